"""Labels of one field that cover the same object, and those that are parts of others."""

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
from ..labels.documents import Progress, Skipped, StoredImage, is_crowd, number_of, visit_images
from ..modeling.arrays import FloatArray, IntArray
from .findings import check_images, check_options, check_tagged_field, patches_of, retag, tags_of
from .overlaps import ious, shapes_of, shares_inside

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection


DUPLICATE, PART, WHOLE = TAGS = ("duplicate", "part", "whole")
ATTRIBUTES = {DUPLICATE: "duplicate_of", PART: "part_of"}


@dataclass(frozen=True)
class Duplicates:
    """What a field's labels are to each other.

    Attributes:
        samples: where they were looked at.
        field: that they are of.
        ids: by tag, "duplicate", "part" and "whole", those of the labels that have it now: duplicates of the highest
            IoU, parts of which most lies inside, and wholes of the most parts come first.
        skipped: of each image with a label that can't be used, its id, filepath and cause.
    """

    samples: SampleCollection = dataclasses.field(repr=False)
    field: str
    ids: dict[str, list[str]] = dataclasses.field(repr=False)
    skipped: list[Skipped] = dataclasses.field(repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """How many labels have each of the tags."""
        return {tag: len(ids) for tag, ids in self.ids.items()}

    def patches(self, tag: str = DUPLICATE) -> fo.core.patches.PatchesView:
        """The labels of a tag in the order of `ids`, but for those that have lost it since."""
        return patches_of(self.samples, self.field, tag, self.ids[tag])


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
    """Finds, and tags, labels of a field that cover the same object, and those that are parts of others.

    - "duplicate" with `duplicate_of`, the id of the label that is kept: has an IoU of `iou` with a better-ranked one
      that is no duplicate itself, as in greedy non-maximum suppression.
    - "part" with `part_of`, the id of the smallest such: at least `containment` of its area lies in a larger label.
      Duplicates are neither parts nor wholes.
    - "whole": contains such parts.

    Crowd regions are left out. An image with a label that can't be used is skipped, logged, and listed in `skipped`.
    Nothing is stored before everything has been looked at; then these tags and attributes replace those that labels
    of `samples` had.

    Args:
        samples: a dataset or view of images. Where image sizes are missing, metadata is computed and stored.
        field: detections or polylines.
        iou: from which IoU on two labels are one object.
        containment: from which share of its area inside a larger one on a label is a part.
        use_masks: compares masks; else boxes.
        rank_by: "confidence", "predicted_iou", "stability", or "sam", the mean of the last two. In an image where no
            label has any of these, larger ones rank higher.
        progress: as everywhere in FiftyOne.

    Raises:
        ValueError: the field is missing, of the wrong type or read-only; a mask is missing, or a score that others of
            the image have; a threshold or ranking is not valid; or every image had to be skipped.
    """
    check_images(samples)
    check_options(rank_by, iou=iou, containment=containment)
    check_tagged_field(samples, field, "labels to compare", ATTRIBUTES.values())
    attributes = [*ATTRIBUTES.values()]
    tagged: dict[str, dict[ObjectId, set[ObjectId]]] = {tag: {} for tag in TAGS}
    noted: dict[str, dict[ObjectId, dict[ObjectId, str]]] = {name: {} for name in attributes}
    found: dict[str, dict[ObjectId, dict[ObjectId, _Relation]]] = {tag: {} for tag in TAGS}

    def look(stored: StoredImage) -> None:
        labels = stored.labels(field)
        for tag in TAGS:
            tagged[tag][stored.sample_id] = {label["_id"] for label in labels if tag in tags_of(label)}
        for name in attributes:
            values = {label["_id"]: label.get(name) for label in labels}
            noted[name][stored.sample_id] = {id: value for id, value in values.items() if value is not None}
        labels = [label for label in labels if not is_crowd(label)]
        shapes = shapes_of(labels, stored.known_size, use_masks)
        scores = _scores(labels, RANKINGS[rank_by].attributes, areas_of(shapes))
        ids = [label["_id"] for label in labels]
        for tag, relations in _related(ids, shapes, ranking(scores, len(labels)), iou, containment).items():
            found[tag][stored.sample_id] = relations

    skipped = visit_images(samples, [field], look, progress)
    dataset = source_dataset(samples)
    for name in attributes:
        dataset.add_sample_field(f"{label_path(dataset, field)}.{name}", fof.StringField)
    for tag in TAGS:
        retag(dataset, field, tag, tagged[tag], found[tag])
    for tag, name in ATTRIBUTES.items():
        _note(dataset, field, name, noted[name], found[tag])
    return Duplicates(samples, field, {tag: _strongest_first(found[tag].values()) for tag in TAGS}, skipped)


class _Relation(NamedTuple):
    """What a tagged label is to others.

    Attributes:
        to: the label that is kept, or the whole.
        strength: the IoU with it, or the share inside it, or how many parts a whole has.
    """

    to: ObjectId | None
    strength: float


def _scores(labels: Sequence[Document], names: Sequence[str], areas: FloatArray) -> Sequence[float] | FloatArray:
    """What the labels of an image are ranked by."""
    if all(label.get(name) is None for label in labels for name in names):
        return areas
    return [number_of(label, names) for label in labels]


def _related(
    ids: Sequence[ObjectId], shapes: Shapes, order: IntArray, iou: float, containment: float
) -> dict[str, dict[ObjectId, _Relation]]:
    """By tag, the labels of an image that get it; `order` holds the indices of all, best-ranked first."""
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
    smallest = np.where(is_inside, sizes, np.inf).argmin(1)  # of equals the better-ranked
    return {
        DUPLICATE: duplicates,
        PART: {
            ids[kept[i]]: _Relation(ids[kept[smallest[i]]], float(shares[i, smallest[i]]))
            for i in np.flatnonzero(is_inside.any(1))
        },
        WHOLE: {ids[kept[i]]: _Relation(None, int(parts)) for i, parts in enumerate(is_inside.sum(0)) if parts},
    }


def _note(
    dataset: fo.Dataset,
    field_name: str,
    attribute: str,
    before: Mapping[ObjectId, Mapping[ObjectId, str]],
    now: Mapping[ObjectId, Mapping[ObjectId, _Relation]],
) -> None:
    """Stores as `attribute` what labels are related to, where it isn't what they have.

    Args:
        before: by sample and label, the attribute where there is one; `now`: likewise, the relations.
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
            # An update for each label would store the whole sample as many times.
            values: Document = {f"{path}.$[l{i}].{attribute}": value for i, value in enumerate(changed)}
            filters: list[Mapping[str, Any]] = [
                {f"l{i}._id": {"$in": labels}} for i, labels in enumerate(changed.values())
            ]
            values["last_modified_at"] = datetime.now(timezone.utc)
            there = {"_id": id, f"{path}._id": {"$exists": True}}  # else a list that is None now would be an error
            operations.append(UpdateOne(there, {"$set": values}, array_filters=filters))
            ids.append(id)
    if operations:
        bulk_write(dataset, operations, ids=ids)


def _strongest_first(images: Iterable[Mapping[ObjectId, _Relation]]) -> list[str]:
    relations = [item for image in images for item in image.items()]
    return [str(id) for id, relation in sorted(relations, key=lambda item: -item[1].strength)]
