"""Finds labels of a field that cover the same object, and labels that are parts of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

import fiftyone.core.fields as fof
import numpy as np
from bson import ObjectId
from pymongo import UpdateOne

from ..evaluation.average_recall import Shapes, areas_of, ranking
from ..evaluation.ranking import RANKINGS
from ..fiftyone_internals import Document, bulk_write, label_path, source_dataset
from ..labels.documents import Progress, Skipped, StoredImage, is_crowd, number_of, tags_of, visit_images
from ..labels.schema import declare_labels
from ..modeling.arrays import FloatArray, IntArray
from .findings import check_images, check_options, check_tagged_field, patches_of, retag
from .overlaps import ious, shapes_of, shares_inside

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection


DUPLICATE, PART, WHOLE = TAGS = ("duplicate", "part", "whole")
ATTRIBUTES = {DUPLICATE: "duplicate_of", PART: "part_of"}


@dataclass(frozen=True)
class Duplicates:
    """The duplicates and parts among a field's labels.

    Attributes:
        samples: the samples that were searched.
        label_field: the field of the labels.
        ids: tag ("duplicate", "part" or "whole") -> ids of the labels that have it now, strongest relation first:
            duplicates by IoU, parts by the share inside, wholes by their number of parts.
        skipped: id, filepath and cause of each image with an unusable label.
    """

    samples: SampleCollection = dataclasses.field(repr=False)
    label_field: str
    ids: dict[str, list[str]] = dataclasses.field(repr=False)
    skipped: list[Skipped] = dataclasses.field(repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """The number of labels with each tag."""
        return {tag: len(ids) for tag, ids in self.ids.items()}

    def patches(self, tag: str = DUPLICATE) -> fo.core.patches.PatchesView:
        """The labels with a tag in the order of `ids`, except those that have lost it since."""
        return patches_of(self.samples, self.label_field, tag, self.ids[tag])


def find_duplicates(
    samples: SampleCollection,
    field: str,
    *,
    iou: float = 0.8,
    containment: float = 0.9,
    use_masks: bool = True,
    rank_by: str = "confidence",
    progress: Progress = None,
) -> Duplicates:
    """Finds and tags labels of a field that cover the same object, and labels that are parts of others.

    - "duplicate", with `duplicate_of`, the id of the label that is kept: it has an IoU of at least `iou` with a
      better-ranked label that is not a duplicate itself, as in greedy non-maximum suppression.
    - "part", with `part_of`, the id of the smallest whole: at least `containment` of its area lies in a larger label.
      Duplicates are neither parts nor wholes.
    - "whole": it contains such parts.

    Crowd regions are ignored. An image with an unusable label is skipped, logged and listed in `skipped`. Results are
    stored once all images have been read; they replace the tags and attributes that labels of `samples` had.

    Args:
        samples: a dataset or view of images. Missing metadata is computed and stored.
        field: detections or polylines.
        iou: minimum IoU of two labels of the same object.
        containment: minimum share of a part's area inside a larger label.
        use_masks: whether to compare masks; otherwise boxes.
        rank_by: "confidence", "predicted_iou", "stability", or "sam", the mean of the last two. In an image where no
            label has any of these attributes, larger labels rank higher.
        progress: as elsewhere in FiftyOne.

    Raises:
        ValueError: the field is missing, of the wrong type or read-only; a mask is missing, or a score that other
            labels of the image have; a threshold or ranking is invalid; or all images were skipped.
    """
    check_images(samples)
    check_options(rank_by, iou=iou, containment=containment)
    check_tagged_field(samples, field, "labels to compare", ATTRIBUTES.values())
    attributes = [*ATTRIBUTES.values()]
    tagged: dict[str, dict[ObjectId, set[ObjectId]]] = {tag: {} for tag in TAGS}
    stored_values: dict[str, dict[ObjectId, dict[ObjectId, str]]] = {name: {} for name in attributes}
    relations: dict[str, dict[ObjectId, dict[ObjectId, _Relation]]] = {tag: {} for tag in TAGS}

    def visit(stored: StoredImage) -> None:
        labels = stored.distinct_labels(field)
        for tag in TAGS:
            tagged[tag][stored.sample_id] = {label["_id"] for label in labels if tag in tags_of(label)}
        for name in attributes:
            values = {label["_id"]: label.get(name) for label in labels}
            stored_values[name][stored.sample_id] = {id: value for id, value in values.items() if value is not None}
        labels = [label for label in labels if not is_crowd(label)]
        shapes = shapes_of(labels, stored.known_size, use_masks)
        scores = _scores(labels, RANKINGS[rank_by].attributes, areas_of(shapes))
        ids = [label["_id"] for label in labels]
        for tag, image_relations in _related(ids, shapes, ranking(scores, len(labels)), iou, containment).items():
            relations[tag][stored.sample_id] = image_relations

    skipped = visit_images(samples, [field], visit, progress)
    dataset = source_dataset(samples)
    fields = dict.fromkeys(attributes, fof.StringField)
    declare_labels(dataset, field, fields)
    for tag in TAGS:
        retag(dataset, field, tag, tagged[tag], relations[tag])
    for tag, name in ATTRIBUTES.items():
        _store_attribute(dataset, field, name, stored_values[name], relations[tag])
    declare_labels(dataset, field, fields)
    return Duplicates(samples, field, {tag: _strongest_first(relations[tag].values()) for tag in TAGS}, skipped)


class _Relation(NamedTuple):
    """The relation of a tagged label to another.

    Attributes:
        to: the label that is kept, or the whole.
        strength: the IoU with it, the share inside it, or a whole's number of parts.
    """

    to: ObjectId | None
    strength: float


def _scores(labels: Sequence[Document], names: Sequence[str], areas: FloatArray) -> Sequence[float] | FloatArray:
    """The scores that rank the labels of an image."""
    if all(label.get(name) is None for label in labels for name in names):
        return areas
    return [number_of(label, names) for label in labels]


def _related(
    ids: Sequence[ObjectId], shapes: Shapes, order: IntArray, iou: float, containment: float
) -> dict[str, dict[ObjectId, _Relation]]:
    """Tag -> the labels of an image that get it; `order` has the indices of all labels, best-ranked first."""
    if not ids:
        return {}
    overlaps = ious(shapes, shapes)
    duplicates: dict[ObjectId, _Relation] = {}
    kept: list[int] = []
    free = np.ones(len(ids), bool)
    for best in order.tolist():
        if free[best]:
            kept.append(best)
            free[best] = False
            rest = np.flatnonzero(free & (overlaps[best] >= iou)).tolist()
            duplicates |= {ids[i]: _Relation(ids[best], float(overlaps[best, i])) for i in rest}
            free[rest] = False

    sizes = areas_of(shapes)[kept]
    shares = shares_inside(shapes, shapes)[np.ix_(kept, kept)]
    is_inside = (shares >= containment) & (sizes[:, None] < sizes)
    smallest = np.where(is_inside, sizes, np.inf).argmin(1)  # among equals, the better-ranked
    return {
        DUPLICATE: duplicates,
        PART: {
            ids[kept[i]]: _Relation(ids[kept[smallest[i]]], float(shares[i, smallest[i]]))
            for i in np.flatnonzero(is_inside.any(1))
        },
        WHOLE: {ids[kept[i]]: _Relation(None, int(parts)) for i, parts in enumerate(is_inside.sum(0)) if parts},
    }


def _store_attribute(
    dataset: fo.Dataset,
    field_name: str,
    attribute: str,
    before: Mapping[ObjectId, Mapping[ObjectId, str]],
    now: Mapping[ObjectId, Mapping[ObjectId, _Relation]],
) -> None:
    """Stores the ids of related labels as `attribute`, where they differ from the stored values.

    Args:
        before: sample -> label -> the stored attribute, if there is one.
        now: sample -> label -> its relation.
    """
    path = label_path(dataset, field_name)
    operations, ids = [], []
    for id, had in before.items():
        has = {label: str(relation.to) for label, relation in now.get(id, {}).items()}
        changed: dict[str | None, list[ObjectId]] = {}
        for label in had.keys() | has.keys():
            if had.get(label) != has.get(label):
                changed.setdefault(has.get(label), []).append(label)
        if changed:
            # A separate update for each label would store the whole sample each time.
            values: Document = {f"{path}.$[l{i}].{attribute}": value for i, value in enumerate(changed)}
            filters: list[Mapping[str, Any]] = [
                {f"l{i}._id": {"$in": labels}} for i, labels in enumerate(changed.values())
            ]
            values["last_modified_at"] = datetime.now(timezone.utc)
            query = {"_id": id, f"{path}._id": {"$exists": True}}  # the update fails on a list that is None
            operations.append(UpdateOne(query, {"$set": values}, array_filters=filters))
            ids.append(id)
    if operations:
        bulk_write(dataset, operations, ids=ids)


def _strongest_first(images: Iterable[Mapping[ObjectId, _Relation]]) -> list[str]:
    relations = [item for image in images for item in image.items()]
    return [str(id) for id, relation in sorted(relations, key=lambda item: -item[1].strength)]
