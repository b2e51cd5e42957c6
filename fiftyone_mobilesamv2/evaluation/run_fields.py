"""The fields that an evaluation of proposals stores in its dataset: label attributes and sample counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.utils as fou
import fiftyone.utils.eval.detection as foud
from bson import ObjectId

from ..errors import ArgumentError
from ..fiftyone_internals import (
    FRAMES_PREFIX,
    bulk_write,
    delete_empty_sidebar_group,
    frame_collection,
    is_frame_field,
    is_frames_view,
    is_patches_view,
    label_path,
    label_root,
    rename_sidebar_group,
    root_dataset,
    sample_collection,
    source_dataset,
    split_frame_field,
)
from ..labels.fields import SHAPE_TYPES, label_fields
from ..labels.schema import delete_fields
from .match_attributes import ENDS, LabelPath, removal

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection
    from fiftyone.core.evaluation import EvaluationInfo

    from .proposals import ProposalEvaluationConfig

UNFINISHED = "_unfinished"  # suffix of the attributes of a run that is about to replace an earlier one
_MAX_IDS = 1000  # labels that are searched for to recognize a field; those of a view may be deleted


class RunFields(foud.DetectionEvaluation):
    """Base of :class:`.run_storage.RunStorage` that finds, renames and deletes the fields of a run."""

    config: ProposalEvaluationConfig

    def check_names(self, samples: SampleCollection, eval_key: str) -> None:
        """Raises ArgumentError if a field that the run would store, and later delete, exists or is read-only."""
        dataset = root_dataset(samples)
        evaluations = dataset.list_evaluations()
        if eval_key + UNFINISHED in evaluations:
            raise ArgumentError(
                f"'{eval_key}{UNFINISHED}', which would store temporary attributes, is an evaluation. Choose another "
                "eval_key."
            )
        labels = self._label_names(dataset)
        for name in labels:
            if dataset.get_field(name).read_only:
                raise ArgumentError(
                    f"'{name}' is read-only: no attributes can be stored on its labels. Use eval_key=None."
                )
        names, attributes = (
            set(self._fields(dataset, eval_key, labels)),
            set(self._attributes(dataset, eval_key, labels)),
        )
        if eval_key in evaluations:
            names -= set(dataset.get_evaluation_info(eval_key).config.build().stored_fields(dataset, eval_key))
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

    def _validate_run(self, samples: SampleCollection, eval_key: str, existing_info: EvaluationInfo) -> None:
        earlier = existing_info.config.build()
        dataset = root_dataset(samples)
        carriers = earlier._carriers(dataset, earlier.config.stored_as or eval_key)
        for role in ("pred_field", "gt_field"):
            new, old = (self._label_name(dataset, getattr(config, role)) for config in (self.config, earlier.config))
            was_renamed = new in carriers and old not in carriers
            if not was_renamed:
                self._validate_fields_match(eval_key, role, existing_info)

    # The names of fields --------------------------------------------------------------------------------------------

    def _label_names(self, dataset: fo.Dataset) -> list[str]:
        """The existing fields of objects and proposals in `dataset`, which may be a view's source."""
        names = [self._label_name(dataset, name) for name in (self.config.gt_field, self.config.pred_field)]
        return [name for name in names if dataset.has_field(name)]

    def _label_name(self, dataset: fo.Dataset, name: str) -> str:
        return FRAMES_PREFIX + name if self.config.view == "frames" and not is_frames_view(dataset) else name

    def _label_path(self, dataset: fo.Dataset, name: str) -> LabelPath | None:
        """The path of a field's labels in documents of `dataset`; None if it does not exist."""
        if not dataset.has_field(name):
            return None
        path, is_list = label_root(dataset, name)
        return split_frame_field(dataset, path)[0], is_list

    def _is_of_frames(self, samples: SampleCollection) -> bool:
        """Whether the labels are in frame fields there."""
        from_view = self.config.view == "frames" and not is_frames_view(samples)
        return from_view or is_frame_field(samples, self.config.gt_field)

    def _carriers(self, samples: SampleCollection, stored_as: str | None) -> list[str]:
        """The fields whose labels have declared attributes of an evaluation."""
        roots = {name: label_root(samples, name)[0] for name in label_fields(samples, SHAPE_TYPES)}
        return [
            name for name, root in roots.items() if all(samples.has_field(f"{root}.{stored_as}{end}") for end in ENDS)
        ]

    def _stored_label_names(self, dataset: fo.Dataset, stored_as: str) -> list[str]:
        """The fields of objects and proposals. If they were renamed since, all fields that have the attributes."""
        names, carriers = self._label_names(dataset), self._carriers(dataset, stored_as)
        if len(names) == 2 and set(names) <= set(carriers):
            return names  # others are copies of them
        return list(dict.fromkeys(names + carriers))

    def current_field(self, samples: SampleCollection, role: str, ids: Sequence[str | None]) -> str:
        """The current name of a field that may have been renamed since.

        Args:
            samples: where to look for it.
            role: "gt_field" or "pred_field".
            ids: ids of some of its labels; others may be None.

        Raises:
            ArgumentError: it is gone, or several fields contain the labels.
        """
        name: str = getattr(self.config, role)
        other = self.config.pred_field if role == "gt_field" else self.config.gt_field
        known = [ObjectId(id) for id in ids if id is not None]
        carriers = self._carriers(samples, self.config.stored_as)
        if name in carriers or (samples.has_field(name) and (not known or _contains(samples, name, known))):
            return name
        candidates = [each for each in carriers or label_fields(samples, SHAPE_TYPES) if each not in (name, other)]
        if known:
            candidates = [each for each in candidates if _contains(samples, each, known)]
        if len(candidates) != 1:
            found = f"{' and '.join(candidates)} contain" if candidates else "no other field contains"
            raise ArgumentError(
                f"Field '{name}' was renamed or deleted since it was evaluated, and {found} its labels. Rename the "
                f"right field to '{name}', or evaluate again."
            )
        return candidates[0]

    def _fields(self, dataset: fo.Dataset, eval_key: str, labels: Sequence[str]) -> dict[str, type[fof.Field]]:
        """All fields that a run stores in `dataset`, with attributes of these fields of labels."""
        return self._count_fields(dataset, eval_key) | self._attributes(dataset, eval_key, labels)

    def stored_fields(self, dataset: fo.Dataset, eval_key: str) -> list[str]:
        """All fields that this run has stored in `dataset`."""
        stored_as = self.config.stored_as or eval_key
        labels = self._stored_label_names(dataset, stored_as)
        return list(dict.fromkeys([*self._fields(dataset, stored_as, labels), *self.config.leftovers]))

    def _count_fields(self, dataset: fo.Dataset, eval_key: str) -> dict[str, type[fof.Field]]:
        if self.config.view == "patches" and not is_patches_view(dataset):
            return {}  # counts of patches are meaningless for their samples
        fields = {f"{eval_key}{end}": fof.IntField for end in ("_tp", "_fp", "_fn")}
        fields |= {f"{eval_key}_recall_at_{k}": fof.FloatField for k in self.config.ks}
        if not self._is_of_frames(dataset):
            return fields
        of_frames = {FRAMES_PREFIX + name: kind for name, kind in fields.items()}
        return of_frames if self.config.view == "frames" else fields | of_frames

    def _attributes(self, dataset: fo.Dataset, eval_key: str, labels: Sequence[str]) -> dict[str, type[fof.Field]]:
        fields: dict[str, type[fof.Field]] = {}
        for name in labels:
            root, _ = label_root(dataset, name)
            fields |= {
                f"{root}.{eval_key}": fof.StringField,
                f"{root}.{eval_key}_id": fof.StringField,
                f"{root}.{eval_key}_iou": fof.FloatField,
                f"{root}.{eval_key}_rank": fof.IntField,
            }
        return fields

    def get_fields(self, samples: SampleCollection, eval_key: str, include_custom_metrics: bool = True) -> list[str]:
        dataset = source_dataset(samples)
        fields = [name for name in self.stored_fields(dataset, eval_key) if dataset.has_field(name)]
        return fields + (self.get_custom_metric_fields(samples, eval_key) if include_custom_metrics else [])

    # Renaming and deleting ------------------------------------------------------------------------------------------

    def rename(self, samples: SampleCollection, eval_key: str, new_eval_key: str) -> None:
        stored_as = self.config.stored_as or eval_key
        if self.config.leftovers:
            raise ArgumentError("storing it was interrupted; its fields keep their names until it is evaluated again")
        renamed = []
        for dataset in datasets_of(samples):
            labels = self._stored_label_names(dataset, stored_as)
            pairs = zip(self._fields(dataset, stored_as, labels), self._fields(dataset, new_eval_key, labels))
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
        for dataset in datasets_of(samples):
            delete_fields(dataset, self.stored_fields(dataset, eval_key))
        self._remove_undeclared(root_dataset(samples), eval_key)
        self.cleanup_custom_metrics(samples, eval_key)
        delete_empty_sidebar_group(samples, eval_key)

    def _remove_undeclared(self, dataset: fo.Dataset, eval_key: str) -> None:
        """Removes the attributes that an interrupted run may have left."""
        self._remove_attributes(dataset, eval_key + UNFINISHED)
        if self.config.leftovers and self.config.stored_as:
            self._remove_attributes(dataset, self.config.stored_as)

    def _remove_attributes(self, dataset: fo.Dataset, eval_key: str) -> None:
        """Removes a key's attributes from all labels, declared or not."""
        paths: dict[bool, list[str]] = {}
        for name in label_fields(dataset, SHAPE_TYPES):
            path, of_frames = split_frame_field(dataset, label_root(dataset, name)[0])
            paths.setdefault(of_frames, []).append(path)
        for of_frames, those in paths.items():
            bulk_write(dataset, [removal(those, eval_key)], frames=of_frames)


def _contains(samples: SampleCollection, field_name: str, ids: Sequence[ObjectId]) -> bool:
    """Whether a field contains any of these labels."""
    dataset = source_dataset(samples)
    path, of_frames = split_frame_field(dataset, label_path(dataset, field_name))
    collection = frame_collection(dataset) if of_frames else sample_collection(dataset)
    some = ids[:: max(1, len(ids) // _MAX_IDS)]
    return collection is not None and collection.find_one({f"{path}._id": {"$in": some}}, {"_id": True}) is not None


def datasets_of(samples: SampleCollection) -> list[fo.Dataset]:
    """The dataset and, for a view of patches or frames, the generated dataset behind it."""
    root, own = root_dataset(samples), source_dataset(samples)
    return [root] if own is root else [root, own]
