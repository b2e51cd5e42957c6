"""Compares the recall and cost of object-aware prompting with SAM's grid."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import fiftyone.core.utils as fou
import numpy as np

from .. import zoo
from ..errors import ArgumentError, Failure
from ..labels.documents import Progress
from ..modeling.defaults import POINTS_PER_SIDE
from .average_recall import KS, AverageRecall
from .proposals import evaluate_proposals

if TYPE_CHECKING:
    import fiftyone as fo
    import pandas as pd
    from fiftyone.core.collections import SampleCollection

OBJECT_AWARE = "object_aware"
IMAGES = 16
SEED = 51  # seed of the draw, so that the next comparison uses the same images

# All fields of a sample share one document, which MongoDB limits to 16 MiB; evaluations add attributes to each label.
LABEL_BYTES = 12 * 2**20


@dataclass(frozen=True)
class Truth:
    """The ground truth for an evaluation of proposals.

    Attributes:
        gt_field: the field of the objects.
        use_masks, area_field: as for :func:`evaluate_proposals`.
        is_kept: whether to keep the evaluation, as "ar_<field of the proposals>".
    """

    gt_field: str
    use_masks: bool = True
    area_field: str | None = None
    is_kept: bool = True


@dataclass(frozen=True)
class Measurement:
    """The recall and cost of a prompting method.

    Attributes:
        recall: the counts for AR@K; None without ground truth.
        prompts, masks: averages per image. With object-aware prompting, each discovered box is a prompt with one mask.
        seconds: wall time per image by stage: "discover", "encode", "decode", "crop".
        failures: the images that could not be segmented; they count as images without proposals.
    """

    recall: AverageRecall | None
    prompts: float
    masks: float
    seconds: dict[str, float]
    failures: list[Failure]

    @property
    def ms(self) -> float:
        """Milliseconds per image without the encoder, which is what the paper compares."""
        return 1000 * sum(seconds for stage, seconds in self.seconds.items() if stage != "encode")

    @property
    def decoder_ms(self) -> float:
        """Milliseconds per image from prompts to low-res logits."""
        return 1000 * self.seconds["decode"]

    def to_dict(self) -> dict[str, Any]:
        """The measurement as JSON-serializable data; metrics are in 0..1, or None for a group without objects."""
        costs = {
            "prompts_per_image": self.prompts,
            "masks_per_image": self.masks,
            "decoder_ms_per_image": self.decoder_ms,
            "ms_per_image_without_encoder": self.ms,
            "seconds_per_image": self.seconds,
            "failures": [asdict(failure) for failure in self.failures],
        }
        if self.recall is None:
            return costs
        metrics = {key: None if math.isnan(value) else value for key, value in self.recall.metrics().items()}
        return {"metrics": metrics, "objects": self.recall.totals, **costs}


def measure(
    samples: SampleCollection,
    model: zoo.MobileSAMv2Model,
    field_name: str,
    settings: Mapping[str, object],
    truth: Truth | None,
    *,
    label_bytes: int,
    batch_size: int = 1,
    progress: Progress = None,
) -> Measurement:
    """Segments images into a field and measures the AR@K of its masks.

    As in SAM's paper, masks of a grid are ranked by the mean of predicted IoU and stability; object-aware ones are
    ranked by the detector's confidence.

    Args:
        settings: settings of the model's configuration for this run.
        truth: the ground truth; None measures only time.
        label_bytes: maximum size of an image's labels in its document.
        progress: for segmentation; as elsewhere in FiftyOne.

    Raises:
        ValueError: no image could be segmented, or the ground truth can't be used.
    """
    with fou.SetAttributes(model.config, **settings), fou.SetAttributes(model.writer, label_bytes=label_bytes):
        # No workers, which would be forks of this process, and that may be the App's server.
        samples.apply_model(model, field_name, batch_size=batch_size, num_workers=0, progress=progress)
        is_grid = model.config.prompting == "grid"
        points = model.config.points_per_side**2
    failures, seconds, masks = list(model.failures), dict(model.seconds), model.num_labels
    segmented = model.num_images - len(failures)
    if not segmented:
        raise ArgumentError(f"No image could be segmented; the first: {failures[0]}")
    recall = None
    if truth is not None:
        results = evaluate_proposals(
            samples,
            field_name,
            truth.gt_field,
            f"ar_{field_name}" if truth.is_kept else None,
            use_masks=truth.use_masks,
            rank_by="sam" if is_grid else "confidence",
            area_field=truth.area_field,
            progress=None if progress is None else False,
        )
        recall = results.average_recall
    return Measurement(
        recall,
        prompts=points if is_grid else masks / segmented,
        masks=masks / segmented,
        seconds={stage: total / segmented for stage, total in seconds.items()},
        failures=failures,
    )


def warm_up(model: zoo.MobileSAMv2Model) -> None:
    """Runs the model once on a GPU, whose first image is slow, so that it does not count for the first method."""
    if model.model.device.type == "cuda":
        model.model.segment_anything([np.zeros((64, 64, 3), np.uint8)], boxes=[np.array([[8, 8, 56, 56]])])


@dataclass(frozen=True)
class Comparison:
    """Object-aware prompting compared with a grid, on the same images with the same model.

    Attributes:
        samples: a view of the images.
        points_per_side: the grid's points per side.
        object_aware, grid: the measurements.
    """

    samples: fo.DatasetView
    points_per_side: int
    object_aware: Measurement
    grid: Measurement

    @property
    def decoder_ratio(self) -> float | None:
        """The grid's decoder time divided by the object-aware one; None if no objects were discovered."""
        return self.grid.decoder_ms / self.object_aware.decoder_ms if self.object_aware.prompts else None

    @property
    def ratio(self) -> float:
        """The grid's time without the encoder, divided by the object-aware one, which includes discovery."""
        return self.grid.ms / self.object_aware.ms

    def table(self) -> pd.DataFrame:
        """A table with a row for each prompting method; cells are text."""
        import pandas as pd

        side = self.points_per_side
        rows = {"object-aware": (self.object_aware, 1.0), f"grid {side}x{side}": (self.grid, self.ratio)}
        table: pd.DataFrame = pd.DataFrame(dtype=object)
        for name, (measured, ratio) in rows.items():
            table.loc[name, "prompts"] = f"{measured.prompts:.1f}"
            table.loc[name, "objects"] = f"{measured.masks:.1f}"
            table.loc[name, "decoder, s"] = short(measured.decoder_ms / 1000)
            table.loc[name, "all but encoder, s"] = short(measured.ms / 1000)
            table.loc[name, "all but encoder, times"] = short(ratio)
            if measured.recall is not None and measured.recall.totals["all"]:
                for k in KS:
                    table.loc[name, f"AR@{k}"] = f"{measured.recall.recalls(k).mean():.3f}"
        return table

    def __str__(self) -> str:
        """The comparison as a sentence."""
        aware, grid, side = self.object_aware, self.grid, self.points_per_side
        grid_cost = f"the {side}x{side} grid {grid.prompts:.0f} in {short(grid.decoder_ms / 1000)} s"
        if self.decoder_ratio is None:
            return f"Object-aware prompting found no object to decode; {grid_cost} per image."
        return (
            f"Object-aware prompting decoded {aware.prompts:.0f} prompts per image in {short(aware.decoder_ms / 1000)} "
            f"s; {grid_cost}: {short(self.decoder_ratio)} times as long."
        )

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-serializable data."""
        return {
            "images": self.samples.values("id"),
            "points_per_side": self.points_per_side,
            "measurements": {name: getattr(self, name).to_dict() for name in (OBJECT_AWARE, "grid")},
            "decoder_ratio": self.decoder_ratio,
            "ratio": self.ratio,
            "sentence": str(self),
        }


def short(value: float) -> str:
    """Formats two significant digits, without an exponent for large numbers."""
    return f"{float(f'{value:.2g}'):g}"


def kept_fields(points_per_side: int) -> tuple[str, str]:
    """The fields in which a comparison keeps its masks: object-aware, grid."""
    return f"compare_{OBJECT_AWARE}", f"compare_grid_{points_per_side}"


def draw(samples: SampleCollection, images: int) -> fo.DatasetView:
    """A random sample of `images` images, the same each time; all of them if there are fewer."""
    return samples.select(samples.take(images, seed=SEED).values("id"))


def compare_promptings(
    samples: SampleCollection,
    model: zoo.MobileSAMv2Model,
    points_per_side: int = POINTS_PER_SIDE,
    images: int = IMAGES,
    *,
    gt_field: str | None = None,
    use_masks: bool = True,
    keep: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> Comparison:
    """Segments a random sample of images, one by one, with object-aware prompts and then with a grid.

    Args:
        samples: a dataset or view of images.
        model: the model; its thresholds are used.
        gt_field: the objects for AR@K; None compares only the number of masks and the time.
        use_masks: whether to compare masks with the ground truth; otherwise boxes.
        keep: whether to keep the masks in :func:`kept_fields` of these images, replacing existing labels, and the
            evaluations "ar_<field>". Otherwise nothing is kept, however this ends.
        progress: called with the share of the work done and a description of the current step; may raise
            :class:`~fiftyone_mobilesamv2.errors.Cancelled`. Default: FiftyOne's progress bars.

    Raises:
        ValueError: no image could be segmented, or the ground truth can't be used.
    """
    drawn = draw(samples, images)
    side = points_per_side
    settings: dict[str, dict[str, object]] = {
        "object-aware": {"prompting": OBJECT_AWARE},
        f"grid {side}x{side}": {"prompting": "grid", "points_per_side": side},
    }
    truth = None if gt_field is None else Truth(gt_field, use_masks, is_kept=keep)
    measurements: list[Measurement] = []
    warm_up(model)
    with nullcontext(drawn) if keep else _copy(drawn, model, gt_field) as target:
        for field_name, (name, setting) in zip(kept_fields(side), settings.items()):

            def report(bar: fou.ProgressBar, name: str = name) -> None:
                share = (len(measurements) + bar.iteration / bar.total) / len(settings)
                if progress is not None:
                    progress(share, f"{name}: {bar.iteration:,} of {bar.total:,} images")

            measurements.append(
                measure(
                    target,
                    model,
                    field_name,
                    setting,
                    truth,
                    label_bytes=LABEL_BYTES // (len(settings) + 1),  # plus the ground truth's field
                    progress=None if progress is None else report,
                )
            )
    return Comparison(drawn, side, *measurements)


@contextmanager
def _copy(samples: fo.DatasetView, model: zoo.MobileSAMv2Model, gt_field: str | None) -> Iterator[fo.Dataset]:
    """A temporary dataset of these samples; it and all masks that the model writes to disk are deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder, fou.SetAttributes(model.config, mask_dir=folder):
        copy = samples.select_fields(gt_field).clone()
        try:
            yield copy
        finally:
            copy.delete()
