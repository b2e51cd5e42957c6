"""The documents of an image's masks -> what its sample gets."""

from __future__ import annotations

from collections.abc import Callable

from ..fiftyone_internals import Document
from ..labels.fields import MASK_ATTRIBUTES

# The documents of an image's masks -> what else must hold of its sample, and the values, as expressions, that it gets.
Update = Callable[[list[Document]], tuple[Document, Document]]


# Values of samples --------------------------------------------------------------------------------------------------
def new_labels(documents: list[Document], label_field: str, replace: bool) -> tuple[Document, Document]:
    """Where labels are not to be replaced, what someone else has put there meanwhile stays."""
    labels = {"_cls": "Detections", "detections": documents}
    return {} if replace else {label_field: None}, {label_field: {"$literal": labels}}


def merged_labels(documents: list[Document], label_field: str) -> tuple[Document, Document]:
    """Adds labels to a field, in place of those with the same ids. In one step, so that nobody's are lost."""
    others = {
        "$filter": {
            "input": {"$ifNull": [f"${label_field}.detections", []]},
            "cond": {"$not": {"$in": ["$$this._id", [document["_id"] for document in documents]]}},
        }
    }
    labels = {"$concatArrays": [others, {"$literal": documents}]}
    return {}, {f"{label_field}._cls": "Detections", f"{label_field}.detections": labels}


def masks_in_place(documents: list[Document], root: str, is_list: bool) -> tuple[Document, Document]:
    """Labels are told by id: others may have come and gone since they were read."""
    ids, masks = [], []
    for document in documents:
        if "mask" in document or "mask_path" in document:
            ids.append(document["_id"])
            masks.append({name: document.get(name) for name in ("mask", "mask_path", *MASK_ATTRIBUTES)})
    label = "$$this" if is_list else f"${root}"
    index = {"$indexOfArray": [ids, f"{label}._id"]}
    mask = {"$arrayElemAt": [{"$literal": masks}, index]}
    given = {"$cond": [{"$gte": [index, 0]}, {"$mergeObjects": [label, mask]}, label]}
    # Else a label that has become None meanwhile, or a single one that is another now, would be written to.
    there = {f"{root}._id": {"$in": ids}}
    return there, {root: {"$map": {"input": f"${root}", "in": given}} if is_list else given}
