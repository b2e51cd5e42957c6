"""Deletes the masks that runs stored in a field, with their files and records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import fiftyone.core.utils as fou
from bson import ObjectId
from pymongo import UpdateOne

from ..errors import ArgumentError
from ..fiftyone_internals import (
    Document,
    bulk_write,
    frame_collection,
    is_frame_field,
    label_root,
    root_dataset,
    sample_collection,
    split_frame_field,
)
from ..labels.documents import Progress, labels_in, value_in
from ..labels.fields import MASK_ATTRIBUTES, RUN_ID
from ..labels.leftovers import is_referred_to, settle
from ..labels.mask_files import MaskFiles
from ..labels.schema import delete_fields
from .claims import on_record
from .record import SegmentationRun, delete_record, recorded_runs

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

_MAX_UPDATES = 200


@dataclass(frozen=True)
class MadeMasks:
    """The masks that runs stored in a field.

    Attributes:
        images: number of images or frames that have such masks.
        masks: their number.
        files: number of these masks that are in files.
        others: number of other labels in the field, which no run made.
        only_masks: whether the masks were added to labels that existed before.
        runs: number of recorded runs.
        evaluations: keys of the evaluations that compare the field's labels.
    """

    images: int
    masks: int
    files: int
    others: int
    only_masks: bool
    runs: int
    evaluations: list[str]


def made_masks(samples: SampleCollection, label_field: str) -> MadeMasks:
    """The masks that :func:`delete_masks` would delete from the dataset behind `samples`.

    Raises:
        ArgumentError: the field does not exist, or does not store masks.
    """
    dataset = root_dataset(samples)
    if not dataset.has_field(label_field):
        raise ArgumentError(f"{dataset.name} has no field '{label_field}'.")
    runs = recorded_runs(dataset, label_field)
    only_masks = any(run.parameters.get("prompting") == label_field for run in runs)
    can_tell = not is_frame_field(dataset, label_field)  # the labels of frames as a whole have no mark
    images = masks = files = others = 0
    for document in _documents(dataset, label_field):
        labels = labels_in(document, label_field)
        made = [label for label in labels if _is_made(label)]
        # Also if the record is lost: a run that creates labels marks those of an image as a whole, too.
        has_mark = (value_in(document, label_field) or {}).get(RUN_ID) is not None
        only_masks |= can_tell and not has_mark and any(label.get(RUN_ID) is not None for label in made)
        images += bool(made)
        masks += len(made)
        files += sum(label.get("mask_path") is not None for label in made)
        others += len(labels) - len(made)
    keys = dataset.list_evaluations()
    configs = {key: dataset.get_evaluation_info(key).config for key in keys}
    fields = {
        key: (getattr(each, "pred_field", None), getattr(each, "gt_field", None)) for key, each in configs.items()
    }
    evaluations = [key for key in keys if label_field in fields[key]]
    return MadeMasks(images, masks, files, others, only_masks, len(runs), evaluations)


def delete_masks(samples: SampleCollection, label_field: str, progress: Progress = None) -> MadeMasks:
    """Deletes the masks that runs stored in a field of the dataset behind `samples`, with their files and records.

    If runs made all labels of the field, the field is deleted; otherwise, images without other labels get None, as if
    they had never been segmented. If the runs added masks to existing labels, these labels
    lose their masks. Files are kept if any dataset still refers to them. After an interruption, the same call, or the
    next run into any field of the dataset, deletes the remaining files. Evaluations are kept.

    Args:
        progress: as elsewhere in FiftyOne.

    Returns:
        What was deleted.

    Raises:
        ArgumentError: the field does not exist, does not store masks, or is read-only.
        FieldBusyError: a run is storing masks in the field.
    """
    dataset = root_dataset(samples)
    made = made_masks(dataset, label_field)
    if dataset.get_field(label_field).read_only:
        raise ArgumentError(f"'{label_field}' is read-only: its masks can't be deleted.")
    with on_record(dataset, SegmentationRun(label_field, {})):
        folders = _mark_files(dataset, label_field, progress)
        _remove_masks(dataset, label_field, made.only_masks)
        if not made.only_masks and not any(labels_in(each, label_field) for each in _documents(dataset, label_field)):
            delete_fields(dataset, [label_field])
        for folder in folders:
            settle(folder, lambda _, field: field == label_field, is_referred_to)
        delete_record(dataset, label_field)
    return made


def _documents(dataset: fo.Dataset, label_field: str) -> Iterator[Document]:
    """The samples or frames with labels in the field: the labels without their masks."""
    path, of_frames = split_frame_field(dataset, label_field)
    root = split_frame_field(dataset, label_root(dataset, label_field)[0])[0]
    collection = frame_collection(dataset) if of_frames else sample_collection(dataset)
    if collection is not None:
        attributes = ("_id", "mask_path", *MASK_ATTRIBUTES)
        keep = dict.fromkeys([f"{path}.{RUN_ID}", *(f"{root}.{name}" for name in attributes)], True)
        yield from collection.find({path: {"$ne": None}}, keep)


def _is_made(label: Document) -> bool:
    """Whether a run stored this mask. Earlier versions of this package did not store the id of the run."""
    return label.get(RUN_ID) is not None or all(
        label.get(name) is not None for name in MASK_ATTRIBUTES if name != RUN_ID
    )


def _mark_files(dataset: fo.Dataset, label_field: str, progress: Progress) -> set[str]:
    """Marks the files of masks as those of a killed run, so that they are deleted once no label refers to them.

    Returns the folders that contain them. Files that other programs have copied elsewhere are not marked.
    """
    folders = set()
    with fou.ProgressBar(progress=progress) as bar:
        for document in bar(_documents(dataset, label_field)):
            labels = filter(_is_made, labels_in(document, label_field))
            for folder in {Path(label["mask_path"]).parent for label in labels if label.get("mask_path")}:
                if files := MaskFiles.of(folder, str(document["_id"]), label_field):
                    files.mark()
                    folders.add(files.folder)
    return folders


def _remove_masks(dataset: fo.Dataset, label_field: str, only_masks: bool) -> None:
    """Removes masks from labels, or labels with masks that runs made."""
    root, is_list = label_root(dataset, label_field)
    field, of_frames = split_frame_field(dataset, label_field)
    path = split_frame_field(dataset, root)[0]
    names = ("mask", "mask_path", *MASK_ATTRIBUTES)
    operations: list[UpdateOne] = []
    ids: list[ObjectId] = []
    write = partial(bulk_write, dataset, frames=of_frames)
    for document in _documents(dataset, label_field):
        made = [label["_id"] for label in labels_in(document, label_field) if _is_made(label)]
        query = {"_id": document["_id"]}
        if not only_masks:
            is_other = {"$not": {"$in": ["$$this._id", made]}}
            others = {"$filter": {"input": {"$ifNull": [f"${path}", []]}, "cond": is_other}}
            labels = {"$mergeObjects": [f"${field}", {path.rpartition(".")[2]: others}]}
            value = {"$cond": [{"$eq": [others, []]}, None, labels]}
            change = UpdateOne(query, [{"$set": {field: value}}, {"$unset": f"{field}.{RUN_ID}"}])
        elif not made:
            continue
        elif is_list:
            nothing = {f"{path}.$[label].{name}": "" for name in names}
            change = UpdateOne(query, {"$unset": nothing}, array_filters=[{"label._id": {"$in": made}}])
        else:
            change = UpdateOne({**query, f"{path}._id": {"$in": made}}, {"$unset": {f"{path}.{n}": "" for n in names}})
        operations.append(change)
        ids.append(document["_id"])
        if len(operations) == _MAX_UPDATES:
            write(operations, ids=ids)
            operations, ids = [], []
    if operations:
        write(operations, ids=ids)
