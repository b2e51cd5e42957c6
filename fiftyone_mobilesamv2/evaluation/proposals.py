"""FiftyOne's evaluation method "proposals": AR@K of class-agnostic masks or boxes, as a run of the dataset."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import fiftyone.utils.eval.detection as foud
import numpy as np

from ..errors import ArgumentError
from ..fiftyone_internals import (
    is_clips_view,
    is_frame_field,
    is_frames_view,
    is_generated,
    is_patches_view,
    replace_run_results,
    root_dataset,
)
from ..labels.documents import (
    Progress,
    log_skipped,
)
from ..labels.fields import GROUND_TRUTH_FIELD, check_not_grouped, check_shapes_field
from ..runs.cluster import Cluster
from .average_recall import IOU_THRESHOLDS, KS, NOT_FOUND, AverageRecall
from .measuring import FOUND_AT, NO_CLASS, Match, Measured, measure, measure_on_cluster
from .proposal_results import ProposalResults
from .ranking import check_ranking
from .run_storage import RunStorage

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection
    from fiftyone.core.video import FrameView

logger = logging.getLogger(__name__)


def evaluate_proposals(
    samples: SampleCollection,
    pred_field: str,
    gt_field: str = GROUND_TRUTH_FIELD,
    eval_key: str | None = None,
    *,
    ks: Sequence[int] = KS,
    use_masks: bool = True,
    rank_by: str = "confidence",
    area_field: str | None = None,
    progress: Progress = None,
    cluster: str | None = None,
    workers: int | None = None,
) -> ProposalResults:
    """Evaluates class-agnostic proposals against ground truth: AR@K by COCO's rules.

    An earlier run with the same key keeps its results and attributes until all images have been measured and the new
    results are stored. If storing is interrupted after that, the run has the new results, but its attributes on labels
    and samples are incomplete until it is evaluated again.

    An image with an unusable label (a file that is not a mask, a score that is not a number, a mask that isn't cropped
    to its box) is skipped, logged and listed in `results.skipped`. Masks of proposals whose boxes overlap no object are
    not decoded. Samples, labels and attributes (such as `iscrowd`) that a view hides are ignored.

    Args:
        samples: a dataset or view of images or videos. Missing metadata is computed and stored.
        pred_field: the proposals: a field of detections or polylines, or a frame field ("frames.x").
        gt_field: the objects, likewise. `iscrowd` marks regions to ignore; "r", "c" or "f" in `frequency` assigns
            objects to LVIS's groups.
        eval_key: the key of the run. Each object gets `<eval_key>` ("tp" or "fn" at IoU 0.5), `<eval_key>_iou` (its
            best IoU with any proposal), and `<eval_key>_rank` (from 1) and `<eval_key>_id` of the proposal that finds
            it, which gets the same attributes; each sample gets `<eval_key>_tp`, `_fp` (proposals without a match),
            `_fn` and `_recall_at_<K>`, its AR@K. With None, none of these are stored.
        ks: numbers of proposals per image to evaluate.
        use_masks: whether to compare masks; otherwise boxes.
        rank_by: "confidence", the detector's score; "predicted_iou"; "stability"; or "sam", the mean of the last two,
            as in SAM. Labels of any model have a confidence, and MobileSAMv2 limits its prompts by it, so the K best
            are those of a run with K prompts.
        area_field: the objects' attribute with their area in pixels; default: the area of the mask, or of the box.
        progress: as elsewhere in FiftyOne.
        cluster: evaluates on a Ray cluster: "auto" for the cluster of this machine, an address, or "local" for
            processes on this machine. The results are identical.
        workers: number of workers of the cluster; None: one per GPU or, without GPUs, one per machine.

    Returns:
        The results; `results.metrics()` returns the metrics.

    Raises:
        ValueError: a field is missing or of the wrong type; a mask, a score or an area is missing; a field that the run
            would store exists and does not belong to an earlier run with this key; or all images were skipped.
        StorageError: a sample's document has no room for the results.
    """
    ray_cluster = Cluster.of(cluster, workers)
    method = ProposalEvaluationConfig(
        pred_field, gt_field, ks=ks, use_masks=use_masks, rank_by=rank_by, area_field=area_field
    ).build()
    method.cluster = ray_cluster
    method.register_run(samples, eval_key, progress=progress)
    method.register_samples(samples, eval_key)
    if eval_key is not None:
        method.add_fields_to_sidebar_group(samples, eval_key)
    results: ProposalResults = method.results
    return results


class ProposalEvaluationConfig(foud.DetectionEvaluationConfig):
    """See :func:`evaluate_proposals`. FiftyOne's `evaluate_detections(method="proposals")` creates one, too.

    Attributes:
        view: "frames" or "patches" if the run was on such a view, whose labels are in other fields of its dataset.
        stored_as: the key in the field names; differs from the run's key if a new key's field names were taken, or if
            storing was interrupted.
        leftovers: fields to delete with the run because storing it was interrupted.
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
        leftovers: Sequence[str] = (),
        # FiftyOne passes these to every method:
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
        self.leftovers = list(leftovers)
        check_ranking(rank_by)
        if iou != IOU_THRESHOLDS[FOUND_AT]:
            raise ArgumentError(f'iou={iou}: "tp" and "fn" are decided at 0.5; the results have recall at 0.5 to 0.95.')
        if pred_field == gt_field:
            raise ArgumentError(f"The proposals and the ground truth are the same field, '{gt_field}'.")

    @property
    def method(self) -> str:
        return "proposals"


class ProposalEvaluation(RunStorage):
    """The evaluation method. It reads labels directly from the database, and each mask once.

    FiftyOne calls `register_run`, `register_samples` and then, having loaded all labels, `evaluate` for each sample.
    Here, the first measures, the second stores, and the third returns the matches. For other methods, the first deletes
    an earlier run with the key; here, the second replaces it once everything is stored.
    """

    def __init__(self, config: ProposalEvaluationConfig) -> None:
        super().__init__(config)
        self.cluster: Cluster | None = None
        self.results: ProposalResults | None = None
        self._measured = Measured(AverageRecall(config.ks))

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
        self._measure(samples, progress)
        self.results = self._results(samples, key)

    def register_samples(self, samples: SampleCollection, eval_key: str | None, dynamic: bool = True) -> None:
        if eval_key is not None and self.results is not None:
            self.store(samples, eval_key, self.results)

    @classmethod
    def save_run_results(
        cls,
        samples: SampleCollection,
        key: str | None,
        run_results: ProposalResults | None,
        overwrite: bool = True,
        cache: bool = True,
    ) -> None:
        if key is None or run_results is None or not overwrite:
            super().save_run_results(samples, key, run_results, overwrite=overwrite, cache=cache)
        else:
            replace_run_results(cls, samples, key, run_results, cache)

    def evaluate(self, doc: fo.Sample | FrameView, eval_key: str | None = None) -> list[Match]:
        # FiftyOne counts these matches and stores the counts again.
        image = self._by_id.get(doc.id)
        if image is None:
            return []
        unmatched: Match = (None, NO_CLASS, None, None, None, None)
        return [each.match for each in image.objects] + [unmatched] * image.fp

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
        """Raises ValueError if the fields of the configuration can't be compared in these samples."""
        check_not_grouped(samples)
        config = self.config
        check_shapes_field(samples, config.pred_field, "proposals")
        check_shapes_field(samples, config.gt_field, "ground truth")
        if is_frame_field(samples, config.pred_field) != is_frame_field(samples, config.gt_field):
            raise ArgumentError(
                f"'{config.pred_field}' and '{config.gt_field}' must both be frame fields or both be sample fields."
            )
        if is_clips_view(samples) or (is_patches_view(samples) and root_dataset(samples).media_type == "video"):
            raise ArgumentError("Clips and patches of frames can't be evaluated: evaluate the frames of the videos.")

    # Measuring ------------------------------------------------------------------------------------------------------

    def _measure(self, samples: SampleCollection, progress: Progress) -> None:
        """Reads and matches all images; stores nothing except missing metadata."""
        if self.cluster is None:
            self._measured = measure(samples, self.config, progress)
        else:
            self._measured = measure_on_cluster(samples, self.config, self.cluster, progress)
        log_skipped(self._measured.skipped, self._measured.num_images)
        self._by_id = {str(image.id): image for image in self._measured.images}

    def _results(
        self,
        samples: SampleCollection,
        eval_key: str | None,
        classes: Sequence[str] | None = None,
        missing: str | None = None,
    ) -> ProposalResults:
        objects = [each for image in self._measured.images for each in image.objects]
        ranks = np.array([each.ranks for each in objects], np.int64).reshape(-1, len(IOU_THRESHOLDS))
        if not objects:
            classes = [NO_CLASS]  # the App's panel fails without classes
        return ProposalResults(
            samples,
            self.config,
            eval_key,
            [each.match for each in objects],
            recall=self._measured.recall.to_dict(),
            ranks=np.where(ranks == NOT_FOUND, -1, ranks),
            skipped=self._measured.skipped,
            classes=classes,
            missing=missing,
            custom_metrics=_panel_metrics(self._measured.recall),
            backend=self,
        )


def _panel_metrics(recall: AverageRecall) -> dict[str, dict[str, object]]:
    """The metrics that are not NaN, in the format of the App's panel."""
    return {
        name: {"key": name, "value": value, "label": name, "lower_is_better": False}
        for name, value in recall.metrics().items()
        if not math.isnan(value)
    }
