"""The figure of a training, in the style of :mod:`..evaluation.figures`."""

from __future__ import annotations

import numpy as np

from ..evaluation.figures import COLORS, Figure, figure_layout, line_trace
from ..modeling.arrays import AnyArray, FloatArray
from .progress import Curve

SCORES = {"discovery": "AR of boxes", "masks": "IoU from boxes"}  # what is measured on the validation images


def learning_curve(curve: Curve, part: str) -> Figure:
    """The loss of each epoch on the left axis, and the score on the validation images on the right one."""
    scored = [point for point in curve if point["score"] is not None]
    data = [
        line_trace("loss", 0, *_points(curve, "loss"), "epoch %{x}: loss %{y:.3f}", 4),
        line_trace(SCORES[part], 1, *_points(scored, "score"), f"epoch %{{x}}: {SCORES[part]} %{{y:.3f}}", 7)
        | {"yaxis": "y2"},
    ]
    layout = figure_layout("epoch", "loss", True)
    layout["margin"]["r"] = layout["margin"]["l"]
    layout["yaxis2"] = layout["yaxis"] | {"overlaying": "y", "side": "right", "showgrid": False}
    for number, (axis, title) in enumerate((("yaxis", "loss"), ("yaxis2", SCORES[part]))):
        layout[axis] |= {"title": {"text": title, "font": {"color": COLORS[number], "size": 13}}}
    if len(curve) <= 10:
        layout["xaxis"]["dtick"] = 1  # no fractions of epochs
    return Figure(data, layout)


def _points(curve: Curve, key: str) -> tuple[AnyArray, FloatArray]:
    return np.array([point["epoch"] for point in curve]), np.array([point[key] for point in curve], float)
