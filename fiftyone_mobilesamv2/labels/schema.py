"""Declares fields of a dataset so that concurrent processes lose none, and deletes fields with all their values.

FiftyOne reads a dataset's schema, changes it in memory, and writes it back. If two processes do so at the same time,
fields of one are lost, and samples with values in a field that is not declared can't be loaded. Here, each field is
added in a single update of the database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.odm as foo

from ..errors import ArgumentError
from ..fiftyone_internals import (
    Document,
    dataset_id,
    field_document,
    frame_collection,
    label_root,
    label_type,
    sample_collection,
    split_frame_field,
    sync_schema,
)

if TYPE_CHECKING:
    import fiftyone as fo


@dataclass(frozen=True)
class NewField:
    """A field to declare, with the arguments of FiftyOne's `add_sample_field`."""

    ftype: type[fof.Field]
    embedded_doc_type: type[fo.Label] | None = None
    description: str | None = None
    info: Mapping[str, str] | None = None


def declare_fields(dataset: fo.Dataset, fields: Mapping[str, NewField]) -> None:
    """Adds sample fields, frame fields ("frames.x") and attributes of labels ("x.detections.y") that don't exist yet.

    Call it before and after storing values: while they are stored, FiftyOne may lose a field in another process.

    Raises:
        ArgumentError: a field exists and is of another type.
    """
    if add_to_schema(dataset, fields) or not all(map(dataset.has_field, fields)):
        sync_schema(dataset)
    for name, new in fields.items():
        field = dataset.get_field(name)
        same = isinstance(field, new.ftype)
        if same and new.embedded_doc_type is not None:
            same = isinstance(field, fof.EmbeddedDocumentField) and field.document_type is new.embedded_doc_type
        if not same:
            expected = (new.embedded_doc_type or new.ftype).__name__
            raise ArgumentError(
                f"Field '{name}' of {dataset.name} is {field}, but {expected} was expected: rename or delete it."
            )


def add_to_schema(dataset: fo.Dataset, fields: Mapping[str, NewField]) -> bool:
    """Like :func:`declare_fields`, but changes only the database, not the dataset in memory; returns whether it did."""
    return any([_add(dataset, name, new) for name, new in fields.items()])


def declare_labels(dataset: fo.Dataset, label_field: str, attributes: Mapping[str, type[fof.Field]]) -> None:
    """Adds attributes to the labels of a field, and the field itself, of detections, if it doesn't exist yet."""
    kind = label_type(dataset, label_field) if dataset.has_field(label_field) else fol.Detections
    declare_fields(dataset, {label_field: NewField(fof.EmbeddedDocumentField, kind)})
    root, _ = label_root(dataset, label_field)
    declare_fields(dataset, {f"{root}.{name}": NewField(ftype) for name, ftype in attributes.items()})


def delete_fields(dataset: fo.Dataset, names: Iterable[str]) -> None:
    """Deletes fields, or attributes of labels, with their values, also values of fields that aren't declared.

    Raises:
        ValueError: a field is read-only.
    """
    sync_schema(dataset)  # another process may have changed it
    declared: dict[bool, list[str]] = {False: [], True: []}
    for name in names:
        path, of_frames = split_frame_field(dataset, name)
        if dataset.has_field(name):
            declared[of_frames].append(path)
        else:
            unset(dataset, name)
    if declared[False]:
        dataset.delete_sample_fields(declared[False])
    if declared[True]:
        dataset.delete_frame_fields(declared[True])


def unset(dataset: fo.Dataset, name: str) -> None:
    """Removes the values of a field, or of an attribute of labels, from the database."""
    path, of_frames = split_frame_field(dataset, name)
    root, _, attribute = path.rpartition(".")
    collection = frame_collection(dataset) if of_frames else sample_collection(dataset)
    if collection is None:
        return
    collection.update_many({path: {"$exists": True}}, {"$unset": {path: ""}})
    if root:
        labels_in_list = {path: {"$exists": True}, root: {"$type": "array"}}
        collection.update_many(labels_in_list, {"$unset": {f"{root}.$[].{attribute}": ""}})


def _add(dataset: fo.Dataset, name: str, new: NewField) -> bool:
    """Adds a field to the dataset's document unless it is there; returns whether it was added."""
    path, of_frames = split_frame_field(dataset, name)
    *parents, own_name = path.split(".")
    target, filters = ("frame_fields" if of_frames else "sample_fields"), []
    exists: Document = {"name": own_name}
    for parent in reversed(parents):
        exists = {"name": parent, "fields": {"$elemMatch": exists}}
    exists = {target: {"$elemMatch": exists}}
    for number, parent in enumerate(parents):
        target += f".$[f{number}].fields"
        filters.append({f"f{number}.name": parent})
    document = field_document(own_name, **vars(new))
    now = datetime.now(timezone.utc)
    change: dict[str, Any] = {"$push": {target: document | {"created_at": now}}, "$set": {"last_modified_at": now}}
    query = {"_id": dataset_id(dataset), "$nor": [exists]}
    datasets = foo.get_db_conn().datasets
    return bool(datasets.update_one(query, change, array_filters=filters or None).modified_count)
