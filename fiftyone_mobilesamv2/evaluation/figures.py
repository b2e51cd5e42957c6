"""The figures of evaluations and runs, as plotly's JSON: notebooks and the SegEvery panel draw the same ones.

Plotly reads texts as HTML with links, so names of fields, evaluations and stages are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..modeling.arrays import AnyArray, FloatArray
from .average_recall import IOU_THRESHOLDS, AverageRecall

if TYPE_CHECKING:
    from ..runs.record import SegmentationRun

COLORS = ("#ff6d04", "#4c8dff", "#2fa84f", "#e0518a", "#9775fa", "#16a5b8", "#a9825a")  # for dark and light backgrounds
_CURVE_POINTS = 100
_BINS = 20
_IOU_HOVER = "IoU %{x}: recall %{y:.3f}"
PlotlyJSON = dict[str, Any]  # a Plotly object
_Values = Sequence[object] | AnyArray
_BACKGROUND = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}


class Figure(NamedTuple):
    """Plotly's `data` and `layout`."""

    data: list[PlotlyJSON]
    layout: PlotlyJSON


class Line(NamedTuple):
    """A line of a figure: a group of the objects of a run."""

    name: str
    recall: AverageRecall
    group: str = "all"


def recall_by_k(lines: Sequence[Line]) -> Figure:
    """AR@K of each line at about 100 values of K, including the run's own, which are drawn as larger points."""
    data = []
    for number, (name, recall, group) in enumerate(lines):
        curve = recall.curve(group)
        ks = np.unique(np.geomspace(1, len(curve), _CURVE_POINTS).round().astype(int).tolist() + list(recall.ks))
        sizes = np.where(np.isin(ks, recall.ks), 9, 4).tolist()
        data.append(line_trace(name, number, ks, curve[ks - 1], "K=%{x}: AR %{y:.3f}", sizes))
    layout = figure_layout("K", "AR", len(lines) > 1)
    layout["xaxis"] |= {"type": "log", "dtick": 1}
    return Figure(data, layout)


def recall_by_iou(lines: Sequence[Line], k: int | None = None) -> Figure:
    """The share of objects that each line finds within `k` proposals (None: its largest K), by IoU threshold."""
    data = [
        line_trace(name, number, IOU_THRESHOLDS.round(2), recall.recalls(k or recall.ks[-1], group), _IOU_HOVER, 7)
        for number, (name, recall, group) in enumerate(lines)
    ]
    title = "recall at the largest K" if k is None else f"recall at K={k}"
    return Figure(data, figure_layout("IoU threshold", title, len(lines) > 1))


def recall_by_group(runs: Mapping[str, AverageRecall]) -> Figure:
    """AR at the largest K of each group of objects. The `ids` of the bars are the groups."""
    groups = list(dict.fromkeys(g for recall in runs.values() for g, total in recall.totals.items() if total))
    data = []
    for number, (name, recall) in enumerate(runs.items()):
        totals = [recall.totals.get(group, 0) for group in groups]
        values = [float(recall.recalls(recall.ks[-1], g).mean()) if n else None for g, n in zip(groups, totals)]
        text = [f"{n:,} objects" for n in totals]
        data.append(_bar(name, number, groups, values, "%{x}: AR %{y:.3f}, %{hovertext}", ids=groups, hovertext=text))
    return Figure(data, figure_layout(None, "AR at the largest K", len(runs) > 1))


def objects_per_image(counts: Mapping[str, Sequence[int]]) -> Figure:
    """A histogram of the number of objects per image, for each field. The `ids` of the bars are "min-max" objects."""
    top = max((max(each, default=0) for each in counts.values()), default=0)
    width = top // _BINS + 1
    lows = np.arange(0, top + 1, width)
    names = [str(low) if width == 1 else f"{low}-{low + width - 1}" for low in lows]
    ids = [f"{low}-{low + width - 1}" for low in lows]
    data = []
    for number, (name, each) in enumerate(counts.items()):
        images = np.bincount(np.asarray(each, int) // width, minlength=len(lows))
        data.append(
            _bar(name, number, lows + (width - 1) / 2, images, "%{hovertext} objects: %{y}", ids=ids, hovertext=names)
        )
    layout = figure_layout("objects per image", "images", len(counts) > 1)
    if max(max(trace["y"]) for trace in data) < 6:
        layout["yaxis"]["dtick"] = 1  # no fractions of images
    return Figure(data, layout)


def time_per_stage(runs: Mapping[str, SegmentationRun]) -> Figure:
    """Milliseconds per image for each stage of each field's run; "other" is the rest of its total time."""
    stages = list(dict.fromkeys(stage for run in runs.values() for stage in run.seconds if stage != "total"))
    data = []
    for number, stage in enumerate([*stages, "other"]):
        values = []
        for run in runs.values():
            known = {name: seconds for name, seconds in run.seconds.items() if name != "total"}
            seconds = known | {"other": max(0.0, run.seconds["total"] - sum(known.values()))}
            values.append(1000 * seconds.get(stage, 0) / run.images)
        hover = f"{escape(stage, quote=False)}: %{{x:.0f}} ms"
        names = [escape(name, quote=False) for name in runs]
        data.append(_bar(stage, number, values, names, hover, orientation="h"))
    layout = figure_layout("ms per image", None, True) | {"barmode": "stack", "height": 130 + 30 * len(runs)}
    layout["yaxis"]["autorange"] = "reversed"  # the first bar on top
    return Figure(data, layout)


def line_trace(name: str, number: int, x: AnyArray, y: FloatArray, hover: str, size: int | list[int]) -> PlotlyJSON:
    """A line with a point at each value, in the color with this number; NaN leaves a gap."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(name, quote=False),
        "x": x.tolist(),
        "y": _numbers(y),
        "line": {"color": _color(number)},
        "marker": {"size": size, "opacity": 1, "line": {"width": 0}},
        "hovertemplate": f"{hover}<extra></extra>",
    }


def _bar(name: str, number: int, x: _Values, y: _Values, hover: str, **more: object) -> PlotlyJSON:
    return {
        "type": "bar",
        "name": escape(name, quote=False),
        "x": np.asarray(x).tolist(),
        "y": np.asarray(y).tolist(),
        "marker": {"color": _color(number)},
        "hovertemplate": f"{hover}<extra></extra>",
        **more,
    }


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _numbers(values: FloatArray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def figure_layout(x: str | None, y: str | None, legend: bool) -> PlotlyJSON:
    """The layout of a figure with these titles of its axes."""
    return _BACKGROUND | {
        "height": 260,
        "margin": {"t": 28 if legend else 8, "l": 56, "r": 16, "b": 44 if x else 24},
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}, "rangemode": "tozero"},
        "hovermode": "closest",
        "showlegend": legend,
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "x": 0,
            "y": 1,
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
            "font": {"size": 12},
        },
    }
