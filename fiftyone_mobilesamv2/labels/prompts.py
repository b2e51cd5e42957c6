"""Boxes and keypoints -> prompts."""

from __future__ import annotations

from collections.abc import Sequence

import fiftyone.core.labels as fol
import numpy as np

from ..errors import ArgumentError, LabelError
from ..fiftyone_internals import Document
from ..modeling.arrays import FloatArray, IntArray
from .documents import class_of, is_number, name_of, shortened, tags_of
from .masks import pairs_of_numbers

# Relative to the image. A mask has as many pixels as its box, and the evaluation accepts no larger boxes.
_MAX_BOX_SIDES = 2


def labels_of(prompts: fol.Label | None) -> list[fol.Detection] | list[fol.Keypoint]:
    """The individual labels of a prompt field's value."""
    if prompts is None:
        return []
    labels: list[fol.Detection] | list[fol.Keypoint] = [prompts]
    if isinstance(prompts, fol.Detections):
        labels = prompts.detections
    elif isinstance(prompts, fol.Keypoints):
        labels = prompts.keypoints
    return labels


def prompts_of(labels: Sequence[Document]) -> fol.Label | None:
    """The prompts that labels from the database describe, without their masks; None without labels.

    Raises:
        LabelError: a label can't be used as a prompt.
    """
    if not labels:
        return None
    prompts = [_prompt_of(label) for label in labels]
    for label in labels:
        if label["_cls"] != labels[0]["_cls"]:
            raise LabelError(f"{name_of(label)} is not of the same type as {name_of(labels[0])}")
    return fol.Keypoints(keypoints=prompts) if labels[0]["_cls"] == "Keypoint" else fol.Detections(detections=prompts)


def _prompt_of(label: Document) -> fol.Label:
    if label.get("_cls") not in ("Detection", "Keypoint"):
        raise LabelError(
            f"{name_of(label)} is neither a detection nor a keypoint: its _cls={shortened(label.get('_cls'))}"
        )
    kind = fol.Keypoint if label["_cls"] == "Keypoint" else fol.Detection
    class_of(label)
    index = label.get("index")
    if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
        raise LabelError(f"{name_of(label)} has index={shortened(index)}: a whole number was expected")
    tags_of(label)
    box = label.get("bounding_box")
    if isinstance(box, list) and any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in box):
        raise LabelError(_unusable_box(name_of(label), box))  # FiftyOne would make numbers of them
    try:  # a mask is not needed, and may be of any size
        return kind.from_dict({name: value for name, value in label.items() if name != "mask"})
    except Exception as error:  # of any kind: FiftyOne does not expect values of wrong types
        cause = " ".join(repr(error).split())[:200]
        raise LabelError(f"{name_of(label)} can't be read: {cause}") from error


def keypoint_prompt(keypoint: fol.Keypoint) -> tuple[FloatArray, IntArray]:
    """Relative points [P, 2] and their labels [P]: 1 inside the object, 0 outside.

    Labels come from the attribute "sam_labels", as with FiftyOne's own SAM; without it, all points are inside. Points
    outside the image (NaN, or not in 0..1) are dropped.

    Raises:
        ValueError: the number of labels differs from that of points, or a label is neither 0 nor 1.
    """
    stored = keypoint.points
    if isinstance(stored, Sequence):  # coordinates of hidden points may be None
        stored = [[np.nan if value is None else value for value in each] if _is_pair(each) else each for each in stored]
    try:
        points = pairs_of_numbers(stored)
    except ValueError as error:
        raise ArgumentError(f"keypoint {keypoint.id} has points that are {error}") from error
    labels = keypoint["sam_labels"] if keypoint.has_field("sam_labels") else None
    if labels is None:
        labels = [1] * len(points)
    if not isinstance(labels, Sequence | np.ndarray) or [v in (0, 1) for v in labels] != [True] * len(points):
        raise ArgumentError(
            f"keypoint {keypoint.id} has sam_labels={shortened(labels)}: 1 (inside the object) or 0 (outside) was "
            f"expected for each of its {len(points)} points"
        )
    visible = ((points >= 0) & (points <= 1)).all(1)
    return points[visible].astype(np.float32), np.array(labels, np.int64)[visible]


def check_prompts(prompts: fol.Label | None) -> None:
    """Raises ValueError if labels can't be used as prompts."""
    if not isinstance(prompts, fol.Detections | fol.Keypoints | fol.Detection | fol.Keypoint | None):
        raise ArgumentError(f"prompts must be detections or keypoints, not {type(prompts).__name__}")
    for prompt in labels_of(prompts):
        if isinstance(prompt, fol.Detection):
            if not _is_in_image(prompt.bounding_box):
                raise ArgumentError(_unusable_box(f"detection {prompt.id}", prompt.bounding_box))
        elif not len(keypoint_prompt(prompt)[0]):
            raise ArgumentError(f"keypoint {prompt.id} has no point inside the image")


def _unusable_box(name: str, box: object) -> str:
    return (
        f"{name} has the unusable bounding box {shortened(box)}: [x, y, width, height] was expected, relative to the "
        "image and at least partly inside it"
    )


def _is_pair(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _is_in_image(box: object) -> bool:
    """Whether a relative box, which may have no area, is at least partly inside the image."""
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(is_number, box)):
        return False
    x, y, width, height = box
    return bool(
        0 <= width <= _MAX_BOX_SIDES and 0 <= height <= _MAX_BOX_SIDES and -width <= x <= 1 and -height <= y <= 1
    )
