"""Labels with mutated values, as other programs may have stored them in the database."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import bson
import numpy as np
from bson import Decimal128, ObjectId
from hypothesis import assume
from hypothesis import strategies as st
from mutations import VALUES, mutated

Document = dict[str, Any]
HEIGHT, WIDTH = 48, 64
FOLDER = "<folder>"  # in texts, in place of the folder of the files
PREDICTIONS, GROUND_TRUTH = "predictions", "ground_truth"
LISTS = {"Detections": "detections", "Polylines": "polylines", "Keypoints": "keypoints"}
# x, y, width, height in pixels. The second prediction is a duplicate of the first; the second object is missed.
_BOXES = {
    PREDICTIONS: [(8, 8, 20, 16), (9, 8, 20, 16), (40, 4, 16, 12)],
    GROUND_TRUTH: [(8, 9, 20, 16), (34, 28, 16, 12)],
}
_BOMB = zlib.compress(bytes(2**27), 9)
_VALUES = [
    *VALUES,
    *(b"", b"junk", _BOMB, ObjectId(), datetime(2020, 1, 1), Decimal128("0.5"), bson.Regex("a"), {"_cls": "Detection"}),
    *("Detection", "Polyline", "Keypoint", "Detections"),
    *(FOLDER, f"{FOLDER}/pipe", f"{FOLDER}/0.png", "/dev/zero", f"{FOLDER}/missing.png"),
]


class Case(NamedTuple):
    """A field's value that is wrong, or unusual, in one place.

    Attributes:
        kind: "Detections", "Polylines" or "Keypoints".
        field: the field that has the value; its other field is as it should be.
        value: the value, without the folder's name, and with ids that other cases have, too.
        attribute: the attribute of the label that was mutated; None if it was something else.
    """

    kind: str
    field: str
    value: object
    attribute: str | None


def stored(kind: str, field: str) -> Document:
    """A field's value without mutations."""
    labels = [_label(kind, 10 * len(field) + number, *box) for number, box in enumerate(_BOXES[field])]
    return {"_cls": kind, LISTS[kind]: labels}


def _label(kind: str, number: int, x: int, y: int, w: int, h: int) -> Document:
    label = {
        "_id": ObjectId(f"{number:024x}"),
        "_cls": kind.removesuffix("s"),
        "attributes": {},
        "tags": ["unlabeled", "mine"],
        "label": "cat",
        "confidence": 0.9 - number % 10 / 10,
        "index": None,
    }
    corners = [(x / WIDTH, y / HEIGHT), ((x + w) / WIDTH, y / HEIGHT), ((x + w) / WIDTH, (y + h) / HEIGHT)]
    if kind == "Keypoints":
        points = [list(point) for point in corners]
        return label | {"confidence": None, "points": points, "sam_labels": [1, 1, 0]}
    label |= {"iscrowd": False, "predicted_iou": 0.75, "stability": 0.5}
    if kind == "Polylines":
        points = [*corners, (x / WIDTH, (y + h) / HEIGHT)]
        return label | {"points": [[list(point) for point in points]], "closed": True, "filled": True}
    mask = np.ones((h, w), bool)
    mask[0, 0] = False
    content = io.BytesIO()
    np.save(content, mask, allow_pickle=False)
    box = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]
    return label | {"bounding_box": box, "mask": zlib.compress(content.getvalue()), "mask_path": None}


@st.composite
def labels(draw: st.DrawFn, places: Sequence[tuple[str, str]]) -> Case:
    """Cases in these places, each a kind of labels and a field."""
    kind, field = draw(st.sampled_from(places))
    tree: Document = {"value": stored(kind, field)}
    if kind == "Detections" and draw(st.booleans()):
        changed = draw(st.sampled_from(tree["value"]["detections"]))
        changed |= {"mask": None, "mask_path": f"{FOLDER}/mask-{changed['_id']}.png"}
    attribute: str | None = None
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        if tree:
            tree, path = draw(mutated(tree, _VALUES))
            in_label = len(path) > 3 and path[1] == LISTS[kind] and attribute in (None, path[3])
            attribute = str(path[3]) if in_label else "several things"
    try:
        bson.encode(tree)
    except (OverflowError, bson.errors.InvalidDocument):
        assume(False)
    return Case(kind, field, tree.get("value"), None if attribute == "several things" else attribute)


def labels_in(value: object) -> list[Document]:
    """What looks like a label in a field's value."""
    found = []
    for name in LISTS.values():
        if isinstance(value, dict) and isinstance(value.get(name), list):
            found += [label for label in value[name] if isinstance(label, dict)]
    return found


# What a label must be -------------------------------------------------------------------------------------------------

SCORES = {"confidence", "predicted_iou", "stability"}


def defects(value: object, attributes: set[str], optional: Collection[str], only_with_ids: bool) -> Iterator[str]:
    """What makes the labels of a field's value unusable for something that reads these attributes."""
    for label in labels_in(value):
        if only_with_ids and not isinstance(label.get("_id"), ObjectId):
            continue
        for name in sorted(attributes):
            if name in optional and label.get(name) is None:
                continue
            if not _is_valid(label, name):
                yield f"{name}={label.get(name)!r:.200}"


def lacks_something(value: object) -> bool:
    """Whether a label has no mask or a score is missing, for which a whole field is refused."""
    return any(
        (label.get("mask") is None and not label.get("mask_path")) or any(label.get(name) is None for name in SCORES)
        for label in labels_in(value)
    )


def _is_valid(label: Document, name: str) -> bool:
    value = label.get(name)
    if name == "_id":
        return isinstance(value, ObjectId)
    if name in SCORES:
        return _is_number(value)
    if name == "iscrowd" or (name in ("closed", "filled") and "points" in label):
        return _is_flag(value)
    if name == "tags":
        return value is None or (isinstance(value, list) and all(isinstance(tag, str) for tag in value))
    if name == "label":
        return value is None or isinstance(value, str)
    if name == "bounding_box" and "points" not in label:
        return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
    if name == "points" and "points" in label:
        points = [value] if "sam_labels" in label else value
        return isinstance(points, list) and all(
            isinstance(shape, list)
            and all(isinstance(p, list) and len(p) == 2 and all(map(_may_be_number, p)) for p in shape)
            for shape in points
        )
    return True


def _is_flag(value: object) -> bool:
    return value is None or (isinstance(value, (bool, int, float)) and value in (0, 1))


def _is_number(value: object) -> bool:
    return _may_be_number(value) and math.isfinite(value)


def _may_be_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def covered(value: object) -> tuple[float, float] | None:
    """The pixels that labels cover together, as FiftyOne draws them, and how many may differ along their outlines.

    None if that would take too much memory.
    """
    import fiftyone as fo

    drawn, outline = np.zeros((HEIGHT, WIDTH), bool), 0.0
    for label in labels_in(value):
        points = label["points"] if "points" in label else [[label["bounding_box"][:2]], [label["bounding_box"][2:]]]
        corners = np.array([point for shape in points for point in shape]) * [WIDTH, HEIGHT]
        if np.abs(corners).max(initial=0) > 10 * WIDTH:
            return None
        if "points" in label:
            read = fo.Polyline(points=label["points"], closed=True, filled=True)
        else:
            shape = {name: label.get(name) for name in ("bounding_box", "mask")}
            if shape["mask"] is None:  # otherwise the file is not read
                shape["mask_path"] = label.get("mask_path")
            read = fo.Detection.from_dict({"_cls": "Detection"} | shape)
        drawn |= read.to_segmentation(frame_size=(WIDTH, HEIGHT)).mask > 0
        outline += 2 * np.abs(np.diff(corners, axis=0)).sum() + 2 * (WIDTH + HEIGHT) * ("points" in label)
    return float(drawn.sum()), outline + 4
