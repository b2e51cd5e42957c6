"""Which samples are left for a run, and whether it can continue with the existing masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fiftyone import ViewField as F

from ..errors import ArgumentError
from ..fiftyone_internals import Document, label_root, root_dataset, select_all_slices, split_frame_field, view_stages
from ..labels.fields import RUN_ID, check_label_field, with_lists
from ..modeling.checkpoints.files import weights_sha256
from ..modeling.defaults import CONFIDENCE
from ..zoo.config import PARAMETERS, MobileSAMv2ModelConfig
from . import retry as database
from .marks import declare_mask_field, marks_in
from .record import grouped_runs, merged
from .shards import Shard

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)

HAS_MASK = (F("mask") != None) | (F("mask_path") != None)  # noqa: E711  of a detection


def samples_left(
    samples: SampleCollection, label_field: str, parameters: dict[str, Any], replace: bool, shard: Shard | None
) -> SampleCollection:
    """The unfiltered samples that a run, or one of its shards, has not processed yet."""
    if shard is not None:
        samples = shard.of(samples)
    if view_stages(samples.view())[shard is not None :]:
        samples = unfiltered(samples)  # a dataset hides nothing, so its millions of ids need not be listed
    if not replace:
        return _without_labels(samples, label_field)
    done = _marks_of_interrupted(samples, label_field, parameters)
    if not done or samples.media_type == "video":
        return samples
    return samples.match({f"{label_field}.{RUN_ID}": {"$nin": done}})


def _marks_of_interrupted(samples: SampleCollection, label_field: str, parameters: dict[str, Any]) -> list[str]:
    """The marks of the latest runs that were interrupted while they replaced labels with these parameters."""
    marks: list[str] = []
    for shards in reversed(grouped_runs(samples, label_field)):
        run = merged(shards)
        if not (run.replace and run.cancelled and not _changed(run.parameters, parameters)):
            break
        marks += [shard.mark for shard in shards]
    return marks


def prepare(samples: SampleCollection, label_field: str, config: MobileSAMv2ModelConfig, replace: bool) -> None:
    """Prepares the field for a run of :func:`segment_everything`.

    FiftyOne loses fields that several processes add at the same time, so call this before workers start on shards.
    """
    check_label_field(samples, label_field)
    if not replace:
        check_same_parameters(samples, label_field, parameters_of(config))
    declare_mask_field(root_dataset(samples), label_field)


def unfiltered(samples: SampleCollection) -> SampleCollection:
    """The same samples without filters: labels that a view hides must not be treated as missing."""
    dataset = root_dataset(samples)
    if samples is dataset or not view_stages(samples):
        return dataset
    if dataset.media_type == "group":
        dataset = select_all_slices(dataset)
    ids = samples.values("id")
    if len(ids) > database.MAX_IDS:
        raise ArgumentError(
            f"The view has {len(ids):,} samples, but FiftyOne can select at most {database.MAX_IDS:,}. Use the whole "
            f"dataset, or process the view in slices such as view[:{database.MAX_IDS}]."
        )
    return dataset.select(ids)


def unsegmented(samples: SampleCollection, label_field: str) -> SampleCollection:
    """The samples without a value in this field. An empty list of labels, for an image without objects, is a value."""
    return _without_labels(unfiltered(samples), label_field)


def _without_labels(samples: SampleCollection, label_field: str) -> SampleCollection:
    if not samples.has_field(label_field):
        return samples
    name, of_frames = split_frame_field(samples, label_field)
    if of_frames:
        return samples.match((F("frames").length() == 0) | (F("frames").filter(F(name) == None).length() > 0))  # noqa: E711
    return samples.match(F(name) == None)  # noqa: E711


def count_labels(samples: SampleCollection, label_field: str) -> tuple[int, int]:
    """The number of samples with labels in this field, and the number of labels, including those that a view hides."""
    samples = unfiltered(samples)
    if not samples.has_field(label_field):
        return 0, 0
    return len(samples) - len(unsegmented(samples, label_field)), samples.count(f"{label_field}.detections")


def count_labels_with_masks(samples: SampleCollection, field_name: str) -> tuple[int, int]:
    """The number of detections with masks in a field, and of all its detections, among those that the view shows."""
    root, _ = label_root(samples, field_name)
    listed = with_lists(samples, field_name)
    return listed.filter_labels(field_name, HAS_MASK).count(root), listed.count(root)


# Prompts of the dataset ---------------------------------------------------------------------------------------------
def ids_of_labels_with_masks(samples: SampleCollection, label_field: str) -> dict[str, list[str]]:
    """Sample id -> the ids of its labels that have masks, including labels that the view hides."""
    labels = with_lists(unfiltered(samples), label_field).filter_labels(label_field, HAS_MASK)
    return dict(zip(*labels.values(["id", f"{label_field}.detections.id"])))


def labels_left(
    labels: Sequence[Document], in_place: bool, replace: bool, answered: Sequence[str]
) -> Sequence[Document]:
    """The labels of a sample that have no mask yet."""
    if replace:
        return labels
    return [each for each in labels if not (_has_mask(each) if in_place else str(each["_id"]) in answered)]


def _has_mask(label: Document) -> bool:
    return label.get("mask") is not None or label.get("mask_path") is not None


# Parameters -------------------------------------------------------------------------------------------------------
def parameters_of(config: MobileSAMv2ModelConfig) -> dict[str, Any]:
    """The part of a model's configuration that affects its results."""
    parameters = {name: getattr(config, name) for name, parameter in PARAMETERS.items() if parameter.changes_results}
    parameters["weights"] = weights_sha256(config.name, config.files)  # independent of the files' paths
    if config.confidence_thresh is None and config.prompting == "object_aware":
        parameters["confidence_thresh"] = CONFIDENCE
    return parameters


def check_same_parameters(samples: SampleCollection, label_field: str, parameters: dict[str, Any]) -> None:
    """Raises ValueError if a run with these parameters would continue with masks made with different parameters."""
    dataset = root_dataset(samples)
    groups = grouped_runs(dataset, label_field)
    marks = marks_in(dataset, label_field)
    if unknown := marks - {run.mark for runs in groups for run in runs}:
        logger.warning(
            "'%s' has masks of unknown runs (%s): whether they were made with other parameters can't be told",
            label_field,
            ", ".join(sorted(unknown)[:3]),
        )
    changed: list[str] = []
    for runs in reversed(groups):
        run = merged(runs)
        if all(each.marks_labels for each in runs) and run.images > run.num_failures:
            if not marks & {each.mark for each in runs}:
                continue  # its labels were replaced or deleted
        changed = changed or _changed(run.parameters, parameters)
        if run.replace and not run.cancelled:
            break
    if not changed or len(unsegmented(dataset, label_field)) == len(dataset):
        return
    raise ArgumentError(
        f"'{label_field}' has masks that were made with other parameters ({'; '.join(changed)}). Use the same "
        f"parameters to continue, replace the masks, or choose another field."
    )


def _changed(earlier: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    """Describes the parameters that differ from an earlier run's; those added since then had their defaults."""
    earlier = {name: parameter.default for name, parameter in PARAMETERS.items()} | earlier
    return [
        f"{name} {earlier.get(name)} then, {value} now"
        for name, value in parameters.items()
        if not _are_same(earlier.get(name), value)
    ]


def _are_same(then: object, now: object) -> bool:
    if isinstance(then, dict) and isinstance(now, dict):  # missing files have no hash
        return all(then[name] == now[name] for name in then.keys() & now.keys())
    return then == now
