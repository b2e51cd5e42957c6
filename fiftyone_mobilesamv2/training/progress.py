"""How far a training is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """A training after one of its steps.

    Attributes:
        done, total: optimizer steps, those before an interruption included.
        epoch, epochs: the current epoch, from 1, and their number.
        loss: running mean of the loss.
        learning_rate: that of the step.
        images_per_second: images read and trained on since the training was started or resumed.
        seconds_left: estimate for the remaining steps.
    """

    done: int
    total: int
    epoch: int
    epochs: int
    loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float


# Called after each step. May raise errors.Cancelled, which stops the training between two steps; the last save is kept.
Report = Callable[[Step], None]

# One entry for each epoch: "epoch", "loss" (mean) and "learning_rate", and "score" on the validation images or None.
Curve = list[dict[str, Any]]
