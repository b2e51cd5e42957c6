"""Reads images, segments them and stores their masks, all concurrently."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import fiftyone.core.odm as foo
import fiftyone.core.utils as fou
from bson import ObjectId
from pymongo.errors import CursorNotFound, PyMongoError, WriteError

from ..errors import ArgumentError
from ..fiftyone_internals import Document, dataset_id, label_root, reload_samples, root_dataset, sample_collection
from ..labels.detections import ImageMasks
from ..labels.documents import Progress, StoredImage, stored_images
from ..labels.fields import RUN_ID
from ..labels.leftovers import is_referred_to, settle
from ..labels.mask_files import MaskFiles, make_folder
from ..zoo.config import MobileSAMv2ModelConfig, mask_folder
from ..zoo.model import MobileSAMv2Model
from ..zoo.reading import ImageItem
from . import retry as database
from .claims import check_claim, is_field_free
from .marks import declare_mask_field, has_index
from .record import SegmentationRun, mask_dirs
from .retry import UNAVAILABLE, first_line, retry_while_unavailable, with_journaled_writes
from .updates import MakeUpdate

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)
_DELETED_FILES = "another run considered this one dead and deleted them"
DELETED = "'{}' was deleted or renamed while masks were being stored in it."


def segment_and_store(
    samples: SampleCollection,
    model: MobileSAMv2Model,
    field_names: Sequence[str],
    read: Callable[[StoredImage], ImageItem | None],
    make_update: MakeUpdate,
    run: SegmentationRun,
    batch_size: int,
    progress: Progress,
) -> None:
    """Segments images in batches. While the model processes one batch, the next is read and the previous one stored.

    One thread reads and one stores, so images are stored in order and at most three batches are in memory. Decoding and
    compressing each take a few percent of the model's time and release the GIL: more threads would only take cores from
    the model. A worker process would be a fork of this process, which may be the App's server.

    However this ends, segmented batches are stored first.

    Args:
        field_names: the fields of a stored image that `read` needs.
        read: loads an image; returns None if there is nothing to do.
        run: updated with images, objects, failures and seconds.
    """
    given_up = threading.Event()
    images = unique_images(samples, field_names, given_up)
    store = partial(_store, root_dataset(samples), model, make_update, run, given_up)

    def read_batch() -> list[ImageItem | None]:
        return [read(image) for image in islice(images, batch_size)]

    with (
        counted(run, model),
        model,
        fou.ProgressBar(total=len(samples), progress=progress) as bar,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
    ):
        ahead = reader.submit(read_batch)
        behind: Future[None] = Future()
        behind.set_result(None)
        try:
            while batch := ahead.result():
                ahead = reader.submit(read_batch)
                items = [item for item in batch if item is not None]
                segmented = model.segment_all(items)
                before, behind = behind, writer.submit(store, items, segmented)
                before.result()
                _update_counts(run, model)
                bar.update(len(batch))
        except BaseException:
            given_up.set()
            raise
        finally:
            if error := behind.exception():
                logger.error("The last segmented images could not be stored: %s", error)
        behind.result()


def unique_images(
    samples: SampleCollection, field_names: Sequence[str], given_up: threading.Event
) -> Iterator[StoredImage]:
    seen = set()  # a view sorted by a field that is written may yield a sample twice
    failed_at, since = -1, 0.0
    while True:
        try:
            for image in stored_images(samples, field_names):
                if image.sample_id not in seen:
                    seen.add(image.sample_id)
                    yield image
            return
        except CursorNotFound:  # MongoDB drops cursors that are idle for ten minutes, and all on a restart
            pass
        except UNAVAILABLE as error:
            if failed_at != len(seen):
                logger.warning("Reading samples was interrupted: %s", first_line(error))
                failed_at, since = len(seen), time.monotonic()
            elif given_up.is_set() or time.monotonic() - since > database.MAX_WAIT:
                raise
            given_up.wait(0.5)


def _store(
    dataset: fo.Dataset,
    model: MobileSAMv2Model,
    make_update: MakeUpdate,
    run: SegmentationRun,
    given_up: threading.Event,
    items: Sequence[ImageItem],
    segmented: Sequence[ImageMasks | None],
) -> None:
    """Stores the masks of images. Each image is stored completely or not at all, independently of the others.

    Raises:
        PyMongoError: the database can't be written to.
        OSError: the disk is full.
        ValueError: the field was deleted.
    """
    check_claim(dataset, run)
    stored = []
    for item, masks in zip(items, segmented):
        if masks is None:
            continue
        sample_id = str(item.sample_id)
        files = MaskFiles(_dataset_mask_folder(dataset, mask_folder(model.config)), sample_id, run.label_field)
        documents: list[Document] = []
        is_stored = False
        try:
            documents = model.writer.documents(masks, files)
            if not files.are_on_disk():
                raise ArgumentError(_DELETED_FILES)
            update = make_update(documents)
            # One by one: a bulk write does not report which samples matched, and is limited to 48 MB.
            matched = _update_sample(dataset, sample_id, update.condition, update.values, given_up)
            # If the response to the first attempt got lost, the second finds nothing to update.
            is_stored = matched or _has_labels(dataset, run.label_field, sample_id, documents)
            if is_stored and not files.are_confirmable():  # this process was suspended just before the update
                _update_sample(dataset, sample_id, {}, update.reverse, given_up)
                is_stored = False
                raise ArgumentError(_DELETED_FILES)
        except Exception as error:
            if isinstance(error, PyMongoError) and not isinstance(error, WriteError):
                raise  # the labels may be stored: the next run settles the files
            if isinstance(error, OSError):  # the following images would fail, too
                _discard(files)
                raise _storage_error(model.config, error) from error
            cause = (error.details or {}).get("errmsg") if isinstance(error, WriteError) else None
            cause = str(cause or error)
            model.fail(item, f"its masks can't be stored: {cause[:200]}")
        if is_stored:
            retry_while_unavailable(partial(_check_field, dataset, run.label_field, files), given_up)
            files.confirm()
            stored.append(sample_id)
            run.objects += len(documents)
        else:
            _discard(files)
    retry_while_unavailable(lambda: reload_samples(dataset, stored), given_up)


def _update_sample(
    dataset: fo.Dataset, sample_id: str, condition: Document, values: Document, given_up: threading.Event
) -> bool:
    """Sets values of a sample; returns whether it exists and meets the condition."""
    collection = with_journaled_writes(sample_collection(dataset))
    change = [{"$set": {**values, "last_modified_at": datetime.now(timezone.utc)}}]
    query = {"_id": ObjectId(sample_id), **condition}
    return retry_while_unavailable(partial(collection.update_one, query, change), given_up).matched_count == 1


def _check_field(dataset: fo.Dataset, label_field: str, files: MaskFiles) -> None:
    """Checks that the field is declared: samples with values in an undeclared field can't be loaded.

    Declares it again if FiftyOne lost it while another process changed the schema.

    Raises:
        ArgumentError: the field was deleted or renamed. The value written since then is deleted, with its `files`.
    """
    root = label_field.split(".")[0]
    query = {"_id": dataset_id(dataset), "sample_fields.name": root}
    if foo.get_db_conn().datasets.find_one(query, {"_id": True}) is not None:
        return
    if has_index(dataset, label_field):
        declare_mask_field(dataset, label_field)
        return
    sample_collection(dataset).update_many({root: {"$exists": True}}, {"$unset": {root: ""}})
    _discard(files)
    raise ArgumentError(DELETED.format(root))


def _discard(files: MaskFiles) -> None:
    with suppress(OSError):  # the next run settles remaining files
        files.discard()


def _has_labels(dataset: fo.Dataset, label_field: str, sample_id: str, documents: Sequence[Document]) -> bool:
    if not documents:
        return False
    root, _ = label_root(dataset, label_field)
    query = {"_id": ObjectId(sample_id), **{f"{root}.{name}": documents[0][name] for name in ("_id", RUN_ID)}}
    return retry_while_unavailable(lambda: sample_collection(dataset).find_one(query, {"_id": True})) is not None


@contextmanager
def counted(run: SegmentationRun, model: MobileSAMv2Model) -> Iterator[None]:
    """Updates the run's counts at the end, even after an error."""
    try:
        yield
    finally:
        _update_counts(run, model)


def _update_counts(run: SegmentationRun, model: MobileSAMv2Model) -> None:
    run.images = model.num_images
    run.failures = list(model.failures)
    run.num_failures = len(run.failures)
    run.seconds |= model.seconds


# Masks on disk ------------------------------------------------------------------------------------------------------
def check_mask_folder(config: MobileSAMv2ModelConfig) -> None:
    """Raises OSError if masks can't be written to disk, so that a run fails at its start and not after hours."""
    if config.masks_on_disk:
        try:
            make_folder(Path(mask_folder(config)))
            with tempfile.TemporaryFile(dir=mask_folder(config)):
                pass
        except OSError as error:
            raise _storage_error(config, error) from error


def settle_leftovers(dataset: fo.Dataset, run: SegmentationRun) -> None:
    """Deletes masks on disk that killed runs left behind and that the database does not refer to."""

    def is_mine(sample_id: str, label_field: str) -> bool:
        if label_field == run.label_field:
            return run.shard is None or run.shard.has(sample_id)
        return is_field_free(dataset, label_field)  # a killed run's field may have been renamed or deleted

    for folder in mask_dirs(dataset):
        try:
            images = settle(_dataset_mask_folder(dataset, folder), is_mine, _is_referred_to)
        except OSError as error:  # an earlier run may have belonged to another user or machine
            logger.warning("Could not delete masks that killed runs may have left in %s: %s", folder, error)
            continue
        if images:
            logger.info("Deleted the masks of %d images that a killed run had not stored in the database", images)


def _is_referred_to(sample_id: str, folder: str) -> bool:
    return retry_while_unavailable(partial(is_referred_to, sample_id, folder))


def _dataset_mask_folder(dataset: fo.Dataset, mask_dir: str) -> str:
    return os.path.join(mask_dir, str(dataset_id(dataset)))


def _storage_error(config: MobileSAMv2ModelConfig, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"{error.strerror or error}: masks can't be stored in {mask_folder(config)}. Make room there, or choose "
        f"another folder with `mask_dir`; then repeat the same call to continue",
    )
