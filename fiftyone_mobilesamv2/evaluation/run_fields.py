"""What an evaluation of proposals stores in its dataset: attributes of labels and counts of samples, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import fiftyone.core.fields as fof
import fiftyone.core.utils as fou
import fiftyone.utils.eval.detection as foud
import numpy as np
from bson import ObjectId
from pymongo import UpdateOne

from ..errors import ArgumentError
from ..fiftyone_internals import (
    FRAMES_PREFIX,
    Document,
    bulk_write,
    delete_empty_sidebar_group,
    frame_collection,
    is_frame_field,
    is_frames_view,
    is_patches_view,
    label_root,
    rename_sidebar_group,
    root_dataset,
    sample_collection,
    source_dataset,
    split_frame_field,
)
from .measuring import Measured, MeasuredImage

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

    from .proposals import ProposalEvaluationConfig

_UPDATES_AT_ONCE = 200
_LABELS_IN_AN_UPDATE = 100  # MongoDB looks for each of them among all labels of the document


class RunFields(foud.DetectionEvaluation):
    """The part of :class:`.proposals.ProposalEvaluation` that stores, renames and deletes what was measured."""

    config: ProposalEvaluationConfig
    _measured: Measured

    def check_names(self, samples: SampleCollection, eval_key: str) -> None:
        """That nothing of the user's is where the run is going to store, and at last delete, its own."""
        dataset = root_dataset(samples)
        for name in self._label_names(dataset):
            if dataset.get_field(name).read_only:
                raise ArgumentError(f"'{name}' is read-only: nothing can be noted on its labels. Use eval_key=None.")
        names, attributes = set(self._fields(dataset, eval_key)), set(self._attributes(dataset, eval_key))
        if eval_key in dataset.list_evaluations():
            earlier = dataset.get_evaluation_info(eval_key).config
            names -= set(earlier.build()._fields(dataset, earlier.stored_as))
            attributes &= names
        taken = [name for name in sorted(names) if dataset.has_field(name)]
        if attributes and not taken:
            # Attributes of labels needn't be declared.
            paths = {split_frame_field(dataset, name)[0]: name for name in attributes}
            collection = frame_collection(dataset) if self._is_of_frames(dataset) else sample_collection(dataset)
            if collection is not None and collection.find_one(
                {"$or": [{path: {"$exists": True}} for path in paths]}, {"_id": True}
            ):
                taken = [name for path, name in paths.items() if collection.find_one({path: {"$exists": True}})]
        if taken:
            raise ArgumentError(f"'{taken[0]}' exists, and is no earlier evaluation's. Choose another eval_key.")

    def write(self, samples: SampleCollection, eval_key: str) -> None:
        """Notes on objects, on the proposals that find them and on samples what was found.

        The other proposals, most of the labels, stay as they are.
        """
        dataset, root = source_dataset(samples), root_dataset(samples)
        if dataset is not root:
            self._delete_fields(dataset, eval_key)  # an earlier run's that was deleted in the source alone
            of_frames = self._is_of_frames(root)
            self._update(
                root,
                eval_key,
                lambda image: (
                    {"_sample_id": image.sample_id, "frame_number": image.frame_number}
                    if of_frames
                    else {"_id": image.sample_id}
                ),
            )
        self._update(dataset, eval_key, lambda image: {"_id": image.id})
        if self._is_of_frames(dataset):
            videos: dict[ObjectId, list[MeasuredImage]] = {}
            for image in self._measured.images:
                videos.setdefault(image.sample_id, []).append(image)
            for name in self._counts([]):
                values = {str(id): self._counts(images)[name] for id, images in videos.items()}
                dataset.set_values(eval_key + name, values, key_field="id")

    def _update(self, dataset: fo.Dataset, eval_key: str, query: Callable[[MeasuredImage], Document]) -> None:
        for name, kind in self._fields(dataset, eval_key).items():
            name, of_frame = split_frame_field(dataset, name)
            (dataset.add_frame_field if of_frame else dataset.add_sample_field)(name, kind)
        of_frames = self._is_of_frames(dataset)
        has_counts = bool(self._count_fields(dataset, eval_key))
        objects_path, proposals_path = (
            self._label_path(dataset, name) for name in (self.config.gt_field, self.config.pred_field)
        )
        ids: list[ObjectId] = []  # of what is in memory, too, and then reloaded
        operations: list[UpdateOne] = []
        for number, image in enumerate(self._measured.images, 1):
            counts = {eval_key + name: value for name, value in self._counts([image]).items()} if has_counts else {}
            operations += _updates(query(image), image, eval_key, objects_path, proposals_path, counts)
            ids.append(query(image).get("_id", image.id))  # a frame has its id in a view of frames as well
            if len(operations) >= _UPDATES_AT_ONCE or number == len(self._measured.images):
                bulk_write(dataset, operations, ids=ids, frames=of_frames)
                ids, operations = [], []

    def forget_counts_of_skipped(self, samples: SampleCollection, eval_key: str) -> None:
        # FiftyOne has stored zeros.
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
        """By the end of the field's name: what `images`, one or those of a video, sum up to."""
        objects = [found for image in images for found in image.objects]
        tp = sum(found.rank is not None for found in objects)
        measured = [(image.recalls, len(image.objects)) for image in images if image.recalls is not None]
        weights = [count for _, count in measured]
        recalls = {
            f"_recall_at_{k}": float(np.average([each[i] for each, _ in measured], weights=weights))
            if measured
            else None
            for i, k in enumerate(self.config.ks)
        }
        return {"_tp": tp, "_fp": sum(image.fp for image in images), "_fn": len(objects) - tp, **recalls}

    def _label_names(self, dataset: fo.Dataset) -> list[str]:
        """The fields of objects and proposals in `dataset`, which may be a view's source; only those that exist."""
        names = [self._label_name(dataset, name) for name in (self.config.gt_field, self.config.pred_field)]
        return [name for name in names if dataset.has_field(name)]

    def _label_name(self, dataset: fo.Dataset, name: str) -> str:
        return FRAMES_PREFIX + name if self.config.view == "frames" and not is_frames_view(dataset) else name

    def _label_path(self, dataset: fo.Dataset, name: str) -> tuple[str, bool] | None:
        """Where the labels are in a document of `dataset`, and whether in a list; None where it lacks the field."""
        name = self._label_name(dataset, name)
        if not dataset.has_field(name):
            return None
        path, is_list = label_root(dataset, name)
        return split_frame_field(dataset, path)[0], is_list

    def _is_of_frames(self, samples: SampleCollection) -> bool:
        """Whether the labels are of videos' frames there."""
        from_view = self.config.view == "frames" and not is_frames_view(samples)
        return from_view or is_frame_field(samples, self.config.gt_field)

    def _fields(self, dataset: fo.Dataset, eval_key: str) -> dict[str, type[fof.Field]]:
        """Everything that a run stores in `dataset`."""
        return self._count_fields(dataset, eval_key) | self._attributes(dataset, eval_key)

    def _count_fields(self, dataset: fo.Dataset, eval_key: str) -> dict[str, type[fof.Field]]:
        if self.config.view == "patches" and not is_patches_view(dataset):
            return {}  # counts of patches say nothing about their samples
        fields = {f"{eval_key}{end}": fof.IntField for end in ("_tp", "_fp", "_fn")}
        fields |= {f"{eval_key}_recall_at_{k}": fof.FloatField for k in self.config.ks}
        if not self._is_of_frames(dataset):
            return fields
        of_frames = {FRAMES_PREFIX + name: kind for name, kind in fields.items()}
        return of_frames if self.config.view == "frames" else fields | of_frames

    def _attributes(self, dataset: fo.Dataset, eval_key: str) -> dict[str, type[fof.Field]]:
        fields: dict[str, type[fof.Field]] = {}
        for name in self._label_names(dataset):
            root, _ = label_root(dataset, name)
            fields |= {
                f"{root}.{eval_key}": fof.StringField,
                f"{root}.{eval_key}_id": fof.StringField,
                f"{root}.{eval_key}_iou": fof.FloatField,
                f"{root}.{eval_key}_rank": fof.IntField,
            }
        return fields

    def get_fields(self, samples: SampleCollection, eval_key: str, include_custom_metrics: bool = True) -> list[str]:
        fields = list(self._fields(source_dataset(samples), self.config.stored_as or eval_key))
        return fields + (self.get_custom_metric_fields(samples, eval_key) if include_custom_metrics else [])

    def rename(self, samples: SampleCollection, eval_key: str, new_eval_key: str) -> None:
        stored_as = self.config.stored_as or eval_key
        renamed = []
        for dataset in _datasets(samples):
            pairs = zip(self._fields(dataset, stored_as), self._fields(dataset, new_eval_key))
            renamed.append((dataset, {old: new for old, new in pairs if dataset.has_field(old)}))
            if taken := [new for new in renamed[-1][1].values() if dataset.has_field(new)]:
                raise ArgumentError(f"'{taken[0]}' exists; the fields keep the name '{stored_as}'")
        for dataset, names in renamed:
            of_samples, of_frames = fou.split_frame_fields(names)
            if of_samples:
                dataset.rename_sample_fields(of_samples)
            if of_frames:
                dataset.rename_frame_fields(of_frames)
        self.config.stored_as = new_eval_key
        self.update_run_config(samples, eval_key, self.config)
        self.rename_custom_metrics(samples, eval_key, new_eval_key)
        rename_sidebar_group(samples, eval_key, new_eval_key)

    def cleanup(self, samples: SampleCollection, eval_key: str) -> None:
        for dataset in _datasets(samples):
            self._delete_fields(dataset, self.config.stored_as or eval_key)
        self.cleanup_custom_metrics(samples, eval_key)
        delete_empty_sidebar_group(samples, eval_key)

    def _delete_fields(self, dataset: fo.Dataset, eval_key: str) -> None:
        names = [name for name in self._fields(dataset, eval_key) if dataset.has_field(name)]
        of_samples, of_frames = fou.split_frame_fields(names)
        if of_samples:
            dataset.delete_sample_fields(of_samples)
        if of_frames:
            dataset.delete_frame_fields(of_frames)


def _updates(
    query: Document,
    image: MeasuredImage,
    eval_key: str,
    objects_path: tuple[str, bool] | None,
    proposals_path: tuple[str, bool] | None,
    values: Document,
) -> Iterator[UpdateOne]:
    """Of one document: sets `values`, and the attributes of the image's objects and of the proposals that find them.

    Labels are told by id: a view may hide some, and others may have come and gone since they were read.

    Args:
        objects_path, proposals_path: where the labels are in the document, and whether in a list; None: they aren't
            there.
    """
    notes: list[tuple[tuple[str, bool], ObjectId, str, float | None, int | None, ObjectId | None]] = []
    for found in image.objects:
        state = "fn" if found.match_id is None else "tp"
        if objects_path is not None:
            notes.append((objects_path, found.id, state, found.best_iou, found.rank, found.match_id))
        if proposals_path is not None and found.match_id is not None:
            notes.append((proposals_path, found.match_id, state, found.match_iou, found.rank, found.id))
    values = {**values, "last_modified_at": datetime.now(timezone.utc)}
    for start in range(0, max(len(notes), 1), _LABELS_IN_AN_UPDATE):
        filters: list[Mapping[str, Any]] = []
        for (path, is_list), label_id, state, iou, rank, other in notes[start : start + _LABELS_IN_AN_UPDATE]:
            if is_list:
                path += f".$[l{len(filters)}]"
                filters.append({f"l{len(filters)}._id": label_id})
            path += f".{eval_key}"
            values |= {path: state, f"{path}_iou": iou, f"{path}_rank": rank, f"{path}_id": other and str(other)}
        yield UpdateOne(query, {"$set": values}, array_filters=filters or None)
        values = {}


def _datasets(samples: SampleCollection) -> list[fo.Dataset]:
    """The dataset and, for a view of patches or frames, the generated dataset behind it."""
    root, own = root_dataset(samples), source_dataset(samples)
    return [root] if own is root else [root, own]
