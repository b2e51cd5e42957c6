"""Entry points that run a model over a dataset and store its masks."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

import fiftyone.core.utils as fou

from ..errors import ArgumentError, Cancelled, LabelError, message_of, plain
from ..fiftyone_internals import label_root, root_dataset
from ..labels.documents import Progress, StoredImage
from ..labels.fields import MASK_ATTRIBUTES, check_label_field, check_prompt_field
from ..labels.prompts import prompts_of
from ..labels.schema import declare_labels
from ..zoo.config import MobileSAMv2ModelConfig, mask_folder
from ..zoo.model import MobileSAMv2Model
from ..zoo.reading import ImageGetItem, ImageItem
from .claims import mark_abandoned, on_record
from .cluster import Cluster, on_cluster
from .marks import declare_mask_field
from .pipeline import DELETED, check_mask_folder, segment_and_store, settle_leftovers
from .plan import ids_of_labels_with_masks, labels_left, parameters_of, prepare, samples_left
from .record import SegmentationRun, grouped_runs, recorded_runs
from .retry import UNAVAILABLE, retry_while_unavailable
from .shards import Shard
from .updates import masks_in_place, merged_labels, new_labels
from .videos import check_ffmpeg, segment_videos

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)


def segment_everything(
    samples: SampleCollection,
    model: MobileSAMv2Model | MobileSAMv2ModelConfig,
    label_field: str = "segmentations",
    *,
    replace: bool = False,
    batch_size: int = 8,
    progress: Progress = None,
    shard: Shard | None = None,
    cluster: str | None = None,
    workers: int | None = None,
) -> SegmentationRun:
    """Stores the masks of all objects in every image, like `apply_model`, and records the run in the dataset.

    After an interruption (an error, a kill, a full disk), repeating the call with the same arguments processes the
    remaining images. If the database is unavailable, waits for it for up to five minutes.

    Args:
        samples: a dataset or view of images, or of videos; for videos, `label_field` is a frame field ("frames.x").
        model: a model, or its configuration, which is then loaded here or on each worker.
        label_field: a new field, or an existing field of detections.
        replace: whether to replace existing labels. By default, samples with labels are skipped, so that an interrupted
            run continues. With it, a run starts over, or continues an interrupted one with the same parameters that
            also replaced labels.
        progress: as elsewhere in FiftyOne. A callback may raise :class:`~fiftyone_mobilesamv2.errors.Cancelled`.
        shard: process only this shard of the samples; other processes handle the others.
        cluster: distributes the work over a Ray cluster: "auto" for the cluster of this machine, an address, or "local"
            for processes on this machine; if Ray is already initialized in this process, that cluster is used. Workers
            read images from the same paths and write masks on disk to the same folder, so all machines must be able to
            reach both, and the database.
        workers: number of workers of the cluster; None: one per GPU or, without GPUs, one per machine.

    Returns:
        The run, whether it completed or was cancelled; :func:`.record.recorded_runs` lists it, too.

    Raises:
        ValueError: the field can't store masks; or the run would continue with masks made with other parameters.
        FieldBusyError: another run is storing masks in the field.
        OSError: masks are written to disk, and the disk is full.
        ClusterError: the cluster can't do the work.
        MobileSAMv2Error: the samples are videos, and ffmpeg or ffprobe isn't installed.
    """
    config = model if isinstance(model, MobileSAMv2ModelConfig) else _config(model)
    if not (shard is None or isinstance(shard, Shard)):
        raise ArgumentError(f"shard must be a Shard, not {shard!r}.")
    if shard is not None and cluster is not None:
        raise ArgumentError("A shard can't be distributed over a cluster: pass either shard or cluster.")
    spread = Cluster.of(cluster, workers)
    _check_options(replace, batch_size)
    prepare(samples, label_field, config, replace)
    if spread is not None:
        return _segment_on_cluster(
            samples, config, label_field, spread, replace=replace, batch_size=batch_size, progress=progress
        )
    if samples.media_type == "video":
        check_ffmpeg()
    if isinstance(model, MobileSAMv2ModelConfig):
        model = MobileSAMv2Model(config)
    parameters = parameters_of(config)
    with _recorded(samples, model, label_field, parameters, shard, replace) as run:
        todo = samples_left(samples, label_field, parameters, replace, shard)
        if samples.media_type != "video":
            read_image = ImageGetItem()

            def read(image: StoredImage) -> ImageItem:
                return read_image({"id": str(image.sample_id), "filepath": image.name})

            earlier = _earlier_marks(samples, run)
            update = partial(new_labels, label_field=label_field, replace=replace, mark=run.mark, earlier=earlier)
            segment_and_store(todo, model, [], read, update, run, batch_size, progress)
        else:
            segment_videos(todo, model, label_field, run, batch_size, progress)
            if not root_dataset(samples).has_field(label_field):
                raise ArgumentError(DELETED.format(label_field))
    return run


def _segment_on_cluster(
    samples: SampleCollection,
    config: MobileSAMv2ModelConfig,
    label_field: str,
    cluster: Cluster,
    *,
    replace: bool,
    batch_size: int,
    progress: Progress,
) -> SegmentationRun:
    run = SegmentationRun(label_field, parameters_of(config), replace=replace, mask_dir=mask_folder(config))
    dataset, group = root_dataset(samples), run.run_id
    total = len(samples_left(samples, label_field, run.parameters, replace, None))
    if not total:
        with on_record(samples, run):
            settle_leftovers(dataset, run)
        return run
    parameters = {**vars(config), "mask_dir": run.mask_dir}  # resolved here, not in each worker's home folder
    with fou.ProgressBar(total=total, progress=progress) as bar:

        def current() -> SegmentationRun:
            return next((recorded for recorded in recorded_runs(samples, label_field) if recorded.run_id == group), run)

        def update_bar() -> None:
            with suppress(*UNAVAILABLE):  # the workers wait for the database, too
                bar.update(max(0, min(current().images, total) - bar.iteration))

        results = on_cluster(
            samples,
            _segmenter,
            (parameters, label_field, replace, batch_size),
            cluster,
            group=group,
            on_worker_death=lambda shard: mark_abandoned(dataset, group, shard.index),
            on_wait=update_bar,
        )
        try:
            with suppress(Cancelled), closing(results):
                for _ in results:
                    pass
                bar.update(total - bar.iteration)  # the record lacks the last images of workers that died
        finally:
            mark_abandoned(dataset, group)
            # An empty run settles the files that killed workers left behind and copies the record to FiftyOne.
            with on_record(samples, dataclasses.replace(run, run_id=uuid.uuid4().hex)):
                settle_leftovers(dataset, run)
            dataset.reload()
    return retry_while_unavailable(current)


def _segmenter(
    parameters: dict[str, Any], label_field: str, replace: bool, batch_size: int
) -> Callable[[SampleCollection, Shard], None]:
    """Returns the function with which a cluster's worker processes each shard."""
    model = MobileSAMv2Model(MobileSAMv2ModelConfig(parameters))

    def segment(samples: SampleCollection, shard: Shard) -> None:
        segment_everything(
            samples, model, label_field, replace=replace, batch_size=batch_size, progress=False, shard=shard
        )

    return segment


def segment_anything(
    samples: SampleCollection,
    model: MobileSAMv2Model,
    prompt_field: str,
    label_field: str | None = None,
    *,
    replace: bool = False,
    batch_size: int = 8,
    progress: Progress = None,
) -> SegmentationRun:
    """Turns boxes or keypoints into masks.

    Args:
        samples: a dataset or view of images; labels that a view filters out are not used as prompts.
        prompt_field: a field of detections or keypoints.
        label_field: the field for the masks, which keep their prompts' labels, ids and attributes. Existing labels of
            other prompts are kept. None stores the masks in the detections of `prompt_field`, which keep their boxes:
            masks are cropped to them.
        replace: whether to replace existing masks.

    Everything else is as for :func:`segment_everything`.
    """
    _config(model)
    _check_options(replace, batch_size)
    check_prompt_field(samples, prompt_field, in_place=label_field is None)
    dataset = root_dataset(samples)
    if label_field is not None:
        check_label_field(samples, label_field)
        declare_mask_field(dataset, label_field)
    parameters = parameters_of(model.config) | {"prompting": prompt_field}
    with _recorded(samples, model, label_field or prompt_field, parameters, marks_labels=False) as run:
        earlier = _earlier_marks(samples, run)
        if label_field is None:
            declare_labels(dataset, prompt_field, MASK_ATTRIBUTES)
            root, is_list = label_root(dataset, prompt_field)
            update = partial(masks_in_place, root=root, is_list=is_list, mark=run.mark, earlier=earlier)
        else:
            update = partial(merged_labels, label_field=label_field, mark=run.mark, earlier=earlier)
        answered = {} if label_field is None or replace else ids_of_labels_with_masks(samples, label_field)
        read_prompted = ImageGetItem({"prompt_field": prompt_field})

        def read(image: StoredImage) -> ImageItem | None:
            sample_id = str(image.sample_id)
            item = ImageItem(sample_id, image.name, prompted=True, skip_failures=True)
            try:
                labels = image.labels(prompt_field)
                prompts = prompts_of(labels_left(labels, label_field is None, replace, answered.get(sample_id) or ()))
            except LabelError as error:
                return dataclasses.replace(item, error=f"its prompts can't be read: {message_of(error)}")
            if prompts is None:
                return None
            return read_prompted({"id": sample_id, "filepath": item.filepath, "prompt_field": prompts})

        with fou.SetAttributes(model.writer, keep_boxes=label_field is None):
            segment_and_store(samples, model, [prompt_field], read, update, run, batch_size, progress)
    return run


def _earlier_marks(samples: SampleCollection, run: SegmentationRun) -> list[str]:
    """The marks of the other runs into the field of a run that has just started."""
    runs = [each for runs in grouped_runs(samples, run.label_field) for each in runs]
    return [each.mark for each in runs if each.run_id != run.run_id]


def _config(model: MobileSAMv2Model) -> MobileSAMv2ModelConfig:
    # Duck typing: a zoo model may come from another copy of this package.
    if not hasattr(model, "segment_all"):
        raise ArgumentError(
            f"model must be loaded with `load_zoo_model` by one of this package's names, not {model!r}."
        )
    return model.config


def _check_options(replace: bool, batch_size: int) -> None:
    if not isinstance(replace, bool):  # a string such as "no" would be true
        raise ArgumentError(f"replace must be True or False, not {plain(replace)!r}.")
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ArgumentError(f"batch_size must be a whole number of at least 1, not {plain(batch_size)!r}.")


@contextmanager
def _recorded(
    samples: SampleCollection,
    model: MobileSAMv2Model,
    label_field: str,
    parameters: dict[str, Any],
    shard: Shard | None = None,
    replace: bool = False,
    marks_labels: bool = True,
) -> Iterator[SegmentationRun]:
    """A run that is recorded in the dataset however it ends. Treats `Cancelled` as a normal end."""
    folder = mask_folder(model.config)
    run = SegmentationRun(
        label_field, parameters, shard=shard, replace=replace, mask_dir=folder, marks_labels=marks_labels
    )
    dataset = root_dataset(samples)
    with on_record(samples, run), fou.SetAttributes(model.writer, run_id=run.mark):
        check_mask_folder(model.config)
        settle_leftovers(dataset, run)
        try:
            yield run
        except Cancelled:
            settle_leftovers(dataset, run)
            raise
        settle_leftovers(dataset, run)
