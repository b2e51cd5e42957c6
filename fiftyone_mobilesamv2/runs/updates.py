"""The documents of an image's masks -> the update of its sample."""

from __future__ import annotations

from collections.abc import Callable

from ..fiftyone_internals import Document
from ..labels.fields import MASK_ATTRIBUTES

# The documents of an image's masks -> a further condition on its sample, and the values to set, as expressions.
Update = Callable[[list[Document]], tuple[Document, Document]]


# Values of samples --------------------------------------------------------------------------------------------------
def new_labels(documents: list[Document], label_field: str, replace: bool) -> tuple[Document, Document]:
    """Sets the labels. Unless `replace`, labels that were stored there in the meantime are kept."""
    labels = {"_cls": "Detections", "detections": documents}
    return {} if replace else {label_field: None}, {label_field: {"$literal": labels}}


def merged_labels(documents: list[Document], label_field: str) -> tuple[Document, Document]:
    """Adds labels to a field, replacing those with the same ids, in one update that loses no concurrent changes."""
    others = {
        "$filter": {
            "input": {"$ifNull": [f"${label_field}.detections", []]},
            "cond": {"$not": {"$in": ["$$this._id", [document["_id"] for document in documents]]}},
        }
    }
    labels = {"$concatArrays": [others, {"$literal": documents}]}
    return {}, {f"{label_field}._cls": "Detections", f"{label_field}.detections": labels}


def masks_in_place(documents: list[Document], root: str, is_list: bool) -> tuple[Document, Document]:
    """Adds masks to existing labels, found by their ids, since labels may have changed since they were read."""
    ids, masks = [], []
    for document in documents:
        if "mask" in document or "mask_path" in document:
            ids.append(document["_id"])
            masks.append({name: document.get(name) for name in ("mask", "mask_path", *MASK_ATTRIBUTES)})
    label = "$$this" if is_list else f"${root}"
    index = {"$indexOfArray": [ids, f"{label}._id"]}
    mask = {"$arrayElemAt": [{"$literal": masks}, index]}
    updated = {"$cond": [{"$gte": [index, 0]}, {"$mergeObjects": [label, mask]}, label]}
    # Otherwise this would write to a label that has since become None, or a single label that has since been replaced.
    condition = {f"{root}._id": {"$in": ids}}
    return condition, {root: {"$map": {"input": f"${root}", "in": updated}} if is_list else updated}
