"""What a training reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """The state of a training after an optimizer step.

    Attributes:
        done, total: optimizer steps.
        epoch, epochs: the epoch of this step, from 1, and their number.
        loss: its running mean.
        learning_rate: of this step.
        images_per_second: since the training started or went on.
        seconds_left: estimated.
    """

    done: int
    total: int
    epoch: int
    epochs: int
    loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float


# Called after each step. It may raise errors.Cancelled, which stops the training; its last save is kept.
Report = Callable[[Step], None]

# One entry for each epoch: "epoch", "loss" and "learning_rate", and the "score" of validation or None.
Curve = list[dict[str, Any]]
