"""Worker processes with limited memory and time, which are started anew when they die. Linux only."""

from __future__ import annotations

import logging
import multiprocessing
import re
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Generic, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")

MAX_SECONDS = 60  # of a call
MAX_MEMORY = 2_000_000_000  # bytes that a worker may allocate beyond those it has when it is ready
_MAX_START_SECONDS = 300
_PROCESSES = multiprocessing.get_context("spawn")


class WorkerError(Exception):
    """A call raised an exception, killed its worker, or took too long."""


@dataclass
class Worker(Generic[Argument, Result]):
    """A process that calls a function; use as a context manager.

    Attributes:
        prepare: called once in the process; returns the function.
        starts: how often the process was started.
        slowest: seconds of the slowest call that returned.
        peak_memory: the most memory, in bytes, that the process has used beyond what it used when it was ready.
    """

    prepare: Callable[[], Callable[[Argument], Result]]
    max_seconds: float = MAX_SECONDS
    max_memory: int = MAX_MEMORY
    starts: int = 0
    slowest: float = 0.0
    peak_memory: int = 0

    def __enter__(self) -> Worker[Argument, Result]:
        self._start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop()

    def __call__(self, argument: Argument) -> Result:
        """Raises WorkerError if the call fails; the next call then finds a new process."""
        if not self._process.is_alive():
            self._start()
        self._connection.send(argument)
        result, error, seconds, memory = self._receive(self.max_seconds)
        self.slowest, self.peak_memory = max(self.slowest, seconds), max(self.peak_memory, memory)
        if error is not None:
            raise WorkerError(error)
        return result

    def _start(self) -> None:
        self._connection, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=_serve, args=(theirs, self.prepare, self.max_memory), daemon=True)
        self._process.start()
        theirs.close()
        self.starts += 1
        self._receive(_MAX_START_SECONDS)

    def _stop(self) -> int | None:
        self._process.kill()
        self._process.join()
        self._connection.close()
        return self._process.exitcode

    def _receive(self, seconds: float) -> tuple[Result, str | None, float, int]:
        if not self._connection.poll(seconds):
            self._stop()
            raise WorkerError(f"did not end within {seconds:.0f} s")
        try:
            return self._connection.recv()
        except EOFError as error:
            self._process.join()
            self._connection.close()
            raise WorkerError(f"the process ended with exit code {self._process.exitcode}") from error


def _serve(connection: Connection, prepare: Callable[[], Callable[[Argument], Result]], max_memory: int) -> None:
    logging.disable()  # thousands of bad files are reported otherwise
    function = prepare()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + max_memory, hard))
    ready = _memory("VmRSS")
    connection.send((None, None, 0.0, 0))
    while True:
        try:
            argument = connection.recv()
        except EOFError:  # the parent has ended
            return
        start, result, error = time.perf_counter(), None, None
        try:
            result = function(argument)
        except Exception:  # the parent raises it
            error = traceback.format_exc()
        connection.send((result, error, time.perf_counter() - start, max(0, _memory("VmHWM") - ready)))


def _memory(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) * 1024
