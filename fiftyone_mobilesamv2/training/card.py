"""A trained model's card, and the curve of its training."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.average_recall import KS
from ..modeling.checkpoints.trained_files import PARTS
from ..modeling.complete_files import complete_file
from .progress import Curve

_COLUMNS = ("epoch", "loss", "learning_rate", "score")


def write_curve(curve: Curve, folder: Path) -> None:
    """Writes `curve.csv` and `curve.png`: the loss, and the score on the validation images, of each epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    with complete_file(folder / "curve.csv") as temporary:
        temporary.write_text(text.getvalue())
    with complete_file(folder / "curve.png") as temporary:
        _draw(curve, temporary)


def _draw(curve: Curve, path: Path) -> None:
    from matplotlib.figure import Figure  # here, because importing it takes long

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.subplots()
    left.plot([point["epoch"] for point in curve], [point["loss"] for point in curve], color="tab:blue")
    left.set_xlabel("Epoch")
    left.set_ylabel("Loss", color="tab:blue")
    right = left.twinx()
    scored = [point for point in curve if point["score"] is not None]
    right.plot([point["epoch"] for point in scored], [point["score"] for point in scored], "o-", color="tab:orange")
    right.set_ylabel("Score on validation images", color="tab:orange")
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def measures_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """A Markdown table of what was measured before and after a training; `to_dict()` of both :class:`.Measures`."""
    kind = "masks" if before["of"] == "masks" else "boxes"
    names = {f"AR@{k}": f"AR@{k} of {kind}" for k in KS} | {"IoU from boxes": "mean IoU from boxes"}
    rows = [
        f"| {name} | {before[key]:.3f} | {after[key]:.3f} |" for key, name in names.items() if before[key] is not None
    ]
    return "\n".join(["| measure | before | after |", "|---|---|---|", *rows])


def write_card(
    folder: Path, name: str, part: str, base: str, dataset: str, files: Mapping[str, str], training: Mapping[str, Any]
) -> None:
    """Writes `README.md`.

    Args:
        files: file name -> sha256.
        training: what `config.json` has under this name.
    """
    counts = training["counts"]
    lines = [
        f"# {name}",
        "",
        f"A MobileSAMv2 whose {PARTS[part]} was trained with fiftyone_mobilesamv2 on the FiftyOne dataset `{dataset}` "
        f"(field `{training['field']}`), starting from `{base}`.",
        "",
        f"On {counts['validation images']:,} validation images with {counts['validation objects']:,} objects, which "
        "this training did not use:",
        "",
        measures_table(training["before"], training["after"]),
        "",
        "![Loss and score of each epoch](curve.png)",
        "",
        "## Use",
        "",
        "```python",
        f'model = foz.load_zoo_model("{name}")  # where it is registered',
        'model = fiftyone_mobilesamv2.load_model("path/to/this/folder", None)  # anywhere',
        "```",
        "",
        "`fiftyone-mobilesamv2 models --add path/to/this/folder` registers a copy of this folder on another machine.",
        "",
        "## Training",
        "",
        *(f"- {label}: {count:,}" for label, count in counts.items()),
        f"- images skipped: {len(training['skipped']):,}",
        *(f"- {key}: {value}" for key, value in training["settings"].items()),
        *([f"- stopped early: {training['stopped']}"] if training["stopped"] else []),
        f"- duration: {training['seconds']:,} s",
        "- versions: " + ", ".join(f"{package} {number}" for package, number in training["versions"].items()),
        "",
        "## Files",
        "",
        *(f"- `{file}`: sha256 {sha256}" for file, sha256 in files.items()),
        "",
        "The terms of the base's weights and of the images apply to these weights, too. The detector is trained and "
        "run with ultralytics, which is AGPL-3.0.",
        "",
    ]
    with complete_file(folder / "README.md") as temporary:
        temporary.write_text("\n".join(lines))
