"""What the SegEvery panel shows of a dataset: evaluations of proposals, and the labels behind each point and bar."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING

import fiftyone as fo
from fiftyone import ViewExpression
from fiftyone import ViewField as F

from ..fiftyone_internals import has_results, is_frame_field, label_root, split_frame_field

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

    from ..evaluation.proposal_results import ProposalResults
    from ..fiftyone_internals import Document
    from ..labels.documents import StoredImage
    from ..modeling.checkpoints.trained import TrainedModel

logger = logging.getLogger(__name__)

# The App may send two events at the same time, but FiftyOne's threads share one open file for a run's results.
_load_lock = threading.Lock()


def evaluations(dataset: fo.Dataset) -> list[str]:
    """The keys of the complete evaluations of proposals, latest first."""
    keys = [key for key in dataset.list_evaluations(method="proposals") if has_results(dataset, key)]
    return sorted(keys, key=lambda key: dataset.get_evaluation_info(key).timestamp, reverse=True)


def results_of(dataset: fo.Dataset, key: str) -> ProposalResults:
    """The results of an evaluation, for plots only, since their samples may be outdated."""
    return _loaded(dataset.name, key, dataset.get_evaluation_info(key).timestamp)


@lru_cache(maxsize=8)  # by name: the App uses a new dataset object for each event
def _loaded(dataset_name: str, key: str, timestamp: datetime) -> ProposalResults:
    with _load_lock:
        results: ProposalResults = fo.load_dataset(dataset_name).load_evaluation_results(key, cache=False)
    return results


def fresh_results(dataset: fo.Dataset, key: str) -> ProposalResults:
    """The results of an evaluation, with its samples as they are now."""
    with _load_lock:
        results: ProposalResults = dataset.load_evaluation_results(key, cache=False)
    return results


def sources(dataset: fo.Dataset, keys: Sequence[str]) -> dict[str, tuple[SampleCollection, str]]:
    """The samples and mask field of each of these evaluations or, without evaluations, of each segmented field."""
    from ..runs.record import segmented_fields

    if not keys:
        return {name: (dataset, name) for name in segmented_fields(dataset)}
    samples = {key: dataset.load_evaluation_view(key) for key in keys}
    return {key: (view, results_of(dataset, key).field_in(view, "pred_field")) for key, view in samples.items()}


def trained_on(dataset: fo.Dataset) -> dict[str, TrainedModel]:
    """The registered models that were trained on this dataset, by name, latest first."""
    from ..modeling.checkpoints.trained import trained_models

    models = [model for model in trained_models().values() if model.dataset == dataset.name]
    return {model.name: model for model in sorted(models, key=lambda model: model.created, reverse=True)}


def object_counts(samples: SampleCollection, field_name: str) -> list[int]:
    """The number of labels of each image or frame that has a value in the field."""
    has_labels, number = _labels(samples, field_name)
    if not is_frame_field(samples, field_name):
        numbers: list[int] = samples.match(has_labels).values(number)
        return numbers
    return [n for video in samples.values(F("frames").filter(has_labels).map(number)) for n in video]


def with_objects(samples: SampleCollection, field_name: str, min_objects: int, max_objects: int) -> fo.DatasetView:
    """The images or frames with `min_objects` to `max_objects` labels."""
    has_labels, number = _labels(samples, field_name)
    match = samples.match_frames if is_frame_field(samples, field_name) else samples.match
    return match(has_labels & (number >= min_objects) & (number <= max_objects))


def _labels(samples: SampleCollection, field_name: str) -> tuple[ViewExpression, ViewExpression]:
    """Expressions for whether an image or frame has a value in the field, and for its number of labels."""
    root, is_list = label_root(samples, field_name)
    name, root = (split_frame_field(samples, each)[0] for each in (field_name, root))
    has_labels = F(name) != None  # noqa: E711
    return has_labels, F(root).length() if is_list else has_labels.to_int()


def missed_of_group(results: ProposalResults, group: str) -> fo.DatasetView:
    """The objects of a group of AverageRecall that no proposal finds at IoU 0.5."""
    from ..errors import LabelError
    from ..evaluation.average_recall import AREA_RANGES, FREQUENCIES
    from ..labels.documents import stored_images

    gt_field, missed = results.gt_field, results.missed()
    if group == "all":
        return missed
    if group in FREQUENCIES:
        return missed.filter_labels(gt_field, F("frequency") == FREQUENCIES[group])
    min_area, max_area = AREA_RANGES[group]
    ids = []
    for image in stored_images(missed, [gt_field]):
        labels = image.labels(gt_field)
        try:
            areas = _areas(labels, image, results.config)
        except LabelError as error:
            logger.warning("%s is skipped: %s", image.name, error)
        else:
            ids += [label["_id"] for label, area in zip(labels, areas) if min_area <= area <= max_area]
    return missed.filter_labels(gt_field, F("_id").is_in(ids))


def _areas(labels: list[Document], image: StoredImage, config: fo.EvaluationMethodConfig) -> list[float]:
    """The areas in pixels that the evaluation used."""
    from pycocotools import mask as mask_utils

    from ..labels.masks import boxes_of, masks_of

    if config.area_field is not None:
        return [label[config.area_field] for label in labels]
    if config.use_masks:
        return [float(mask_utils.area(mask)) for mask in masks_of(labels, image.known_size)]
    return [float(area) for area in boxes_of(labels, image.known_size)[:, 2:].prod(1)]
