"""Matching proposals to objects, image by image, here or on a cluster: what an evaluation of proposals measures."""

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
from ..labels.documents import Progress, Skipped, StoredImage, ensure_metadata, is_crowd, number_of, visit_shard
from ..labels.masks import boxes_may_overlap, boxes_of, masks_of
from ..modeling.arrays import IntArray
from ..runs.cluster import Cluster, Work, on_cluster
from ..runs.shards import Shard
from .average_recall import NOT_FOUND, AverageRecall, Shapes, ranking
from .ranking import RANKINGS

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

    from .proposals import ProposalEvaluationConfig

NO_CLASS = "object"  # of objects without a class, which the App counts by their class
FOUND_AT = 0  # the place of IoU 0.5, of "tp" and "fn", in IOU_THRESHOLDS

# FiftyOne's (label of the object, of the proposal, IoU, confidence, id of the object, of the proposal).
Match = tuple[str | None, str | None, float | None, float | None, str | None, str | None]


@dataclass
class MeasuredObject:
    id: ObjectId
    label: str
    best_iou: float
    ranks: IntArray  # [thresholds], from 0
    match_id: ObjectId | None  # of the proposal that finds it at IoU 0.5; the next two are of this match
    match_iou: float | None
    match_confidence: float | None

    @property
    def rank(self) -> int | None:
        """From 1, as users count."""
        return None if self.match_id is None else int(self.ranks[FOUND_AT]) + 1

    @property
    def match(self) -> Match:
        """As FiftyOne has it.

        The proposal is given the object's label, or FiftyOne would not count it as a true positive.
        """
        if self.match_id is None:
            return self.label, None, None, None, str(self.id), None
        return self.label, self.label, self.match_iou, self.match_confidence, str(self.id), str(self.match_id)


@dataclass
class MeasuredImage:
    """A sample, or a frame of a video: what was found in it.

    Attributes:
        sample_id: of the dataset's sample that it is, or belongs to.
        recalls: its AR at each K; None without objects.
        fp: how many proposals match nothing at IoU 0.5.
    """

    id: ObjectId
    sample_id: ObjectId
    frame_number: int | None
    recalls: list[float] | None
    fp: int
    objects: list[MeasuredObject] = field(default_factory=list)


@dataclass
class Measured:
    """What was measured of samples, or of a shard of them.

    Attributes:
        recall: the counts from which AR@K follows.
        images: those that could be measured.
        skipped: those that could not.
        num_images: how many there are of both.
        num_samples: how many samples these are, or are of.
    """

    recall: AverageRecall
    images: list[MeasuredImage] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    num_images: int = 0
    num_samples: int = 0

    def add(self, other: Measured) -> None:
        """Takes what was measured of other samples."""
        self.recall += other.recall
        self.images += other.images
        self.skipped += other.skipped
        self.num_images += other.num_images
        self.num_samples += other.num_samples


def measure(samples: SampleCollection, config: ProposalEvaluationConfig, progress: Progress) -> Measured:
    """Reads and matches everything; stores nothing but missing metadata."""
    measured = Measured(AverageRecall(config.ks), num_samples=len(samples))

    def measure_image(stored: StoredImage) -> None:
        measured.images.append(_match(stored, config, measured.recall))

    fields = [config.pred_field, config.gt_field]
    measured.skipped, measured.num_images = visit_shard(samples, fields, measure_image, progress)
    return measured


def measure_on_cluster(
    samples: SampleCollection, config: ProposalEvaluationConfig, cluster: Cluster, progress: Progress
) -> Measured:
    """The same, by the workers of a cluster. Raises ArgumentError for patches and frames."""
    if is_generated(samples):
        raise ArgumentError("Patches and frames can't be spread over a cluster: evaluate what they are of.")
    ensure_metadata(samples, progress)
    measured = Measured(AverageRecall(config.ks))
    shards = on_cluster(samples, _measurer, (config,), cluster, group=uuid.uuid4().hex)
    with fou.ProgressBar(total=len(samples), progress=progress) as bar, closing(shards):
        for of_shard in shards:
            measured.add(of_shard)
            bar.update(of_shard.num_samples)
    # As if they had been measured one after the other.
    places = {sample_id: place for place, sample_id in enumerate(samples.values("_id"))}
    measured.images.sort(key=lambda image: (places[image.sample_id], image.frame_number or 0))
    measured.skipped.sort(key=lambda each: places.get(ObjectId(each["id"]), -1))
    return measured


def _measurer(config: ProposalEvaluationConfig) -> Work[Measured]:
    """What a worker of a cluster does with each shard."""

    def measure_shard(samples: SampleCollection, shard: Shard) -> Measured:
        return measure(shard.of(samples), config, progress=False)

    return measure_shard


def _match(stored: StoredImage, config: ProposalEvaluationConfig, recall: AverageRecall) -> MeasuredImage:
    """Matches the image's proposals to its objects, and adds them to the counts."""
    size = stored.known_size
    objects = stored.labels(config.gt_field)
    proposals = stored.labels(config.pred_field)
    scores = [number_of(label, RANKINGS[config.rank_by].attributes) for label in proposals]
    # Masks beyond the largest K need no decoding.
    proposals = [proposals[i] for i in ranking(scores, config.ks[-1])]
    crowd = [is_crowd(label) for label in objects]
    areas = None if config.area_field is None else [number_of(label, [config.area_field]) for label in objects]
    frequencies = [label.get("frequency") for label in objects]
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
        image.objects.append(
            MeasuredObject(
                objects[i]["_id"],
                objects[i].get("label") or NO_CLASS,
                float(matches.best_ious[i]),
                matches.ranks[:, i],
                match.get("_id"),
                float(matches.ious[rank, i]) if match else None,
                match.get("confidence"),
            )
        )
    return image
