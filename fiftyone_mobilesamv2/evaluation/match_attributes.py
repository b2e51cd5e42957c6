"""Database updates of the attributes that tell which proposal finds which object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from bson import ObjectId
from pymongo import UpdateMany, UpdateOne

from ..fiftyone_internals import Document

if TYPE_CHECKING:
    from .measuring import MeasuredImage

ENDS = ("", "_id", "_iou", "_rank")  # a label's attributes are named <key><end>
_LABELS_PER_UPDATE = 100  # MongoDB searches all labels of the document for each of them
LabelPath = tuple[str, bool]  # the path of a field's individual labels in a document, and whether they are in a list


def image_updates(
    query: Document,
    image: MeasuredImage,
    eval_key: str,
    objects_path: LabelPath | None,
    proposals_path: LabelPath | None,
    values: Document,
) -> Iterator[UpdateOne]:
    """Updates one document: sets `values`, and the attributes of objects and of the proposals that find them.

    Labels are identified by id: a view may hide some, and labels may have changed since they were read.

    Args:
        objects_path, proposals_path: None if the document has no such labels, or they keep their attributes.
    """
    attributes: list[tuple[LabelPath, ObjectId, str, float | None, int | None, ObjectId | None]] = []
    for each in image.objects:
        state = "fn" if each.match_id is None else "tp"
        if objects_path is not None:
            attributes.append((objects_path, each.id, state, each.best_iou, each.rank, each.match_id))
        if proposals_path is not None and each.match_id is not None:
            attributes.append((proposals_path, each.match_id, state, each.match_iou, each.rank, each.id))
    values = {**values, "last_modified_at": datetime.now(timezone.utc)}
    for start in range(0, max(len(attributes), 1), _LABELS_PER_UPDATE):
        filters: list[Mapping[str, Any]] = []
        for (path, is_list), label_id, state, iou, rank, other in attributes[start : start + _LABELS_PER_UPDATE]:
            if is_list:
                path += f".$[l{len(filters)}]"
                filters.append({f"l{len(filters)}._id": label_id})
            path += f".{eval_key}"
            values |= {path: state, f"{path}_iou": iou, f"{path}_rank": rank, f"{path}_id": other and str(other)}
        yield UpdateOne(query, {"$set": values}, array_filters=filters or None)
        values = {}


def removal(paths: Iterable[str], eval_key: str) -> UpdateMany:
    """Removes a key's attributes from all labels at these paths."""
    paths = list(paths)
    names = [f"{path}.{eval_key}{end}" for path in paths for end in ENDS]
    with_attributes = {"$or": [{f"{path}.{eval_key}": {"$exists": True}} for path in paths]}
    return UpdateMany(with_attributes, [{"$unset": names}, _now()])


def replacement(path: LabelPath, eval_key: str, temporary: str) -> UpdateMany:
    """Replaces the attributes of `eval_key` by those of `temporary`: all of a document's labels in one update."""
    labels, is_list = path
    label = "$$this" if is_list else f"${labels}"
    moved = {"$mergeObjects": [label, {f"{eval_key}{end}": f"{label}.{temporary}{end}" for end in ENDS}]}
    has_new = {"$ne": [{"$type": f"{label}.{temporary}"}, "missing"]}
    new: Document = {"$cond": [has_new, moved, label]}
    earlier, temporaries = ([f"{labels}.{key}{end}" for end in ENDS] for key in (eval_key, temporary))
    return UpdateMany(
        # A document without labels is left as it is: setting the path would create it.
        {
            f"{labels}._id": {"$exists": True},
            "$or": [{earlier[0]: {"$exists": True}}, {temporaries[0]: {"$exists": True}}],
        },
        [
            {"$unset": earlier},
            {"$set": {labels: {"$map": {"input": f"${labels}", "in": new}} if is_list else new}},
            {"$unset": temporaries},
            _now(),
        ],
    )


def _now() -> Document:
    return {"$set": {"last_modified_at": datetime.now(timezone.utc)}}
