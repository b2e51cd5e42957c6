"""Finds disagreements of ground truth and proposals: objects without a label, and labels without an object."""

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
from ..labels.documents import Progress, Skipped, StoredImage, is_crowd, number_of, tags_of, visit_images
from ..labels.fields import GROUND_TRUTH_FIELD, check_shapes_field
from .duplicates import DUPLICATE
from .findings import check_images, check_options, check_tagged_field, patches_of, retag
from .overlaps import ious, shapes_of, shares_inside_any

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

UNLABELED = "unlabeled"  # default tag of `find_unlabeled_objects`
# Tags of proposals that a user has reviewed.
PROMOTED = "promoted"
DISMISSED = "dismissed"
NOT_SUGGESTED = {PROMOTED, DISMISSED, DUPLICATE}  # the last is set by `find_duplicates`


@dataclass(frozen=True)
class FoundLabels:
    """Labels that were found and tagged.

    Attributes:
        samples: the samples that were searched.
        label_field: the field of the labels.
        tag: their tag, which no other label of the field in `samples` has.
        ids: the ids of the labels, in the order in which to review them.
        num_samples: number of samples with such labels.
        left_out: number of images that were left out because the model hasn't been run on them.
        skipped: id, filepath and cause of each image with an unusable label.
    """

    samples: SampleCollection = dataclasses.field(repr=False)
    label_field: str
    tag: str
    ids: list[str] = dataclasses.field(repr=False)
    num_samples: int
    left_out: int
    skipped: list[Skipped] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def patches(self) -> fo.core.patches.PatchesView:
        """These labels in this order, except those that have lost the tag since."""
        return patches_of(self.samples, self.label_field, self.tag, self.ids)


def find_unlabeled_objects(
    samples: SampleCollection,
    pred_field: str,
    gt_field: str = GROUND_TRUTH_FIELD,
    *,
    iou: float = 0.5,
    max_inside: float = 0.7,
    min_score: float = 0.0,
    min_area: float = 0.0,
    rank_by: str = "confidence",
    use_masks: bool = True,
    tag: str = UNLABELED,
    progress: Progress = None,
) -> FoundLabels:
    """Finds and tags the proposals that no label explains.

    A label explains a proposal if their IoU is at least `iou`. Labels together explain a proposal if at least
    `max_inside` of it lies in their union: a part of a labelled object, or anything in a crowd region. Proposals tagged
    "promoted" or "dismissed" have been reviewed and are not tagged again; neither are those tagged "duplicate". In an
    image without labels, all other proposals are tagged.

    An image with an unusable label is skipped, logged and listed in `skipped`. Tags are stored once all images have
    been read; the tag is then removed from all other proposals in `samples`.

    Args:
        samples: a dataset or view of images. Missing metadata is computed and stored.
        pred_field: the proposals: detections or polylines.
        gt_field: the labels, likewise. `iscrowd` marks regions of several objects.
        iou: minimum IoU of a proposal with a label of the same object.
        max_inside: minimum share of a proposal's area inside labels for which they explain it.
        min_score: proposals with a lower score are ignored.
        min_area: proposals with fewer pixels are ignored.
        rank_by: the score: "confidence", "predicted_iou", "stability", or "sam", the mean of the last two.
        use_masks: whether to compare masks; otherwise boxes, which are rounded to pixels for `max_inside`.
        tag: the tag for the proposals.
        progress: as elsewhere in FiftyOne.

    Returns:
        The proposals, highest score first.

    Raises:
        ValueError: a field is missing, of the wrong type or read-only; a mask or a score is missing; a threshold or
            ranking is invalid; or all images were skipped.
    """
    check_images(samples)
    check_options(rank_by, iou=iou, max_inside=max_inside)
    check_tagged_field(samples, pred_field, "proposals")
    check_shapes_field(samples, gt_field, "ground truth")
    _check_different(pred_field, gt_field)

    def unlabeled(stored: StoredImage) -> dict[ObjectId, float]:
        proposals = [label for label in stored.distinct_labels(pred_field) if not tags_of(label) & NOT_SUGGESTED]
        scores = np.array([number_of(label, RANKINGS[rank_by].attributes) for label in proposals])
        proposals = [label for label, score in zip(proposals, scores) if score >= min_score]
        scores = scores[scores >= min_score]
        objects, size = stored.labels(gt_field), stored.known_size
        crowd = np.array([is_crowd(label) for label in objects], bool)
        shapes, labelled = shapes_of(proposals, size, use_masks), shapes_of(objects, size, use_masks)
        best_ious = ious(shapes, labelled)[:, ~crowd].max(1, initial=0)
        is_unlabeled = (best_ious < iou) & (shares_inside_any(shapes, labelled, size) < max_inside)
        is_unlabeled &= (areas_of(shapes) > 0) & (areas_of(shapes) >= min_area)
        return {proposals[i]["_id"]: -scores[i] for i in np.flatnonzero(is_unlabeled)}

    return _tag_labels(samples, [pred_field, gt_field], pred_field, unlabeled, tag, progress)


def find_unsupported_labels(
    samples: SampleCollection,
    pred_field: str,
    gt_field: str = GROUND_TRUTH_FIELD,
    *,
    iou: float = 0.5,
    use_masks: bool = True,
    tag: str = "unsupported",
    progress: Progress = None,
) -> FoundLabels:
    """Finds and tags the labels whose IoU with every proposal is below `iou`: wrong labels, or objects the model
    misses.

    Crowd regions are ignored. Images on which the model hasn't been run, where `pred_field` is None, are left out and
    counted. Otherwise like :func:`find_unlabeled_objects`, with the same arguments.

    Returns:
        The labels, lowest best IoU first.

    Raises:
        ValueError: as for :func:`find_unlabeled_objects`.
    """
    check_images(samples)
    check_options(iou=iou)
    check_tagged_field(samples, gt_field, "ground truth")
    check_shapes_field(samples, pred_field, "proposals")
    _check_different(pred_field, gt_field)

    def unsupported(stored: StoredImage) -> dict[ObjectId, float] | None:
        if not stored.has(pred_field):
            return None
        objects = [label for label in stored.distinct_labels(gt_field) if not is_crowd(label)]
        size = stored.known_size
        shapes, proposed = (shapes_of(labels, size, use_masks) for labels in (objects, stored.labels(pred_field)))
        best_ious = ious(shapes, proposed).max(1, initial=0)
        return {objects[i]["_id"]: best_ious[i] for i in np.flatnonzero(best_ious < iou)}

    return _tag_labels(samples, [pred_field, gt_field], gt_field, unsupported, tag, progress)


def _tag_labels(
    samples: SampleCollection,
    field_names: list[str],
    field_name: str,
    find: Callable[[StoredImage], dict[ObjectId, float] | None],
    tag: str,
    progress: Progress,
) -> FoundLabels:
    """Tags the labels of `field_name` that `find` finds in the images.

    Args:
        find: image -> {label id: sort key} of the labels to tag, which are sorted in ascending order; None for an image
            that is left out.
    """
    before: dict[ObjectId, set[ObjectId]] = {}
    sort_keys: dict[ObjectId, dict[ObjectId, float]] = {}
    left_out = 0

    def visit(stored: StoredImage) -> None:
        nonlocal left_out
        before[stored.sample_id] = {label["_id"] for label in stored.labels(field_name) if tag in tags_of(label)}
        if (labels := find(stored)) is None:
            left_out += 1
        elif labels:
            sort_keys[stored.sample_id] = labels

    skipped = visit_images(samples, field_names, visit, progress)
    retag(source_dataset(samples), field_name, tag, before, sort_keys)
    all_keys = {id: key for labels in sort_keys.values() for id, key in labels.items()}
    ids = [str(id) for id in sorted(all_keys, key=all_keys.__getitem__)]
    return FoundLabels(samples, field_name, tag, ids, len(sort_keys), left_out, skipped)


def _check_different(pred_field: str, gt_field: str) -> None:
    if pred_field == gt_field:
        raise ArgumentError(f"The proposals and the ground truth are the same field, '{gt_field}'.")
