"""Masks in files: written before the database refers to them; files that it never refers to are cleaned up.

    <folder>/<two digits>/<attempt>/<number>.png            the masks of an image
    <folder>/unconfirmed/<attempt>-<sample>-<field>         a marker file, until the database refers to the masks

A killed run leaves such marker files; the next run into the same field settles them: it deletes masks that no label
refers to. Files that the database ever referred to are not deleted here, since copied labels may still refer to them.
"""

from __future__ import annotations

import errno
import hashlib
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
HASH_PREFIX = "="  # of a hash in place of a long field name; the marker file contains the name
_MAX_NAME = 150  # file names are limited to 255 bytes, of which the ids and GONE take 55


class MaskFiles:
    """The masks of one image.

    Args:
        folder: the mask folder of its dataset.
        sample_id: the id of its sample.
        label_field: the field for its labels.
        attempt: the id of the attempt that wrote them; None: new masks.
    """

    def __init__(self, folder: str, sample_id: str, label_field: str, attempt: str | None = None) -> None:
        attempt = attempt or str(ObjectId())
        self.folder = folder
        self._masks = masks_folder(Path(folder), attempt)
        self._label_field = label_field.encode()
        name = quote(label_field, safe="")
        if len(name) > _MAX_NAME:
            name = HASH_PREFIX + hashlib.sha256(self._label_field).hexdigest()
        self._note = Path(folder) / UNCONFIRMED / f"{attempt}-{sample_id}-{name}"
        self._count = 0

    @classmethod
    def of(cls, masks: Path, sample_id: str, label_field: str) -> MaskFiles | None:
        """The masks that were written to the folder `masks`; None if no instance of this class has written them."""
        if len(masks.parents) < 2 or not ObjectId.is_valid(masks.name):
            return None
        files = cls(str(masks.parents[1]), sample_id, label_field, masks.name)
        return files if files._masks == masks and masks.is_dir() else None

    def add(self, mask: MaskArray) -> str:
        """Writes a mask, bool [h, w], with FiftyOne's values 0 and 1. Returns its path."""
        if not self._count:
            self.mark()
            make_folder(self._masks)
        _, content = cv2.imencode(".png", mask.astype(np.uint8))
        path = self._masks / f"{self._count}.png"
        self._count += 1
        _write(path, content.tobytes())
        return str(path)

    def mark(self) -> None:
        """Writes the marker file, so that the masks are deleted unless the database refers to them."""
        make_folder(self._note.parent)
        _write(self._note, self._label_field)
        _sync(self._note.parent)

    @property
    def is_empty(self) -> bool:
        """Whether no masks were written."""
        return not self._count

    def are_on_disk(self) -> bool:
        """Flushes the masks to disk. Returns False if another run deleted them because it considered this run dead."""
        if not self._count:
            return True
        with suppress(FileNotFoundError):
            _sync(self._masks)
            _sync(self._masks.parents[1])  # another run may have created it just now
            return self._note.exists()
        return False

    def are_confirmable(self) -> bool:
        """Whether no other run has deleted the masks since :meth:`are_on_disk`."""
        return not self._count or self._note.exists()

    def confirm(self) -> None:
        """Removes the marker file: the database now refers to the masks."""
        self._note.unlink(missing_ok=True)

    def discard(self) -> None:
        """Deletes the masks and the marker file: the database will not refer to them."""
        remove(self._masks, self._note)


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, and flushes them to disk so that they survive a power failure."""
    if not path.is_dir():
        if path.parent != path:
            make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def masks_folder(folder: Path, attempt: str) -> Path:
    return folder / attempt[-2:] / attempt  # ids end in a counter, so 256 folders fill evenly


def remove(masks: Path, note: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(masks)
    note.unlink(missing_ok=True)  # last: without the marker, no run would look for the masks again


def _sync(folder: Path) -> None:
    """Flushes a folder's entries to disk, if the file system supports it."""
    if os.name == "nt":  # Windows flushes by itself and can't open folders
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # the folder may be writable but not readable
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
