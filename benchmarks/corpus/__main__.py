"""Gives files and labels with wrong values to everything that reads them: is each used correctly or refused clearly?

    python benchmarks/corpus --cases 2000

Prints a table of what each consumer did with its cases, and each violation. The cases are the same in every run; a
larger number adds cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from consumers import CONSUMERS, Consuming
from files import Loading, files
from labels import GROUND_TRUTH, PREDICTIONS, labels
from mutations import cases_of
from workers import Worker, WorkerError

LOADERS = ("load_coco", "load_lvis")
BATCH = 50  # images in a call
COLUMNS = ("consumer", "cases", "used", "refused", "violations", "seconds", "slowest call", "peak memory", "restarts")


@dataclass
class Row:
    """What a consumer did with its cases.

    Attributes:
        outcomes: "used", "refused" (the file, the image, or the whole call) and "violations" -> number of cases.
        slowest: seconds of the slowest call, of a file or of a batch of images.
        peak_memory: bytes that a worker needed at most beyond what it had before its first call.
        restarts: number of workers that died or were ended because they took too long.
    """

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: float = 0.0
    peak_memory: int = 0
    restarts: int = 0

    @property
    def cells(self) -> list[str]:
        counts = [self.outcomes.total(), *(self.outcomes[name] for name in ("used", "refused", "violations"))]
        times = f"{self.seconds:.0f} s", f"{self.slowest:.1f} s"
        return [self.name, *map(str, counts), *times, f"{self.peak_memory / 1e6:.0f} MB", str(self.restarts)]


def run(cases: int, show: Callable[[str], None]) -> list[Row]:
    """Gives each consumer its share of the cases; `show` gets lines about violations."""
    names = [*LOADERS, *CONSUMERS]
    share = -(-cases // len(names))
    rows = []
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        for name in names:
            row = Row(name)
            start = time.perf_counter()
            prepare = partial(Loading if name in LOADERS else Consuming, name, Path(folder))
            with Worker(prepare) as worker:
                for batch in _batches(name, share):
                    row.outcomes.update(_outcomes(worker, batch, show))
                row.slowest, row.peak_memory, row.restarts = worker.slowest, worker.peak_memory, worker.starts - 1
            row.seconds = time.perf_counter() - start
            show(_line(row.cells))
            rows.append(row)
    return rows


def _batches(name: str, count: int) -> Iterator[Sequence[Any]]:
    if name in LOADERS:
        yield from ([text] for text in _files(count))
        return
    consumer = CONSUMERS[name]
    fields = [name for name in (PREDICTIONS, GROUND_TRUTH) if name in consumer.reads]
    places = product(consumer.kinds, fields)
    cases = _labels(count, tuple((kind, name) for kind, name in places if consumer.kind_in(name, kind) == kind))
    for kind in consumer.kinds:
        of_kind = [case for case in cases if case.kind == kind]
        for start in range(0, len(of_kind), BATCH):
            yield of_kind[start : start + BATCH]


@lru_cache
def _files(count: int) -> list[str]:
    return cases_of(files(), count)


@lru_cache
def _labels(count: int, places: tuple[tuple[str, str], ...]) -> list[Any]:
    return cases_of(labels(places), count)


def _outcomes(worker: Worker[Any, list[str]], batch: Sequence[Any], show: Callable[[str], None]) -> Counter[str]:
    """The outcomes of cases. If their call fails, each half is tried alone, to find the case that made it fail."""
    try:
        outcomes = worker(batch)
    except WorkerError as error:
        if len(batch) == 1:
            show(f"VIOLATION by {batch[0]!r:.2000}\n{error}")
            return Counter(violations=1)
        middle = len(batch) // 2
        return _outcomes(worker, batch[:middle], show) + _outcomes(worker, batch[middle:], show)
    counts: Counter[str] = Counter()
    for case, outcome in zip(batch, outcomes):
        kind = outcome.split(":")[0]
        if kind == "violation":
            show(f"VIOLATION by {case!r:.2000}\n{outcome}")
        counts[{"used": "used", "violation": "violations"}.get(kind, "refused")] += 1
    return counts


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@contextmanager
def _database() -> Iterator[None]:
    """A MongoDB of its own, unless the environment names one."""
    if os.environ.get("FIFTYONE_DATABASE_URI"):
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    package = Path(importlib.util.find_spec("fiftyone").submodule_search_locations[0])
    with tempfile.TemporaryDirectory(prefix="corpus-database-") as folder:
        options = ["--dbpath", folder, "--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket"]
        process = subprocess.Popen([package / "db" / "bin" / "mongod", *options], stdout=subprocess.DEVNULL)
        os.environ["FIFTYONE_DATABASE_URI"] = f"mongodb://127.0.0.1:{port}/?serverSelectionTimeoutMS=60000"
        try:
            yield
        finally:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="number of cases of all consumers together")
    args = parser.parse_args()
    os.environ |= {"FIFTYONE_DO_NOT_TRACK": "true", "YOLO_AUTOINSTALL": "false", "OMP_NUM_THREADS": "1"}
    print(f"{_line(COLUMNS)}\n{_line(['---'] * len(COLUMNS))}", flush=True)
    with _database():
        rows = run(args.cases, partial(print, flush=True))
    total = sum((row.outcomes for row in rows), Counter())
    print(f"\n{total.total():,} cases, {total['violations']} violations")
    return 1 if total["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
