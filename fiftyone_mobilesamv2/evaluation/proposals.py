"""FiftyOne's evaluation method "proposals": AR@K of class-agnostic masks or boxes, as a run of the dataset."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import fiftyone.core.utils as fou
import fiftyone.core.validation as fov
import fiftyone.utils.eval.detection as foud
import numpy as np
from bson import ObjectId

from ..errors import ArgumentError
from ..fiftyone_internals import (
    is_clips_view,
    is_frame_field,
    is_frames_view,
    is_generated,
    is_patches_view,
    root_dataset,
)
from ..labels.documents import (
    Progress,
    Skipped,
    StoredImage,
    ensure_metadata,
    is_crowd,
    log_skipped,
    number_of,
    visit_shard,
)
from ..labels.fields import check_shapes_field
from ..labels.masks import boxes_may_overlap, boxes_of, masks_of
from ..runs.cluster import Work, check_workers, on_cluster
from ..runs.shards import Shard
from .average_recall import IOU_THRESHOLDS, KS, NOT_FOUND, AverageRecall, Shapes, ranking
from .proposal_results import ProposalResults
from .ranking import RANKINGS
from .run_fields import FOUND_AT, NO_CLASS, Match, MeasuredImage, MeasuredObject, RunFields

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection
    from fiftyone.core.video import FrameView

logger = logging.getLogger(__name__)
# What a worker of a cluster returns of a part: counts, images, what was skipped, how many images, how many samples.
_Measured = tuple[AverageRecall, list[MeasuredImage], list[Skipped], int, int]


def evaluate_proposals(
    samples: SampleCollection,
    pred_field: str,
    gt_field: str = "ground_truth",
    eval_key: str | None = None,
    ks: Sequence[int] = KS,
    use_masks: bool = True,
    rank_by: str = "confidence",
    area_field: str | None = None,
    progress: Progress = None,
    cluster: str | None = None,
    workers: int | None = None,
) -> ProposalResults:
    """Measures class-agnostic proposals against ground truth: AR@K, by COCO's rules.

    An earlier run of that key is replaced only after everything has been measured.

    An image with a label that can't be used (a file that is no mask, a score that is no number, a mask that isn't
    cropped to its box) is skipped, logged, and listed in `results.skipped`. Masks of proposals whose boxes meet no
    object are not looked at. What a view hides isn't seen: neither samples and labels nor attributes such as `iscrowd`.

    Args:
        samples: a dataset or view of images or videos. Where image sizes are missing, metadata is computed and stored.
        pred_field: the proposals: detections or polylines, of samples or, as "frames.x", of frames.
        gt_field: the objects, likewise. `iscrowd` marks regions that are ignored; "r", "c" or "f" in `frequency` puts
            objects into LVIS's groups.
        eval_key: the key of the run. Then each object gets `<eval_key>` ("tp" or "fn" at IoU 0.5), `<eval_key>_iou`
            (its best IoU with any proposal), `<eval_key>_rank` (from 1) and `<eval_key>_id` of the proposal that finds
            it, and that proposal the same; each sample gets `<eval_key>_tp`, `_fp` (proposals that match nothing),
            `_fn` and `_recall_at_<K>`, its AR@K. None stores nothing of these.
        ks: how many proposals of an image count.
        use_masks: compares masks; else boxes.
        rank_by: "confidence": the detector's score, by which MobileSAMv2 caps its prompts, so that the K best are what
            a run of K prompts would have found, and which labels of any model have; "predicted_iou"; "stability"; or
            "sam", the mean of these two, by which SAM ranks.
        area_field: the objects' attribute that holds their area in pixels; default: their mask's, or their box's.
        progress: as everywhere in FiftyOne.
        cluster: measures on a Ray cluster: "auto" for the one that this machine belongs to, its address, or "local" for
            processes on this machine. The results are the same, to the last digit.
        workers: how many of the cluster; None: one for each GPU, or, without any, for each machine.

    Returns:
        the results; `results.metrics()` are the figures.

    Raises:
        ValueError: a field is missing or of the wrong type; a mask, a score or an area is missing; what a run of this
            key would store is there already and no earlier run's; or every image had to be skipped.
    """
    check_workers(cluster, workers)
    method = ProposalEvaluationConfig(
        pred_field, gt_field, ks=ks, use_masks=use_masks, rank_by=rank_by, area_field=area_field
    ).build()
    method.cluster, method.workers = cluster, workers
    method.register_run(samples, eval_key, progress=progress)
    method.register_samples(samples, eval_key)
    if eval_key is not None:
        method.add_fields_to_sidebar_group(samples, eval_key)
    results: ProposalResults = method.results
    return results


class ProposalEvaluationConfig(foud.DetectionEvaluationConfig):
    """See :func:`evaluate_proposals`. FiftyOne's `evaluate_detections(method="proposals")` makes one, too.

    Attributes:
        view: "frames" or "patches" if the run was over such a view, whose labels are in other fields of its dataset.
        stored_as: the key in the names of the fields, which isn't the run's if those of a new key were taken.
    """

    def __init__(
        self,
        pred_field: str,
        gt_field: str,
        ks: Sequence[int] = KS,
        use_masks: bool = False,
        rank_by: str = "confidence",
        area_field: str | None = None,
        view: str | None = None,
        stored_as: str | None = None,
        # What FiftyOne passes to any method:
        iou: float = 0.5,
        classwise: bool = False,
        use_boxes: bool = False,
        custom_metrics: list[str] | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(pred_field, gt_field, iou=iou, classwise=False, custom_metrics=custom_metrics)
        self.ks = list(AverageRecall(ks).ks)
        self.use_masks = use_masks and not use_boxes
        self.rank_by = rank_by
        self.area_field = area_field
        self.view = view
        self.stored_as = stored_as
        if rank_by not in RANKINGS:
            raise ArgumentError(f"rank_by={rank_by!r}: one of {', '.join(map(repr, RANKINGS))} was expected.")
        if iou != IOU_THRESHOLDS[FOUND_AT]:
            raise ArgumentError(f'iou={iou}: "tp" and "fn" are told at 0.5; the results have recall at 0.5 to 0.95.')
        if pred_field == gt_field:
            raise ArgumentError(f"The proposals and the ground truth are the same field, '{gt_field}'.")

    @property
    def method(self) -> str:
        return "proposals"


class ProposalEvaluation(RunFields):
    """The method. It reads labels from the database itself, and each mask once.

    FiftyOne calls `register_run`, which would delete an earlier run, then `register_samples`, and then, having loaded
    every label, `evaluate` for each sample. Here the first measures, the second stores, and the third tells.
    """

    def __init__(self, config: ProposalEvaluationConfig) -> None:
        super().__init__(config)
        self.cluster: str | None = None
        self.workers: int | None = None
        self.results: ProposalResults | None = None
        self._recall = AverageRecall(config.ks)
        self._images: list[MeasuredImage] = []
        self._skipped: list[Skipped] = []

    def register_run(
        self,
        samples: SampleCollection,
        key: str | None,
        overwrite: bool = True,
        cleanup: bool = True,
        progress: Progress = None,
    ) -> None:
        if key is not None:
            self.validate_run(samples, key, overwrite=overwrite)
        self.check_fields(samples)
        if is_generated(samples):
            self.config.view = "frames" if is_frames_view(samples) else "patches"
        if key is not None:
            self.check_names(samples, key)
        self.config.stored_as = key
        self._measure(samples, progress)
        self.results = self._results(samples, key)
        super().register_run(samples, key, overwrite=overwrite, cleanup=cleanup)

    def register_samples(self, samples: SampleCollection, eval_key: str | None, dynamic: bool = True) -> None:
        if eval_key is None:
            return
        try:
            self.write(samples, eval_key)
            self.save_run_results(samples, eval_key, self.results)
        except BaseException:
            self.delete_run(samples, eval_key)
            raise

    def evaluate(self, doc: fo.Sample | FrameView, eval_key: str | None = None) -> list[Match]:
        # FiftyOne counts these, and stores the counts once more.
        image = self._by_id.get(doc.id)
        if image is None:
            return []
        unmatched: Match = (None, NO_CLASS, None, None, None, None)
        return [found.match for found in image.objects] + [unmatched] * image.fp

    def generate_results(
        self,
        samples: SampleCollection,
        matches: Sequence[Match],
        eval_key: str | None = None,
        classes: Sequence[str] | None = None,
        missing: str | None = None,
        progress: Progress = None,
    ) -> ProposalResults:
        if eval_key is not None:
            self.forget_counts_of_skipped(samples, eval_key)
        self.results = self._results(samples, eval_key, classes, missing)
        return self.results

    # Checks ---------------------------------------------------------------------------------------------------------

    def check_fields(self, samples: SampleCollection) -> None:
        """Raises ValueError where the fields of the configuration can't be compared in these samples."""
        fov.validate_non_grouped_collection(samples)
        config = self.config
        check_shapes_field(samples, config.pred_field, "proposals")
        check_shapes_field(samples, config.gt_field, "ground truth")
        if is_frame_field(samples, config.pred_field) != is_frame_field(samples, config.gt_field):
            raise ArgumentError(f"'{config.pred_field}' and '{config.gt_field}' must both be of frames, or of samples.")
        if is_clips_view(samples) or (is_patches_view(samples) and root_dataset(samples).media_type == "video"):
            raise ArgumentError("Clips, and patches of frames, can't be measured: evaluate the frames of the videos.")

    # Measuring ------------------------------------------------------------------------------------------------------

    def _measure(self, samples: SampleCollection, progress: Progress) -> None:
        """Reads and matches everything, and stores nothing but missing metadata."""
        if self.cluster is None:
            total = self._measure_part(samples, progress)
        else:
            total = self._measure_on_cluster(samples, self.cluster, progress)
        log_skipped(self._skipped, total)
        self._by_id = {str(image.id): image for image in self._images}

    def _measure_part(self, samples: SampleCollection, progress: Progress) -> int:
        fields = [self.config.pred_field, self.config.gt_field]
        skipped, total = visit_shard(samples, fields, lambda each: self._images.append(self._measured(each)), progress)
        self._skipped += skipped
        return total

    def _measure_on_cluster(self, samples: SampleCollection, cluster: str, progress: Progress) -> int:
        if is_generated(samples):
            raise ArgumentError("Patches and frames can't be spread over a cluster: evaluate what they are of.")
        ensure_metadata(samples, progress)
        parts = on_cluster(samples, _measurer, (self.config,), uuid.uuid4().hex, cluster, self.workers)
        total = 0
        with fou.ProgressBar(total=len(samples), progress=progress) as bar, closing(parts):
            for recall, images, skipped, count, num_samples in parts:
                self._recall += recall
                self._images += images
                self._skipped += skipped
                total += count
                bar.update(num_samples)
        # As if they had been measured one after the other.
        places = {sample_id: place for place, sample_id in enumerate(samples.values("_id"))}
        self._images.sort(key=lambda image: (places[image.sample_id], image.frame_number or 0))
        self._skipped.sort(key=lambda each: places.get(ObjectId(each["id"]), -1))
        return total

    def _results(
        self,
        samples: SampleCollection,
        eval_key: str | None,
        classes: Sequence[str] | None = None,
        missing: str | None = None,
    ) -> ProposalResults:
        objects = [found for image in self._images for found in image.objects]
        ranks = np.array([found.ranks for found in objects], np.int64).reshape(-1, len(IOU_THRESHOLDS))
        if not objects:
            classes = [NO_CLASS]  # the App's panel breaks down without any
        return ProposalResults(
            samples,
            self.config,
            eval_key,
            [found.match for found in objects],
            recall=self._recall.to_dict(),
            ranks=np.where(ranks == NOT_FOUND, -1, ranks),
            skipped=self._skipped,
            classes=classes,
            missing=missing,
            custom_metrics=_panel_metrics(self._recall),
            backend=self,
        )

    def _measured(self, stored: StoredImage) -> MeasuredImage:
        """Matches the image's proposals to its objects, and counts them."""
        size = stored.known_size
        config = self.config
        objects = stored.labels(config.gt_field)
        proposals = stored.labels(config.pred_field)
        scores = [number_of(label, RANKINGS[config.rank_by]) for label in proposals]
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
        matches = self._recall.add(*shapes, crowd, areas, frequencies if any(frequencies) else None)

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


def _measurer(config: ProposalEvaluationConfig) -> Work[_Measured]:
    """What a worker of a cluster does with each part."""

    def measure(samples: SampleCollection, shard: Shard) -> _Measured:
        part, method = shard.of(samples), config.build()
        total = method._measure_part(part, progress=False)
        return method._recall, method._images, method._skipped, total, len(part)

    return measure


def _panel_metrics(recall: AverageRecall) -> dict[str, dict[str, object]]:
    """As the App's panel shows them, where they are numbers."""
    return {
        name: {"key": name, "value": value, "label": name, "lower_is_better": False}
        for name, value in recall.metrics().items()
        if not math.isnan(value)
    }
