"""Checks of the arguments of :func:`.train.train`."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral

from ..errors import ArgumentError, plain
from ..labels.documents import is_number

PARTS = ("discovery", "masks")
CHOICES = {
    "unlabeled": ("ignore", "background"),
    "discovery": ("detector", "embedding"),
    "size": ("n", "s", "m", "l", "x"),  # of YOLOv8
    "learn": ("decoder", "neck", "encoder"),
}
_ONLY_FOR = {"discovery": "discovery", "size": "discovery", "teacher": "discovery", "learn": "masks"}
_MINIMUMS = {"epochs": 1, "batch_size": 1, "seed": 0}


def check_arguments(part: object, given: Mapping[str, object]) -> None:
    """Checks arguments by their names; None stands for the default.

    Raises:
        ValueError: one is invalid; the message names it.
    """
    arguments = {name: value for name, value in given.items() if value is not None}
    for name, choices in {"part": PARTS, **CHOICES}.items():
        value = part if name == "part" else arguments.get(name, choices[0])
        if value not in choices:
            raise ArgumentError(f"{name} must be one of {', '.join(choices)}, not {plain(value)!r}.")
    for name, only_for in _ONLY_FOR.items():
        if name in arguments and part != only_for:
            raise ArgumentError(f"{name} applies only to part='{only_for}'.")
    if "size" in arguments and arguments.get("discovery") == "embedding":
        raise ArgumentError("size applies only to discovery='detector'.")
    for name, minimum in _MINIMUMS.items():
        number = arguments.get(name, minimum)
        if not isinstance(number, Integral) or isinstance(number, bool) or int(number) < minimum:
            raise ArgumentError(f"{name} must be a whole number of at least {minimum}, not {plain(number)!r}.")
    rate = arguments.get("learning_rate", 1)
    if not (is_number(rate) and float(rate) > 0):  # type: ignore[arg-type]
        raise ArgumentError(f"learning_rate must be a number above 0, not {plain(rate)!r}.")
