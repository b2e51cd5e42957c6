"""Masks, polygons and run lengths -> COCO RLE. Imports no torch, so that reading stored labels stays cheap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr  # shortened: values may be of any length
from typing import Any, TypedDict

import numpy as np

from ..errors import ArgumentError
from .arrays import AnyArray, FloatArray, IntArray, MaskArray

MAX_COORDINATE = 1e9  # pixels; far above any image, and far below where float64 loses parts of pixels
# pycocotools 2 takes 44 bytes for each pixel of an outline (measured: 377 MB for 7.9 million). A rectangle around the
# largest image that is read, 65,535 pixels a side, has an outline of 262,140.
_MAX_OUTLINE = 4e6


class RLE(TypedDict):
    """A mask of a whole image as compressed COCO RLE."""

    size: list[int]  # height, width
    counts: bytes


def rle_from_crop(mask: MaskArray, box: AnyArray, size: tuple[int, int]) -> RLE:
    """COCO RLE of an image of `size` (height, width) with the bool array `mask` at `box` (xyxy)."""
    height, width = size
    x0, y0, x1, y1 = (int(v) for v in box)
    # RLE runs down the columns. The column after the box, if any, ends a run that reaches the bottom of the box.
    columns = np.zeros((min(x1 + 1, width) - x0, height), bool)
    columns[: x1 - x0, y0:y1] = mask.T
    pixels = columns.ravel()
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1 + x0 * height
    starts = [x0 * height] if pixels[:1].any() else []
    return _rle_from_changes(np.concatenate([starts, changes]).astype(np.int64), size)


def rle_from_polygons(polygons: Sequence[FloatArray], size: tuple[int, int], even_odd: bool = False) -> RLE:
    """COCO RLE of the pixels that polygons contain, as pycocotools draws them.

    pycocotools takes time and memory in proportion to the outline, wherever that is, and crashes on coordinates that no
    integer can hold. What lies far outside the image is therefore cut off first, which changes no pixel of the image.

    Args:
        polygons: float64 [N, 2] each: x, y of the corners in pixels, anywhere. Those of fewer than 3 are ignored.
        size: (height, width) of the image.
        even_odd: whether pixels in an even number of polygons are outside, so that polygons inside others are holes;
            otherwise, the union of all.

    Raises:
        ValueError: a coordinate is not finite or beyond :data:`MAX_COORDINATE`, or an outline is too long to be drawn.

    >>> ring = [np.array([[0, 0], [6, 0], [6, 6], [0, 6]], float), np.array([[2, 2], [4, 2], [4, 4], [2, 4]], float)]
    >>> from pycocotools import mask as mask_utils
    >>> int(mask_utils.area(rle_from_polygons(ring, (6, 6), even_odd=True)))
    32
    """
    from pycocotools import mask as mask_utils

    height, width = size
    flat = [
        outline.ravel().tolist() for outline in (_clipped(points, size) for points in polygons) if len(outline) >= 3
    ]
    if not flat:
        return _rle_from_changes(np.zeros(0, np.int64), size)
    parts: list[RLE] = mask_utils.frPyObjects(flat, height, width)
    if not even_odd or len(parts) == 1:
        merged: RLE = mask_utils.merge(parts)
        return merged
    # A pixel changes from its predecessor if an odd number of polygons change there.
    changes, times = np.unique(
        np.concatenate([np.cumsum(run_lengths(part["counts"]))[:-1] for part in parts]), return_counts=True
    )
    return _rle_from_changes(changes[times % 2 == 1], size)


def _clipped(points: FloatArray, size: tuple[int, int]) -> FloatArray:
    """The part of a polygon within an image's side of the image (Sutherland and Hodgman's algorithm)."""
    if not np.isfinite(points).all():
        raise ArgumentError("non-finite coordinates")
    if (np.abs(points) > MAX_COORDINATE).any():
        raise ArgumentError(f"a coordinate of {np.abs(points).max():.3g} pixels")
    margin = max(size)
    for axis, length in ((0, size[1]), (1, size[0])):
        for bound, sign in ((-margin, 1), (length + margin, -1)):
            inside = sign * (points[:, axis] - bound) >= 0
            if inside.all():
                continue
            following = np.roll(points, -1, axis=0)
            crossing = inside != np.roll(inside, -1)
            step = following - points
            share = np.divide(bound - points[:, axis], step[:, axis], where=crossing, out=np.zeros(len(points)))
            crossings = points + share[:, None] * step
            crossings[:, axis] = bound
            both = np.stack([points, crossings], 1).reshape(-1, 2)
            points = both[np.stack([inside, crossing], 1).ravel()]
    if (outline := float(np.abs(points - np.roll(points, -1, axis=0)).sum())) > _MAX_OUTLINE:
        raise ArgumentError(f"an outline of {outline:.3g} pixels")
    return points


def checked_rle(segmentation: Mapping[str, Any], size: tuple[int, int]) -> RLE:
    """COCO RLE, compressed or not, of an image of `size` (height, width).

    pycocotools does not check it: pixels that the runs don't cover would be uninitialized memory.

    Raises:
        ValueError: it isn't RLE of this size.
    """
    from pycocotools import mask as mask_utils

    height, width = size
    declared, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(declared, (list, tuple)) or list(declared) != [height, width]:
        raise ArgumentError(f"its size is {repr(declared)}")
    if isinstance(counts, (str, bytes)):
        runs = run_lengths(counts)
    elif isinstance(counts, list) and all(isinstance(run, int) and not isinstance(run, bool) for run in counts):
        if not all(0 <= run <= height * width for run in counts):
            raise ArgumentError("a run is negative or longer than the image")
        runs = np.array(counts, np.int64)
    else:
        raise ArgumentError("its counts are neither whole numbers nor text")
    if (runs < 0).any() or runs.sum() != height * width:
        raise ArgumentError(f"its runs add up to {runs.sum():,} pixels, not {height * width:,}, or one is negative")
    rle: RLE = mask_utils.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return rle


def run_lengths(counts: str | bytes) -> IntArray:
    """The run lengths of compressed COCO RLE, starting with the background.

    Each is written as a varint of 5 bits a character, lowest first, the third and later as the difference from the run
    before the previous one (rleFrString of pycocotools' maskApi.c).

    Raises:
        ValueError: it is not of this form.
    """
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError as error:
        raise ArgumentError("its counts contain characters that RLE does not have") from error
    if not text:
        return np.zeros(0, np.int64)
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any():
        raise ArgumentError("its counts contain characters that RLE does not have")
    last = codes & 0x20 == 0  # of a number
    if not last[-1]:
        raise ArgumentError("its counts end in the middle of a run")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    if (ends - starts).max(initial=0) > 6:  # 35 bits
        raise ArgumentError("a run is longer than any image")
    position = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    numbers: IntArray = np.add.reduceat((codes & 0x1F) << 5 * position, starts)
    numbers -= np.where(codes[ends] & 0x10 != 0, 1 << 5 * (ends - starts + 1), 0)  # two's complement
    numbers[1::2], numbers[2::2] = np.cumsum(numbers[1::2]), np.cumsum(numbers[2::2])
    return numbers


def _rle_from_changes(changes: IntArray, size: tuple[int, int]) -> RLE:
    """RLE of the mask whose pixels, in RLE's order, differ from their predecessors at these positions, ascending."""
    from pycocotools import mask as mask_utils  # imported late, so that masks can be computed without pycocotools

    height, width = size
    runs = np.diff(np.concatenate([[0], changes, [height * width]]).astype(np.int64))
    rle: RLE = mask_utils.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return rle
