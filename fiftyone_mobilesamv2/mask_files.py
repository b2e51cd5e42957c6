"""Masks in files: written before the database hears of them, and none left behind that it never heard of.

    <folder>/<two digits>/<attempt>/<number>.png    the masks of an image
    <folder>/unconfirmed/<attempt>                  whose they are, until the database has them

A run that is killed leaves such notes; the next one into the same field settles them. Files that the database once knew
are never deleted here: copies of their labels may refer to them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from bson import ObjectId

_UNCONFIRMED = "unconfirmed"


class MaskFiles:
    """The masks of one image.

    Args:
        folder: of its dataset.
        sample_id: of the image.
        label_field: where its labels go.
    """

    def __init__(self, folder: str, sample_id: str, label_field: str) -> None:
        attempt = str(ObjectId())
        self._masks = _masks_folder(Path(folder), attempt)
        self._note = Path(folder) / _UNCONFIRMED / attempt
        self._content = {"sample_id": sample_id, "label_field": label_field}
        self._count = 0

    def add(self, mask: np.ndarray) -> str:
        """Writes a mask, bool [h, w], as FiftyOne does: 0 and 1. Returns its path once it is safely on the disk."""
        if not self._count:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            draft = self._note.with_suffix(".draft")
            _write(draft, json.dumps(self._content).encode())
            draft.rename(self._note)  # at once and wholly: others may be reading
            self._masks.mkdir(parents=True)
        _, content = cv2.imencode(".png", mask.astype(np.uint8))
        path = self._masks / f"{self._count}.png"
        self._count += 1
        _write(path, content.tobytes())
        return str(path)

    def confirm(self) -> None:
        """The database has them."""
        self._note.unlink(missing_ok=True)

    def discard(self) -> None:
        """The database will never have them."""
        _remove(self._masks, self._note)


def settle(folder: str, is_mine: Callable[[str, str], bool], is_stored: Callable[[str, str], bool]) -> int:
    """Deletes what runs that were killed have left: masks that the database doesn't know of.

    Args:
        folder: of the dataset.
        is_mine: (id of the sample, field): whether no other run may be writing these just now.
        is_stored: (id of the sample, name of a folder): whether its labels refer to files in such a folder.

    Returns:
        of how many images.
    """
    notes = Path(folder) / _UNCONFIRMED
    deleted = 0
    for note in sorted(notes.iterdir()) if notes.is_dir() else ():
        if not ObjectId.is_valid(note.name):
            continue
        try:
            left = json.loads(note.read_bytes())
        except FileNotFoundError:  # settled by another run
            continue
        if not is_mine(left["sample_id"], left["label_field"]):
            continue
        if is_stored(left["sample_id"], note.name):
            note.unlink(missing_ok=True)
        else:
            _remove(_masks_folder(Path(folder), note.name), note)
            deleted += 1
    return deleted


def _masks_folder(folder: Path, attempt: str) -> Path:
    return folder / attempt[-2:] / attempt  # ids end in a counter: 256 folders that fill evenly


def _remove(masks: Path, note: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(masks)
    note.unlink(missing_ok=True)  # last: without it nobody would look for the masks again


def _write(path: Path, content: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
