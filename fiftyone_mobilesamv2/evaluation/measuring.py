"""Matches proposals to objects, image by image, in this process or on a cluster."""

from __future__ import annotations

import uuid
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import fiftyone.core.utils as fou
import numpy as np
from bson import ObjectId

from ..errors import ArgumentError
from ..fiftyone_internals import is_generated
from ..labels.documents import (
    Progress,
    Skipped,
    StoredImage,
    class_of,
    ensure_metadata,
    is_crowd,
    is_number,
    number_of,
    visit_shard,
)
from ..labels.masks import boxes_may_overlap, boxes_of, masks_of
from ..modeling.arrays import IntArray
from ..runs.cluster import Cluster, Work, on_cluster
from ..runs.shards import Shard
from .average_recall import NOT_FOUND, AverageRecall, Shapes, ranking
from .ranking import RANKINGS

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

    from .proposals import ProposalEvaluationConfig

NO_CLASS = "object"  # class of objects without one, since the App groups objects by class
FOUND_AT = 0  # index in IOU_THRESHOLDS of IoU 0.5, which decides "tp" and "fn"

# FiftyOne's match: (object's label, proposal's label, IoU, confidence, object's id, proposal's id).
Match = tuple[str | None, str | None, float | None, float | None, str | None, str | None]


@dataclass
class MeasuredObject:
    id: ObjectId
    label: str
    best_iou: float
    ranks: IntArray  # [thresholds], from 0
    match_id: ObjectId | None  # id of the proposal that finds it at IoU 0.5; the next two belong to this match
    match_iou: float | None
    match_confidence: float | None

    @property
    def rank(self) -> int | None:
        """The rank of the proposal that finds the object, from 1."""
        return None if self.match_id is None else int(self.ranks[FOUND_AT]) + 1

    @property
    def match(self) -> Match:
        """The match in FiftyOne's format.

        The proposal gets the object's label; otherwise FiftyOne would not count it as a true positive.
        """
        if self.match_id is None:
            return self.label, None, None, None, str(self.id), None
        return self.label, self.label, self.match_iou, self.match_confidence, str(self.id), str(self.match_id)


@dataclass
class MeasuredImage:
    """The matches in a sample or video frame.

    Attributes:
        sample_id: id of the dataset's sample that it is or belongs to.
        recalls: its AR at each K; None without objects.
        fp: number of proposals without a match at IoU 0.5.
    """

    id: ObjectId
    sample_id: ObjectId
    frame_number: int | None
    recalls: list[float] | None
    fp: int
    objects: list[MeasuredObject] = field(default_factory=list)


@dataclass
class Measured:
    """The measurements of samples, or of a shard of them.

    Attributes:
        recall: the counts that AR@K is computed from.
        images: the images that were measured.
        skipped: the images that could not be measured.
        num_images: the number of images, measured and skipped.
        num_samples: the number of samples that the images belong to.
    """

    recall: AverageRecall
    images: list[MeasuredImage] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    num_images: int = 0
    num_samples: int = 0

    def add(self, other: Measured) -> None:
        """Merges the measurements of other samples."""
        self.recall += other.recall
        self.images += other.images
        self.skipped += other.skipped
        self.num_images += other.num_images
        self.num_samples += other.num_samples


def measure(samples: SampleCollection, config: ProposalEvaluationConfig, progress: Progress) -> Measured:
    """Reads and matches all images; stores nothing except missing metadata."""
    measured = Measured(AverageRecall(config.ks), num_samples=len(samples))

    def measure_image(stored: StoredImage) -> None:
        measured.images.append(_match(stored, config, measured.recall))

    fields = [config.pred_field, config.gt_field]
    measured.skipped, measured.num_images = visit_shard(samples, fields, measure_image, progress)
    return measured


def measure_on_cluster(
    samples: SampleCollection, config: ProposalEvaluationConfig, cluster: Cluster, progress: Progress
) -> Measured:
    """Like :func:`measure`, on the workers of a cluster. Raises ArgumentError for patches and frames."""
    if is_generated(samples):
        raise ArgumentError(
            "Patches and frames can't be evaluated on a cluster: evaluate the samples that they come from."
        )
    ensure_metadata(samples, progress)
    measured = Measured(AverageRecall(config.ks))
    results = on_cluster(samples, _measurer, (config,), cluster, group=uuid.uuid4().hex)
    with fou.ProgressBar(total=len(samples), progress=progress) as bar, closing(results):
        for shard_measured in results:
            measured.add(shard_measured)
            bar.update(shard_measured.num_samples)
    # Restores the order of the samples.
    positions = {sample_id: position for position, sample_id in enumerate(samples.values("_id"))}
    measured.images.sort(key=lambda image: (positions[image.sample_id], image.frame_number or 0))
    measured.skipped.sort(key=lambda each: positions.get(ObjectId(each["id"]), -1))
    return measured


def _measurer(config: ProposalEvaluationConfig) -> Work[Measured]:
    """Returns the function with which a cluster's worker measures each shard."""

    def measure_shard(samples: SampleCollection, shard: Shard) -> Measured:
        return measure(shard.of(samples), config, progress=False)

    return measure_shard


def _match(stored: StoredImage, config: ProposalEvaluationConfig, recall: AverageRecall) -> MeasuredImage:
    """Matches an image's proposals to its objects and adds them to the counts."""
    size = stored.known_size
    objects = stored.distinct_labels(config.gt_field)
    proposals = stored.distinct_labels(config.pred_field)
    scores = [number_of(label, RANKINGS[config.rank_by].attributes) for label in proposals]
    # Masks beyond the largest K are not decoded.
    proposals = [proposals[i] for i in ranking(scores, config.ks[-1])]
    crowd = [is_crowd(label) for label in objects]
    areas = None if config.area_field is None else [number_of(label, [config.area_field]) for label in objects]
    frequencies = [label.get("frequency") for label in objects]
    classes = [class_of(label) or NO_CLASS for label in objects]
    boxes = boxes_of(proposals, size), boxes_of(objects, size)
    shapes: tuple[Shapes, Shapes] = boxes
    if config.use_masks:
        wanted = np.asarray(boxes_may_overlap(*boxes).any(1))
        shapes = masks_of(proposals, size, wanted), masks_of(objects, size)
    matches = recall.add(*shapes, crowd, areas, frequencies if any(frequencies) else None)

    counted = [i for i, ignored in enumerate(crowd) if not ignored]
    ranks = matches.ranks[:, counted]
    image = MeasuredImage(
        stored.document["_id"],
        stored.sample_id,
        stored.document.get("frame_number"),
        recalls=[float((ranks < k).mean()) for k in config.ks] if counted else None,
        fp=int(matches.unmatched.sum()),
    )
    for i in counted:
        rank = matches.ranks[FOUND_AT, i]
        match = proposals[rank] if rank != NOT_FOUND else {}
        confidence = match.get("confidence")  # which another ranking does not check
        image.objects.append(
            MeasuredObject(
                objects[i]["_id"],
                classes[i],
                float(matches.best_ious[i]),
                matches.ranks[:, i],
                match.get("_id"),
                float(matches.ious[rank, i]) if match else None,
                confidence if is_number(confidence) else None,
            )
        )
    return image
