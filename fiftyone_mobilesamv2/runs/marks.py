"""Marks of labels: the `run_id` of the run that made them, which they keep in clones, copied and renamed fields.

Each mask has one, `<field>.detections.run_id`. The labels of an image have another one, `<field>.run_id`, also if no
object was found; it is indexed. The labels of video frames, which FiftyOne stores, do not have the latter.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
from pymongo.errors import OperationFailure

from ..fiftyone_internals import FRAMES_PREFIX, Document, frame_collection, is_frame_field, sample_collection
from ..labels.fields import MASK_ATTRIBUTES, RUN_ID
from ..labels.schema import NewField, declare_fields, declare_labels
from .retry import retry_while_unavailable

if TYPE_CHECKING:
    import fiftyone as fo
    from pymongo.collection import Collection

logger = logging.getLogger(__name__)


def declare_mask_field(dataset: fo.Dataset, label_field: str) -> None:
    """Adds a field of masks unless it exists, with the attributes of masks and their marks."""
    declare_labels(dataset, label_field, MASK_ATTRIBUTES)
    if not is_frame_field(dataset, label_field):
        declare_fields(dataset, {f"{label_field}.{RUN_ID}": NewField(fof.StringField)})
    collection, path = _marks(dataset, label_field)
    try:
        collection.create_index(path)
    except OperationFailure as error:  # a collection has at most 64 indexes
        logger.debug("Reading the marks of %s will be slow: %s", label_field, error)


def has_index(dataset: fo.Dataset, label_field: str) -> bool:
    """Whether the index of the marks exists. FiftyOne deletes or renames it with the field."""
    collection, path = _marks(dataset, label_field)
    return any(index["key"][0][0] == path for index in collection.index_information().values())


def marks_in(dataset: fo.Dataset, label_field: str) -> set[str]:
    """The marks of the labels in a field."""
    collection, path = _marks(dataset, label_field)
    if not dataset.has_field(FRAMES_PREFIX + path if is_frame_field(dataset, label_field) else path):
        return set()
    return {mark for mark in retry_while_unavailable(lambda: collection.distinct(path)) if isinstance(mark, str)}


def count_marked(dataset: fo.Dataset, label_field: str, mark: str) -> tuple[int, int]:
    """The number of images and of objects whose labels have this mark. Not for video frames."""
    size = {"$size": {"$ifNull": [f"${label_field}.detections", []]}}
    sums = {"$group": {"_id": None, "images": {"$sum": 1}, "objects": {"$sum": size}}}
    pipeline: list[Document] = [{"$match": {f"{label_field}.{RUN_ID}": mark}}, sums]
    counts = retry_while_unavailable(lambda: list(sample_collection(dataset).aggregate(pipeline)))
    return (counts[0]["images"], counts[0]["objects"]) if counts else (0, 0)


def _marks(dataset: fo.Dataset, label_field: str) -> tuple[Collection[Document], str]:
    """The collection that has a field's marks, and their path in its documents."""
    if is_frame_field(dataset, label_field) and (frames := frame_collection(dataset)) is not None:
        return frames, f"{label_field.removeprefix(FRAMES_PREFIX)}.detections.{RUN_ID}"
    return sample_collection(dataset), f"{label_field}.{RUN_ID}"
