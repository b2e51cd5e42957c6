"""The record that a dataset keeps of the runs which stored masks in its fields. Needs no torch."""

from __future__ import annotations

import re
import zlib
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
        cancelled: whether it was stopped before its end, or is still going on. What it has stored stays.
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
    results = dataset.load_run_results(key, cache=False)
    if results is None:  # registered, and killed then
        return []
    return [
        SegmentationRun(**run | {"failures": [Failure(**each) for each in run["failures"]]}) for run in results.runs
    ]


def segmented_fields(samples: Samples) -> list[str]:
    """The fields that masks were made for: not those whose own labels were given masks."""
    dataset = samples._root_dataset
    infos = [dataset.get_run_info(key) for key in dataset.list_runs(method=_METHOD)]
    fields = [info.config.label_field for info in infos]
    return [name for name in fields if any(run.parameters["prompting"] != name for run in recorded_runs(dataset, name))]


def record(samples: Samples, run: SegmentationRun) -> None:
    """Keeps this run, and what there is to say of it by now, among those of its field. One that did nothing is none."""
    dataset = samples._root_dataset
    runs = [each for each in recorded_runs(dataset, run.label_field) if each.started != run.started]
    if run.images or not run.seconds:  # or it has just begun
        runs.append(run)
    key = _key(run.label_field)
    if key not in dataset.list_runs():  # registering anew would drop the earlier record first
        dataset.register_run(key, dataset.init_run(method=_METHOD, label_field=run.label_field))
    kept = [asdict(each) | {"failures": [vars(f) for f in each.failures[:_MOST_FAILURES]]} for each in runs]
    dataset.save_run_results(key, dataset.init_run_results(key, runs=kept), cache=False)


def _key(label_field: str) -> str:
    # A key is a Python name; fields may be called "my masks", and "my_masks" be another one.
    name = re.sub(r"\W", "_", label_field)
    if name != label_field.replace("frames.", "frames_", 1):
        name += f"_{zlib.crc32(label_field.encode()):08x}"
    return f"mobilesamv2_{name}"
