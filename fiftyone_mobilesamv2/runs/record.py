"""Records, from their start, the runs that store masks in a dataset's fields. Does not import torch."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import fiftyone.core.odm as foo
import psutil
from gridfs.errors import NoFile
from pymongo import ReturnDocument

from ..errors import Cancelled, Failure, FieldBusyError
from ..fiftyone_internals import Document, dataset_id, reload_list_of_runs, root_dataset
from .retry import MAX_WAIT, retry_while_unavailable
from .shards import Shard

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection
    from pymongo.collection import Collection

logger = logging.getLogger(__name__)
_METHOD = "mobilesamv2"
_MAX_FAILURES = 1000  # recorded per run
# A collection in the database, beside FiftyOne's own, with all runs on any machine. FiftyOne gets a copy, for users and
# clones of the dataset: it does not support concurrent updates by several processes, and has no record while it saves
# one.
_COLLECTION = "mobilesamv2.runs"
_HEARTBEAT = 5  # seconds between the heartbeats of a run
# A run on another machine is considered dead after this time without a heartbeat: longer than it waits for the
# database.
_MAX_SILENCE = timedelta(seconds=MAX_WAIT + 60)
_MAX_CLOCK_CHANGE = 2  # seconds by which a process's start time may appear to change when the clock is set


@dataclass
class SegmentationRun:
    """The record of a run.

    Attributes:
        label_field: the field of the masks.
        parameters: the model's parameters by name. "prompting" is the prompt field if the user provided prompts;
            "weights" has the sha256 of every file.
        started: start time, UTC.
        images: number of images or video frames processed, including failed ones.
        objects: number of masks stored.
        seconds: wall time by stage ("encode", "discover", "decode", "crop"), and "total". For the shards of one run,
            the stages are summed, and "total" is the time from the first start to the last end.
        failures: the first thousand images that could not be segmented; their labels are unchanged.
        num_failures: number of images that could not be segmented.
        cancelled: whether it was stopped before its end, or is still running. Masks stored so far are kept.
        shard: the shard of the dataset that it processed; None: the whole dataset.
        replace: whether it replaced existing labels.
        mask_dir: the folder of masks on disk, if any.
    """

    label_field: str
    parameters: Document
    started: str = field(default_factory=lambda: _now().isoformat())
    images: int = 0
    objects: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    num_failures: int = 0
    cancelled: bool = True
    shard: Shard | None = None
    replace: bool = False
    mask_dir: str | None = None
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def images_per_second(self) -> float:
        """Throughput of the whole run, including reading and storing."""
        return self.images / self.seconds["total"] if self.seconds.get("total") else 0.0


def recorded_runs(samples: SampleCollection, label_field: str) -> list[SegmentationRun]:
    """The runs that stored masks in this field, including active ones, oldest first; empty if the field does not exist.

    The shards of one run are merged into one run.
    """
    dataset = root_dataset(samples)
    if not dataset.has_field(label_field):
        return []
    runs = [_run(document) for document in _collection().find(_of_field(dataset, label_field))]
    runs = runs or _copied(dataset, label_field)
    groups: dict[str, list[SegmentationRun]] = {}
    for run in sorted(runs, key=lambda run: run.started):
        groups.setdefault(run.run_id if run.shard is None else run.shard.group, []).append(run)
    return [_merged(runs) for runs in groups.values()]


def mask_dirs(samples: SampleCollection, label_field: str) -> list[str]:
    """The folders in which runs into this field, and their shards, may have stored masks on disk."""
    query = _of_field(root_dataset(samples), label_field)
    folders = retry_while_unavailable(lambda: _collection().distinct("run.mask_dir", query))
    return [folder for folder in folders if folder is not None]


def segmented_fields(samples: SampleCollection) -> list[str]:
    """The fields that runs created masks in; not fields whose own labels only received masks."""
    dataset = root_dataset(samples)
    fields = [dataset.get_run_info(key).config.label_field for key in dataset.list_runs(method=_METHOD)]
    fields += _collection().distinct("label_field", {"dataset_id": dataset_id(dataset)})
    fields = [name for name in dict.fromkeys(fields) if dataset.has_field(name)]
    return [name for name in fields if any(run.parameters["prompting"] != name for run in recorded_runs(dataset, name))]


def failed_samples(samples: SampleCollection, label_field: str) -> fo.DatasetView:
    """The samples that the last run into this field could not segment, to inspect or to process again."""
    runs = recorded_runs(samples, label_field)
    ids = [failure.sample_id for failure in (runs[-1].failures if runs else ()) if failure.sample_id]
    return root_dataset(samples).select(dict.fromkeys(ids))


@contextmanager
def on_record(samples: SampleCollection, run: SegmentationRun) -> Iterator[None]:
    """Records the run while it is active and after it ends, for whatever reason, and keeps other runs out of its field.

    Treats `Cancelled` as a normal end.

    Raises:
        FieldBusyError: another run is processing the same samples.
    """
    dataset = root_dataset(samples)
    collection, query = _collection(), _of_field(dataset, run.label_field)
    if collection.find_one(query) is None:  # the dataset is a clone: keep the record copied from its original
        for earlier in _copied(dataset, run.label_field):
            retry_while_unavailable(partial(_write, dataset, earlier, {"ended": True}))
    start, ended = time.perf_counter(), threading.Event()
    heartbeat = threading.Thread(
        target=_heartbeat, args=(dataset, run, ended), name=f"record-{run.run_id}", daemon=True
    )
    _active.add(run.run_id)
    try:
        _claim(dataset, run)
        heartbeat.start()
        yield
        run.cancelled = False
    except Cancelled:
        pass
    finally:
        _active.discard(run.run_id)  # first, so that the field is free again even if the rest is interrupted
        ended.set()
        if heartbeat.ident is not None:  # it was started, and may have ended already
            heartbeat.join()
            run.seconds["total"] = time.perf_counter() - start
            if run.images or run.shard is not None:
                retry_while_unavailable(lambda: _write(dataset, run, {"ended": True}))
            else:  # a run without images is not recorded, except for a shard
                retry_while_unavailable(lambda: collection.delete_one(_id(dataset, run)))
            _copy(dataset, run.label_field)


def mark_abandoned(group: str, index: int | None = None) -> None:
    """Marks one shard of a run, or all, as abandoned: other workers may take it over at once."""
    query: Document = {"run.shard.group": group}
    if index is not None:
        query["run.shard.index"] = index
    retry_while_unavailable(lambda: _collection().update_many(query, {"$set": {"ended": True}}))


# Active runs --------------------------------------------------------------------------------------------------------
_active: set[str] = set()  # ids of this process's runs


def _claim(dataset: fo.Dataset, run: SegmentationRun) -> None:
    """Claims the field for the run. Of two concurrent claims, the later one by the server's clock fails."""
    collection, mine = _collection(), _id(dataset, run)
    query = _of_field(dataset, run.label_field)
    fields = {**query, "run": _document(run), "owner": _this_process(), "ended": False}
    now = {"$currentDate": {"claimed": True, "seen": True}}
    change = partial(collection.find_one_and_update, mine, {"$set": fields, **now}, upsert=True)
    own = retry_while_unavailable(partial(change, return_document=ReturnDocument.AFTER))
    for other in collection.find({**query, "ended": False, "_id": {"$ne": own["_id"]}}):
        is_earlier = (other["claimed"], other["_id"]) < (own["claimed"], own["_id"])
        if is_earlier and _is_alive(other, own["seen"]) and not _are_shards_of_one_run(_run(other), run):
            collection.delete_one(mine)
            owner = other["owner"]
            raise FieldBusyError(
                f"Another run is storing masks in '{run.label_field}', since {other['run']['started']}, by process "
                f"{owner['pid']} on {owner['host']}. Wait until it ends, or stop it. If that machine is down, its run "
                f"is considered dead {_MAX_SILENCE.seconds} seconds after its last heartbeat."
            )


def _heartbeat(dataset: fo.Dataset, run: SegmentationRun, ended: threading.Event) -> None:
    while not ended.wait(_HEARTBEAT):
        try:
            update = {"$set": {"run": _document(run)}, "$currentDate": {"seen": True}}
            _collection().update_one(_id(dataset, run), update)
        except Exception as error:  # the next one may succeed, and the thread that stores masks reports the problem
            logger.debug("The heartbeat failed: %s", error)


def _is_alive(document: Document, now: datetime) -> bool:
    if document["ended"]:
        return False
    owner, this = document["owner"], _this_process()
    if owner["machine"] != this["machine"]:
        return bool(now - document["seen"] <= _MAX_SILENCE)
    if owner["pid"] == this["pid"]:
        return document["run"]["run_id"] in _active
    try:  # no heartbeat check: it may be waiting for the database, stopped, or on a suspended laptop
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["process_started"]) <= _MAX_CLOCK_CHANGE)
    except psutil.NoSuchProcess:
        return False


def _are_shards_of_one_run(run: SegmentationRun, other: SegmentationRun) -> bool:
    """Whether they are different shards of the same run."""
    return bool(
        run.shard and other.shard and run.shard.group == other.shard.group and run.shard.index != other.shard.index
    )


def _this_process() -> Document:
    host = socket.gethostname()
    return {
        "host": host,
        "machine": f"{host} {_read('/proc/sys/kernel/random/boot_id')} {_namespace()}",
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
    }


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


# Ended runs ---------------------------------------------------------------------------------------------------------
def _copy(dataset: fo.Dataset, label_field: str) -> None:
    """Copies the records to FiftyOne once no run into the field is active. Logs errors, since the run has ended."""
    collection, key = _collection(), _key(label_field)
    try:
        documents = list(collection.find(_of_field(dataset, label_field)))
        now = foo.get_db_conn().command("hello")["localTime"]
        if not documents or any(_is_alive(document, now) for document in documents) or dataset.deleted:
            return
        runs = sorted(map(_run, documents), key=lambda run: run.started)
        reload_list_of_runs(dataset)  # other processes may have added runs
        if key not in dataset.list_runs():
            dataset.register_run(key, dataset.init_run(method=_METHOD, label_field=label_field))
        results = dataset.init_run_results(key, runs=[_document(run) for run in runs])
        dataset.save_run_results(key, results, cache=False)
        recorded = collection.distinct("dataset_id")
        deleted = set(recorded) - set(foo.get_db_conn().datasets.distinct("_id"))
        collection.delete_many({"dataset_id": {"$in": list(deleted)}})
    except Exception as error:
        logger.warning("The record of runs into '%s' could not be copied to FiftyOne: %s", label_field, error)


def _copied(dataset: fo.Dataset, label_field: str) -> list[SegmentationRun]:
    """The runs in FiftyOne's copy of the record."""
    key = _key(label_field)
    if key not in dataset.list_runs():
        return []
    try:
        results = dataset.load_run_results(key, cache=False)
    except (NoFile, AttributeError):  # raised by FiftyOne if a process was killed while saving them
        return []
    return [] if results is None else [_from_dict(run) for run in results.runs]


def _merged(runs: Sequence[SegmentationRun]) -> SegmentationRun:
    """Merges the runs of a dataset's shards into one run."""
    first, shard = runs[0], runs[0].shard
    if shard is None:
        return first
    seconds: dict[str, float] = {}
    for run in runs:
        for stage, value in run.seconds.items():
            seconds[stage] = seconds.get(stage, 0) + value
    starts = [datetime.fromisoformat(run.started) for run in runs]
    ends = [start + timedelta(seconds=run.seconds.get("total", 0)) for start, run in zip(starts, runs)]
    seconds["total"] = (max(ends) - min(starts)).total_seconds()
    # A retried shard also retried the images that failed in its earlier attempts.
    by_shard = [(run.shard.index, run) for run in runs if run.shard is not None]
    last = dict(by_shard)
    retried = [run for index, run in by_shard if run is not last[index]]
    return replace(
        first,
        images=sum(run.images for run in runs) - sum(run.num_failures for run in retried),
        objects=sum(run.objects for run in runs),
        seconds=seconds,
        failures=[failure for run in last.values() for failure in run.failures],
        num_failures=sum(run.num_failures for run in last.values()),
        cancelled=len({index for index, run in by_shard if not run.cancelled}) < shard.count,
        shard=None,
        run_id=shard.group,
    )


def _document(run: SegmentationRun) -> Document:
    failures = [asdict(failure) for failure in run.failures[:_MAX_FAILURES]]
    return asdict(replace(run, failures=[])) | {"failures": failures}


def _run(document: Document) -> SegmentationRun:
    return _from_dict(document["run"])


def _from_dict(run: Document) -> SegmentationRun:
    shard = run.get("shard")
    failures = [Failure(**failure) for failure in run["failures"]]
    return SegmentationRun(**{**run, "failures": failures, "shard": shard and Shard(**shard)})


def _collection() -> Collection[Document]:
    collection: Collection[Document] = foo.get_db_conn()[_COLLECTION]
    return collection


def _write(dataset: fo.Dataset, run: SegmentationRun, values: Document) -> None:
    fields = {**_of_field(dataset, run.label_field), "run": _document(run), **values}
    _collection().update_one(_id(dataset, run), {"$set": fields}, upsert=True)


def _id(dataset: fo.Dataset, run: SegmentationRun) -> Document:
    return {"_id": f"{dataset_id(dataset)}/{run.run_id}"}  # clones have the same runs


def _of_field(dataset: fo.Dataset, label_field: str) -> Document:
    return {"dataset_id": dataset_id(dataset), "label_field": label_field}


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _key(label_field: str) -> str:
    # A key must be a Python identifier, but "my masks" and "my_masks" can be two different fields.
    name = re.sub(r"\W", "_", label_field)
    if name != label_field.replace("frames.", "frames_", 1):
        name += f"_{zlib.crc32(label_field.encode()):08x}"
    return f"mobilesamv2_{name}"
