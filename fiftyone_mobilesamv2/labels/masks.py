"""Stored labels -> their masks and boxes.

FiftyOne's own loading takes longer than everything in this module (benchmarks/evaluation.py).
"""

from __future__ import annotations

import io
import math
import tokenize
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import fiftyone.core.storage as fos
import numpy as np

from ..errors import ArgumentError, LabelError, MissingError, message_of
from ..fiftyone_internals import Document
from ..images import size_of
from ..modeling.arrays import AnyArray, FloatArray, IntArray, MaskArray
from ..modeling.rle import RLE, rle_from_crop, rle_from_polygons
from .documents import is_number, is_set, name_of, shortened

_MAX_PATH = 4096  # characters of a file's path: Linux's limit, the highest
_NO_MASK = np.zeros((0, 0), bool), np.zeros(4, np.int64)


def masks_of(
    labels: Sequence[Document], size: tuple[int, int], wanted: Sequence[bool] | MaskArray | None = None
) -> list[RLE]:
    """The mask of each label of an image, as COCO RLE.

    A mask whose resolution differs from its box in pixels is resized to the box, as in the App.

    Args:
        labels: documents of `fo.Detection`, with the mask in `mask` or in a file, or of `fo.Polyline`.
        size: (height, width) of the image in pixels.
        wanted: whether to decode each label's mask; the others are empty, since decoding takes most of the time.
            Default: all.

    Raises:
        MissingError: a detection, wanted or not, has no mask.
        LabelError: a label can't be used; the message names it and says why.
    """
    for label in labels:
        _check_has_mask(label)
    if wanted is None:
        wanted = [True] * len(labels)
    empty = rle_from_crop(*_NO_MASK, size)
    return [_mask_of(label, size) if decode else empty for label, decode in zip(labels, wanted)]


def cropped_masks(labels: Sequence[Document], size: tuple[int, int]) -> list[tuple[MaskArray, IntArray]]:
    """The mask of each `fo.Detection`, bool [h, w], and its box, xyxy in pixels of an image of `size` (height, width).

    Raises the same errors as :func:`masks_of`.
    """
    return [_cropped_mask(label, size) for label in labels]


def boxes_of(labels: Sequence[Document], size: tuple[int, int]) -> FloatArray:
    """float64 [N, 4]: x, y, width and height of each label, in pixels. Raises the same errors as :func:`masks_of`."""
    scale = np.array([size[1], size[0]] * 2, float)
    boxes: FloatArray = np.array([_relative_box(label) for label in labels], float).reshape(-1, 4) * scale
    return boxes


def boxes_may_overlap(boxes: FloatArray, others: FloatArray) -> MaskArray:
    """bool [boxes, others]: whether labels with these boxes (x, y, width, height in pixels) could overlap.

    Boxes may be a pixel or two apart: masks start at whole pixels, boxes need not.
    """
    starts = np.maximum(boxes[:, None, :2], others[None, :, :2])
    ends = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], (others[:, :2] + others[:, 2:])[None])
    return np.asarray((starts <= ends + 2).all(2))


def _mask_of(label: Document, size: tuple[int, int]) -> RLE:
    return _polygons_mask(label, size) if _is_polyline(label) else rle_from_crop(*_cropped_mask(label, size), size)


def _cropped_mask(label: Document, size: tuple[int, int]) -> tuple[MaskArray, IntArray]:
    mask = _stored_mask(label, size)
    height, width = size
    x, y, w, h = _relative_box(label) * [width, height, width, height]
    if not mask.any():
        return _NO_MASK
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise LabelError(f"{name_of(label)} has a mask, but its bounding_box lies outside the image")
    rows, columns = mask.shape
    if abs(rows - h) > 1 or abs(columns - w) > 1:  # otherwise, rounding to pixels explains the difference
        # The pixels of a coarser mask are squares in the image, again up to rounding at the ends.
        scale = max(h / rows, w / columns)
        if mask.shape == size or abs(rows * scale - h) > 1 + scale or abs(columns * scale - w) > 1 + scale:
            fits_swapped = abs(rows - h * width / height) <= 1 and abs(columns - w * height / width) <= 1
            raise LabelError(
                f"{name_of(label)} has a mask of {columns}x{rows} pixels in a bounding_box of {w:.0f}x{h:.0f}: "
                + (
                    f"it fits an image of {height}x{width} pixels, but this image has {width}x{height}, probably "
                    "because of its EXIF orientation"
                    if fits_swapped
                    else "a mask must be cropped to its box"
                )
            )
        rows, columns = max(1, round(h)), max(1, round(w))
        mask = cv2.resize(mask.view(np.uint8), (columns, rows), interpolation=cv2.INTER_NEAREST).view(bool)
    x, y = round(x), round(y)
    mask = mask[max(0, -y) : height - y, max(0, -x) : width - x]
    x, y = max(0, x), max(0, y)
    return mask, np.array([x, y, x + mask.shape[1], y + mask.shape[0]])


def _polygons_mask(label: Document, size: tuple[int, int]) -> RLE:
    """The area of a polyline, whose shapes FiftyOne and the App fill even-odd."""
    if not any([is_set(label, "filled"), is_set(label, "closed")]):
        raise LabelError(f"{name_of(label)} is an open line without an area: set `closed` or `filled`")
    height, width = size
    polygons = [points * [width, height] for points in _outlines(label) if len(points) >= 3]
    if not polygons:
        raise LabelError(f"{name_of(label)} has no polygon of at least 3 points")
    try:
        return rle_from_polygons(polygons, size, even_odd=True)
    except ValueError as error:
        raise LabelError(f"{name_of(label)} has {error}") from error


def _outlines(label: Document) -> list[FloatArray]:
    """The shapes of a polyline, float64 [N, 2] each, relative to the image."""
    shapes = []
    stored = label.get("points")
    for points in stored if isinstance(stored, list) else [[] if stored is None else stored]:
        try:
            shapes.append(pairs_of_numbers(points))
        except ValueError as error:
            raise LabelError(f"{name_of(label)} has points that are {error}") from error
    return shapes


def pairs_of_numbers(points: Any) -> FloatArray:
    """float64 [N, 2] of stored points. Raises ValueError, with what they are, unless they are pairs of numbers."""
    try:
        array: AnyArray = np.array(points)
    except ValueError:  # of different lengths
        array = np.array(None)
    if array.size and (array.dtype.kind not in "iuf" or array.ndim != 2 or array.shape[1] != 2):
        raise ArgumentError("not pairs of numbers")
    if any(isinstance(value, bool) for point in points for value in point):  # NumPy makes numbers of them
        raise ArgumentError("not pairs of numbers")
    return array.astype(float).reshape(-1, 2)


def _is_polyline(label: Document) -> bool:
    return "points" in label or label.get("_cls") == "Polyline"


def _relative_box(label: Document) -> FloatArray:
    box: object
    if _is_polyline(label):
        points = np.concatenate([np.zeros((0, 2)), *_outlines(label)])
        if not len(points):
            raise LabelError(f"{name_of(label)} has no points")
        if not np.isfinite(points).all():
            raise LabelError(f"{name_of(label)} has non-finite coordinates")
        low, high = np.clip(points.min(0), -1, 2), np.clip(points.max(0), -1, 2)  # what reaches further is not in it
        box = [*low, *(high - low)]
    else:
        box = label.get("bounding_box")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(is_number(v) and abs(v) <= 2 for v in box)
        or min(box[2:]) <= 0
    ):
        raise LabelError(
            f"{name_of(label)} has bounding_box={shortened(box)}: [x, y, width, height], relative to the image, was "
            "expected"
        )
    return np.array(box, float)


def _stored_mask(label: Document, size: tuple[int, int]) -> MaskArray:
    """bool [h, w]"""
    _check_has_mask(label)
    max_values = 4 * size[0] * size[1] + 2**20  # a finer mask than the image, or one of a small image
    if (stored := label.get("mask")) is not None:
        try:
            mask = _deserialized(stored, max_values)
        except (zlib.error, ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
            cause = " ".join(str(error).split())[:200]  # NumPy's causes contain the whole header
            raise LabelError(f"{name_of(label)} has a mask that can't be decoded: {cause}") from error
    else:
        mask = _mask_file(label, max_values)
    if mask.dtype.kind not in "biuf":
        raise LabelError(f"{name_of(label)} has a mask of type {mask.dtype}: numbers were expected")
    if mask.ndim == 3:
        mask = _single_channel(label, mask)
    if mask.ndim != 2:
        raise LabelError(f"{name_of(label)} has a mask of shape {mask.shape}: two dimensions were expected")
    if mask.dtype != bool:
        if not (mask >= 0).all():
            raise LabelError(f"{name_of(label)} has a mask with negative or non-finite values")
        mask = mask > 0
    return np.ascontiguousarray(mask)


def _mask_file(label: Document, max_values: int) -> AnyArray:
    path = label["mask_path"]
    if not isinstance(path, str):
        raise LabelError(f"{name_of(label)} has mask_path={shortened(path)}: the path of a file was expected")
    if len(path) > _MAX_PATH:
        raise LabelError(f"{name_of(label)} has a mask_path of {len(path):,} characters")
    mask: AnyArray | None = None
    try:
        height, width = size_of(path)
        if height * width <= max_values:
            content = np.frombuffer(fos.read_file(path, binary=True), np.uint8)
            mask = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    except (OSError, ValueError, cv2.error) as error:
        raise LabelError(f"{name_of(label)} has a mask_path that can't be read: {message_of(error)}") from error
    if height * width > max_values:
        raise LabelError(f"{name_of(label)} has a mask of {width}x{height} pixels, far larger than its image: {path}")
    if mask is None:
        raise LabelError(f"{name_of(label)} has a mask_path that is not an image: {path}")
    return mask


def _single_channel(label: Document, mask: AnyArray) -> AnyArray:
    colors, alpha = mask[..., :3], mask[..., 3:]
    if (colors != colors[..., :1]).any() or (alpha != alpha.max(initial=0)).any():
        raise LabelError(
            f"{name_of(label)} has a mask with colours or transparency: a greyscale mask, 0 outside, was expected"
        )
    return mask[..., 0]


def _check_has_mask(label: Document) -> None:
    if label.get("mask") is None and label.get("mask_path") in (None, "") and not _is_polyline(label):
        raise MissingError(
            f"{name_of(label)} has no mask. Create masks from boxes with `apply_model(model, ..., prompt_field=...)`, "
            f"or evaluate boxes with `use_masks=False`"
        )


def serialized(mask: MaskArray) -> bytes:
    """Like `fiftyone.core.utils.serialize_numpy_array`, but with zlib's run-length strategy.

    It takes a quarter to a sixth of the time of the default strategy. Masks of 100x100 pixels become an eighth larger,
    those of 300x300 a quarter smaller.
    """
    content = io.BytesIO()
    np.save(content, mask, allow_pickle=False)
    compressor = zlib.compressobj(strategy=zlib.Z_RLE)
    return compressor.compress(content.getvalue()) + compressor.flush()


def _deserialized(stored: bytes, max_values: int) -> AnyArray:
    """Like `fiftyone.core.utils.deserialize_numpy_array`, but bounded, and without its 60 µs of parsing each header."""
    decompressor = zlib.decompressobj()
    data = decompressor.decompress(stored, 8 * max_values + 2**16)
    if not decompressor.eof:
        raise ArgumentError("it is incomplete, or far larger than its image")
    if data[:8] != b"\x93NUMPY\x01\x00":  # version 1.0, which NumPy writes for headers of up to 64 KB
        raise ArgumentError("it is not an array in NumPy's format")
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, fortran_order, dtype = _array_header(data[8:start])
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize > len(data) - start:
        raise ArgumentError(f"it has shape {shape}, but {len(data) - start:,} bytes")
    array = np.frombuffer(data, dtype, math.prod(shape), start)
    return array.reshape(shape, order="F" if fortran_order else "C")


@lru_cache(maxsize=4096)
def _array_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    if dtype.hasobject:
        raise ArgumentError("it contains Python objects")
    return shape, fortran_order, dtype
