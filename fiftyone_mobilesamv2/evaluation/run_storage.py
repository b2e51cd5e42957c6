"""Stores an evaluation of proposals in its dataset: attributes of labels, and counts of samples and frames."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import bson
import fiftyone as fo
import fiftyone.core.utils as fou
import numpy as np
from bson import ObjectId
from fiftyone.constants import VERSION
from pymongo import UpdateMany, UpdateOne
from pymongo.errors import BulkWriteError

from ..errors import StorageError
from ..fiftyone_internals import (
    Document,
    bulk_write,
    frame_collection,
    has_results,
    is_generated,
    replace_run_results,
    root_dataset,
    run_view,
    sample_collection,
    source_dataset,
)
from ..labels.schema import NewField, declare_fields, delete_fields
from .match_attributes import image_updates, replacement
from .measuring import Measured, MeasuredImage
from .run_fields import UNFINISHED, RunFields, datasets_of

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection
    from fiftyone.core.runs import BaseRunResults

_MAX_UPDATES = 200
_MAX_BYTES = 16 * 2**20  # of a document in MongoDB


class RunStorage(RunFields):
    """Base of :class:`.proposals.ProposalEvaluation` that stores its results on labels, samples and frames."""

    _measured: Measured

    def store(self, samples: SampleCollection, eval_key: str, results: BaseRunResults) -> None:
        """Stores the run: its results, and the values of objects, of the proposals that find them, and of samples.

        The other proposals, which are most labels, are not changed. An earlier run with this key keeps everything it
        has until the new one is complete.
        """
        dataset = root_dataset(samples)
        if eval_key in dataset.list_evaluations() and has_results(dataset, eval_key):
            self._replace(samples, eval_key, results)
            return
        self.config.stored_as = eval_key
        super().register_run(samples, eval_key)
        try:
            for each in datasets_of(samples):
                self._store_in(each, eval_key)
            self._store_video_counts(samples, eval_key)
            self.save_run_results(samples, eval_key, results)
        except BaseException:
            self.delete_run(samples, eval_key)
            raise

    def _replace(self, samples: SampleCollection, eval_key: str, results: BaseRunResults) -> None:
        """Stores the run under the key of an earlier one.

        1. Attributes are stored under temporary, undeclared names, so that the documents are known to have room.
        2. One update of the run's document replaces the earlier run by this one, which is complete.
        3. The attributes get their final names, counts are stored, and what only the earlier run had is deleted. If
           this is interrupted, `config.leftovers` has the names of all fields that may exist.
        """
        dataset, temporary = root_dataset(samples), eval_key + UNFINISHED
        earlier = dataset.get_evaluation_info(eval_key).config.build()
        fields = self._fields(dataset, eval_key, self._label_names(dataset))
        self._remove_attributes(dataset, temporary)  # left by a process that was killed
        try:
            self._update(dataset, temporary, counts=False)
            self._check_room(dataset, eval_key)
        except BaseException:
            self._remove_attributes(dataset, temporary)
            raise
        self.config.stored_as = temporary
        self.config.leftovers = list(dict.fromkeys([*earlier.stored_fields(dataset, eval_key), *fields]))
        replace_run_results(
            type(self),
            samples,
            eval_key,
            results,
            config=self.config.serialize(),
            view_stages=run_view(samples),
            timestamp=datetime.now(timezone.utc),
            version=VERSION,
        )
        earlier.cleanup_custom_metrics(samples, eval_key)
        self._declare(dataset, eval_key)
        self._move_attributes(dataset, temporary, eval_key)
        if earlier.config.leftovers:
            earlier._remove_undeclared(dataset, eval_key)
        delete_fields(dataset, [name for name in self.config.leftovers if name not in fields])
        for names, of_frames in zip(fou.split_frame_fields(list(self._count_fields(dataset, eval_key))), (False, True)):
            if names:
                bulk_write(dataset, [UpdateMany({}, {"$unset": dict.fromkeys(names, "")})], frames=of_frames)
        self._update(dataset, eval_key, labels=False)
        self._declare(dataset, eval_key)
        self._store_video_counts(samples, eval_key)
        for generated in datasets_of(samples)[1:]:
            delete_fields(generated, earlier.stored_fields(generated, eval_key))
            self._store_in(generated, eval_key)
        self.config.stored_as, self.config.leftovers = eval_key, []
        self.update_run_config(samples, eval_key, self.config)

    def _check_room(self, dataset: fo.Dataset, eval_key: str) -> None:
        """Raises StorageError if a document that gets counts would become too large by them."""
        collection = frame_collection(dataset) if self._is_of_frames(dataset) else sample_collection(dataset)
        counts = {eval_key + name: 0.0 for name in self._counts([])} if self._count_fields(dataset, eval_key) else {}
        limit = _MAX_BYTES - len(bson.encode(counts))
        if collection is None:
            return
        measured = {image.id for image in self._measured.images}
        for document in collection.find({"$expr": {"$gt": [{"$bsonSize": "$$ROOT"}, limit]}}, {"_id": True}):
            if document["_id"] in measured:
                raise StorageError(_too_large(document, f"it has more than {limit} bytes"))

    def _move_attributes(self, dataset: fo.Dataset, temporary: str, eval_key: str) -> None:
        paths = [path for name in self._label_names(dataset) if (path := self._label_path(dataset, name))]
        if paths:
            moves = [replacement(path, eval_key, temporary) for path in paths]
            bulk_write(dataset, moves, frames=self._is_of_frames(dataset))

    def _store_in(self, dataset: fo.Dataset, eval_key: str) -> None:
        if is_generated(dataset):  # fields may be left by an earlier run that was deleted only in the source
            delete_fields(dataset, self._fields(dataset, eval_key, self._label_names(dataset)))
        self._declare(dataset, eval_key)
        self._update(dataset, eval_key)
        self._declare(dataset, eval_key)

    def _declare(self, dataset: fo.Dataset, eval_key: str) -> None:
        fields = self._fields(dataset, eval_key, self._label_names(dataset))
        declare_fields(dataset, {name: NewField(ftype) for name, ftype in fields.items()})

    def _update(self, dataset: fo.Dataset, eval_key: str, labels: bool = True, counts: bool = True) -> None:
        of_frames = self._is_of_frames(dataset)
        counts = counts and bool(self._count_fields(dataset, eval_key))
        names = [self._label_name(dataset, name) for name in (self.config.gt_field, self.config.pred_field)]
        objects_path, proposals_path = (self._label_path(dataset, name) if labels else None for name in names)
        ids: list[ObjectId] = []  # documents to reload if they are in memory
        operations: list[UpdateOne] = []
        for number, image in enumerate(self._measured.images, 1):
            query = self._query(dataset, image)
            values = {eval_key + name: value for name, value in self._counts([image]).items()} if counts else {}
            operations += image_updates(query, image, eval_key, objects_path, proposals_path, values)
            ids.append(query.get("_id", image.id))  # a frame has the same id in a frame view
            if len(operations) >= _MAX_UPDATES or number == len(self._measured.images):
                try:
                    bulk_write(dataset, operations, ids=ids, frames=of_frames)
                except ValueError as error:
                    raise _refusal(error) from error
                ids, operations = [], []

    def _query(self, dataset: fo.Dataset, image: MeasuredImage) -> Document:
        """Finds the document of an image in `dataset`, which may be the source of the view that was evaluated."""
        if self.config.view is None or is_generated(dataset):
            return {"_id": image.id}
        if self.config.view == "frames":
            return {"_sample_id": image.sample_id, "frame_number": image.frame_number}
        return {"_id": image.sample_id}

    def _store_video_counts(self, samples: SampleCollection, eval_key: str) -> None:
        dataset = source_dataset(samples)
        if not self._is_of_frames(dataset):
            return
        videos: dict[ObjectId, list[MeasuredImage]] = {}
        for image in self._measured.images:
            videos.setdefault(image.sample_id, []).append(image)
        for name in self._counts([]):
            values = {str(id): self._counts(images)[name] for id, images in videos.items()}
            dataset.set_values(eval_key + name, values, key_field="id")

    def forget_counts_of_skipped(self, samples: SampleCollection, eval_key: str) -> None:
        # FiftyOne stored zeros for them.
        ends = [f"{eval_key}{end}" for end in ("_tp", "_fp", "_fn")]
        dataset, of_frames = source_dataset(samples), self._is_of_frames(samples)
        nothing = {"$set": dict.fromkeys(ends)}
        if operations := [UpdateOne({"_id": ObjectId(each["id"])}, nothing) for each in self._measured.skipped]:
            bulk_write(dataset, operations, frames=of_frames)
        if of_frames:
            measured = {str(image.sample_id) for image in self._measured.images}
            empty = [id for id in samples.values("id") if id not in measured]
            if empty:
                bulk_write(dataset, [UpdateOne({"_id": ObjectId(id)}, nothing) for id in empty])

    def _counts(self, images: Sequence[MeasuredImage]) -> dict[str, float | None]:
        """The totals of `images`, a single one or those of a video, by the suffix of the field's name."""
        objects = [measured_object for image in images for measured_object in image.objects]
        tp = sum(measured_object.rank is not None for measured_object in objects)
        measured = [(image.recalls, len(image.objects)) for image in images if image.recalls is not None]
        weights = [count for _, count in measured]
        recalls = {
            f"_recall_at_{k}": float(np.average([each[i] for each, _ in measured], weights=weights))
            if measured
            else None
            for i, k in enumerate(self.config.ks)
        }
        return {"_tp": tp, "_fp": sum(image.fp for image in images), "_fn": len(objects) - tp, **recalls}


def _refusal(error: ValueError) -> Exception:
    """Names the document that the database refused to update; FiftyOne's error has only the reason."""
    if not isinstance(error.__cause__, BulkWriteError):
        return error
    return StorageError(_too_large(error.__cause__.details["writeErrors"][0]["op"]["q"], str(error)))


def _too_large(query: Document, cause: str) -> str:
    name = ", ".join(f"{key} {value}" for key, value in query.items())
    return (
        f"The results of the sample or frame with {name} can't be stored: {cause}. Use eval_key=None to store none, or "
        "keep masks in files, which makes documents smaller."
    )
