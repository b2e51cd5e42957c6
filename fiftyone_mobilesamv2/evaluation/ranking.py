"""Rankings of proposals: the attributes that each uses, and its title in forms."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import ArgumentError, plain


class Ranking(NamedTuple):
    """A way to rank proposals.

    Attributes:
        attributes: the label attributes whose mean is the score.
        title: its name in forms.
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
    """Raises ArgumentError unless `rank_by` is a key of RANKINGS."""
    if rank_by not in RANKINGS:
        raise ArgumentError(f"rank_by={plain(rank_by)!r}: one of {', '.join(map(repr, RANKINGS))} was expected.")
