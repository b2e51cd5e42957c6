"""Helpers for curation: argument checks, tags that match the current findings, and patches that show them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import fiftyone.core.labels as fol
from bson import ObjectId
from pymongo import UpdateOne

from ..errors import ArgumentError
from ..evaluation.ranking import check_ranking
from ..fiftyone_internals import bulk_write, is_generated, label_path, label_root, label_type, root_dataset
from ..labels.fields import check_not_grouped, check_shapes_field, with_lists

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)

# Sample id -> ids of its labels.
LabelIds = Mapping[ObjectId, Iterable[ObjectId]]


def check_options(rank_by: str = "confidence", **shares: float) -> None:
    """Raises ValueError unless `rank_by` is a ranking and each of the named `shares` is in (0, 1]."""
    check_ranking(rank_by)
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ArgumentError(f"{name}={share} is invalid: it must be more than 0 and at most 1.")


def check_images(samples: SampleCollection) -> None:
    """Raises ValueError unless these are whole images."""
    check_not_grouped(samples)
    if is_generated(samples) or samples.media_type not in ("image", None):  # None: without samples
        kind = "patches or frames" if is_generated(samples) else f"media of type '{samples.media_type}'"
        raise ArgumentError(f"The view contains {kind}, not images: choose the dataset or a view of whole images.")


def check_tagged_field(samples: SampleCollection, name: str, role: str, attributes: Iterable[str] = ()) -> None:
    """Raises ValueError unless `name` is a field of lists of labels whose tags, and `attributes`, can be edited."""
    check_shapes_field(samples, name, role)
    kind = label_type(samples, name)
    if not issubclass(kind, (fol.Detections, fol.Polylines)):
        raise ArgumentError(f"Field '{name}' contains single labels; lists of labels were expected as {role}.")
    root = label_path(samples, name)
    for path in (name, *(f"{root}.{attribute}" for attribute in ("tags", *attributes))):
        field = root_dataset(samples).get_field(path)
        if field is not None and field.read_only:
            raise ArgumentError(f"'{path}' is read-only: its labels can't be tagged.")


def retag(dataset: fo.Dataset, field_name: str, tag: str, before: LabelIds, now: LabelIds) -> None:
    """Moves the tag from the labels `before`, which have it, to the labels `now`.

    Only changes are written, since storing a sample with its masks takes most of the time.
    """
    # Not with `tag_labels`: if a label's tags are null, FiftyOne 1.22 deletes all labels of the sample whose tags
    # aren't.
    root = label_path(dataset, field_name)
    tags = f"{root}.$[label].tags"
    operations, ids = [], []
    for more, less, edit in ((now, before, {"$addToSet": {tags: tag}}), (before, now, {"$pull": {tags: tag}})):
        for id, labels in more.items():
            if changed := list(set(labels).difference(less.get(id, ()))):
                query = {"_id": id, f"{root}._id": {"$in": changed}}  # the update fails on a list that is None
                chosen = {"label._id": {"$in": changed}}
                edits = edit | {"$set": {"last_modified_at": datetime.now(timezone.utc)}}
                operations += [
                    UpdateOne(query, {"$set": {tags: []}}, array_filters=[chosen | {"label.tags": None}]),
                    UpdateOne(query, edits, array_filters=[chosen]),
                ]
                ids.append(id)
    if operations:
        bulk_write(dataset, operations, ids=ids, ordered=True)


def patches_of(samples: SampleCollection, field_name: str, tag: str, ids: Iterable[str]) -> fo.core.patches.PatchesView:
    """The labels `ids`, which have this tag, as patches in this order."""
    ids = list(ids)
    # Selected by tag first: creating patches from thousands of ids takes ten times as long.
    tagged = with_labels(samples, field_name, ids).select_labels(tags=tag, fields=field_name)
    return tagged.to_patches(field_name).select(ids, ordered=True)


def with_labels(samples: SampleCollection, field_name: str, ids: Iterable[str]) -> SampleCollection:
    """The samples with any of these labels.

    FiftyOne's selections of labels fail for the whole collection if one sample has unusable labels.
    """
    path = f"{label_root(samples, field_name)[0]}._id"
    return with_lists(samples, field_name).match({path: {"$in": [ObjectId(id) for id in ids]}})
