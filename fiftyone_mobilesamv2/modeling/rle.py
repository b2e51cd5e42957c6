"""Cropped masks -> COCO RLE. Separate from masks.py so that reading stored labels does not import torch."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from .arrays import AnyArray, MaskArray


class RLE(TypedDict):
    """A mask of a whole image as compressed COCO RLE."""

    size: list[int]  # height, width
    counts: bytes


def rle_from_crop(mask: MaskArray, box: AnyArray, size: tuple[int, int]) -> RLE:
    """COCO RLE of an image of `size` (height, width) with the bool array `mask` at `box` (xyxy)."""
    from pycocotools import mask as mask_utils  # imported late, so that masks can be computed without pycocotools

    height, width = size
    x0, y0, x1, y1 = (int(v) for v in box)
    # RLE runs down the columns. The column after the box, if any, ends a run that reaches the bottom of the box.
    columns = np.zeros((min(x1 + 1, width) - x0, height), bool)
    columns[: x1 - x0, y0:y1] = mask.T
    pixels = columns.ravel()
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1 + x0 * height
    starts = [x0 * height] if pixels[:1].any() else []
    ends = np.concatenate([starts, changes, [height * width]]).astype(np.int64)
    ends[1:] -= ends[:-1].copy()
    rle: RLE = mask_utils.frPyObjects({"size": [height, width], "counts": ends.tolist()}, height, width)
    return rle
