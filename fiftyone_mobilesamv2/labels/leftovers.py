"""Settles the mask files that killed processes left behind: finds them by their marker files and deletes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import fiftyone.core.odm as foo
from bson import CodecOptions, ObjectId
from bson.raw_bson import RawBSONDocument

from .mask_files import GONE, HASH_PREFIX, NOTE, UNCONFIRMED, masks_folder, remove

logger = logging.getLogger(__name__)


def settle(
    folder: str, is_mine: Callable[[str, str], bool], is_stored: Callable[[str, str], bool], min_age: float = 0
) -> int:
    """Deletes the masks that killed runs left behind and that the database does not refer to.

    Args:
        folder: the dataset's mask folder.
        is_mine: (sample id, field) -> whether no other run can be writing these masks at the moment.
        is_stored: (sample id, folder name) -> whether any labels refer to files in such a folder.
        min_age: minimum age of the masks in seconds.

    Returns:
        The number of images whose masks were deleted.
    """
    notes = Path(folder) / UNCONFIRMED
    deleted = 0
    for note in sorted(notes.iterdir()) if notes.is_dir() else ():
        match = NOTE.fullmatch(note.name.removesuffix(GONE))
        try:
            if match is None or not is_mine(match[2], _label_field(note, match[3])):
                continue
            if min_age and time.time() - note.stat().st_mtime < min_age:
                continue
            if not note.name.endswith(GONE):
                # Renamed first, so that a process that was only suspended does not store them after all.
                note = note.rename(note.with_name(note.name + GONE))
            if is_stored(match[2], match[1]):
                note.unlink()
            else:
                remove(masks_folder(Path(folder), match[1]), note)
                deleted += 1
        except FileNotFoundError:  # settled by another run
            pass
        except OSError as error:  # it may belong to another user; the others can be settled all the same
            logger.warning("Masks that a killed run left behind can't be deleted: %s", error)
    return deleted


def _label_field(note: Path, name: str) -> str:
    """The field that a marker file belongs to."""
    return note.read_bytes().decode() if name.startswith(HASH_PREFIX) else unquote(name)


def is_referred_to(sample_id: str, folder: str, if_unknown: bool = False) -> bool:
    """Whether the document of this sample or frame, in any dataset, mentions a folder of this name.

    All datasets are searched, because clones have the same samples, and whole documents, because labels may have moved
    to another field.

    Args:
        if_unknown: the result for a sample that no dataset has; it may have belonged to a deleted view.
    """
    datasets = foo.get_db_conn().datasets
    database = foo.get_db_conn().with_options(codec_options=CodecOptions(document_class=RawBSONDocument))
    is_known = False
    for kind in ("sample_collection_name", "frame_collection_name"):
        for collection in filter(None, datasets.distinct(kind)):
            document = database[collection].find_one({"_id": ObjectId(sample_id)})
            if document is not None and folder.encode() in document.raw:
                return True
            is_known = is_known or document is not None
    return if_unknown and not is_known
