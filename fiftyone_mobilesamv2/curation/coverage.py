"""How much of each image its masks cover, and how large they are: numbers to sort and filter samples by."""

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
from .findings import check_images
from .overlaps import shapes_of

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

# The end of a field's name -> its type, and what the App says of it.
NUMBERS = {
    "coverage": (fof.FloatField, "share of the image that the objects in '{}' cover together, 0 to 1"),
    "objects": (fof.IntField, "number of objects in '{}'"),
    "small": (fof.IntField, "number of objects in '{}' of up to 32x32 pixels"),
    "medium": (fof.IntField, "number of objects in '{}' of more than 32x32 and up to 96x96 pixels"),
    "large": (fof.IntField, "number of objects in '{}' of more than 96x96 pixels"),
    "median_area": (fof.FloatField, "median area of the objects in '{}', as a share of the image"),
}
_MARK = "image_coverage"  # in the `info` of a field: it is ours, and of which labels
_UPDATES_AT_ONCE = 1000


@dataclass(frozen=True)
class Coverage:
    """What :func:`image_coverage` measured.

    Attributes:
        images: how many were measured.
        unsegmented: how many have nothing in the field, not even an empty list.
        means: over the measured images, by the ends of the fields' names; None where there is nothing to average.
        skipped: of each image with a label that can't be used, its id, filepath and cause.
    """

    images: int
    unsegmented: int
    means: dict[str, float | None]
    skipped: list[Skipped]


Numbers = dict[str, float | None]  # what is stored on a sample, by the ends of the fields' names


def image_coverage(
    samples: SampleCollection, field: str, use_masks: bool = True, progress: Progress = None
) -> Coverage:
    """Stores on each sample how much of the image its objects cover, how many they are and of what size.

    The fields are `<field>_coverage` (share of the image's pixels in any mask), `<field>_objects`, `<field>_small`,
    `<field>_medium` and `<field>_large` (COCO's sizes, by the masks' areas; one of exactly 32x32 or 96x96 pixels counts
    as the smaller) and `<field>_median_area` (share of the image; None without objects). Samples with nothing in
    `field`, which were never segmented, and those with an unusable label get None, those without objects 0. Everything
    is measured before anything is stored.

    Args:
        samples: a dataset or view of images. Missing metadata is computed and stored.
        field: detections or polylines. What a view hides isn't counted.
        use_masks: measures masks; else boxes, which are rounded to pixels for what they cover together.
        progress: as everywhere in FiftyOne.

    Raises:
        ValueError: `field` is missing or of the wrong type; a field of one of these names is there and isn't from an
            earlier run, or is read-only; a mask is missing; or every image had to be skipped.
    """
    check_coverage(samples, field)
    # By the id of each sample; None where nothing could be measured.
    numbers: dict[ObjectId, Numbers | None] = {}

    def look(stored: StoredImage) -> None:
        segmented = stored.has(field)
        numbers[stored.sample_id] = _measured(stored.labels(field), stored.known_size, use_masks) if segmented else None

    skipped = visit_images(samples, [field], look, progress)
    _store(source_dataset(samples), field, numbers | {ObjectId(image["id"]): None for image in skipped})
    measured = [found for found in numbers.values() if found is not None]
    means: Numbers = {}
    for end in NUMBERS:
        values = [value for found in measured if (value := found[end]) is not None]
        means[end] = float(np.mean(values)) if values else None
    return Coverage(len(measured), len(numbers) - len(measured), means, skipped)


def check_coverage(samples: SampleCollection, field: str) -> None:
    """Raises ValueError where the objects of a field can't be measured, or something of the user's is in the way."""
    check_images(samples)
    check_shapes_field(samples, field, "objects")
    for end in NUMBERS:
        name = f"{field}_{end}"
        if (there := source_dataset(samples).get_field(name)) is None:
            continue
        if (there.info or {}).get(_MARK) != field:
            raise ArgumentError(f"Field '{name}' exists, and isn't from an earlier measurement: rename or delete it.")
        if there.read_only:
            raise ArgumentError(f"Field '{name}' of an earlier measurement is read-only: it can't be replaced.")


def _measured(labels: Sequence[Document], size: tuple[int, int], use_masks: bool) -> Numbers:
    """An image's values, by the ends of the fields' names."""
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
    """Sets the fields of each sample; None are those of samples without numbers."""
    for end, (kind, description) in NUMBERS.items():
        dataset.add_sample_field(f"{field}_{end}", kind, description=description.format(field), info={_MARK: field})
    add_to_sidebar_group(dataset, [f"{field}_{end}" for end in NUMBERS], "coverage")
    now = datetime.now(timezone.utc)
    nothing = dict.fromkeys(NUMBERS)
    for batch in fou.iter_batches(numbers.items(), _UPDATES_AT_ONCE):
        operations = []
        for sample_id, found in batch:
            values = {f"{field}_{end}": value for end, value in (found or nothing).items()}
            operations.append(UpdateOne({"_id": sample_id}, {"$set": {**values, "last_modified_at": now}}))
        bulk_write(dataset, operations, ids=[sample_id for sample_id, _ in batch])
