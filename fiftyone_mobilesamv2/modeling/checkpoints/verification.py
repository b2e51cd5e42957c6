"""Verifies weights files by size and hash, or by the hash recorded when the file was first used."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, message_of
from ..complete_files import complete_file
from .catalog import Weights

logger = logging.getLogger(__name__)

COPY_AGAIN = "copy the trained model's whole folder again"
_WEB_PAGE = (b"<!doctype html", b"<html")


def verify(path: Path, weights: Weights, reread: bool = False) -> None:
    """Checks that the file at `path` is `weights`.

    Its size and hash are compared with the catalog's if known, otherwise with those recorded when it was first used.

    Args:
        reread: read the file again even if it has not changed since it was last verified.

    Raises:
        CheckpointError: it is another file.
    """
    if problem := find_problem(path, weights, record_path(path), reread):
        remedy = "move it away to download it again"
        if not weights.sources:
            remedy = "reinstall fiftyone_mobilesamv2" if weights.is_packaged else COPY_AGAIN
        raise CheckpointError(f"{path} {problem}; {remedy}.")


def find_problem(path: Path, weights: Weights, record: Path, reread: bool = False) -> str | None:
    """What is wrong with the file at `path`, as a sentence without its subject, the file; None if nothing is wrong.

    The hashes of a valid file are saved in the file `record`.
    """
    try:
        stat = path.stat()
        if weights.size is not None and stat.st_size != weights.size:
            return (
                f"is not {weights.filename}: it has {stat.st_size:,} bytes{_if_web_page(path)}, expected "
                + weights.describe()
            )
        known = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        recorded = read_record(record)
        recorded_hashes = recorded.get("sha256"), recorded.get("git_blob")
        if not reread and known.items() <= recorded.items() and _matches(weights, *recorded_hashes):
            return None
        sha256, git_blob = file_hashes(path)
        if not _matches(weights, sha256, git_blob):
            return (
                f"is not {weights.filename}: its sha256 is {sha256}{_if_web_page(path)}, expected {weights.describe()}"
            )
    except OSError as error:
        return f"can't be read ({error.strerror or error})"
    if not (weights.sha256 or weights.git_blob) and recorded and recorded_hashes[0] != sha256:
        return (
            f"has changed since {weights.filename} was first used: its sha256 was {recorded_hashes[0]} and is "
            f"{sha256} now. If this is intended, delete {record}; otherwise"
        )
    if weights.sources:  # nothing should be written beside the package's own files or into a trained model's folder
        _write_record(record, {**known, "sha256": sha256, "git_blob": git_blob})
    return None


def file_sha256(path: Path) -> str:
    """The sha256 of a file, taken from its record if the file has not changed since."""
    stat = path.stat()
    return _file_sha256(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=100)
def _file_sha256(path: Path, mtime_ns: int, size: int) -> str:
    record = read_record(record_path(path))
    if {"size": size, "mtime_ns": mtime_ns}.items() <= record.items() and "sha256" in record:
        recorded: str = record["sha256"]
        return recorded
    return file_hashes(path)[0]


def file_hashes(path: Path) -> tuple[str, str]:
    """The sha256 and git blob id of a file, as hex strings."""
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def record_path(path: Path) -> Path:
    """Path of the record of a verified file's hashes."""
    return path.with_name(path.name + ".verified.json")


def read_record(record: Path) -> dict[str, Any]:
    """The recorded hashes, size and modification time of a file; empty if there is no record."""
    try:
        content = json.loads(record.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or message_of(error)
        raise CheckpointError(f"{record} can't be read ({cause}); delete it.") from error
    return content if isinstance(content, dict) else {}


def _write_record(record: Path, content: dict[str, Any]) -> None:
    try:
        with complete_file(record) as temporary:  # another process may be reading
            temporary.write_text(json.dumps(content))
    except OSError as error:
        logger.debug("Could not write %s: %s", record, error)


def _matches(weights: Weights, sha256: str | None, git_blob: str | None) -> bool:
    return weights.sha256 in (None, sha256) and weights.git_blob in (None, git_blob)


def _if_web_page(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(100).lstrip().lower().startswith(_WEB_PAGE):
            return " of a web page (this network may require you to log in first)"
    return ""
