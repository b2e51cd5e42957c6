"""Cropped masks -> COCO RLE. Apart from masks.py, so that reading stored labels need not wait for torch."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from .arrays import AnyArray, MaskArray


class RLE(TypedDict):
    """A mask of a whole image as COCO stores it, compressed."""

    size: list[int]  # height, width
    counts: bytes


def rle_from_crop(mask: MaskArray, box: AnyArray, size: tuple[int, int]) -> RLE:
    """COCO RLE of the image of `size` (height, width) that holds the bool array `mask` at `box` (xyxy)."""
    from pycocotools import mask as mask_utils  # here, so that masks can be made where it is not installed

    height, width = size
    x0, y0, x1, y1 = (int(v) for v in box)
    # RLE runs down the columns. The column after the box, where there is one, ends a run at the bottom of the last.
    columns = np.zeros((min(x1 + 1, width) - x0, height), bool)
    columns[: x1 - x0, y0:y1] = mask.T
    pixels = columns.ravel()
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1 + x0 * height
    starts = [x0 * height] if pixels[:1].any() else []
    ends = np.concatenate([starts, changes, [height * width]]).astype(np.int64)
    ends[1:] -= ends[:-1].copy()
    rle: RLE = mask_utils.frPyObjects({"size": [height, width], "counts": ends.tolist()}, height, width)
    return rle
