"""Draws the benchmark results as charts."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from measure import Report, Row

_MET, _SHORT, _PLAIN = "#2a9d8f", "#e76f51", "#8d99ae"


def draw(report: Report, folder: Path) -> list[Path]:
    """Writes charts of ratios, growth and steps as PNG files."""
    figures = {"ratios": ratios(report.rows), "growth": growth(report.curves), "steps": steps(report.steps)}
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"benchmarks-{name}.png")
        figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
    return paths


def ratios(rows: list[Row]) -> Figure:
    """Speed-ups, with a tick at each target."""
    rows = sorted((row for row in rows if row.unit == "x"), key=lambda row: row.target)[::-1]
    figure = Figure(figsize=(9, 0.27 * len(rows) + 1))
    axes = figure.subplots()
    colors = [_PLAIN if row.wanted is None else _MET if row.met else _SHORT for row in rows]
    bars = axes.barh([f"{row.name} ({row.target})" for row in rows], [row.value for row in rows], color=colors)
    axes.bar_label(bars, [f"{row.value:.1f}" for row in rows], padding=3, fontsize=7)
    for place, row in enumerate(rows):
        if row.wanted is not None:
            axes.plot([row.wanted] * 2, [place - 0.4, place + 0.4], color="black")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.tick_params("y", labelsize=7)
    axes.set_xlabel("times faster than the baseline; black: target")
    return figure


def growth(curves: dict[str, dict]) -> Figure:
    figure = Figure(figsize=(4 * len(curves), 3.4), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        axes.plot(curve["x"], curve["y"], "o-", color=_MET)
        if "exponent" in curve:
            axes.loglog()
            name += f": exponent {curve['exponent']:.2f}"
        else:
            axes.set_ylim(0, 1.2 * max(curve["y"]))
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(curve["xlabel"])
        axes.set_ylabel(curve["ylabel"])
    return figure


def steps(stages: list[tuple[str, float]]) -> Figure:
    """Seconds per image, with one more stage replaced in each bar, and the time that each step saves."""
    names, seconds = zip(*stages)
    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots()
    axes.bar(names, seconds, color=[_PLAIN] + [_MET] * (len(names) - 1))
    for place in range(1, len(seconds)):
        saved = seconds[place - 1] - seconds[place]
        axes.bar(place, saved, bottom=seconds[place], color="none", edgecolor=_PLAIN, linestyle=":")
    for place, value in enumerate(seconds):
        label = f"{value:.1f} s\n{seconds[0] / value:.1f}x"
        axes.annotate(label, (place, seconds[max(place - 1, 0)]), ha="center", va="bottom", fontsize=8)
    axes.set_ylim(0, 1.2 * seconds[0])
    axes.set_ylabel("s for an image with 320 prompts")
    axes.tick_params("x", labelrotation=30)
    for label in axes.get_xticklabels():
        label.set_ha("right")
    return figure
