"""Overlaps of the labels of one image, measured with masks or boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_utils

from ..evaluation.average_recall import Shapes, ious_of
from ..fiftyone_internals import Document
from ..labels.masks import boxes_of, masks_of
from ..modeling.arrays import FloatArray


def shapes_of(labels: Sequence[Document], size: tuple[int, int], use_masks: bool) -> Shapes:
    """The labels' masks, or their boxes. Raises the same errors as `labels.masks.masks_of`."""
    return masks_of(labels, size) if use_masks else boxes_of(labels, size)


def ious(shapes: Shapes, others: Shapes) -> FloatArray:
    """float64 [shapes, others]: the IoU of each pair; 0 if one is empty."""
    return ious_of(shapes, others, np.zeros(len(others), bool))


def shares_inside(shapes: Shapes, others: Shapes) -> FloatArray:
    """float64 [shapes, others]: the share of each shape's area inside each of the others; 0 if it is empty."""
    return ious_of(shapes, others, np.ones(len(others), bool))


def shares_inside_any(shapes: Shapes, others: Shapes, size: tuple[int, int]) -> FloatArray:
    """float64 [shapes]: the share of each shape's area inside the union of the others.

    Boxes are rounded to pixels for this. `size` is the image's (height, width).
    """
    if not len(shapes) or not len(others):
        return np.zeros(len(shapes))
    shapes, others = (
        mask_utils.frPyObjects(each, *size) if isinstance(each, np.ndarray) else each for each in (shapes, others)
    )
    return shares_inside(shapes, [mask_utils.merge(others)])[:, 0]
