"""Finding labels image by image: tags that follow what is found, and patches that show it."""

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
from ..fiftyone_internals import Document, bulk_write, is_generated, label_path, label_type, root_dataset
from ..labels.fields import check_shapes_field

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)

# By the id of the sample, ids of labels of it.
LabelIds = Mapping[ObjectId, Iterable[ObjectId]]


def check_options(rank_by: str = "confidence", **shares: float) -> None:
    """Raises ValueError unless this is a ranking, and the others, by the names of their arguments, lie in (0, 1]."""
    check_ranking(rank_by)
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ArgumentError(f"{name}={share}: more than 0, and at most 1, was expected.")


def check_images(samples: SampleCollection) -> None:
    """Raises ValueError unless these are whole images."""
    if is_generated(samples) or samples.media_type not in ("image", None):  # None: without samples
        if samples.media_type == "group":
            raise ArgumentError("Groups can't be worked on as a whole: take a slice, dataset.select_group_slices(...).")
        kind = "patches or frames" if is_generated(samples) else f"media of type '{samples.media_type}'"
        raise ArgumentError(
            f"The view holds {kind}; images were expected: choose the dataset or a view of whole images."
        )


def check_tagged_field(samples: SampleCollection, name: str, role: str, attributes: Iterable[str] = ()) -> None:
    """Raises ValueError unless `name` is a field of lists of labels whose tags, and `attributes`, can be edited."""
    check_shapes_field(samples, name, role)
    kind = label_type(samples, name)
    if not issubclass(kind, (fol.Detections, fol.Polylines)):
        raise ArgumentError(f"Field '{name}' holds single labels; lists were expected as {role}.")
    root = label_path(samples, name)
    for path in (name, *(f"{root}.{attribute}" for attribute in ("tags", *attributes))):
        found = root_dataset(samples).get_field(path)
        if found is not None and found.read_only:
            raise ArgumentError(f"'{path}' is read-only: nothing can be noted on its labels.")


def tags_of(label: Document) -> set[str]:
    """The tags of a label as the database holds it."""
    return set(label.get("tags") or [])


def retag(dataset: fo.Dataset, field_name: str, tag: str, before: LabelIds, now: LabelIds) -> None:
    """Gives the labels `now` the tag, which those of `before` have, and takes it from the others.

    What changes nothing is not written: storing a sample with its masks is what takes the time.
    """
    # Not by `tag_labels`: where a label's tags are null, FiftyOne 1.22 deletes all labels of the sample whose aren't.
    root = label_path(dataset, field_name)
    tags = f"{root}.$[label].tags"
    operations, ids = [], []
    for more, less, edit in ((now, before, {"$addToSet": {tags: tag}}), (before, now, {"$pull": {tags: tag}})):
        for id, labels in more.items():
            if changed := list(set(labels).difference(less.get(id, ()))):
                there = {"_id": id, f"{root}._id": {"$in": changed}}  # else a list that is None now would be an error
                chosen = {"label._id": {"$in": changed}}
                edits = edit | {"$set": {"last_modified_at": datetime.now(timezone.utc)}}
                operations += [
                    UpdateOne(there, {"$set": {tags: []}}, array_filters=[chosen | {"label.tags": None}]),
                    UpdateOne(there, edits, array_filters=[chosen]),
                ]
                ids.append(id)
    if operations:
        bulk_write(dataset, operations, ids=ids, ordered=True)


def patches_of(samples: SampleCollection, field_name: str, tag: str, ids: Iterable[str]) -> fo.core.patches.PatchesView:
    """The labels `ids`, which have this tag, as patches in this order."""
    # By tag first: making patches by thousands of ids takes ten times as long.
    patches = samples.select_labels(tags=tag, fields=field_name).to_patches(field_name)
    return patches.select(list(ids), ordered=True)
