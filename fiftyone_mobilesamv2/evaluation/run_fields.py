"""The fields that an evaluation of proposals stores in its dataset: label attributes and sample counts."""

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
from ..labels.schema import NewField, declare_fields, delete_fields
from .measuring import Measured, MeasuredImage

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

    from .proposals import ProposalEvaluationConfig

_MAX_UPDATES = 200
_LABELS_PER_UPDATE = 100  # MongoDB searches all labels of the document for each of them


class RunFields(foud.DetectionEvaluation):
    """Base of :class:`.proposals.ProposalEvaluation` that stores, renames and deletes its fields."""

    config: ProposalEvaluationConfig
    _measured: Measured

    def check_names(self, samples: SampleCollection, eval_key: str) -> None:
        """Raises ArgumentError if a field that the run would store, and later delete, exists or is read-only."""
        dataset = root_dataset(samples)
        for name in self._label_names(dataset):
            if dataset.get_field(name).read_only:
                raise ArgumentError(
                    f"'{name}' is read-only: no attributes can be stored on its labels. Use eval_key=None."
                )
        names, attributes = set(self._fields(dataset, eval_key)), set(self._attributes(dataset, eval_key))
        if eval_key in dataset.list_evaluations():
            earlier = dataset.get_evaluation_info(eval_key).config
            names -= set(earlier.build()._fields(dataset, earlier.stored_as))
            attributes &= names
        taken = [name for name in sorted(names) if dataset.has_field(name)]
        if attributes and not taken:
            # Label attributes may exist without being declared.
            paths = {split_frame_field(dataset, name)[0]: name for name in attributes}
            collection = frame_collection(dataset) if self._is_of_frames(dataset) else sample_collection(dataset)
            if collection is not None and collection.find_one(
                {"$or": [{path: {"$exists": True}} for path in paths]}, {"_id": True}
            ):
                taken = [name for path, name in paths.items() if collection.find_one({path: {"$exists": True}})]
        if taken:
            raise ArgumentError(
                f"'{taken[0]}' exists and does not belong to an earlier evaluation. Choose another eval_key."
            )

    def write(self, samples: SampleCollection, eval_key: str) -> None:
        """Stores the results on objects, on the proposals that find them, and on samples.

        The other proposals, which are most labels, are not changed.
        """
        dataset, root = source_dataset(samples), root_dataset(samples)
        if dataset is not root:
            self._delete_fields(dataset, eval_key)  # left by an earlier run that was deleted only in the source
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
        fields = {name: NewField(ftype) for name, ftype in self._fields(dataset, eval_key).items()}
        declare_fields(dataset, fields)
        of_frames = self._is_of_frames(dataset)
        has_counts = bool(self._count_fields(dataset, eval_key))
        objects_path, proposals_path = (
            self._label_path(dataset, name) for name in (self.config.gt_field, self.config.pred_field)
        )
        ids: list[ObjectId] = []  # documents to reload if they are in memory
        operations: list[UpdateOne] = []
        for number, image in enumerate(self._measured.images, 1):
            counts = {eval_key + name: value for name, value in self._counts([image]).items()} if has_counts else {}
            operations += _updates(query(image), image, eval_key, objects_path, proposals_path, counts)
            ids.append(query(image).get("_id", image.id))  # a frame has the same id in a frame view
            if len(operations) >= _MAX_UPDATES or number == len(self._measured.images):
                bulk_write(dataset, operations, ids=ids, frames=of_frames)
                ids, operations = [], []
        declare_fields(dataset, fields)

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

    def _label_names(self, dataset: fo.Dataset) -> list[str]:
        """The existing fields of objects and proposals in `dataset`, which may be a view's source."""
        names = [self._label_name(dataset, name) for name in (self.config.gt_field, self.config.pred_field)]
        return [name for name in names if dataset.has_field(name)]

    def _label_name(self, dataset: fo.Dataset, name: str) -> str:
        return FRAMES_PREFIX + name if self.config.view == "frames" and not is_frames_view(dataset) else name

    def _label_path(self, dataset: fo.Dataset, name: str) -> tuple[str, bool] | None:
        """The path of the labels in documents of `dataset`, and whether it is a list; None if it does not exist."""
        name = self._label_name(dataset, name)
        if not dataset.has_field(name):
            return None
        path, is_list = label_root(dataset, name)
        return split_frame_field(dataset, path)[0], is_list

    def _is_of_frames(self, samples: SampleCollection) -> bool:
        """Whether the labels are in frame fields there."""
        from_view = self.config.view == "frames" and not is_frames_view(samples)
        return from_view or is_frame_field(samples, self.config.gt_field)

    def _fields(self, dataset: fo.Dataset, eval_key: str) -> dict[str, type[fof.Field]]:
        """All fields that a run stores in `dataset`."""
        return self._count_fields(dataset, eval_key) | self._attributes(dataset, eval_key)

    def _count_fields(self, dataset: fo.Dataset, eval_key: str) -> dict[str, type[fof.Field]]:
        if self.config.view == "patches" and not is_patches_view(dataset):
            return {}  # counts of patches are meaningless for their samples
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
        delete_fields(dataset, self._fields(dataset, eval_key))


def _updates(
    query: Document,
    image: MeasuredImage,
    eval_key: str,
    objects_path: tuple[str, bool] | None,
    proposals_path: tuple[str, bool] | None,
    values: Document,
) -> Iterator[UpdateOne]:
    """Updates one document: sets `values`, and the attributes of objects and of the proposals that find them.

    Labels are identified by id: a view may hide some, and labels may have changed since they were read.

    Args:
        objects_path, proposals_path: the path of the labels in the document, and whether it is a list; None if the
            document has no such labels.
    """
    attributes: list[tuple[tuple[str, bool], ObjectId, str, float | None, int | None, ObjectId | None]] = []
    for each in image.objects:
        state = "fn" if each.match_id is None else "tp"
        if objects_path is not None:
            attributes.append((objects_path, each.id, state, each.best_iou, each.rank, each.match_id))
        if proposals_path is not None and each.match_id is not None:
            attributes.append((proposals_path, each.match_id, state, each.match_iou, each.rank, each.id))
    values = {**values, "last_modified_at": datetime.now(timezone.utc)}
    for start in range(0, max(len(attributes), 1), _LABELS_PER_UPDATE):
        filters: list[Mapping[str, Any]] = []
        for (path, is_list), label_id, state, iou, rank, other in attributes[start : start + _LABELS_PER_UPDATE]:
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
