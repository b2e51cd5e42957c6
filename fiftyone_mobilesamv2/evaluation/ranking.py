"""How proposals are ranked: the one table of the attributes that count, and what forms call each ranking."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import ArgumentError


class Ranking(NamedTuple):
    """A way to rank proposals.

    Attributes:
        attributes: of a label; their mean is the score.
        title: what forms say.
    """

    attributes: tuple[str, ...]
    title: str


RANKINGS = {
    "confidence": Ranking(("confidence",), "Confidence, the detector's score"),
    "predicted_iou": Ranking(("predicted_iou",), "Predicted IoU, by the decoder"),
    "stability": Ranking(("stability",), "Stability of the mask"),
    "sam": Ranking(("predicted_iou", "stability"), "SAM's: the mean of predicted IoU and stability"),
}


def check_ranking(rank_by: str) -> None:
    """Raises ArgumentError unless it is a key of RANKINGS."""
    if rank_by not in RANKINGS:
        raise ArgumentError(f"rank_by={rank_by!r}: one of {', '.join(map(repr, RANKINGS))} was expected.")
