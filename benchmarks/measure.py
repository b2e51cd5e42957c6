"""Shared code of the benchmarks: interleaved timing, peak memory, test images, and output of the figures."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from ultralytics.utils import ASSETS

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "photos"

_START = time.perf_counter()


@dataclass(frozen=True)
class Row:
    """A figure and its target.

    Attributes:
        target: its number in the list of targets in docs/speed.md.
        value: the figure, in `unit`; "x" means times faster or smaller than the baseline.
        wanted: the minimum value or, with `at_most`, the maximum; None if the figure is for comparison only.
        how: the two sides of a ratio, or what was measured.
        runs: number of runs of each side; value and sides are medians.
    """

    target: int
    name: str
    value: float
    unit: str
    wanted: float | None
    how: str = ""
    runs: int = 1
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.wanted is None or (self.value <= self.wanted if self.at_most else self.value >= self.wanted)

    @property
    def cells(self) -> list[str]:
        if self.wanted is None:
            wanted, verdict = "", ""
        else:
            wanted = f"{'at most' if self.at_most else 'at least'} {_figure(self.wanted, self.unit)}"
            verdict = "met" if self.met else f"short by {_figure(abs(self.value - self.wanted), self.unit)}"
        return [str(self.target), self.name, _figure(self.value, self.unit), wanted, verdict, self.how, str(self.runs)]


COLUMNS = ("", "what", "result", "target", "", "how", "runs")


def _figure(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.2f}x"
    return f"{value:.0f} MB" if unit == "MB" else f"{value:.4g} {unit}".strip()


def speedup(target: int, name: str, wanted: float | None, slow: Sequence[float], fast: Sequence[float]) -> Row:
    """The row of a speed-up, the ratio of the median times in seconds."""
    runs = str(len(fast)) if len(slow) == len(fast) else f"{len(slow)} and {len(fast)}"
    how = f"{_seconds(median(slow))} -> {_seconds(median(fast))}"
    if runs != str(len(fast)):
        how += f" ({runs} runs)"
    return Row(target, name, median(slow) / median(fast), "x", wanted, how, min(len(slow), len(fast)))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


@dataclass
class Report:
    """All figures of a benchmark run.

    Attributes:
        machine: the environment, from :func:`machine`.
        curves: name -> {"x": [...], "y": [...], "xlabel": ..., "ylabel": ..., "exponent": ...}.
        steps: (name, seconds per image), from the released code on, each step with one more part of this package.
    """

    machine: dict = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, dict] = field(default_factory=dict)
    steps: list[tuple[str, float]] = field(default_factory=list)

    def add(self, *rows: Row) -> None:
        """Adds rows and prints them."""
        for row in rows:
            print("   " + " | ".join(cell for cell in row.cells if cell), flush=True)
        self.rows += rows

    def markdown(self) -> str:
        """The table of figures, by target."""
        lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells for row in sorted(self.rows, key=lambda r: r.target))]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def write(self, path: Path) -> None:
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        content = {"machine": self.machine, "rows": rows, "steps": self.steps, "curves": self.curves}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


def machine(device: torch.device) -> dict:
    """The environment that figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def matrix_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of ten products of 2048 x 2048 matrices, as a reference for other figures."""
    size = 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = min(timed(lambda: a @ b) for _ in range(10))
    return 2 * size**3 / seconds / 1e9


def _processor() -> str:
    model = (
        re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if platform.system() == "Linux" else None
    )
    return model[1] if model else platform.processor()


def replace_between(text: str, name: str, content: str) -> str:
    """`text` with `content` between the comments `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: `text` doesn't contain each of these once.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"Expected one {start}, followed by one {end}.")
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


# Time and memory ------------------------------------------------------------------------------------------------------


@contextmanager
def section(title: str) -> Iterator[None]:
    """Prints what is being measured and how long it took."""
    start = time.perf_counter()
    print(f"[{(start - _START) / 60:4.1f} min] {title}", flush=True)
    yield
    print(f"   took {time.perf_counter() - start:.0f} s", flush=True)


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call, including GPU work."""
    gc.collect()
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of several calls, interleaved `runs` times, so that a slowdown of the machine affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    return seconds


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent b of the best fit y = a x^b, by least squares of the logarithms: 1 is linear growth."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def in_new_process(function: Callable, *args: object) -> object:
    """Runs `function(*args)` in a fresh process, so that its memory is not affected by earlier work."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory(call: Callable[[], object]) -> float:
    """The peak increase of this process's memory during a call, in MB. Linux with glibc only."""
    gc.collect()
    # Otherwise the call would reuse memory freed by earlier ones, which would not be counted.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current value
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def resident_memory() -> float:
    """This process's memory in MB."""
    return _memory("VmRSS")


def _memory(name: str) -> float:
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) * 1024 / 1e6


# Test images ---------------------------------------------------------------------------------------------------------


def photo() -> np.ndarray:
    """A street with a bus and people, 1080x810, from ultralytics' wheel; the detector receives it at 1024x768."""
    return read_rgb(ASSETS / "bus.jpg")


def turned(image: np.ndarray) -> list[np.ndarray]:
    """The image and its mirror image, each in four rotations: eight images that cost the same."""
    return [np.ascontiguousarray(np.rot90(i, k)) for i in (image, image[:, ::-1]) for k in range(4)]


def photos(count: int) -> tuple[str, list[np.ndarray]]:
    """The available photos, at most `count`, and a name for them."""
    files = sorted((PHOTOS / "images").glob("*.jpg"))[:count]
    if files:
        return f"{len(files)} COCO photos", [read_rgb(file) for file in files]
    images = turned(photo()) + turned(read_rgb(ASSETS / "zidane.jpg"))
    return "2 photos, mirrored and turned", images[:count]


def read_rgb(path: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def random_boxes(count: int, size: tuple[int, int]) -> np.ndarray:
    """float32 [count, 4] xyxy within `size` (h, w), with log-uniform sides of 4 to 60 % of the image's."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(0.04), np.log(0.6), (count, 2)))
    starts = rng.uniform(0, 1 - sides)
    scale = np.array(size[::-1])
    return np.concatenate([starts * scale, (starts + sides) * scale], 1).astype(np.float32)
