"""Repairs a dataset: fields that FiftyOne lost, and paths of masks whose files were moved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.utils as fou
from pymongo import UpdateOne

from ..errors import ArgumentError
from ..evaluation.run_fields import RunFields
from ..fiftyone_internals import (
    FRAMES_PREFIX,
    Document,
    bulk_write,
    declared_names,
    frame_collection,
    label_root,
    root_dataset,
    sample_collection,
    split_frame_field,
    sync_schema,
)
from ..labels.documents import Progress
from ..labels.fields import label_fields
from ..labels.schema import NewField, add_to_schema, unset
from .coverage import coverage_fields

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection
    from pymongo.collection import Collection

# MongoDB's name of a type -> the field for values of this type.
_FIELD_TYPES: Mapping[str, type[fof.Field]] = {
    "bool": fof.BooleanField,
    "date": fof.DateTimeField,
    "string": fof.StringField,
    "int": fof.IntField,
    "long": fof.IntField,
    "double": fof.FloatField,
    "array": fof.ListField,
    "object": fof.DictField,
}
_MAX_UPDATES = 200
# The end of a mask's path that stays the same if its folder is moved: <dataset>/<two digits>/<attempt>/<number>.png
_KEPT_PARTS = 4


@dataclass(frozen=True)
class Repair:
    """What :func:`repair` did.

    Attributes:
        declared: the fields with values that were not declared, and now are. Before, samples could not be loaded.
        emptied: undeclared fields without any value, which were removed.
        found: number of masks whose file was found in another folder; their labels refer to it now.
        missing: number of masks without a file, by sample id.
    """

    declared: list[str]
    emptied: list[str]
    found: int
    missing: dict[str, int]

    @property
    def is_sound(self) -> bool:
        """Whether nothing had to be repaired."""
        return not (self.declared or self.emptied or self.found or self.missing)


def repair(
    samples: SampleCollection, mask_dir: str | os.PathLike[str] | None = None, progress: Progress = None
) -> Repair:
    """Repairs the dataset behind `samples`, so that its samples can be loaded and its masks shown.

    - Fields that have values but are not declared are declared again: if two processes add fields at the same time,
      FiftyOne may lose one of them, and then fails to load any sample with a value in it. The attributes that
      evaluations store on labels are declared, too.
    - Masks in files that are gone are looked for in `mask_dir`, to which their folder may have been moved.

    Args:
        mask_dir: the new place of the `mask_dir` in which runs stored masks, or of a dataset's folder in it.
        progress: as elsewhere in FiftyOne.
    """
    dataset = root_dataset(samples)
    check_mask_dir(mask_dir)
    declared, emptied = _declare_lost_fields(dataset)
    sync_schema(dataset)
    declared += _declare_lost_attributes(dataset)
    sync_schema(dataset)
    found, missing = 0, dict[str, int]()
    names = [
        name
        for name in label_fields(dataset, (fol.Detections, fol.Detection))
        if "." not in name.removeprefix(FRAMES_PREFIX)
    ]
    for name in names:
        found += _find_files(dataset, name, mask_dir, missing, progress)
    return Repair(declared, emptied, found, missing)


def check_mask_dir(mask_dir: str | os.PathLike[str] | None) -> None:
    """Raises ArgumentError unless this is a folder, or None."""
    if mask_dir is not None and not os.path.isdir(mask_dir):
        raise ArgumentError(f"mask_dir={os.fspath(mask_dir)!r} is not a folder.")


# Lost fields --------------------------------------------------------------------------------------------------------
def _declare_lost_fields(dataset: fo.Dataset) -> tuple[list[str], list[str]]:
    """Declares fields that have values; returns the names of the declared and the emptied ones."""
    sync_schema(dataset)
    declared, emptied = [], []
    for prefix, collection in _collections(dataset):
        known = ["_id", *declared_names(dataset, of_frames=bool(prefix))]
        for name, types in _types_of_unknown(collection, known).items():
            path = f"{prefix}{name}"
            types.discard(("null", None))
            if not types:
                unset(dataset, path)
                emptied.append(path)
            else:
                add_to_schema(dataset, {path: _field_of(dataset, path, types)})
                declared.append(path)
    return declared, emptied


def _types_of_unknown(collection: Collection[Document], known: Sequence[str]) -> dict[str, set[tuple[str, str | None]]]:
    """Name of each undeclared field -> the MongoDB types of its values, with the classes of labels."""
    pipeline: list[Document] = [
        {"$project": {"field": {"$objectToArray": "$$ROOT"}}},
        {"$unwind": "$field"},
        {"$match": {"field.k": {"$nin": list(known)}}},
        {"$group": {"_id": {"name": "$field.k", "type": {"$type": "$field.v"}, "class": "$field.v._cls"}}},
    ]
    types: dict[str, set[tuple[str, str | None]]] = {}
    for document in collection.aggregate(pipeline):
        found = document["_id"]
        label_class = found.get("class")
        types.setdefault(found["name"], set()).add(
            (found["type"], label_class if isinstance(label_class, str) else None)
        )
    return types


def _field_of(dataset: fo.Dataset, path: str, types: set[tuple[str, str | None]]) -> NewField:
    """A field that can hold values of all these types; a field without a type if no other can."""
    for field in label_fields(dataset, (fol.Detections, fol.Polylines)):
        if path in (fields := coverage_fields(field)):
            return fields[path]
    kinds = {kind for kind, _ in types}
    classes = {label_class for _, label_class in types}
    if kinds == {"object"} and classes != {None}:
        kind = getattr(fol, str(next(iter(classes))), None) if len(classes) == 1 else None
        is_label = isinstance(kind, type) and issubclass(kind, fol.Label)
        return NewField(fof.EmbeddedDocumentField, kind) if is_label else NewField(fof.Field)
    fields_of_kinds = {_FIELD_TYPES.get(kind) for kind in kinds}
    if fields_of_kinds == {fof.IntField, fof.FloatField}:
        return NewField(fof.FloatField)
    ftype = fields_of_kinds.pop()
    return NewField(fof.Field if ftype is None or fields_of_kinds else ftype)


def _declare_lost_attributes(dataset: fo.Dataset) -> list[str]:
    """Declares the attributes of labels that evaluations have stored; returns their paths."""
    declared = []
    for key in dataset.list_evaluations():
        method = dataset.get_evaluation_info(key).config.build()
        is_ours = isinstance(method, RunFields)
        for path in method.stored_fields(dataset, key) if is_ours else method.get_fields(dataset, key):
            value = _some_value(dataset, path)
            ftype = next((ftype for kind, ftype in _ATTRIBUTE_TYPES if isinstance(value, kind)), None)
            if ftype is not None and add_to_schema(dataset, {path: NewField(ftype)}):
                declared.append(path)
    return declared


_ATTRIBUTE_TYPES = ((bool, fof.BooleanField), (int, fof.IntField), (float, fof.FloatField), (str, fof.StringField))


def _some_value(dataset: fo.Dataset, path: str) -> object:
    """A stored value of this attribute; None if no label has one."""
    path, of_frames = split_frame_field(dataset, path)
    collection = frame_collection(dataset) if of_frames else sample_collection(dataset)
    value: object = None if collection is None else collection.find_one({path: {"$ne": None}}, {path: True})
    values = [value]
    for name in path.split("."):
        values = [each.get(name) for each in values if isinstance(each, dict)]
        values = [item for each in values for item in (each if isinstance(each, list) else [each])]
    return next((each for each in values if each is not None), None)


def _collections(dataset: fo.Dataset) -> Iterator[tuple[str, Collection[Document]]]:
    """The prefix of the field names, and the collection, of samples and of frames."""
    yield "", sample_collection(dataset)
    if (frames := frame_collection(dataset)) is not None:
        yield FRAMES_PREFIX, frames


# Masks in files -----------------------------------------------------------------------------------------------------
def _find_files(
    dataset: fo.Dataset,
    name: str,
    mask_dir: str | os.PathLike[str] | None,
    missing: dict[str, int],
    progress: Progress,
) -> int:
    """Corrects the paths of masks whose files were moved, and counts those that are missing; returns the number."""
    root, is_list = label_root(dataset, name)
    path, of_frames = split_frame_field(dataset, root)
    collection = frame_collection(dataset) if of_frames else sample_collection(dataset)
    if collection is None:
        return 0
    query = {f"{path}.mask_path": {"$ne": None}}
    total, found = collection.count_documents(query), 0
    operations: list[UpdateOne] = []
    with fou.ProgressBar(total=total, progress=progress) as bar:
        for document in bar(
            collection.find(query, {f"{path}.mask_path": True, "_sample_id": True, f"{path}._id": True})
        ):
            value: object = document
            for part in path.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            for label in value if isinstance(value, list) else [value]:
                if not isinstance(label, dict) or not isinstance(old := label.get("mask_path"), str):
                    continue
                if os.path.isfile(old):
                    continue
                new = _moved(old, mask_dir)
                if new is None:
                    sample_id = str(document.get("_sample_id", document["_id"]))
                    missing[sample_id] = missing.get(sample_id, 0) + 1
                    continue
                found += 1
                own = f"{path}.$[label]" if is_list else path
                filters: list[Mapping[str, object]] = [{"label._id": label.get("_id")}] if is_list else []
                change = {"$set": {f"{own}.mask_path": new}}
                operations.append(UpdateOne({"_id": document["_id"]}, change, array_filters=filters or None))
            if len(operations) >= _MAX_UPDATES:
                bulk_write(dataset, operations, frames=of_frames)
                operations = []
    if operations:
        bulk_write(dataset, operations, frames=of_frames)
    return found


def _moved(path: str, mask_dir: str | os.PathLike[str] | None) -> str | None:
    """The new path in `mask_dir` of a file whose folder was moved there; None if the file is not there."""
    if mask_dir is None:
        return None
    parts = Path(path).parts
    for kept in (_KEPT_PARTS, _KEPT_PARTS - 1):
        new = os.path.join(os.path.abspath(mask_dir), *parts[-kept:])
        if os.path.isfile(new):
            return new
    return None
