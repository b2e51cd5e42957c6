"""Masks in files: written before the database hears of them, and none left behind that it never heard of.

    <folder>/<two digits>/<attempt>/<number>.png            the masks of an image
    <folder>/unconfirmed/<attempt>-<sample>-<field>         a note, until the database has them

A run that is killed leaves such notes; the next one into the same field settles them. Files that the database once knew
are not deleted here: copies of their labels may refer to them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
from bson import ObjectId

from ..modeling.arrays import MaskArray

UNCONFIRMED = "unconfirmed"
NOTE = re.compile(r"([0-9a-f]{24})-([0-9a-f]{24})-(.+)")
GONE = ".gone"


class MaskFiles:
    """The masks of one image.

    Args:
        folder: of its dataset.
        sample_id: of the image.
        label_field: where its labels go.
    """

    def __init__(self, folder: str, sample_id: str, label_field: str) -> None:
        attempt = str(ObjectId())
        self.folder = folder
        self._masks = masks_folder(Path(folder), attempt)
        self._note = Path(folder) / UNCONFIRMED / f"{attempt}-{sample_id}-{quote(label_field, safe='')}"
        self._count = 0

    def add(self, mask: MaskArray) -> str:
        """Writes a mask, bool [h, w], as FiftyOne does: 0 and 1. Returns its path."""
        if not self._count:
            make_folder(self._note.parent)
            _write(self._note, b"")
            _sync(self._note.parent)
            make_folder(self._masks)
        _, content = cv2.imencode(".png", mask.astype(np.uint8))
        path = self._masks / f"{self._count}.png"
        self._count += 1
        _write(path, content.tobytes())
        return str(path)

    @property
    def is_empty(self) -> bool:
        """Whether no mask was written."""
        return not self._count

    def are_there(self) -> bool:
        """Whether they are safely on the disk. A run that was taken for dead, but only slept, has lost them."""
        if not self._count:
            return True
        with suppress(FileNotFoundError):
            _sync(self._masks)
            _sync(self._masks.parents[1])  # which another run may have made just now
            return self._note.exists()
        return False

    def confirm(self) -> None:
        """The database has them."""
        self._note.unlink(missing_ok=True)

    def discard(self) -> None:
        """The database will never have them."""
        remove(self._masks, self._note)


def make_folder(path: Path) -> None:
    """With those that it is in, where they are missing. On the disk, else a power failure would take them back."""
    if not path.is_dir():
        if path.parent != path:
            make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def masks_folder(folder: Path, attempt: str) -> Path:
    return folder / attempt[-2:] / attempt  # ids end in a counter: 256 folders that fill evenly


def remove(masks: Path, note: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(masks)
    note.unlink(missing_ok=True)  # last: without it nobody would look for the masks again


def _sync(folder: Path) -> None:
    """Puts the names of the files in a folder on the disk, where the file system has that."""
    if os.name == "nt":  # which does so by itself, and doesn't open folders
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # one may write to it, and not read it
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
