"""Objects without a label, and labels without an object: where the ground truth and the proposals disagree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from bson import ObjectId

from ..errors import ArgumentError
from ..evaluation.average_recall import areas_of
from ..evaluation.ranking import RANKINGS
from ..fiftyone_internals import source_dataset
from ..labels.documents import Progress, Skipped, StoredImage, is_crowd, number_of, visit_images
from ..labels.fields import check_shapes_field
from .duplicates import DUPLICATE
from .findings import check_images, check_options, check_tagged_field, patches_of, retag, tags_of
from .overlaps import ious, shapes_of, shares_inside_any

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

# Tags of proposals that someone has decided on.
PROMOTED = "promoted"
DISMISSED = "dismissed"
NOT_SUGGESTED = {PROMOTED, DISMISSED, DUPLICATE}  # the last where `find_duplicates` was run before


@dataclass(frozen=True)
class FoundLabels:
    """Labels that were found, and tagged.

    Attributes:
        samples: where they were looked for.
        field: that they are of.
        tag: that they have now, and no other label of that field in `samples`.
        ids: of the labels, in the order in which they should be looked at.
        num_samples: how many samples have any.
        left_out: how many images were not looked at, since the model hasn't been run on them.
        skipped: of each image with a label that can't be used, its id, filepath and cause.
    """

    samples: SampleCollection = dataclasses.field(repr=False)
    field: str
    tag: str
    ids: list[str] = dataclasses.field(repr=False)
    num_samples: int
    left_out: int
    skipped: list[Skipped] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def patches(self) -> fo.core.patches.PatchesView:
        """These labels in this order, but for those that have lost the tag since."""
        return patches_of(self.samples, self.field, self.tag, self.ids)


def find_unlabeled_objects(
    samples: SampleCollection,
    pred_field: str,
    gt_field: str = "ground_truth",
    *,
    iou: float = 0.5,
    max_inside: float = 0.7,
    min_score: float = 0.0,
    min_area: float = 0.0,
    rank_by: str = "confidence",
    use_masks: bool = True,
    tag: str = "unlabeled",
    progress: Progress = None,
) -> FoundLabels:
    """Finds and tags the proposals that no label explains.

    A label explains a proposal that has an IoU of `iou` with it. Labels together explain one of which `max_inside` lies
    in their union: a part of a labelled object, or anything in a crowd region. Proposals tagged "promoted" or
    "dismissed" have been decided on, and are not found again. In an image without any label all others are.

    An image with a label that can't be used is skipped, logged, and listed in `skipped`. Nothing is stored before
    everything has been looked at; then the tag is taken from all other proposals in `samples`.

    Args:
        samples: a dataset or view of images. Where image sizes are missing, metadata is computed and stored.
        pred_field: the proposals: detections or polylines.
        gt_field: the labels, likewise. `iscrowd` marks regions of several objects.
        iou: from which IoU with a label on a proposal is that object.
        max_inside: from which share of its area inside labels on a proposal is explained by them.
        min_score: proposals that score less are not looked at.
        min_area: nor are those of fewer pixels.
        rank_by: what the score is: "confidence", "predicted_iou", "stability", or "sam", the mean of the last two.
        use_masks: compares masks; else boxes, whose shares are rounded to pixels.
        tag: what they are tagged with.
        progress: as everywhere in FiftyOne.

    Returns:
        the proposals, those of the highest score first.

    Raises:
        ValueError: a field is missing, of the wrong type or read-only; a mask or a score is missing; a threshold or
            ranking is not valid; or every image had to be skipped.
    """
    check_images(samples)
    check_options(rank_by, iou=iou, max_inside=max_inside)
    check_tagged_field(samples, pred_field, "proposals")
    check_shapes_field(samples, gt_field, "ground truth")
    _check_different(pred_field, gt_field)

    def unlabeled(stored: StoredImage) -> dict[ObjectId, float]:
        proposals = [label for label in stored.labels(pred_field) if not tags_of(label) & NOT_SUGGESTED]
        scores = np.array([number_of(label, RANKINGS[rank_by].attributes) for label in proposals])
        proposals = [label for label, score in zip(proposals, scores) if score >= min_score]
        scores = scores[scores >= min_score]
        objects, size = stored.labels(gt_field), stored.known_size
        crowd = np.array([is_crowd(label) for label in objects], bool)
        shapes, labelled = shapes_of(proposals, size, use_masks), shapes_of(objects, size, use_masks)
        best_ious = ious(shapes, labelled)[:, ~crowd].max(1, initial=0)
        found = (best_ious < iou) & (shares_inside_any(shapes, labelled, size) < max_inside)
        found &= (areas_of(shapes) > 0) & (areas_of(shapes) >= min_area)
        return {proposals[i]["_id"]: -scores[i] for i in np.flatnonzero(found)}

    return _found(samples, [pred_field, gt_field], pred_field, unlabeled, tag, progress)


def find_unsupported_labels(
    samples: SampleCollection,
    pred_field: str,
    gt_field: str = "ground_truth",
    *,
    iou: float = 0.5,
    use_masks: bool = True,
    tag: str = "unsupported",
    progress: Progress = None,
) -> FoundLabels:
    """Finds and tags the labels that no proposal has an IoU of `iou` with: wrong ones, or objects the model misses.

    Crowd regions are no such labels. Images on which the model hasn't been run, where `pred_field` is None, are left
    out and counted. Otherwise as :func:`find_unlabeled_objects`, with the same arguments.

    Returns:
        the labels, those of the lowest best IoU first.

    Raises:
        ValueError: as :func:`find_unlabeled_objects`.
    """
    check_images(samples)
    check_options(iou=iou)
    check_tagged_field(samples, gt_field, "ground truth")
    check_shapes_field(samples, pred_field, "proposals")
    _check_different(pred_field, gt_field)

    def unsupported(stored: StoredImage) -> dict[ObjectId, float] | None:
        if not stored.has(pred_field):
            return None
        objects = [label for label in stored.labels(gt_field) if not is_crowd(label)]
        size = stored.known_size
        shapes, proposed = (shapes_of(labels, size, use_masks) for labels in (objects, stored.labels(pred_field)))
        best_ious = ious(shapes, proposed).max(1, initial=0)
        return {objects[i]["_id"]: best_ious[i] for i in np.flatnonzero(best_ious < iou)}

    return _found(samples, [pred_field, gt_field], gt_field, unsupported, tag, progress)


def _found(
    samples: SampleCollection,
    field_names: list[str],
    field_name: str,
    find: Callable[[StoredImage], dict[ObjectId, float] | None],
    tag: str,
    progress: Progress,
) -> FoundLabels:
    """Tags the labels of `field_name` that `find` finds in the images.

    Args:
        find: an image -> by id its labels that are to be tagged, and where they go in the order of all, lowest first;
            None for an image that is left out.
    """
    before: dict[ObjectId, set[ObjectId]] = {}
    found: dict[ObjectId, dict[ObjectId, float]] = {}
    left_out = 0

    def look(stored: StoredImage) -> None:
        nonlocal left_out
        before[stored.sample_id] = {label["_id"] for label in stored.labels(field_name) if tag in tags_of(label)}
        if (labels := find(stored)) is None:
            left_out += 1
        elif labels:
            found[stored.sample_id] = labels

    skipped = visit_images(samples, field_names, look, progress)
    retag(source_dataset(samples), field_name, tag, before, found)
    places = {id: place for labels in found.values() for id, place in labels.items()}
    ids = [str(id) for id in sorted(places, key=places.__getitem__)]
    return FoundLabels(samples, field_name, tag, ids, len(found), left_out, skipped)


def _check_different(pred_field: str, gt_field: str) -> None:
    if pred_field == gt_field:
        raise ArgumentError(f"The proposals and the ground truth are the same field, '{gt_field}'.")
