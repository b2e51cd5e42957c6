"""The record that a dataset keeps of the runs which store masks in its fields, from their start. Needs no torch."""

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
from .retry import PATIENCE, retry_while_unavailable
from .shards import Shard

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection
    from pymongo.collection import Collection

logger = logging.getLogger(__name__)
_METHOD = "mobilesamv2"
_MAX_FAILURES = 1000  # of a run: more tell nothing new
# In the database beside FiftyOne's own: all runs, on any machine. What FiftyOne is given is a copy, for users and for
# clones of the dataset: it can't take records from several processes at once, and while it saves one it has none.
_COLLECTION = "mobilesamv2.runs"
_BEAT = 5  # seconds after which a run gives the next sign of life
# After which one of another machine is taken for dead: longer than it would wait for the database.
_SILENCE = timedelta(seconds=PATIENCE + 60)
_CLOCK = 2  # seconds that the start of a process may seem to change by when the clock is set


@dataclass
class SegmentationRun:
    """What a run did.

    Attributes:
        label_field: where the masks are.
        parameters: the model's, by name. "prompting" names the field where prompts were the user's; "weights" has the
            sha256 of every file.
        started: when, UTC.
        images: how many images, or frames of videos, it went through; those that failed are among them.
        objects: how many masks it stored.
        seconds: wall time by stage ("encode", "discover", "decode", "crop"), and of everything as "total". Of the parts
            of one run the stages add up, and "total" is the time from the first start to the last end.
        failures: the images that could not be segmented, the first thousand; their labels are as they were.
        num_failures: how many there were.
        cancelled: whether it was stopped before its end, or is still going on. What it has stored stays.
        shard: the part of the dataset that it is about; None: all of it.
        replace: whether it replaced labels that were there.
        mask_dir: where masks on disk went, if there were any.
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
        """Of the whole run, with reading and storing."""
        return self.images / self.seconds["total"] if self.seconds.get("total") else 0.0


def recorded_runs(samples: SampleCollection, label_field: str) -> list[SegmentationRun]:
    """The runs that stored masks in this field, oldest first, those that go on among them; none, where it is gone.

    The parts of one run are told as one run.
    """
    dataset = root_dataset(samples)
    if not dataset.has_field(label_field):
        return []
    runs = [_run(document) for document in _collection().find(_of_field(dataset, label_field))]
    runs = runs or _copied(dataset, label_field)
    groups: dict[str, list[SegmentationRun]] = {}
    for run in sorted(runs, key=lambda run: run.started):
        groups.setdefault(run.run_id if run.shard is None else run.shard.group, []).append(run)
    return [_merged(parts) for parts in groups.values()]


def mask_dirs(samples: SampleCollection, label_field: str) -> list[str]:
    """Where runs into this field, and each part of them, may have put masks on disk."""
    query = _of_field(root_dataset(samples), label_field)
    found = retry_while_unavailable(lambda: _collection().distinct("run.mask_dir", query))
    return [folder for folder in found if folder is not None]


def segmented_fields(samples: SampleCollection) -> list[str]:
    """The fields that masks were made for: not those whose own labels were given masks."""
    dataset = root_dataset(samples)
    fields = [dataset.get_run_info(key).config.label_field for key in dataset.list_runs(method=_METHOD)]
    fields += _collection().distinct("label_field", {"dataset_id": dataset_id(dataset)})
    fields = [name for name in dict.fromkeys(fields) if dataset.has_field(name)]
    return [name for name in fields if any(run.parameters["prompting"] != name for run in recorded_runs(dataset, name))]


def failed_samples(samples: SampleCollection, label_field: str) -> fo.DatasetView:
    """The samples that the last run into this field could not segment: to look at, and to try again alone."""
    runs = recorded_runs(samples, label_field)
    ids = [failure.sample_id for failure in (runs[-1].failures if runs else ()) if failure.sample_id]
    return root_dataset(samples).select(dict.fromkeys(ids))


@contextmanager
def on_record(samples: SampleCollection, run: SegmentationRun) -> Iterator[None]:
    """Keeps the run on record while it goes on and after, whatever ends it, and other runs out of its field.

    Takes `Cancelled` for an end.

    Raises:
        FieldBusyError: another one is at the same samples.
    """
    dataset = root_dataset(samples)
    collection, here = _collection(), _of_field(dataset, run.label_field)
    if collection.find_one(here) is None:  # the dataset is a clone: what its original's record has stays
        for earlier in _copied(dataset, run.label_field):
            retry_while_unavailable(partial(_write, dataset, earlier, {"ended": True}))
    start, ended = time.perf_counter(), threading.Event()
    signs = threading.Thread(target=_heartbeat, args=(dataset, run, ended), name=f"record-{run.run_id}", daemon=True)
    _going_on.add(run.run_id)
    try:
        _claim(dataset, run)
        signs.start()
        yield
        run.cancelled = False
    except Cancelled:
        pass
    finally:
        _going_on.discard(run.run_id)  # first: whatever interrupts the rest, the field is free again
        ended.set()
        if signs.ident is not None:  # it was started, be it alive or not: told of the end, it may be faster than this
            signs.join()
            run.seconds["total"] = time.perf_counter() - start
            if run.images or run.shard is not None:
                retry_while_unavailable(lambda: _write(dataset, run, {"ended": True}))
            else:  # a run without images is not recorded; but a shard may be empty
                retry_while_unavailable(lambda: collection.delete_one(_id(dataset, run)))
            _copy(dataset, run.label_field)


def mark_abandoned(group: str, index: int | None = None) -> None:
    """Marks one shard of a run, or all, as abandoned: other workers may take it over at once."""
    query: Document = {"run.shard.group": group}
    if index is not None:
        query["run.shard.index"] = index
    retry_while_unavailable(lambda: _collection().update_many(query, {"$set": {"ended": True}}))


# Runs that go on --------------------------------------------------------------------------------------------------
_going_on: set[str] = set()  # in this process


def _claim(dataset: fo.Dataset, run: SegmentationRun) -> None:
    """Announces the run. Of two that do so at the same time, the later one makes way, by the server's clock."""
    collection, mine = _collection(), _id(dataset, run)
    here = _of_field(dataset, run.label_field)
    fields = {**here, "run": _document(run), "owner": _this_process(), "ended": False}
    now = {"$currentDate": {"claimed": True, "seen": True}}
    change = partial(collection.find_one_and_update, mine, {"$set": fields, **now}, upsert=True)
    own = retry_while_unavailable(partial(change, return_document=ReturnDocument.AFTER))
    for other in collection.find({**here, "ended": False, "_id": {"$ne": own["_id"]}}):
        is_earlier = (other["claimed"], other["_id"]) < (own["claimed"], own["_id"])
        if is_earlier and _is_alive(other, own["seen"]) and not _are_shards_of_one_run(_run(other), run):
            collection.delete_one(mine)
            owner = other["owner"]
            raise FieldBusyError(
                f"Another run is storing masks in '{run.label_field}', since {other['run']['started']}, by process "
                f"{owner['pid']} on {owner['host']}. Wait for its end, or stop it. If that machine is gone, its run is "
                f"taken for dead {_SILENCE.seconds} seconds after its last sign of life."
            )


def _heartbeat(dataset: fo.Dataset, run: SegmentationRun, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        try:
            sign = {"$set": {"run": _document(run)}, "$currentDate": {"seen": True}}
            _collection().update_one(_id(dataset, run), sign)
        except (
            Exception
        ) as error:  # the next one may get through, and the thread that stores masks reports what is wrong
            logger.debug("No sign of life: %s", error)


def _is_alive(document: Document, now: datetime) -> bool:
    if document["ended"]:
        return False
    owner, here = document["owner"], _this_process()
    if owner["machine"] != here["machine"]:
        return bool(now - document["seen"] <= _SILENCE)
    if owner["pid"] == here["pid"]:
        return document["run"]["run_id"] in _going_on
    try:  # it may be silent for long: waiting for the database, or stopped, or on a laptop that sleeps
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["process_started"]) <= _CLOCK)
    except psutil.NoSuchProcess:
        return False


def _are_shards_of_one_run(run: SegmentationRun, other: SegmentationRun) -> bool:
    """Whether they are different parts of the same work."""
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
    except OSError:  # no Linux
        return ""


def _namespace() -> str:
    try:  # containers of one machine may have one name, and numbers of processes of their own
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


# Runs that have ended ---------------------------------------------------------------------------------------------
def _copy(dataset: fo.Dataset, label_field: str) -> None:
    """Gives FiftyOne a copy of the records, once no run into the field goes on. Failing ends no run: it has ended."""
    collection, key = _collection(), _key(label_field)
    try:
        documents = list(collection.find(_of_field(dataset, label_field)))
        now = foo.get_db_conn().command("hello")["localTime"]
        if not documents or any(_is_alive(document, now) for document in documents) or dataset.deleted:
            return
        runs = sorted(map(_run, documents), key=lambda run: run.started)
        reload_list_of_runs(dataset)  # others may have added some
        if key not in dataset.list_runs():
            dataset.register_run(key, dataset.init_run(method=_METHOD, label_field=label_field))
        results = dataset.init_run_results(key, runs=[_document(run) for run in runs])
        dataset.save_run_results(key, results, cache=False)
        known = collection.distinct("dataset_id")
        gone = set(known) - set(foo.get_db_conn().datasets.distinct("_id"))
        collection.delete_many({"dataset_id": {"$in": list(gone)}})
    except Exception as error:
        logger.warning("FiftyOne has no copy of the record of runs into '%s': %s", label_field, error)


def _copied(dataset: fo.Dataset, label_field: str) -> list[SegmentationRun]:
    """What FiftyOne has."""
    key = _key(label_field)
    if key not in dataset.list_runs():
        return []
    try:
        results = dataset.load_run_results(key, cache=False)
    except (NoFile, AttributeError):  # FiftyOne's answer where a process was killed while it saved them
        return []
    return [] if results is None else [_from_dict(run) for run in results.runs]


def _merged(parts: Sequence[SegmentationRun]) -> SegmentationRun:
    """The runs of the parts of a dataset, as one run."""
    first, shard = parts[0], parts[0].shard
    if shard is None:
        return first
    seconds: dict[str, float] = {}
    for part in parts:
        for stage, value in part.seconds.items():
            seconds[stage] = seconds.get(stage, 0) + value
    starts = [datetime.fromisoformat(part.started) for part in parts]
    ends = [start + timedelta(seconds=part.seconds.get("total", 0)) for start, part in zip(starts, parts)]
    seconds["total"] = (max(ends) - min(starts)).total_seconds()
    # A part that was tried again: what failed the first time was, too.
    by_shard = [(part.shard.index, part) for part in parts if part.shard is not None]
    last = dict(by_shard)
    retried = [part for index, part in by_shard if part is not last[index]]
    return replace(
        first,
        images=sum(part.images for part in parts) - sum(part.num_failures for part in retried),
        objects=sum(part.objects for part in parts),
        seconds=seconds,
        failures=[failure for part in last.values() for failure in part.failures],
        num_failures=sum(part.num_failures for part in last.values()),
        cancelled=len({index for index, part in by_shard if not part.cancelled}) < shard.count,
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
    return {"_id": f"{dataset_id(dataset)}/{run.run_id}"}  # a clone has the same runs


def _of_field(dataset: fo.Dataset, label_field: str) -> Document:
    return {"dataset_id": dataset_id(dataset), "label_field": label_field}


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _key(label_field: str) -> str:
    # A key is a Python name; fields may be called "my masks", and "my_masks" be another one.
    name = re.sub(r"\W", "_", label_field)
    if name != label_field.replace("frames.", "frames_", 1):
        name += f"_{zlib.crc32(label_field.encode()):08x}"
    return f"mobilesamv2_{name}"
