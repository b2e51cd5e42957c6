"""The documents of an image's masks -> the update of its sample, and the update that takes them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..fiftyone_internals import Document
from ..labels.fields import MASK_ATTRIBUTES, RUN_ID


class Update(NamedTuple):
    """An update of a sample.

    Attributes:
        condition: a further condition on the sample.
        values: the values to set, as expressions.
        reverse: the values that remove what was stored, as expressions; what others have stored since is kept.
    """

    condition: Document
    values: Document
    reverse: Document


# The documents of an image's masks -> the update of its sample. None of these updates replaces labels of a run that was
# recorded after this one started: it considers this one dead. Their arguments `mark` and `earlier` are the mark of the
# run (see `marks`) and those of the runs that had been recorded when it started.
MakeUpdate = Callable[[list[Document]], Update]


def new_labels(documents: list[Document], label_field: str, replace: bool, mark: str, earlier: Sequence[str]) -> Update:
    """Sets the labels of a sample.

    Unless `replace`, labels that were stored in the meantime are kept, except those of an earlier run: it was
    considered dead.
    """
    path = f"{label_field}.{RUN_ID}"
    if replace:
        condition: Document = {path: {"$in": [None, mark, *earlier]}}
    else:
        condition = {"$or": [{label_field: None}, {path: {"$in": list(earlier)}}]}
    labels = {"_cls": "Detections", "detections": documents, RUN_ID: mark}
    ids = [document["_id"] for document in documents]
    is_mine = {"$and": [{"$eq": [f"${path}", mark]}, {"$eq": [f"${label_field}.detections._id", ids]}]}
    reverse = {label_field: {"$cond": [is_mine, None, f"${label_field}"]}}
    return Update(condition, {label_field: {"$literal": labels}}, reverse)


def merged_labels(documents: list[Document], label_field: str, mark: str, earlier: Sequence[str]) -> Update:
    """Adds labels to a field, replacing those with the same ids, in one update that loses no concurrent changes."""
    others = {
        "$filter": {
            "input": {"$ifNull": [f"${label_field}.detections", []]},
            "cond": {"$not": {"$in": ["$$this._id", [document["_id"] for document in documents]]}},
        }
    }
    labels = {"$concatArrays": [others, {"$literal": documents}]}
    values = {"_cls": "Detections", "detections": labels, RUN_ID: mark}
    return Update(
        {f"{label_field}.{RUN_ID}": {"$in": [None, mark, *earlier]}},
        {f"{label_field}.{name}": value for name, value in values.items()},
        {f"{label_field}.detections": others},
    )


def masks_in_place(documents: list[Document], root: str, is_list: bool, mark: str, earlier: Sequence[str]) -> Update:
    """Adds masks to existing labels, found by their ids, since labels may have changed since they were read."""
    ids, masks = [], []
    for document in documents:
        if "mask" in document or "mask_path" in document:
            ids.append(document["_id"])
            masks.append({name: document.get(name) for name in ("mask", "mask_path", *MASK_ATTRIBUTES)})

    def with_masks(masks: list[Document]) -> Document:
        label = "$$this" if is_list else f"${root}"
        index = {"$indexOfArray": [ids, f"{label}._id"]}
        mask = {"$arrayElemAt": [{"$literal": masks}, index]}
        updated = {"$cond": [{"$gte": [index, 0]}, {"$mergeObjects": [label, mask]}, label]}
        return {root: {"$map": {"input": f"${root}", "in": updated}} if is_list else updated}

    # Otherwise this would write to a label that has since become None, or a single label that has since been replaced.
    later = {"_id": {"$in": ids}, RUN_ID: {"$nin": [None, mark, *earlier]}}
    of_later = {root: {"$elemMatch": later}} if is_list else {f"{root}.{name}": each for name, each in later.items()}
    condition = {f"{root}._id": {"$in": ids}, "$nor": [of_later]}
    return Update(condition, with_masks(masks), with_masks([dict.fromkeys(mask) for mask in masks]))
