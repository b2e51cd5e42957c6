"""Tells whether the process that owns a run is still running."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil

from ..fiftyone_internals import Document

_START_TICKS = 19  # index of the start time among the values after the name in /proc/<pid>/stat; see proc(5)


def this_process() -> Document:
    """What identifies this process: its host, the machine since its last start, the id, and the start time."""
    host = socket.gethostname()
    return {
        "host": host,
        "machine": f"{host} {_read('/proc/sys/kernel/random/boot_id')} {_namespace()}",
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def has_ended(owner: Document) -> bool:
    """Whether a process of this machine, as :func:`this_process` described it, has ended; zombies have."""
    try:
        if psutil.Process(owner["pid"]).status() == psutil.STATUS_ZOMBIE:
            return True
        return _started(owner["pid"]) != owner["started"]  # otherwise, another process has its id
    except psutil.NoSuchProcess:
        return True


def _started(pid: int) -> str:
    """The start time of a process, which does not change when the clock is set."""
    try:
        # The name, in parentheses, may contain spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START_TICKS]
    except FileNotFoundError:  # not Linux, where psutil's value depends on the clock; or the process has ended
        return str(psutil.Process(pid).create_time())


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # not Linux
        return ""


def _namespace() -> str:
    try:  # containers on one machine may share a host name but have separate process ids
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
