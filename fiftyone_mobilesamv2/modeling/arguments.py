"""Validation of the arguments that callers pass to a model."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ArgumentError, plain
from .arrays import AnyArray, ImageArray, IntArray
from .defaults import MAX_NMS_CANDIDATES, MAX_POINTS_PER_SIDE
from .grid_prompts import GridFilter

PROMPTINGS = ("object_aware", "grid")

_MAX_COORDINATE = 1e9  # pixels; the position of a prompt beyond that would not be finite


@overload
def checked_number(name: str, value: float, minimum: float, maximum: float, whole: Literal[True]) -> int: ...
@overload
def checked_number(name: str, value: float, minimum: float, maximum: float, whole: Literal[False] = False) -> float: ...
def checked_number(name: str, value: float, minimum: float, maximum: float, whole: bool = False) -> float:
    """Returns `value` as a plain Python number. Raises ValueError unless it is a number from `minimum` to `maximum`.

    Args:
        name: the argument's name in the error message.
        whole: whether the number must be an integer.
    """
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool) or not minimum <= value <= maximum:
        expected = f"a {'whole ' * whole}number from {minimum} to {maximum}"
        raise ArgumentError(f"{name} must be {expected}, not {plain(value)!r}.")
    return int(value) if whole else float(value)


def checked_thresholds(conf: float, iou: float, max_prompts: int) -> tuple[float, float, int]:
    return (
        checked_number("conf", conf, 0, 1),
        checked_number("iou", iou, 0, 1),
        checked_number("max_prompts", max_prompts, 1, MAX_NMS_CANDIDATES, whole=True),
    )


def check_prompting(prompting: str) -> None:
    """Raises ValueError unless `prompting` is one of PROMPTINGS."""
    if not isinstance(prompting, str) or prompting not in PROMPTINGS:
        raise ArgumentError(f"Unknown prompting {prompting!r}; choose one of {', '.join(PROMPTINGS)}.")


def checked_grid(points_per_side: int, grid_filter: GridFilter) -> tuple[int, GridFilter]:
    """Both arguments as plain numbers. Raises TypeError if `grid_filter` is not a GridFilter, ValueError if a number is
    invalid or out of range."""
    points_per_side = checked_number("points_per_side", points_per_side, 1, MAX_POINTS_PER_SIDE, whole=True)
    if not isinstance(grid_filter, GridFilter):
        raise TypeError(f"grid_filter must be a GridFilter, not {type(grid_filter).__name__}.")
    return points_per_side, GridFilter(
        *(checked_number(name, value, -1, 1) for name, value in vars(grid_filter).items())
    )


def check_images(images: Sequence[ImageArray]) -> None:
    _check_is_sequence("images", images)
    for i, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            actual = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ArgumentError(f"Image {i} must be a uint8 RGB array [H, W, 3], not {actual}.")
        if not image.size:
            raise ArgumentError(f"Image {i} has no pixels: its shape is {image.shape}.")


def coordinates(index: int, name: str, values: Tensor | AnyArray, width: int) -> Tensor:
    """The boxes or points that the caller passed for image `index`, as float32 [N, width] on the CPU."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    expected = f"Image {index}: {name} must be finite numbers [N, {width}]"
    array = _array(expected, values)
    if array.size == 0:
        return torch.zeros(0, width)
    array = np.atleast_2d(array)
    is_good = array.dtype.kind in "iuf" and array.ndim == 2 and array.shape[1] == width
    if not is_good or not (np.abs(array.astype(np.float64)) <= _MAX_COORDINATE).all():
        raise ArgumentError(
            f"{expected} of at most {_MAX_COORDINATE:g} pixels, not an array {array.shape} of {array.dtype}."
        )
    return torch.from_numpy(array.astype(np.float32))


def _array(expected: str, values: npt.ArrayLike) -> AnyArray:
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ArgumentError(f"{expected}: {error}") from error


def _check_is_sequence(name: str, values: object) -> None:
    if not isinstance(values, Sequence) and not (isinstance(values, np.ndarray | Tensor) and values.ndim):
        raise TypeError(f"{name} must be a sequence, not {type(values).__name__}.")


def check_count(name: str, prompts: Sequence[object], images: int) -> None:
    _check_is_sequence(name, prompts)
    if len(prompts) != images:
        raise ArgumentError(f"{name} must hold one entry for each of the {images} images, not {len(prompts)}.")


def check_prompts(
    images: Sequence[ImageArray],
    boxes: Sequence[Tensor | AnyArray] | None,
    points: Sequence[Sequence[AnyArray]] | None,
    point_labels: Sequence[Sequence[AnyArray]] | None,
) -> None:
    """Raises ValueError unless there are prompts, with one entry per image; TypeError if one is not a sequence."""
    check_images(images)
    if boxes is None and points is None:
        raise ArgumentError("segment_anything needs prompts: boxes, points, or both.")
    if point_labels is not None and points is None:
        raise ArgumentError("point_labels requires points.")
    for name, prompts in (("boxes", boxes), ("points", points), ("point_labels", point_labels)):
        if prompts is not None:
            check_count(name, prompts, len(images))
    for name, prompts in (("points", points), ("point_labels", point_labels)):
        for i, image_prompts in enumerate(prompts if prompts is not None else ()):
            _check_is_sequence(f"Image {i}: {name}", image_prompts)


def points_with_labels(
    index: int,
    points: Sequence[AnyArray],
    point_labels: Sequence[AnyArray] | None,
    num_boxes: int | None,
) -> tuple[list[Tensor], list[IntArray]]:
    """The points of each prompt of image `index`, float32 [P, 2], and their labels, int64 [P].

    Args:
        num_boxes: number of boxes that prompt this image; None if there are no box prompts.

    Raises:
        ValueError: the counts do not match, or a label is neither 0 nor 1.
    """
    point_sets = [coordinates(index, "points", p, 2) for p in points]
    if point_labels is None:
        point_labels = [np.ones(len(p), np.int64) for p in point_sets]
    expected = f"Image {index}: point_labels must be arrays [P]"
    labels = [np.atleast_1d(_array(expected, each)) for each in point_labels]
    count = len(point_sets) if num_boxes is None else num_boxes
    if len(point_sets) != count or [(len(p),) for p in point_sets] != [each.shape for each in labels]:
        raise ArgumentError(
            f"Image {index}: every prompt needs as many point_labels as points, and one array of points for each "
            f"box; got {count} prompts, {len(point_sets)} arrays of points, {len(labels)} of labels."
        )
    if not all(each.dtype.kind in "biuf" and np.isin(each, (0, 1)).all() for each in labels):
        raise ArgumentError(f"Image {index}: point labels must be 1 (inside the object) or 0 (outside).")
    return point_sets, [each.astype(np.int64) for each in labels]
