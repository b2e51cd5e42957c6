"""Proposals -> ground truth: what the annotators missed, taken over with one's own class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.storage as fos
from bson import ObjectId
from pycocotools import mask as mask_utils
from pymongo.errors import DocumentTooLarge, WriteError

from ..errors import ArgumentError, LabelError, MissingError
from ..fiftyone_internals import (
    Document,
    is_patches_view,
    label_path,
    label_type,
    root_dataset,
    sample_collection,
    source_dataset,
)
from ..labels.documents import Progress, Skipped, StoredImage, labels_in, name_of, stored_images, value_in, visit_images
from ..labels.fields import check_field_name, check_shapes_field
from ..labels.masks import boxes_of, masks_of
from .findings import LabelIds, check_images, check_tagged_field, retag
from .unlabeled import DISMISSED, PROMOTED

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

    from ..modeling.rle import RLE

UNLABELED = "unlabeled"  # the tag that `find_unlabeled_objects` gives
PROMOTED_FROM = "promoted_from"  # the attribute of a label that holds the id of the proposal it was


@dataclass(frozen=True)
class Promotion:
    """What :func:`promote_to_labels` did.

    Attributes:
        promoted: how many proposals became labels.
        already: how many were labels before; these were left as they are.
        samples: how many samples got labels.
        missing: the ids that no proposal has.
        skipped: of each sample that got no label, because one couldn't be made or stored, its id, filepath and cause.
    """

    promoted: int
    already: int
    samples: int
    missing: list[str]
    skipped: list[Skipped]


def promote_to_labels(
    samples: SampleCollection,
    ids: Iterable[str],
    pred_field: str,
    gt_field: str = "ground_truth",
    *,
    label: str,
    progress: Progress = None,
) -> Promotion:
    """Makes proposals ground truth, in the dataset that `samples` is, or shows.

    Each becomes a label of its own in `gt_field`: its box and its mask, the class `label`, and its id as
    `promoted_from`. Nothing else is taken over: confidence and notes of evaluations are of proposals. A mask in a file
    is copied beside it, named after the new label, so that the label outlives the proposal. The proposal stays, and has
    the tag "promoted" instead of "unlabeled".

    A proposal that is a label of `gt_field` already isn't promoted again, and its label keeps its class. All labels of
    a sample are stored at once, before the proposals' tags change: after an interruption, the same call does the rest.

    Args:
        samples: a dataset or view of images, or a view of patches; proposals that it hides are missing.
        ids: of the proposals.
        pred_field: the proposals: `fo.Detections`.
        gt_field: `fo.Detections`, which it becomes if there is no such field, or `fo.Polylines`, which get the outline
            by FiftyOne's `Detection.to_polyline`.
        label: the class.
        progress: as everywhere in FiftyOne.

    Raises:
        ValueError: a field is missing, read-only or of the wrong type; `label` is empty; or every sample was skipped.
    """
    dataset = root_dataset(samples)
    check_promotion(samples, pred_field, gt_field)
    if not isinstance(label, str) or not label.strip():
        raise ArgumentError(f"label={label!r}: the name of a class was expected.")
    if not dataset.has_field(gt_field):
        dataset.add_sample_field(gt_field, fof.EmbeddedDocumentField, embedded_doc_type=fol.Detections)
    attribute = label_path(dataset, gt_field, PROMOTED_FROM)
    dataset.add_sample_field(attribute, fof.StringField)

    asked = dict.fromkeys(ids)
    shown = samples.select_labels(ids=[id for id in asked if ObjectId.is_valid(id)], fields=pred_field)
    sample_ids = set(shown.values("sample_id" if is_patches_view(samples) else "id"))
    label_ids = shown.values(label_path(shown, pred_field, "id"), unwind=True)
    # What a view shows may be incomplete, and what patches show out of date.
    view = dataset.select(sample_ids).select_labels(ids=label_ids, fields=pred_field)

    labelled: dict[ObjectId, list[ObjectId]] = {}  # by the id of each sample, its proposals that are labels now
    found: set[str] = set()
    promoted = samples_changed = 0

    def look(stored: StoredImage) -> None:
        nonlocal promoted, samples_changed
        proposals = stored.labels(pred_field)
        found.update(str(proposal["_id"]) for proposal in proposals)
        new = _promote(dataset, stored, proposals, gt_field, label)
        labelled[stored.sample_id] = [proposal["_id"] for proposal in proposals]
        promoted += new
        samples_changed += new > 0

    try:
        skipped = visit_images(view, [pred_field], look, progress)
    finally:
        _tag(samples, pred_field, labelled, PROMOTED)
    already = sum(map(len, labelled.values())) - promoted
    return Promotion(promoted, already, samples_changed, [id for id in asked if id not in found], skipped)


def dismiss(samples: SampleCollection, ids: Iterable[str], pred_field: str) -> int:
    """Gives the proposals with these ids the tag "dismissed" instead of "unlabeled": they are not suggested again.

    Arguments as for :func:`promote_to_labels`. Returns how many there were.
    """
    dataset = root_dataset(samples)
    check_tagged_field(dataset, pred_field, "proposals")
    view = dataset.select_labels(ids=[id for id in ids if ObjectId.is_valid(id)], fields=pred_field)
    found = {
        image.sample_id: [label["_id"] for label in image.labels(pred_field)]
        for image in stored_images(view, [pred_field])
    }
    _tag(samples, pred_field, found, DISMISSED)
    return sum(map(len, found.values()))


def check_promotion(samples: SampleCollection, pred_field: str, gt_field: str) -> None:
    """Raises ValueError where proposals of the one field can't become labels of the other."""
    dataset = root_dataset(samples)
    check_images(dataset)
    check_shapes_field(samples, pred_field, "proposals")
    check_tagged_field(dataset, pred_field, "proposals")
    kind = label_type(dataset, pred_field)
    if kind is not fol.Detections:
        raise ArgumentError(f"Field '{pred_field}' holds {kind.__name__}; Detections were expected as proposals.")
    if pred_field == gt_field:
        raise ArgumentError(f"The proposals and the ground truth are the same field, '{gt_field}'.")
    if dataset.has_field(gt_field):
        check_tagged_field(dataset, gt_field, "ground truth", [PROMOTED_FROM])
    else:
        check_field_name(gt_field)


def _promote(dataset: fo.Dataset, stored: StoredImage, proposals: Sequence[Document], gt_field: str, label: str) -> int:
    """Stores the labels of proposals of one sample that are none yet; returns how many.

    Raises:
        LabelError: one of them can't be made, or they can't be stored. Nothing was stored.
    """
    kind = label_type(dataset, gt_field)
    path, attribute = (label_path(dataset, gt_field, name) for name in ("", PROMOTED_FROM))
    collection = sample_collection(dataset)
    query: Document = {"_id": stored.sample_id}
    document = collection.find_one(query, {attribute: True})
    if document is None:
        raise LabelError("it was deleted meanwhile")
    before = {each.get(PROMOTED_FROM) for each in labels_in(document, gt_field)}
    new = [proposal for proposal in proposals if str(proposal["_id"]) not in before]
    if not new:
        return 0
    make = _polyline if kind is fol.Polylines else _detection
    try:
        labels = [make(proposal, stored.known_size, label) for proposal in new]
        # Someone else may be promoting the same proposals: the update finds only what is as it was read.
        if value_in(document, gt_field) is not None:
            query[attribute] = {"$nin": [made[PROMOTED_FROM] for made in labels]}
            update: Document = {"$push": {path: {"$each": labels}}}
        else:  # MongoDB adds to a list, but not to one that isn't there
            query[gt_field] = None
            update = {"$set": {gt_field: {**kind().to_dict(), kind._LABEL_LIST_FIELD: labels}}}
        update["$currentDate"] = {"last_modified_at": True}
        result = collection.update_one(query, update)
    except (OSError, WriteError, DocumentTooLarge) as error:
        raise LabelError(f"its labels can't be stored: {error}") from error
    if not result.matched_count:
        raise LabelError("its labels were changed at the same time: promote once more")
    return len(new)


def _detection(proposal: Document, size: tuple[int, int], label: str) -> Document:
    """As the database holds it; its mask, if in a file, in a file of its own."""
    _mask(proposal, size)  # only labels that can be used are made
    made: Document = fol.Detection(label=label, bounding_box=proposal["bounding_box"], **_origin(proposal)).to_dict()
    if proposal.get("mask") is not None:
        made["mask"] = proposal["mask"]
    elif path := proposal.get("mask_path"):
        made["mask_path"] = os.path.join(os.path.dirname(path), f"{made['_id']}{os.path.splitext(path)[1]}")
        fos.copy_file(path, made["mask_path"])
    return made


def _polyline(proposal: Document, size: tuple[int, int], label: str) -> Document:
    """As the database holds it."""
    if (mask := _mask(proposal, size)) is None:
        detection = fol.Detection(label=label, bounding_box=proposal["bounding_box"], **_origin(proposal))
    else:
        detection = fol.Detection.from_mask(mask_utils.decode(mask), label=label, **_origin(proposal))
    made: Document = detection.to_polyline().to_dict()
    return made


def _origin(proposal: Document) -> dict[str, str]:
    return {PROMOTED_FROM: str(proposal["_id"])}


def _mask(proposal: Document, size: tuple[int, int]) -> RLE | None:
    """COCO RLE; None of a box without a mask. Raises LabelError where either can't be used, or the mask is empty."""
    try:
        (mask,) = masks_of([proposal], size)
    except MissingError:
        boxes_of([proposal], size)
        return None
    if not mask_utils.area(mask):
        raise LabelError(f"{name_of(proposal)} has a mask without any pixel")
    return mask


def _tag(samples: SampleCollection, pred_field: str, found: LabelIds, tag: str) -> None:
    """Gives these proposals the tag, in place of "unlabeled": in the dataset, and in patches of it that are shown."""
    dataset = root_dataset(samples)
    retag(dataset, pred_field, tag, {}, found)
    retag(dataset, pred_field, UNLABELED, found, {})
    if source_dataset(samples) is not dataset and found:
        ids = [str(id) for label_ids in found.values() for id in label_ids]
        patches = source_dataset(samples).select_labels(ids=ids, fields=pred_field)
        patches.tag_labels(tag, label_fields=pred_field)
        patches.untag_labels(UNLABELED, label_fields=pred_field)
