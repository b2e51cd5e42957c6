"""Computes how much of each image its masks cover and how large they are, to sort and filter samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.utils as fou
import numpy as np
from bson import ObjectId
from pycocotools import mask as mask_utils
from pymongo import UpdateOne

from ..errors import ArgumentError
from ..evaluation.average_recall import AREA_RANGES, areas_of
from ..fiftyone_internals import Document, add_to_sidebar_group, bulk_write, source_dataset
from ..labels.documents import Progress, Skipped, StoredImage, visit_images
from ..labels.fields import check_shapes_field
from ..labels.schema import NewField, declare_fields
from .findings import check_images
from .overlaps import shapes_of

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

# Suffix of the field's name -> its type, and its description in the App.
NUMBERS = {
    "coverage": (fof.FloatField, "share of the image that the objects in '{}' cover together, 0 to 1"),
    "objects": (fof.IntField, "number of objects in '{}'"),
    "small": (fof.IntField, "number of objects in '{}' of up to 32x32 pixels"),
    "medium": (fof.IntField, "number of objects in '{}' of more than 32x32 and up to 96x96 pixels"),
    "large": (fof.IntField, "number of objects in '{}' of more than 96x96 pixels"),
    "median_area": (fof.FloatField, "median area of the objects in '{}', as a share of the image"),
}
_MARK = "image_coverage"  # key in a field's `info`; its value is the field of the labels
_MAX_UPDATES = 1000


@dataclass(frozen=True)
class Coverage:
    """The result of :func:`image_coverage`.

    Attributes:
        images: number of images measured.
        unsegmented: number of images without a value in the field, not even an empty list.
        means: averages over the measured images, by the suffix of the field's name; None if there are no values.
        skipped: id, filepath and cause of each image with an unusable label.
    """

    images: int
    unsegmented: int
    means: dict[str, float | None]
    skipped: list[Skipped]


Numbers = dict[str, float | None]  # a sample's values by the suffix of the field's name


def image_coverage(
    samples: SampleCollection, field: str, use_masks: bool = True, progress: Progress = None
) -> Coverage:
    """Stores on each sample how much of the image its objects cover, and their number and sizes.

    The fields are `<field>_coverage` (share of the image's pixels in any mask), `<field>_objects`, `<field>_small`,
    `<field>_medium` and `<field>_large` (COCO's sizes, by mask area; exactly 32x32 or 96x96 pixels count as the smaller
    size) and `<field>_median_area` (share of the image; None without objects). Samples without a value in `field`,
    which were never segmented, and those with an unusable label get None; those without objects get 0. Results are
    stored once all images have been measured.

    Args:
        samples: a dataset or view of images. Missing metadata is computed and stored.
        field: detections or polylines. Labels that a view hides aren't counted.
        use_masks: whether to measure masks; otherwise boxes, which are rounded to pixels for the coverage.
        progress: as elsewhere in FiftyOne.

    Raises:
        ValueError: `field` is missing or of the wrong type; a field with one of these names exists and is not from an
            earlier run, or is read-only; a mask is missing; or all images were skipped.
    """
    check_coverage(samples, field)
    # Sample id -> its values; None if it was not measured.
    numbers: dict[ObjectId, Numbers | None] = {}

    def visit(stored: StoredImage) -> None:
        segmented = stored.has(field)
        numbers[stored.sample_id] = _measured(stored.labels(field), stored.known_size, use_masks) if segmented else None

    skipped = visit_images(samples, [field], visit, progress)
    _store(source_dataset(samples), field, numbers | {ObjectId(image["id"]): None for image in skipped})
    measured = [image_numbers for image_numbers in numbers.values() if image_numbers is not None]
    means: Numbers = {}
    for suffix in NUMBERS:
        values = [value for image_numbers in measured if (value := image_numbers[suffix]) is not None]
        means[suffix] = float(np.mean(values)) if values else None
    return Coverage(len(measured), len(numbers) - len(measured), means, skipped)


def check_coverage(samples: SampleCollection, field: str) -> None:
    """Raises ValueError if a field's objects can't be measured, or a field of the user has a name that is needed."""
    check_images(samples)
    check_shapes_field(samples, field, "objects")
    for suffix in NUMBERS:
        name = f"{field}_{suffix}"
        if (existing := source_dataset(samples).get_field(name)) is None:
            continue
        if (existing.info or {}).get(_MARK) != field:
            raise ArgumentError(f"Field '{name}' exists and is not from an earlier measurement: rename or delete it.")
        if existing.read_only:
            raise ArgumentError(f"Field '{name}' of an earlier measurement is read-only, so it can't be replaced.")


def coverage_fields(field: str) -> dict[str, NewField]:
    """The fields of samples in which the coverage by the labels of `field` is stored."""
    return {
        f"{field}_{suffix}": NewField(ftype, description=description.format(field), info={_MARK: field})
        for suffix, (ftype, description) in NUMBERS.items()
    }


def _measured(labels: Sequence[Document], size: tuple[int, int], use_masks: bool) -> Numbers:
    """An image's values by the suffix of the field's name."""
    shapes = shapes_of(labels, size, use_masks)
    areas_px = areas_of(shapes)
    masks = shapes if use_masks or not labels else mask_utils.frPyObjects(shapes, *size)
    pixels = size[0] * size[1]
    (_, small), (_, medium) = AREA_RANGES["small"], AREA_RANGES["medium"]
    counts = np.bincount(np.searchsorted([small, medium], areas_px), minlength=3).tolist()
    return {
        "coverage": float(mask_utils.area(mask_utils.merge(masks))) / pixels if labels else 0.0,
        "objects": len(labels),
        **dict(zip(("small", "medium", "large"), counts)),
        "median_area": float(np.median(areas_px)) / pixels if labels else None,
    }


def _store(dataset: fo.Dataset, field: str, numbers: Mapping[ObjectId, Numbers | None]) -> None:
    """Sets the fields of each sample, to None for samples without numbers."""
    fields = coverage_fields(field)
    declare_fields(dataset, fields)
    add_to_sidebar_group(dataset, [f"{field}_{suffix}" for suffix in NUMBERS], "coverage")
    now = datetime.now(timezone.utc)
    nothing = dict.fromkeys(NUMBERS)
    for batch in fou.iter_batches(numbers.items(), _MAX_UPDATES):
        operations = []
        for sample_id, sample_numbers in batch:
            values = {f"{field}_{suffix}": value for suffix, value in (sample_numbers or nothing).items()}
            operations.append(UpdateOne({"_id": sample_id}, {"$set": {**values, "last_modified_at": now}}))
        bulk_write(dataset, operations, ids=[sample_id for sample_id, _ in batch])
    declare_fields(dataset, fields)
