"""What killed processes have left of masks in files: found by their notes, and deleted."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import fiftyone.core.odm as foo
from bson import CodecOptions, ObjectId
from bson.raw_bson import RawBSONDocument

from .mask_files import GONE, NOTE, UNCONFIRMED, masks_folder, remove


def settle(
    folder: str, is_mine: Callable[[str, str], bool], is_stored: Callable[[str, str], bool], min_age: float = 0
) -> int:
    """Deletes what runs that were killed have left: masks that the database doesn't know of.

    Args:
        folder: of the dataset.
        is_mine: (id of the sample, field): whether no other run may be writing these just now.
        is_stored: (id of the sample, name of a folder): whether any labels refer to files in such a folder.
        min_age: seconds that masks must have been there.

    Returns:
        of how many images.
    """
    notes = Path(folder) / UNCONFIRMED
    deleted = 0
    for note in sorted(notes.iterdir()) if notes.is_dir() else ():
        match = NOTE.fullmatch(note.name.removesuffix(GONE))
        if match is None or not is_mine(match[2], unquote(match[3])):
            continue
        with suppress(FileNotFoundError):  # settled by another run
            if min_age and time.time() - note.stat().st_mtime < min_age:
                continue
            if not note.name.endswith(GONE):
                # First this: a process that only slept must not store them any more.
                note = note.rename(note.with_name(note.name + GONE))
            if is_stored(match[2], match[1]):
                note.unlink()
            else:
                remove(masks_folder(Path(folder), match[1]), note)
                deleted += 1
    return deleted


def is_referred_to(sample_id: str, folder: str, if_unknown: bool = False) -> bool:
    """Whether this sample or frame, of any dataset, has anything about a folder of this name.

    Any dataset: a clone has the same samples. Anything: labels may have gone to another field.

    Args:
        if_unknown: the answer for a sample that no dataset has: it may have been one of a view that is gone.
    """
    datasets = foo.get_db_conn().datasets
    database = foo.get_db_conn().with_options(codec_options=CodecOptions(document_class=RawBSONDocument))
    is_known = False
    for kind in ("sample_collection_name", "frame_collection_name"):
        for collection in filter(None, datasets.distinct(kind)):
            found = database[collection].find_one({"_id": ObjectId(sample_id)})
            if found is not None and folder.encode() in found.raw:
                return True
            is_known = is_known or found is not None
    return if_unknown and not is_known
