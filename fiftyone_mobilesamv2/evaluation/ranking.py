"""How proposals are ranked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

# How proposals are ranked -> the attributes whose mean is the score.
RANKINGS = {
    "confidence": ("confidence",),
    "predicted_iou": ("predicted_iou",),
    "stability": ("stability",),
    "sam": ("predicted_iou", "stability"),
}
