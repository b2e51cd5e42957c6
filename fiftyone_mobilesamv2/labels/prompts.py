"""Boxes and keypoints -> prompts."""

from __future__ import annotations

from collections.abc import Sequence

import fiftyone.core.labels as fol
import numpy as np

from ..errors import ArgumentError
from ..modeling.arrays import FloatArray, IntArray

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


def keypoint_prompt(keypoint: fol.Keypoint) -> tuple[FloatArray, IntArray]:
    """Relative points [P, 2] and their labels [P]: 1 inside the object, 0 outside.

    Labels come from the attribute "sam_labels", as with FiftyOne's own SAM; without it, all points are inside. Points
    outside the image (NaN, or not in 0..1) are dropped.

    Raises:
        ValueError: the number of labels differs from that of points, or a label is neither 0 nor 1.
    """
    points = np.array(keypoint.points, np.float64).reshape(-1, 2)
    labels = keypoint["sam_labels"] if keypoint.has_field("sam_labels") else None
    if labels is None:
        labels = [1] * len(points)
    if not isinstance(labels, Sequence | np.ndarray) or [v in (0, 1) for v in labels] != [True] * len(points):
        raise ArgumentError(
            f"keypoint {keypoint.id} has sam_labels={labels}: 1 (inside the object) or 0 (outside) was expected for "
            f"each of its {len(points)} points"
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
                raise ArgumentError(
                    f"detection {prompt.id} has the unusable bounding box {prompt.bounding_box}: [x, y, width, height] "
                    f"was expected, relative to the image and at least partly inside it"
                )
        elif not len(keypoint_prompt(prompt)[0]):
            raise ArgumentError(f"keypoint {prompt.id} has no point inside the image")


def _is_in_image(box: Sequence[float] | None) -> bool:
    """Whether a relative box, which may have no area, is at least partly inside the image."""
    if box is None:
        return False
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        return False
    return 0 <= width <= _MAX_BOX_SIDES and 0 <= height <= _MAX_BOX_SIDES and -width <= x <= 1 and -height <= y <= 1
