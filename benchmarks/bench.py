"""Measures every figure of docs/speed.md in one run: `make bench`.

Prints its progress and a table; writes assets/benchmarks.json, the charts beside it, and the page's table.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ |= {"FIFTYONE_DO_NOT_TRACK": "true", "YOLO_AUTOINSTALL": "false"}

import charts
import core
import dataset
import torch
from measure import ROOT, Report, machine, replace_between


def main() -> None:
    # core.py measures GPUs; this benchmark is for machines without one.
    report = Report(machine(torch.device("cpu")))
    print(report.machine, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        released = core.measure(report, Path(folder), "cpu")
        dataset.measure(report, Path(folder), released)
    print(f"\n{report.markdown()}\n\n{sum(not row.met for row in report.rows)} figures fall short of their targets.")
    report.write(ROOT / "assets" / "benchmarks.json")
    charts.draw(report, ROOT / "assets")
    page = ROOT / "docs" / "speed.md"
    text = f"{report.machine['device']}, {report.machine['threads']} threads:\n\n{report.markdown()}"
    page.write_text(replace_between(page.read_text(), "benchmarks", text))


if __name__ == "__main__":
    main()
