"""FiftyOne's evaluation method "proposals": AR@K of class-agnostic masks or boxes, as a run of the dataset."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import fiftyone.core.validation as fov
import fiftyone.utils.eval.detection as foud
import numpy as np

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
    log_skipped,
)
from ..labels.fields import check_shapes_field
from ..runs.cluster import Cluster
from .average_recall import IOU_THRESHOLDS, KS, NOT_FOUND, AverageRecall
from .measuring import FOUND_AT, NO_CLASS, Match, Measured, measure, measure_on_cluster
from .proposal_results import ProposalResults
from .ranking import check_ranking
from .run_fields import RunFields

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection
    from fiftyone.core.video import FrameView

logger = logging.getLogger(__name__)


def evaluate_proposals(
    samples: SampleCollection,
    pred_field: str,
    gt_field: str = "ground_truth",
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
    spread = Cluster.of(cluster, workers)
    method = ProposalEvaluationConfig(
        pred_field, gt_field, ks=ks, use_masks=use_masks, rank_by=rank_by, area_field=area_field
    ).build()
    method.cluster = spread
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
        check_ranking(rank_by)
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
        objects = [found for image in self._measured.images for found in image.objects]
        ranks = np.array([found.ranks for found in objects], np.int64).reshape(-1, len(IOU_THRESHOLDS))
        if not objects:
            classes = [NO_CLASS]  # the App's panel breaks down without any
        return ProposalResults(
            samples,
            self.config,
            eval_key,
            [found.match for found in objects],
            recall=self._measured.recall.to_dict(),
            ranks=np.where(ranks == NOT_FOUND, -1, ranks),
            skipped=self._measured.skipped,
            classes=classes,
            missing=missing,
            custom_metrics=_panel_metrics(self._measured.recall),
            backend=self,
        )


def _panel_metrics(recall: AverageRecall) -> dict[str, dict[str, object]]:
    """As the App's panel shows them, where they are numbers."""
    return {
        name: {"key": name, "value": value, "label": name, "lower_is_better": False}
        for name, value in recall.metrics().items()
        if not math.isnan(value)
    }
