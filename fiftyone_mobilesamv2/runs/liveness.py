"""Tells whether a run is still storing masks: its process is running, and sends heartbeats."""

from __future__ import annotations

import os
import socket
from datetime import datetime, timedelta
from pathlib import Path

import fiftyone.core.odm as foo
import psutil

from ..fiftyone_internals import Document
from .retry import MAX_WAIT, retry_while_unavailable

# A run is considered dead after this time without a heartbeat: longer than it waits for the database.
MAX_SILENCE = timedelta(seconds=MAX_WAIT + 60)
active: set[str] = set()  # ids of the runs of this process
_START_TICKS = 19  # index of the start time among the values after the name in /proc/<pid>/stat; see proc(5)


def is_alive(document: Document, now: datetime) -> bool:
    """Whether the run of a document in the record is still storing masks.

    Args:
        document: has "ended", "owner" (see :func:`this_process`) and "seen", the time of the last heartbeat.
        now: the server's time, see :func:`server_time`.
    """
    owner, seen = document.get("owner"), document.get("seen")
    if document.get("ended") or not isinstance(owner, dict) or not isinstance(seen, datetime):
        return False
    this = this_process()
    if owner == this:
        return document["run"]["run_id"] in active
    # Silent although its process is running: it is suspended, or the database was away when it ended.
    return now - seen <= MAX_SILENCE and not (owner.get("machine") == this["machine"] and _has_ended(owner))


def server_time() -> datetime:
    """The time of the database server, with which heartbeats are stored: clocks of machines differ."""
    now: datetime = retry_while_unavailable(lambda: foo.get_db_conn().command("hello"))["localTime"]
    return now


def this_process() -> Document:
    """What identifies this process: its host, the machine since its last start, the id, and the start time."""
    host = socket.gethostname()
    return {
        "host": host,
        "machine": f"{host} {_read('/proc/sys/kernel/random/boot_id')} {_namespace()}",
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _has_ended(owner: Document) -> bool:
    """Whether a process of this machine has ended. A zombie has."""
    try:
        if psutil.Process(owner.get("pid")).status() == psutil.STATUS_ZOMBIE:
            return True
        # Otherwise, another process has its id.
        return owner.get("started") != _started(owner["pid"])
    except psutil.NoSuchProcess:
        return True


def _started(pid: int) -> str:
    """The start time of a process, which does not change when the clock is set."""
    try:
        # The name, in parentheses, may contain spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START_TICKS]
    except (FileNotFoundError, ProcessLookupError):  # not Linux; or the process has ended, so that psutil raises
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
