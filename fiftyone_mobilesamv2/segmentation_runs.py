"""The record that a dataset keeps of the runs which stored masks in its fields. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import fiftyone as fo

    Samples = fo.core.collections.SampleCollection

_METHOD = "mobilesamv2"
_MOST_FAILURES = 1000  # of a run: more tell nothing new


@dataclass(frozen=True)
class Failure:
    """An image that could not be segmented."""

    sample_id: str | None
    filepath: str | None
    error: str


@dataclass
class SegmentationRun:
    """What a run did.

    Attributes:
        label_field: where the masks are.
        parameters: the model's, by name. "prompting" names the field where prompts were the user's.
        started: when, UTC.
        images: how many images, or frames of videos, it went through; those that failed are among them.
        objects: how many masks it stored.
        seconds: wall time by stage ("encode", "discover", "decode", "crop"), and of everything as "total".
        failures: the images that could not be segmented; their labels are as they were.
        cancelled: whether it was stopped before its end. What it had stored stays.
    """

    label_field: str
    parameters: dict
    started: str
    images: int = 0
    objects: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    cancelled: bool = False

    @property
    def images_per_second(self) -> float:
        """Of the whole run, with reading and storing."""
        return self.images / self.seconds["total"] if self.seconds.get("total") else 0.0


def recorded_runs(samples: Samples, label_field: str) -> list[SegmentationRun]:
    """The runs that stored masks in this field, oldest first; none, where the field is gone since."""
    dataset = samples._root_dataset
    key = _key(label_field)
    if key not in dataset.list_runs() or not dataset.has_field(label_field):
        return []
    runs = dataset.load_run_results(key, cache=False).runs
    return [SegmentationRun(**run | {"failures": [Failure(**each) for each in run["failures"]]}) for run in runs]


def segmented_fields(samples: Samples) -> list[str]:
    """The fields that have a record."""
    dataset = samples._root_dataset
    infos = [dataset.get_run_info(key) for key in dataset.list_runs(method=_METHOD)]
    return [info.config.label_field for info in infos if dataset.has_field(info.config.label_field)]


def record(dataset: fo.Dataset, runs: Sequence[SegmentationRun]) -> None:
    """Keeps these as the runs of their field, oldest first."""
    label_field = runs[-1].label_field
    key = _key(label_field)
    dataset.register_run(key, dataset.init_run(method=_METHOD, label_field=label_field), overwrite=True)
    kept = [asdict(run) | {"failures": [vars(each) for each in run.failures[:_MOST_FAILURES]]} for run in runs]
    dataset.save_run_results(key, dataset.init_run_results(key, runs=kept), cache=False)


def _key(label_field: str) -> str:
    return "mobilesamv2_" + label_field.replace(".", "_")
