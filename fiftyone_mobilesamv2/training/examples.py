"""Labelled images to train on, whatever they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..modeling.arrays import FloatArray, ImageArray
from ..modeling.rle import RLE


@dataclass(frozen=True)
class Example:
    """A labelled image to train on.

    Attributes:
        id: id of its sample or frame.
        name: its name in messages.
        read: reads its pixels, uint8 RGB [H, W, 3].
        boxes: float32 [N, 4], xyxy in pixels.
        masks: COCO RLE of each object (of the whole image's size); None if its labels are boxes only.
        ignored: float32 [M, 4], xyxy in pixels: regions that count neither as an object nor as background.
    """

    id: str
    name: str
    read: Callable[[], ImageArray]
    boxes: FloatArray
    masks: tuple[RLE, ...] | None
    ignored: FloatArray


@dataclass(frozen=True)
class Seen:
    """Contents of the images that a model knows from its training, and from those of the models it started from.

    Attributes:
        trained_on: those it was trained on.
        held_out: those it was last validated with.
    """

    trained_on: frozenset[str] = frozenset()
    held_out: frozenset[str] = frozenset()


NOTHING_SEEN = Seen()
