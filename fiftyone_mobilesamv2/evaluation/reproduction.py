"""Reproduces the paper's tables of mask AR on your ground truth, with the paper's figures beside yours.

A run with at most N prompts uses the N boxes with the highest confidence, and the masks of different boxes are
independent. So one run with 320 prompts also gives the results for fewer: AR with at most N prompts is AR@N of that
run, ranked by the detector's confidence. (An empty mask is dropped; AR@N then counts the next best instead.) Grids of
different density have no points in common, so each needs its own run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fiftyone as fo
import numpy as np

from .. import zoo
from ..errors import ArgumentError
from ..labels.fields import GROUND_TRUTH_FIELD
from ..modeling.checkpoints.catalog import DEMO_MODEL
from ..modeling.checkpoints.lookup import pretrained_model
from ..modeling.complete_files import complete_file
from ..modeling.defaults import CONFIDENCE, MAX_PROMPTS
from .average_recall import AREA_RANGES, KS, METRIC_NAMES, AverageRecall
from .coco import load_coco
from .comparison import LABEL_BYTES, OBJECT_AWARE, Measurement, Truth, measure, warm_up
from .instances import read_instances
from .lvis import load_lvis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

GRIDS = (16, 32, 64)
RESULTS_NAME, PICTURE_NAME = "reproduction.json", "reproduction.png"

# The paper's figures, arXiv 2312.09579: AR in percent on 100 images of LVIS, ViT-H encoder unless another is named.
# By K (None: the mean over K): all, small, medium and large objects.
PAPER_AR: dict[str, dict[int | None, tuple[float, ...]]] = {
    OBJECT_AWARE: {
        10: (17.6, 6.4, 35.0, 37.8),
        100: (50.6, 36.3, 73.1, 76.3),
        1000: (59.3, 47.9, 77.1, 79.9),
        None: (42.5, 30.2, 61.7, 64.7),
    },
    "grid_64": {
        10: (12.6, 2.9, 22.7, 45.0),
        100: (44.8, 29.8, 67.6, 73.8),
        1000: (59.2, 46.6, 78.7, 82.4),
        None: (38.9, 26.4, 56.3, 67.1),
    },
    "grid_32": {1000: (57.2,)},
    "grid_16": {1000: (40.0,)},
}
PAPER_AR_BY_PROMPTS = {320: 59.3, 256: 58.5, 192: 56.6, 128: 53.6, 64: 44.8}
PAPER_AR_BY_ENCODER = {"sam_vit_h": 59.3, "efficientvit_l2": 56.3, "tiny_vit": 51.1}
PAPER_MS = {OBJECT_AWARE: 97, "grid_32": 1616, "grid_64": 6464}  # per image, without the encoder

COMPARABLE = (
    "The paper used 100 unnamed images of LVIS val and SAM's ViT-H as the encoder. Its figures are comparable with "
    "these only if the ground truth is LVIS val and the model is a released one with that encoder "
    "(mobilesamv2-vith-torch); in the table by encoder, also EfficientViT-L2 and TinyViT. The paper doesn't name its "
    "GPU: compare ratios of times."
)
DEMO_NOTE = "The demo model was trained only on synthetic scenes: on photos, its figures say nothing about the method."

_MARK = "mobilesamv2_reproduction"
_COLORS = {OBJECT_AWARE: "#ff6d04", "grid_16": "#9db4ff", "grid_32": "#4263eb", "grid_64": "#1b2a80"}


@dataclass
class Reproduction:
    """The measurements; they print as the paper's tables.

    Attributes:
        about: the model, its settings and the ground truth, as in the JSON file.
        measurements: the measurements by the name of the proposals' field: "object_aware", "grid_16", ...
    """

    about: dict[str, Any]
    measurements: dict[str, Measurement] = field(default_factory=dict)

    @property
    def _recalls(self) -> dict[str, AverageRecall]:
        return {name: each.recall for name, each in self.measurements.items() if each.recall is not None}

    def cells(self) -> list[dict[str, Any]]:
        """A dictionary for each figure: "table", "row", "column", "ours", "paper"; AR in percent, or None."""
        cells = []

        def add(table: str, row: str, column: str, ours: float, paper: float | None) -> None:
            percent = None if math.isnan(ours) else 100 * ours
            cells.append({"table": table, "row": row, "column": column, "ours": percent, "paper": paper})

        recalls = self._recalls
        for name, recall in recalls.items():
            metrics = recall.metrics()
            for k in (*KS, None):
                suffix = "" if k is None else f"@{k}"
                by_group = dict(zip(AREA_RANGES, PAPER_AR.get(name, {}).get(k, ())))
                for group in recall.totals:
                    ours = metrics[METRIC_NAMES[group] + suffix]
                    add("Mask AR by object size", f"{name} AR{suffix}", group, ours, by_group.get(group))
        for name, recall in recalls.items():
            if name != OBJECT_AWARE:
                paper = next(iter(PAPER_AR.get(name, {}).get(1000, ())), None)
                add("AR@1000 by sampling", name, "all", recall.metrics()["AR@1000"], paper)
        if OBJECT_AWARE in recalls:
            recall = recalls[OBJECT_AWARE]
            for max_prompts in (320, 256):
                ours = recall.recalls(max_prompts).mean()
                add("AR@1000 by sampling", f"{max_prompts} boxes", "all", ours, PAPER_AR_BY_PROMPTS[max_prompts])
            for max_prompts, paper in PAPER_AR_BY_PROMPTS.items():
                ours = recall.recalls(max_prompts).mean()
                add("AR@1000 by the maximum number of prompts", str(max_prompts), "all", ours, paper)
            encoder = self.about["encoder"]
            ours = recall.metrics()["AR@1000"]
            add("AR@1000 by encoder", encoder, "all", ours, PAPER_AR_BY_ENCODER.get(encoder))
        return cells

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by title; each cell is text, "ours (paper's)"."""
        import pandas as pd

        tables: dict[str, pd.DataFrame] = {}
        for cell in self.cells():
            table = tables.setdefault(cell["table"], pd.DataFrame(dtype=object))
            table.loc[cell["row"], cell["column"]] = _beside(cell["ours"], cell["paper"])
        costs = tables["Cost per image"] = pd.DataFrame(dtype=object)
        for name, measured in self.measurements.items():
            paper = PAPER_MS.get(name)
            costs.loc[name, "prompts"] = f"{measured.prompts:.1f}"
            costs.loc[name, "masks"] = f"{measured.masks:.1f}"
            costs.loc[name, "decoder ms"] = f"{measured.decoder_ms:.1f}"
            costs.loc[name, "all but encoder ms"] = _beside(measured.ms, paper)
            paper_ratio = None if paper is None else paper / PAPER_MS[OBJECT_AWARE]
            costs.loc[name, "times object-aware"] = _beside(self.ratio(name), paper_ratio)
        return tables

    def ratio(self, name: str) -> float | None:
        """Its time without the encoder, divided by that of object-aware prompting; None if that wasn't measured."""
        reference = self.measurements.get(OBJECT_AWARE)
        return self.measurements[name].ms / reference.ms if reference else None

    def notes(self) -> list[str]:
        """Notes for interpreting the figures."""
        notes = [COMPARABLE]
        if self.about["encoder"] == pretrained_model(DEMO_MODEL).encoder:
            notes.append(DEMO_NOTE)
        for name, measured in self.measurements.items():
            if name != OBJECT_AWARE and measured.masks < 1 and self.about["pred_iou_thresh"]:
                notes.append(
                    f"{name}: SAM's filters leave {measured.masks:.1f} masks per image, since this model's predicted "
                    "IoU or stability rarely reaches their thresholds. --no-grid-filters keeps all masks."
                )
            if failures := measured.failures:
                notes.append(
                    f"{name}: {len(failures)} images were not segmented and count as having no proposals; the first: "
                    f"{failures[0]}"
                )
        return notes

    def __str__(self) -> str:
        about = self.about
        objects = next(iter(self._recalls.values())).totals["all"]
        head = (
            f"{about['model']} (encoder {about['encoder']}) on {about['images']} images of {about['annotations']} with "
            f"{objects} objects.\nAR is in percent. In brackets: the paper's figure."
        )
        tables = [f"{title}\n{table.fillna('').to_string()}" for title, table in self.tables().items()]
        return "\n\n".join([head, *tables, *self.notes()])

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file: "metrics" are in 0..1, as in `evaluate_proposals`; "tables" are in percent."""
        measurements = {
            name: {**measured.to_dict(), "times_object_aware": self.ratio(name)}
            for name, measured in self.measurements.items()
        }
        return {**self.about, "measurements": measurements, "tables": self.cells(), "notes": self.notes()}

    def save(self, folder: Path) -> None:
        """Writes `reproduction.json` and `reproduction.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        with complete_file(folder / RESULTS_NAME) as results, complete_file(folder / PICTURE_NAME) as picture:
            results.write_text(json.dumps(self.to_dict(), indent=2))
            self._plot(picture)

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure  # without pyplot, which looks for a display

        figure = Figure(figsize=(16, 5.6), layout="constrained")
        by_k, by_size, by_cost = figure.subplots(1, 3)
        self._plot_by_k(by_k)
        self._plot_by_size(by_size)
        self._plot_by_cost(by_cost)
        for axes in (by_k, by_size, by_cost):
            axes.set_ylim(0, 100)
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
        by_k.plot([], [], "o", color="black", markerfacecolor="white", label="the paper")
        by_k.legend(loc="upper left")
        about = self.about
        figure.suptitle(f"{about['model']} on {about['images']} images of {about['annotations']}: mask AR")
        figure.supxlabel("\n".join(self.notes()), fontsize=8, wrap=True)
        figure.savefig(path, dpi=110)

    def _plot_by_k(self, axes: Axes) -> None:
        for name, recall in self._recalls.items():
            curve = 100 * recall.curve()
            axes.plot(np.arange(1, len(curve) + 1), curve, color=_color(name), label=name)
            paper = {k: values[0] for k, values in PAPER_AR.get(name, {}).items() if k}
            if name == OBJECT_AWARE:
                paper |= {count: ar for count, ar in PAPER_AR_BY_PROMPTS.items() if count < MAX_PROMPTS}
            axes.plot(list(paper), list(paper.values()), "o", color=_color(name), markerfacecolor="white")
        axes.set(xscale="log", title="AR@K, %", xlabel="K: masks per image")

    def _plot_by_size(self, axes: Axes) -> None:
        recalls = self._recalls
        width = 0.8 / len(recalls)
        for number, (name, recall) in enumerate(recalls.items()):
            metrics = recall.metrics()
            x = np.arange(len(AREA_RANGES)) + (number - (len(recalls) - 1) / 2) * width
            ours = [100 * metrics[f"{METRIC_NAMES[group]}@1000"] for group in AREA_RANGES]
            axes.bar(x, ours, width * 0.9, color=_color(name))
            paper = PAPER_AR.get(name, {}).get(1000, ())
            axes.plot(x[: len(paper)], paper, "o", color=_color(name), markerfacecolor="white")
        axes.set_xticks(range(len(AREA_RANGES)), list(AREA_RANGES))
        axes.set(title="AR@1000, %, by object size")

    def _plot_by_cost(self, axes: Axes) -> None:
        for name, recall in self._recalls.items():
            ours = self.measurements[name].ms, 100 * recall.metrics()["AR@1000"]
            axes.plot(*ours, "o", color=_color(name), markersize=9)
            axes.annotate(name, ours, (0, 9), textcoords="offset points", ha="center")
            if name in PAPER_MS:
                paper = PAPER_MS[name], PAPER_AR[name][1000][0]
                axes.plot(*paper, "o", color=_color(name), markerfacecolor="white")
        axes.margins(x=0.2)
        axes.set(xscale="log", title="AR@1000, %, by time", xlabel="ms per image, encoder excluded")


def _beside(ours: float | None, paper: float | None) -> str:
    """Ours, and the paper's in brackets; "-" for a missing figure."""
    our_text, paper_text = ("-" if value is None else f"{value:.1f}" for value in (ours, paper))
    return f"{our_text} ({paper_text})"


def _color(name: str) -> str:
    return _COLORS.get(name, "#868e96")


def reproduce(
    annotations: Path,
    images: Path,
    model: zoo.MobileSAMv2Model,
    output: Path,
    *,
    object_aware: bool = True,
    grids: Sequence[int] = GRIDS,
    confidence: float = CONFIDENCE,
    sample: int = 100,
    seed: int = 0,
    batch_size: int = 4,
) -> Reproduction:
    """Imports the ground truth, segments its images with each prompting method, and measures; keeps all results for the
    App.

    The dataset, "mobilesamv2-reproduce-<annotations>-<model>", is persistent. It has a field of proposals and an
    evaluation for each prompting method: "object_aware" and "ar_object_aware", "grid_32" and "ar_grid_32". It replaces
    the dataset of an earlier reproduction. Results are written to `output` after each method.

    As in SAM's paper, masks of a grid are ranked by the mean of predicted IoU and stability, 1000 per image;
    object-aware ones are ranked by the detector's confidence. Objects are small, medium or large by the area in the
    file.

    Args:
        annotations: a JSON file in COCO format, or LVIS format, whose categories have a `frequency`.
        images: the folder of its images.
        model: the model; this run sets its prompting, maximum number of prompts and detector threshold, and uses its
            grid thresholds.
        output: the folder for `reproduction.json` and `reproduction.png`.
        object_aware: whether to measure object-aware prompting.
        grids: points per side of each grid to measure.
        confidence: the minimum detector score of box prompts.
        sample: maximum number of images to draw at random.
        seed: seed of the draw.
        batch_size: number of images to segment together.

    Raises:
        FileNotFoundError: the JSON file or a listed image doesn't exist.
        ValueError: the file is in neither format; a dataset of that name exists and is not a reproduction's; there is
            nothing to measure; or no image could be segmented.
    """
    if not 0 <= confidence <= 1:
        raise ArgumentError(f"confidence must be between 0 and 1, not {confidence}.")
    fields: dict[str, dict[str, object]] = {}
    if object_aware:
        aware = {"prompting": "object_aware", "max_prompts": MAX_PROMPTS, "confidence_thresh": confidence}
        fields[OBJECT_AWARE] = aware
    fields |= {f"grid_{side}": {"prompting": "grid", "points_per_side": side} for side in grids}
    if not fields:
        raise ArgumentError("Nothing to measure: choose object-aware prompting, a grid, or both.")
    name = dataset_name(annotations, model)
    _check_replaceable(name)
    dataset = _load_ground_truth(annotations, images, sample, seed)
    # An earlier reproduction's dataset is replaced only below, when all arguments have proved valid.
    output.mkdir(parents=True, exist_ok=True)
    config = model.config
    about = {
        "model": config.name,
        "encoder": pretrained_model(config.name).encoder,
        "device": str(model.model.device),
        "dtype": config.dtype,
        "confidence": confidence,
        "pred_iou_thresh": config.pred_iou_thresh,
        "stability_score_thresh": config.stability_score_thresh,
        "annotations": annotations.name,
        "images": len(dataset),
        "seed": seed,
        "dataset": name,
    }
    _keep(dataset, name, about)
    reproduction = Reproduction(about)
    warm_up(model)
    for field_name, settings in fields.items():
        print(f"{field_name}: segmenting and measuring {len(dataset)} images")
        reproduction.measurements[field_name] = measure(
            dataset,
            model,
            field_name,
            settings,
            Truth(GROUND_TRUTH_FIELD, area_field="area"),
            label_bytes=LABEL_BYTES // (len(fields) + 1),  # and one for the ground truth
            batch_size=batch_size,
        )
        reproduction.save(output)
    return reproduction


def dataset_name(annotations: Path, model: zoo.MobileSAMv2Model) -> str:
    """The name of the dataset that :func:`reproduce` keeps."""
    short = model.config.name.removeprefix("mobilesamv2-").removesuffix("-torch")
    return f"mobilesamv2-reproduce-{annotations.stem}-{short}"


def _check_replaceable(name: str) -> None:
    if fo.dataset_exists(name) and _MARK not in fo.load_dataset(name).info:
        raise ArgumentError(f"The dataset {name!r} exists and is not a reproduction's: rename or delete it.")


def _keep(dataset: fo.Dataset, name: str, about: dict[str, Any]) -> None:
    if fo.dataset_exists(name):
        fo.delete_dataset(name)
    dataset.name = name
    dataset.persistent = True
    dataset.info[_MARK] = about
    dataset.save()


def _load_ground_truth(annotations: Path, images: Path, sample: int, seed: int) -> fo.Dataset:
    instances = read_instances(annotations)
    is_lvis = any("frequency" in category for category in instances.categories.values())
    drawn = sample if sample < len(instances.images) else None
    return (load_lvis if is_lvis else load_coco)(images, annotations, drawn, seed, gt_field=GROUND_TRUTH_FIELD)
