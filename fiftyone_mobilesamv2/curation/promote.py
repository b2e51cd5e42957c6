"""Promotes proposals to ground truth: adds objects that annotators missed, with a class that the user chooses."""

from __future__ import annotations

import logging
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

from ..errors import ArgumentError, LabelError, MissingError, message_of, plain
from ..fiftyone_internals import (
    Document,
    is_patches_view,
    label_path,
    label_type,
    root_dataset,
    sample_collection,
    source_dataset,
)
from ..labels.documents import Progress, Skipped, StoredImage, labels_in, name_of, stored_images, tags_of, visit_images
from ..labels.fields import GROUND_TRUTH_FIELD, check_field_name, check_shapes_field
from ..labels.masks import boxes_of, masks_of
from ..labels.schema import declare_labels
from .findings import LabelIds, check_images, check_tagged_field, retag, with_labels
from .unlabeled import DISMISSED, PROMOTED, UNLABELED

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

    from ..modeling.rle import RLE

logger = logging.getLogger(__name__)

PROMOTED_FROM = "promoted_from"  # attribute of a label with the id of its proposal


@dataclass(frozen=True)
class Promotion:
    """The result of :func:`promote_to_labels`.

    Attributes:
        promoted: number of proposals that became labels.
        already: number of proposals that were labels already; their labels are unchanged.
        samples: number of samples that got labels.
        missing: ids without a proposal.
        skipped: id, filepath and cause of each sample that got no labels because one could not be created or stored.
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
    gt_field: str = GROUND_TRUTH_FIELD,
    *,
    label: str,
    progress: Progress = None,
) -> Promotion:
    """Adds proposals to the ground truth of the dataset behind `samples`.

    Each becomes a new label in `gt_field` with its box and mask, the class `label`, and its id as `promoted_from`.
    Other attributes, such as the confidence and those of evaluations, belong to the proposal and are not copied. A mask
    in a file is copied to the same folder under the new label's id, so that the label does not depend on the proposal.
    The proposal is kept; its tag "unlabeled" is replaced by "promoted".

    A proposal that already is a label of `gt_field` isn't promoted again, and its label keeps its class. All labels of
    a sample are stored at once, before the proposals' tags change: after an interruption, the same call completes the
    work.

    Args:
        samples: a dataset or view of images, or a view of patches; proposals that it hides count as missing.
        ids: the ids of the proposals.
        pred_field: the proposals: `fo.Detections`.
        gt_field: `fo.Detections`, also created if the field does not exist, or `fo.Polylines`, which get the outlines
            of FiftyOne's `Detection.to_polyline`.
        label: the class.
        progress: as elsewhere in FiftyOne.

    Raises:
        ValueError: a field is missing, read-only or of the wrong type; `label` is empty; or all samples were skipped.
    """
    dataset = root_dataset(samples)
    check_promotion(samples, pred_field, gt_field)
    if not isinstance(label, str) or not label.strip():
        raise ArgumentError(f"label must be the name of a class, not {plain(label)!r}.")
    declare_labels(dataset, gt_field, {PROMOTED_FROM: fof.StringField})

    requested = dict.fromkeys(ids)
    shown = _selected(samples, pred_field, requested)
    sample_ids = set(shown.values("sample_id" if is_patches_view(samples) else "id"))
    label_ids = shown.values(label_path(shown, pred_field, "id"), unwind=True)
    # A view may hide attributes, and patches may be outdated.
    view = _selected(dataset.select(sample_ids), pred_field, label_ids)

    labelled: dict[ObjectId, list[ObjectId]] = {}  # sample id -> its proposals that are labels now
    existing_ids: set[str] = set()
    promoted = samples_changed = 0

    def visit(stored: StoredImage) -> None:
        nonlocal promoted, samples_changed
        proposals = stored.labels(pred_field)
        for proposal in proposals:
            tags_of(proposal)
        existing_ids.update(str(proposal["_id"]) for proposal in proposals)
        new = _promote(dataset, stored, proposals, gt_field, label)
        labelled[stored.sample_id] = [proposal["_id"] for proposal in proposals]
        promoted += new
        samples_changed += new > 0

    try:
        skipped = visit_images(view, [pred_field], visit, progress)
    finally:
        _tag(samples, pred_field, labelled, PROMOTED)
        declare_labels(dataset, gt_field, {PROMOTED_FROM: fof.StringField})
    already = sum(map(len, labelled.values())) - promoted
    return Promotion(promoted, already, samples_changed, [id for id in requested if id not in existing_ids], skipped)


def dismiss(samples: SampleCollection, ids: Iterable[str], pred_field: str) -> int:
    """Replaces the tag "unlabeled" of these proposals by "dismissed", so that they are not suggested again.

    Arguments as for :func:`promote_to_labels`. Returns the number of proposals, without those of samples in which one
    can't be tagged, which are logged.
    """
    dataset = root_dataset(samples)
    check_tagged_field(dataset, pred_field, "proposals")
    label_ids: dict[ObjectId, list[ObjectId]] = {}
    for image in stored_images(_selected(dataset, pred_field, ids), [pred_field]):
        try:
            proposals = image.labels(pred_field)
            for proposal in proposals:
                tags_of(proposal)
        except LabelError as error:
            logger.warning("No proposal of %s was dismissed: %s", image.name, error)
        else:
            label_ids[image.sample_id] = [proposal["_id"] for proposal in proposals]
    _tag(samples, pred_field, label_ids, DISMISSED)
    return sum(map(len, label_ids.values()))


def _selected(samples: SampleCollection, pred_field: str, ids: Iterable[str]) -> SampleCollection:
    """The samples with any of these proposals, and only these proposals."""
    valid = [id for id in ids if ObjectId.is_valid(id)]
    return with_labels(samples, pred_field, valid).select_labels(ids=valid, fields=pred_field)


def check_promotion(samples: SampleCollection, pred_field: str, gt_field: str) -> None:
    """Raises ValueError if proposals of `pred_field` can't become labels of `gt_field`."""
    dataset = root_dataset(samples)
    check_images(dataset)
    check_shapes_field(samples, pred_field, "proposals")
    check_tagged_field(dataset, pred_field, "proposals")
    kind = label_type(dataset, pred_field)
    if kind is not fol.Detections:
        raise ArgumentError(f"Field '{pred_field}' contains {kind.__name__}; Detections were expected as proposals.")
    if pred_field == gt_field:
        raise ArgumentError(f"The proposals and the ground truth are the same field, '{gt_field}'.")
    if dataset.has_field(gt_field):
        check_tagged_field(dataset, gt_field, "ground truth", [PROMOTED_FROM])
    else:
        check_field_name(gt_field)


def _promote(dataset: fo.Dataset, stored: StoredImage, proposals: Sequence[Document], gt_field: str, label: str) -> int:
    """Stores labels for the proposals of one sample that are not labels yet; returns their number.

    Raises:
        LabelError: a label can't be created, or the labels can't be stored. Nothing was stored.
    """
    kind = label_type(dataset, gt_field)
    path, attribute = (label_path(dataset, gt_field, name) for name in ("", PROMOTED_FROM))
    collection = sample_collection(dataset)
    query: Document = {"_id": stored.sample_id}
    document = collection.find_one(query, {attribute: True})
    if document is None:
        raise LabelError("it has been deleted")
    values = [each.get(PROMOTED_FROM) for each in labels_in(document, gt_field)]
    before = {value for value in values if isinstance(value, str)}
    new = [proposal for proposal in proposals if str(proposal["_id"]) not in before]
    if not new:
        return 0
    make = _polyline if kind is fol.Polylines else _detection
    try:
        labels = [make(proposal, stored.known_size, label) for proposal in new]
        # Others may be promoting the same proposals: the first update only matches if none has become a label since.
        is_list = {path: {"$type": "array"}, attribute: {"$nin": [made[PROMOTED_FROM] for made in labels]}}
        updates: list[tuple[Document, Document]] = [
            (is_list, {"$push": {path: {"$each": labels}}}),
            # MongoDB can't append to a list that does not exist.
            ({gt_field: None}, {"$set": {gt_field: {**kind().to_dict(), kind._LABEL_LIST_FIELD: labels}}}),
            ({gt_field: {"$type": "object"}, path: None}, {"$set": {path: labels}}),
        ]
        now = {"$currentDate": {"last_modified_at": True}}
        stored_now = any(
            collection.update_one(query | condition, update | now).matched_count for condition, update in updates
        )
    except (OSError, WriteError, DocumentTooLarge) as error:
        raise LabelError(f"its labels can't be stored: {message_of(error)}") from error
    if not stored_now:
        raise LabelError(
            f"its labels in '{gt_field}' were changed at the same time, or are something else than labels: promote "
            "again"
        )
    return len(new)


def _detection(proposal: Document, size: tuple[int, int], label: str) -> Document:
    """The document of the new label; a mask in a file is copied to a new file."""
    _mask(proposal, size)  # raises LabelError for an unusable proposal
    made: Document = fol.Detection(label=label, bounding_box=proposal["bounding_box"], **_origin(proposal)).to_dict()
    if proposal.get("mask") is not None:
        made["mask"] = proposal["mask"]
    elif path := proposal.get("mask_path"):
        made["mask_path"] = os.path.join(os.path.dirname(path), f"{made['_id']}{os.path.splitext(path)[1]}")
        fos.copy_file(path, made["mask_path"])
    return made


def _polyline(proposal: Document, size: tuple[int, int], label: str) -> Document:
    """The document of the new label."""
    if (mask := _mask(proposal, size)) is None:
        detection = fol.Detection(label=label, bounding_box=proposal["bounding_box"], **_origin(proposal))
    else:
        detection = fol.Detection.from_mask(mask_utils.decode(mask), label=label, **_origin(proposal))
    made: Document = detection.to_polyline().to_dict()
    return made


def _origin(proposal: Document) -> dict[str, str]:
    return {PROMOTED_FROM: str(proposal["_id"])}


def _mask(proposal: Document, size: tuple[int, int]) -> RLE | None:
    """The mask as COCO RLE; None for a box without a mask. Raises LabelError if it is unusable or empty."""
    try:
        (mask,) = masks_of([proposal], size)
    except MissingError:
        boxes_of([proposal], size)
        return None
    if not mask_utils.area(mask):
        raise LabelError(f"{name_of(proposal)} has an empty mask")
    return mask


def _tag(samples: SampleCollection, pred_field: str, proposals: LabelIds, tag: str) -> None:
    """Replaces the proposals' tag "unlabeled" by `tag`, in the dataset and in `samples` if it is a view of patches."""
    dataset = root_dataset(samples)
    retag(dataset, pred_field, tag, {}, proposals)
    retag(dataset, pred_field, UNLABELED, proposals, {})
    if source_dataset(samples) is not dataset and proposals:
        ids = [str(id) for label_ids in proposals.values() for id in label_ids]
        patches = source_dataset(samples).select_labels(ids=ids, fields=pred_field)
        patches.tag_labels(tag, label_fields=pred_field)
        patches.untag_labels(UNLABELED, label_fields=pred_field)
