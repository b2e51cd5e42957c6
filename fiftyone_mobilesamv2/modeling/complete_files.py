"""Files that appear, or replace earlier ones, only when they are complete."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a path in the same folder to write to, which is moved to `path` at the end.

    If writing fails, or the process is killed, an earlier file at `path` is kept.
    """
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{path.name}")  # with the same extension
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
