"""Claims a field for a run: one run at a time stores masks in it, and a dead one does not block it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from pymongo import ReturnDocument

from ..errors import Cancelled, FieldBusyError
from ..fiftyone_internals import Document, root_dataset
from .liveness import MAX_SILENCE, active, is_alive, server_time, this_process
from .record import (
    SegmentationRun,
    collection,
    copy_to_fiftyone,
    count_stored,
    document_of,
    grouped_runs,
    id_of,
    of_field,
    run_of,
    write,
)
from .retry import retry_while_unavailable

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)
_HEARTBEAT = 5  # seconds between the heartbeats of a run


@contextmanager
def on_record(samples: SampleCollection, run: SegmentationRun) -> Iterator[None]:
    """Records the run while it is active and after it ends, for whatever reason, and keeps other runs out of its field.

    Treats `Cancelled` as a normal end.

    Raises:
        FieldBusyError: another run is processing the same samples.
    """
    dataset = root_dataset(samples)
    # The dataset may be a clone, or the field renamed or copied: keep the record of what made its labels.
    earlier_runs = [each for runs in grouped_runs(dataset, run.label_field) for each in runs]
    recorded = {document["_id"] for document in collection().find(of_field(dataset, run.label_field), {"_id": True})}
    for earlier in earlier_runs:
        if id_of(dataset, earlier)["_id"] in recorded:
            continue
        # Another run may be doing the same.
        document = {**of_field(dataset, run.label_field), "run": document_of(earlier), "ended": True}
        insert = partial(collection().update_one, id_of(dataset, earlier), {"$setOnInsert": document}, upsert=True)
        retry_while_unavailable(insert)
    start, ended = time.perf_counter(), threading.Event()
    heartbeat = threading.Thread(
        target=_heartbeat, args=(dataset, run, ended), name=f"record-{run.run_id}", daemon=True
    )
    active.add(run.run_id)
    try:
        _claim(dataset, run)
        heartbeat.start()
        yield
        run.cancelled = False
    except Cancelled:
        pass
    finally:
        active.discard(run.run_id)  # first, so that the field is free again even if the rest is interrupted
        ended.set()
        if heartbeat.ident is not None:  # it was started, and may have ended already
            heartbeat.join()
            run.seconds["total"] = time.perf_counter() - start
            if run.images or run.shard is not None:
                write(dataset, run.label_field, run, {"ended": True})
            else:  # a run without images is not recorded, except for a shard
                retry_while_unavailable(lambda: collection().delete_one(id_of(dataset, run)))
            copy_to_fiftyone(dataset, run.label_field)


def check_claim(dataset: fo.Dataset, run: SegmentationRun) -> None:
    """Raises FieldBusyError if another run has considered this one dead, so that it must stop storing masks."""
    claim = {**id_of(dataset, run), "ended": False}
    if retry_while_unavailable(lambda: collection().find_one(claim, {"_id": True})) is None:
        raise FieldBusyError(
            f"This run into '{run.label_field}' was suspended, or without the database, and another run has taken over "
            f"since. Everything stored so far is kept. Repeat the call once the other run has ended."
        )


def is_field_free(dataset: fo.Dataset, label_field: str) -> bool:
    """Whether no run is storing masks in the field."""
    query = {**of_field(dataset, label_field), "ended": False}
    documents = retry_while_unavailable(lambda: list(collection().find(query)))
    now = server_time()
    return not any(is_alive(document, now) for document in documents)


def mark_abandoned(dataset: fo.Dataset, group: str, index: int | None = None) -> None:
    """Marks one shard of a run, or all, as abandoned: other workers may take it over at once."""
    query: Document = {"run.shard.group": group, "ended": False}
    if index is not None:
        query["run.shard.index"] = index
    for document in retry_while_unavailable(lambda: list(collection().find(query))):
        _take_over(dataset, document)


def _claim(dataset: fo.Dataset, run: SegmentationRun) -> None:
    """Claims the field for the run. Of two concurrent claims, the later one by the server's clock fails."""
    mine, query = id_of(dataset, run), of_field(dataset, run.label_field)
    values = {**query, "run": document_of(run), "owner": this_process(), "ended": False}
    now = {"$currentDate": {"claimed": True, "seen": True}}
    change = partial(collection().find_one_and_update, mine, {"$set": values, **now}, upsert=True)
    own = retry_while_unavailable(partial(change, return_document=ReturnDocument.AFTER))
    for other in collection().find({**query, "ended": False, "_id": {"$ne": own["_id"]}}):
        if not is_alive(other, own["seen"]):
            _take_over(dataset, other)
            continue
        is_earlier = (other["claimed"], other["_id"]) < (own["claimed"], own["_id"])
        if is_earlier and not _are_shards_of_one_run(run_of(other), run):
            collection().delete_one(mine)
            owner = other["owner"]
            raise FieldBusyError(
                f"Another run is storing masks in '{run.label_field}', since {other['run']['started']}, by process "
                f"{owner['pid']} on {owner['host']}. Wait until it ends, or stop it. If it can't be stopped, it "
                f"is considered dead {MAX_SILENCE.seconds} seconds after its last heartbeat."
            )


def _take_over(dataset: fo.Dataset, document: Document) -> None:
    """Ends a run that is considered dead, on its behalf; if it is not dead after all, it stops storing masks."""
    values: Document = {"ended": True}
    if run := run_of(document):
        count_stored(dataset, run.label_field, run)
        values["run"] = document_of(run)
    retry_while_unavailable(lambda: collection().update_one({"_id": document["_id"], "ended": False}, {"$set": values}))


def _heartbeat(dataset: fo.Dataset, run: SegmentationRun, ended: threading.Event) -> None:
    while not ended.wait(_HEARTBEAT):
        try:
            update = {"$set": {"run": document_of(run)}, "$currentDate": {"seen": True}}
            collection().update_one({**id_of(dataset, run), "ended": False}, update)
        except Exception as error:  # the next one may succeed, and the thread that stores masks reports the problem
            logger.debug("The heartbeat failed: %s", error)


def _are_shards_of_one_run(run: SegmentationRun | None, other: SegmentationRun) -> bool:
    """Whether they are different shards of the same run."""
    return bool(
        run
        and run.shard
        and other.shard
        and run.shard.group == other.shard.group
        and run.shard.index != other.shard.index
    )
