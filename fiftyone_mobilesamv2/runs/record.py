"""Records of the runs that store masks in a dataset's fields. Does not import torch."""

from __future__ import annotations

import logging
import re
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import fiftyone.core.odm as foo
from bson import ObjectId
from fiftyone.core.runs import Run
from gridfs.errors import NoFile

from ..errors import ArgumentError, Failure
from ..fiftyone_internals import (
    Document,
    dataset_id,
    is_frame_field,
    reload_list_of_runs,
    replace_run_results,
    root_dataset,
)
from ..labels.fields import RUN_ID
from .liveness import is_alive, server_time
from .marks import count_marked, marks_in
from .retry import retry_while_unavailable
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
        marks_labels: whether its labels have its `mark`; those of earlier versions of this package do not.
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
    marks_labels: bool = True

    @property
    def images_per_second(self) -> float:
        """Throughput of the whole run, including reading and storing."""
        return self.images / self.seconds["total"] if self.seconds.get("total") else 0.0

    @property
    def mark(self) -> str:
        """The `run_id` of its labels: short, since each label has it."""
        return self.run_id[:_MARK_LENGTH]


_MARK_LENGTH = 12


def recorded_runs(samples: SampleCollection, label_field: str) -> list[SegmentationRun]:
    """The runs that stored masks in this field, including active ones, oldest first; empty if the field does not exist.

    The shards of one run are merged into one run. The runs that made the labels are found, too, if the field was
    renamed or copied from another field or dataset.
    """
    return [merged(runs) for runs in grouped_runs(samples, label_field)]


def grouped_runs(samples: SampleCollection, label_field: str) -> list[list[SegmentationRun]]:
    """The runs of :func:`recorded_runs`, each as the list of its shards, or of the run itself."""
    dataset = root_dataset(samples)
    if not dataset.has_field(label_field):
        return []
    documents = list(collection().find(of_field(dataset, label_field)))
    recorded = {run.mark for run in filter(None, map(run_of, documents))}
    unknown = marks_in(dataset, label_field) - recorded
    by_id: dict[str, SegmentationRun] = {}
    if unknown or not documents:
        copies = _copied(dataset)
        by_id = {run.run_id: run for run in copies if run.mark in unknown}
        by_id |= {run.run_id: run for run in copies if run.label_field == label_field and not documents}
        documents += _documents_of(unknown)
    now = server_time()
    for document in documents:
        if run := run_of(document):
            if not (document.get("ended") or is_alive(document, now)):
                count_stored(dataset, label_field, run)
            by_id[run.run_id] = run
    groups: dict[str, list[SegmentationRun]] = {}
    for run in sorted(by_id.values(), key=lambda run: run.started):
        groups.setdefault(run.run_id if run.shard is None else run.shard.group, []).append(run)
    return list(groups.values())


def count_stored(dataset: fo.Dataset, label_field: str, run: SegmentationRun) -> None:
    """Corrects the counts of a run that could not record its end, from the labels with its mark."""
    if run.marks_labels and not is_frame_field(dataset, label_field):
        images, objects = count_marked(dataset, label_field, run.mark)
        run.images, run.objects = max(run.images, images + run.num_failures), max(run.objects, objects)


def mask_dirs(samples: SampleCollection) -> list[str]:
    """The folders in which runs of this dataset may have stored masks on disk."""
    query = {"dataset_id": dataset_id(root_dataset(samples))}
    folders = retry_while_unavailable(lambda: collection().distinct("run.mask_dir", query))
    return [folder for folder in folders if isinstance(folder, str)]


def fields_of_runs(samples: SampleCollection) -> list[str]:
    """The fields that runs stored masks in."""
    dataset = root_dataset(samples)
    names = [dataset.get_run_info(key).config.label_field for key in dataset.list_runs(method=_METHOD)]
    names += collection().distinct("label_field", {"dataset_id": dataset_id(dataset)})
    names += [name for name in dataset.get_field_schema() if dataset.has_field(f"{name}.{RUN_ID}")]
    return [name for name in dict.fromkeys(names) if dataset.has_field(name)]


def segmented_fields(samples: SampleCollection) -> list[str]:
    """The fields that runs created masks in; not fields whose own labels only received masks."""
    runs = {name: recorded_runs(samples, name) for name in fields_of_runs(samples)}
    return [name for name in runs if any(run.parameters.get("prompting") != name for run in runs[name])]


def failed_samples(samples: SampleCollection, label_field: str) -> fo.DatasetView:
    """The samples that the last run into this field could not segment, to inspect or to process again."""
    runs = recorded_runs(samples, label_field)
    ids = [failure.sample_id for failure in (runs[-1].failures if runs else ()) if failure.sample_id]
    return root_dataset(samples).select(dict.fromkeys(ids))


# The database ---------------------------------------------------------------------------------------------------------
def collection() -> Collection[Document]:
    """The collection of all runs. Each document has the dataset's id, the field, and the run."""
    runs: Collection[Document] = foo.get_db_conn()[_COLLECTION]
    return runs


def _documents_of(marks: Iterable[str]) -> list[Document]:
    """The documents of runs with these marks, into any field of any dataset."""
    queries = [{"run.run_id": {"$regex": f"^{re.escape(mark)}"}} for mark in marks]
    return list(collection().find({"$or": queries})) if queries else []


def id_of(dataset: fo.Dataset, run: SegmentationRun) -> Document:
    """The query for the document of a run."""
    return {"_id": f"{dataset_id(dataset)}/{run.run_id}"}  # clones have the same runs


def of_field(dataset: fo.Dataset, label_field: str) -> Document:
    """The query for the documents of the runs into a field."""
    return {"dataset_id": dataset_id(dataset), "label_field": label_field}


def write(dataset: fo.Dataset, label_field: str, run: SegmentationRun, values: Document) -> None:
    """Writes a run into the record of a field, with further values of its document."""
    changed = {**of_field(dataset, label_field), "run": document_of(run), **values}
    retry_while_unavailable(lambda: collection().update_one(id_of(dataset, run), {"$set": changed}, upsert=True))


def copy_to_fiftyone(dataset: fo.Dataset, label_field: str) -> None:
    """Copies the records to FiftyOne once no run into the field is active. Logs errors, since the run has ended."""
    key = _key(label_field)
    try:
        documents = list(collection().find(of_field(dataset, label_field)))
        now = server_time()
        if not documents or any(is_alive(document, now) for document in documents) or dataset.deleted:
            return
        runs = sorted(filter(None, map(run_of, documents)), key=lambda run: run.started)
        reload_list_of_runs(dataset)  # other processes may have added runs
        if key not in dataset.list_runs():
            dataset.register_run(key, dataset.init_run(method=_METHOD, label_field=label_field))
        results = dataset.init_run_results(key, runs=[document_of(run) for run in runs])
        replace_run_results(Run, dataset, key, results, cache=False)
        recorded = collection().distinct("dataset_id")
        deleted = set(recorded) - set(foo.get_db_conn().datasets.distinct("_id"))
        collection().delete_many({"dataset_id": {"$in": list(deleted)}})
    except Exception as error:
        logger.warning("The record of runs into '%s' could not be copied to FiftyOne: %s", label_field, error)


def delete_record(dataset: fo.Dataset, label_field: str) -> None:
    """Deletes the record of the runs into a field."""
    retry_while_unavailable(lambda: collection().delete_many(of_field(dataset, label_field)))
    reload_list_of_runs(dataset)
    if _key(label_field) in dataset.list_runs():
        dataset.delete_run(_key(label_field))


def _copied(dataset: fo.Dataset) -> list[SegmentationRun]:
    """The runs in FiftyOne's copies of the records of all fields."""
    runs: list[SegmentationRun] = []
    for key in dataset.list_runs(method=_METHOD):
        try:
            results = dataset.load_run_results(key, cache=False)
        except (NoFile, AttributeError):  # raised by FiftyOne if a process was killed while saving them
            continue
        runs += filter(None, map(_from_dict, getattr(results, "runs", None) or ()))
    return runs


def merged(runs: Sequence[SegmentationRun]) -> SegmentationRun:
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


def document_of(run: SegmentationRun) -> Document:
    """A run as plain data."""
    failures = [asdict(failure) for failure in run.failures[:_MAX_FAILURES]]
    return asdict(replace(run, failures=[])) | {"failures": failures}


def run_of(document: Document) -> SegmentationRun | None:
    """The run of a document of the collection; None if it can't be read."""
    return _from_dict(document.get("run"))


def _from_dict(stored: object) -> SegmentationRun | None:
    """A run from plain data; None if it is none.

    Other versions of this package may have written it: what is unknown here is ignored, and what is missing or of the
    wrong type gets its default.
    """
    if not isinstance(stored, dict):
        return None
    values: dict[str, Any] = {"marks_labels": False}
    for name, types in _TYPES.items():
        if isinstance(stored.get(name), types):
            values[name] = stored[name]
    if not {"label_field", "parameters", "run_id"} <= values.keys():
        logger.debug("A record of a run can't be read: %s", stored)
        return None
    values["seconds"] = {
        name: value for name, value in values.get("seconds", {}).items() if isinstance(value, (int, float))
    }
    failures = [failure for failure in values.get("failures", ()) if isinstance(failure, dict)]
    values["failures"] = [
        Failure(
            each["sample_id"] if ObjectId.is_valid(each.get("sample_id")) else None,
            each.get("filepath"),
            str(each.get("error")),
        )
        for each in failures
    ]
    try:
        values["shard"] = Shard(**values["shard"]) if "shard" in values else None
        datetime.fromisoformat(values.setdefault("started", _UNKNOWN_START))
    except (ArgumentError, TypeError, ValueError):
        logger.debug("A record of a run can't be read: %s", stored)
        return None
    return SegmentationRun(**values)


_UNKNOWN_START = "1970-01-01T00:00:00+00:00"
_TYPES = {
    "label_field": str,
    "parameters": dict,
    "started": str,
    "images": int,
    "objects": int,
    "seconds": dict,
    "failures": list,
    "num_failures": int,
    "cancelled": bool,
    "shard": dict,
    "replace": bool,
    "mask_dir": str,
    "run_id": str,
    "marks_labels": bool,
}


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _key(label_field: str) -> str:
    # A key must be a Python identifier, but "my masks" and "my_masks" can be two different fields.
    name = re.sub(r"\W", "_", label_field)
    if name != label_field.replace("frames.", "frames_", 1):
        name += f"_{zlib.crc32(label_field.encode()):08x}"
    return f"mobilesamv2_{name}"
