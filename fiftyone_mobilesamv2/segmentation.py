"""Running a model over a dataset: what is left to do, and which fields masks go to."""

from __future__ import annotations

import dataclasses
import logging
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.utils as fou
import fiftyone.core.validation as fov
from bson import ObjectId
from fiftyone import ViewField as F
from mongoengine.errors import ValidationError

from . import database
from .cluster import check_workers, on_cluster
from .database import AWAY, patiently
from .modeling.checkpoints.files import weights_sha256
from .modeling.object_discovery import CONFIDENCE
from .pipeline import (
    DELETED,
    MASK_ATTRIBUTES,
    check_mask_folder,
    counted,
    masks_in_place,
    merged_labels,
    new_labels,
    segment_and_store,
    settle_leftovers,
)
from .progress import Cancelled
from .segmentation_runs import SegmentationRun, declare_dead, on_record, recorded_runs
from .shards import Shard
from .stored_labels import LabelError, StoredImage, check_field_name
from .zoo import CHECKPOINTS, ImageGetItem, ImageItem, MobileSAMv2Model, MobileSAMv2ModelConfig, mask_folder

if TYPE_CHECKING:
    import fiftyone as fo

    Samples = fo.core.collections.SampleCollection

logger = logging.getLogger(__name__)

_KINDS = {"Detection": fol.Detection, "Keypoint": fol.Keypoint}
PROMPT_TYPES = (fol.Detections, fol.Keypoints, fol.Detection, fol.Keypoint)

HAS_MASK = (F("mask") != None) | (F("mask_path") != None)  # noqa: E711  of a detection

# Of a model's configuration, what says where it runs and not what it finds.
_RUNTIME = {"model_name", "model_path", "device", "masks_on_disk", "mask_dir"}
_TRIES = 5


def segment_everything(
    samples: Samples,
    model: MobileSAMv2Model | MobileSAMv2ModelConfig,
    label_field: str = "segmentations",
    replace: bool = False,
    batch_size: int = 8,
    progress: bool | Callable | None = None,
    shard: Shard | None = None,
    cluster: str | None = None,
    workers: int | None = None,
) -> SegmentationRun:
    """Stores the masks of all objects of every image, as `apply_model` does, and keeps a record of it in the dataset.

    Whatever ends it (an error, a kill, a full disk), called again with the same arguments it does what is missing.
    While the database is away it waits for it, up to five minutes.

    Args:
        samples: a dataset or view of images, or of videos: then `label_field` is one of frames, as "frames.x".
        model: a model, or its configuration, for it to be loaded here or on each worker.
        label_field: a new field, or one of detections.
        replace: replaces the labels of samples that have some. Else these are left as they are, so that a run that was
            stopped goes on; with it, it starts anew.
        progress: as everywhere in FiftyOne. A callback may raise :class:`~fiftyone_mobilesamv2.progress.Cancelled`.
        shard: only this part of the samples: other processes do the others.
        cluster: spreads the work over a Ray cluster: "auto" for the one that this machine belongs to, its address, or
            "local" for processes on this machine; where Ray runs in this process already, any of them is that. Workers
            read the images by the same paths, and masks on disk go to the same folder, so both have to be where all
            machines reach them, and so has the database.
        workers: how many of the cluster; None: one for each GPU, or, without any, for each machine.

    Returns:
        the run, which `segmentation_runs.recorded_runs` lists from then on, whether it came to its end or not.

    Raises:
        ValueError: the field can't take masks; or it would go on with masks that were made with other parameters.
        FieldBusyError: another run is storing masks in the field.
        OSError: masks go to a disk, and that is full.
        ClusterError: the cluster can't do it.
    """
    config = model if isinstance(model, MobileSAMv2ModelConfig) else _config(model)
    if not (shard is None or isinstance(shard, Shard)):
        raise ValueError(f"shard must be a Shard, not {shard!r}.")
    if shard is not None and cluster is not None:
        raise ValueError("A part can't be spread over a cluster: give either shard or cluster.")
    check_workers(cluster, workers)
    _check_how(replace, batch_size)
    prepare(samples, label_field, config, replace)
    if cluster is not None:
        return _segment_on_cluster(samples, config, label_field, replace, batch_size, progress, cluster, workers)
    if model is config:
        model = MobileSAMv2Model(config)
    parameters = parameters_of(config)
    todo = _todo(samples, label_field, parameters, replace, shard)
    with _recorded(samples, model, label_field, parameters, shard, replace) as run:
        if samples.media_type != "video":
            read_image = ImageGetItem()

            def read(image: StoredImage) -> ImageItem:
                return read_image({"id": str(image.sample_id), "filepath": image.name})

            update = partial(new_labels, label_field=label_field, replace=replace)
            segment_and_store(todo, model, [], read, update, run, batch_size, progress)
        elif len(todo):
            try:  # FiftyOne reads videos frame by frame, one after the other
                with counted(run, model):
                    todo.apply_model(model, label_field=label_field, batch_size=batch_size, progress=progress)
            finally:
                run.objects = model.num_labels
            if not samples._root_dataset.has_field(label_field):
                raise ValueError(DELETED.format(label_field))
    return run


def _segment_on_cluster(
    samples: Samples,
    config: MobileSAMv2ModelConfig,
    label_field: str,
    replace: bool,
    batch_size: int,
    progress: bool | Callable | None,
    cluster: str,
    workers: int | None,
) -> SegmentationRun:
    run = SegmentationRun(label_field, parameters_of(config), replace=replace, mask_dir=mask_folder(config))
    dataset, group = samples._root_dataset, run.run_id
    total = len(_todo(samples, label_field, run.parameters, replace, None))
    if not total:
        with on_record(samples, run):
            settle_leftovers(dataset, run)
        return run
    parameters = {name: value for name, value in vars(config).items() if name not in ("model_name", "model_path")}
    parameters["mask_dir"] = run.mask_dir  # as it is here, not in each worker's home
    with fou.ProgressBar(total=total, progress=progress) as bar:

        def so_far() -> SegmentationRun:
            return next((found for found in recorded_runs(samples, label_field) if found.run_id == group), run)

        def show() -> None:
            with suppress(*AWAY):  # workers wait for the database; so does this
                bar.update(max(0, min(so_far().images, total) - bar.iteration))

        parts = on_cluster(
            samples,
            _segmenter,
            (parameters, label_field, replace, batch_size),
            group,
            cluster,
            workers,
            died=lambda part: declare_dead(group, part.index),
            waiting=show,
        )
        try:
            with suppress(Cancelled), closing(parts):
                for _ in parts:
                    pass
                bar.update(total - bar.iteration)  # of a worker that died the last images are not on record
        finally:
            declare_dead(group)
            # Once more, for nothing: it settles what killed workers have left, and gives FiftyOne the record.
            with on_record(samples, dataclasses.replace(run, run_id=uuid.uuid4().hex)):
                settle_leftovers(dataset, run)
            dataset.reload()
    return patiently(so_far)


def _segmenter(parameters: dict, label_field: str, replace: bool, batch_size: int) -> Callable[[Samples, Shard], None]:
    """What a worker of a cluster does with each part."""
    model = MobileSAMv2Model(MobileSAMv2ModelConfig(parameters))

    def segment(samples: Samples, shard: Shard) -> None:
        segment_everything(samples, model, label_field, replace, batch_size, progress=False, shard=shard)

    return segment


def _todo(samples: Samples, label_field: str, parameters: dict, replace: bool, shard: Shard | None) -> Samples:
    """The samples of a run, or of a part of it, with all that they have: those that it has not done yet."""
    if shard is not None:
        samples = shard.of(samples)
    if samples.view()._stages[shard is not None :]:
        samples = unfiltered(samples)  # of a dataset all is seen, and nobody lists the ids of millions
    if not replace:
        return _without_labels(samples, label_field)
    since = _replacing_since(samples, label_field, parameters)
    if since is None or samples.media_type == "video":
        return samples
    # Labels that an earlier attempt has put there are younger than it is.
    older = {"$lt": ObjectId.from_datetime(since)}
    left = [{label_field: None}, {f"{label_field}.detections": []}, {f"{label_field}.detections.0._id": older}]
    return samples.match({"$or": left})


def _replacing_since(samples: Samples, label_field: str, parameters: dict) -> datetime | None:
    """When the run began that replaced labels with these parameters and was stopped; None if the last one wasn't."""
    since = None
    for run in reversed(recorded_runs(samples, label_field)):
        if not (run.replace and run.cancelled and not _changed(run.parameters, parameters)):
            break
        since = datetime.fromisoformat(run.started)
    return since


def prepare(samples: Samples, label_field: str, config: MobileSAMv2ModelConfig, replace: bool) -> None:
    """Makes the field ready for a run of :func:`segment_everything`.

    FiftyOne loses fields that several processes add at once: before parts of one run are given to workers, this is to
    be called.
    """
    check_label_field(samples, label_field)
    if not replace:
        check_same_parameters(samples, label_field, parameters_of(config))
    _declare(samples._root_dataset, label_field)
    if samples.media_type != "video":
        _declare_attributes(samples._root_dataset, label_field)


def segment_anything(
    samples: Samples,
    model: MobileSAMv2Model,
    prompt_field: str,
    label_field: str | None = None,
    replace: bool = False,
    batch_size: int = 8,
    progress: bool | Callable | None = None,
) -> SegmentationRun:
    """Turns boxes or keypoints into masks.

    Args:
        samples: a dataset or view of images; what a view filters out is no prompt.
        prompt_field: detections or keypoints.
        label_field: the field for the masks, which have their prompts' labels, ids and attributes. What is there of
            other prompts stays. None writes masks into the detections of `prompt_field` themselves, which keep their
            boxes: what lies outside is cut off.
        replace: also masks that are there already.

    The rest is as with :func:`segment_everything`.
    """
    _config(model)
    _check_how(replace, batch_size)
    check_prompt_field(samples, prompt_field, in_place=label_field is None)
    dataset = samples._root_dataset
    if label_field is not None:
        check_label_field(samples, label_field)
        _declare(dataset, label_field)
    parameters = parameters_of(model.config) | {"prompting": prompt_field}
    with _recorded(samples, model, label_field or prompt_field, parameters) as run:
        if label_field is None:
            root, is_list = dataset._get_label_field_root(prompt_field)
            update = partial(masks_in_place, root=root, is_list=is_list)
        else:
            update = partial(merged_labels, label_field=label_field)
        _declare_attributes(dataset, run.label_field)
        answered = {} if label_field is None or replace else _labels_with_masks(samples, label_field)
        read_prompted = ImageGetItem({"prompt_field": prompt_field})

        def read(image: StoredImage) -> ImageItem | None:
            item = ImageItem(str(image.sample_id), image.name, prompted=True, skip_failures=True)
            try:
                prompts = [_KINDS[label["_cls"]].from_dict(label) for label in image.labels(prompt_field)]
            except (LabelError, KeyError, ValidationError, TypeError, ValueError, zlib.error) as error:
                return dataclasses.replace(item, error=f"its prompts can't be read: {error}")
            left = _left(prompts, label_field is None, replace, answered.get(item.sample_id) or ())
            if left is None:
                return None
            return read_prompted({"id": item.sample_id, "filepath": item.filepath, "prompt_field": left})

        with fou.SetAttributes(model, keep_boxes=label_field is None):
            segment_and_store(samples, model, [prompt_field], read, update, run, batch_size, progress)
    return run


def unfiltered(samples: Samples) -> Samples:
    """The same samples with all that they have: what a view hides is not to be taken for absent."""
    dataset = samples._root_dataset
    if samples is dataset or not samples._stages:
        return dataset
    if dataset.media_type == "group":
        dataset = dataset.select_group_slices(_allow_mixed=True)
    ids = samples.values("id")
    if len(ids) > database.MOST_IDS:
        raise ValueError(
            f"The view has {len(ids):,} samples, and FiftyOne can select at most {database.MOST_IDS:,}. Take all of "
            f"the dataset, or one part of the view after the other, such as view[:{database.MOST_IDS}]."
        )
    return dataset.select(ids)


def unsegmented(samples: Samples, label_field: str) -> Samples:
    """The samples without labels in this field. An image in which nothing was found has labels: none."""
    return _without_labels(unfiltered(samples), label_field)


def _without_labels(samples: Samples, label_field: str) -> Samples:
    if not samples.has_field(label_field):
        return samples
    name, of_frames = samples._handle_frame_field(label_field)
    if of_frames:
        return samples.match((F("frames").length() == 0) | (F("frames").filter(F(name) == None).length() > 0))  # noqa: E711
    return samples.match(F(name) == None)  # noqa: E711


def labels_there(samples: Samples, label_field: str) -> tuple[int, int]:
    """How many samples have labels in this field, and how many labels; also what a view hides."""
    samples = unfiltered(samples)
    if not samples.has_field(label_field):
        return 0, 0
    return len(samples) - len(unsegmented(samples, label_field)), samples.count(f"{label_field}.detections")


def labels_with_masks(samples: Samples, field_name: str) -> tuple[int, int]:
    """How many detections of a field, as far as the view shows them, have masks, and how many there are."""
    root, _ = samples._get_label_field_root(field_name)
    return samples.filter_labels(field_name, HAS_MASK).count(root), samples.count(root)


def _config(model: MobileSAMv2Model) -> MobileSAMv2ModelConfig:
    # By what it can do: a model of the zoo may be of another copy of this package.
    if not hasattr(model, "segment_all"):
        raise ValueError(f"model must be one that `load_zoo_model` gives for a name of this package, not {model!r}.")
    return model.config


def _check_how(replace: bool, batch_size: int) -> None:
    if not isinstance(replace, bool):  # "no" would replace, too
        raise ValueError(f"replace must be True or False, not {replace!r}.")
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, not {batch_size!r}.")


def _check_is_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be the name of a field, not {value!r}.")


def check_label_field(samples: Samples, label_field: str) -> None:
    """Raises ValueError where masks can't be stored in this field of these samples."""
    _check_is_text("label_field", label_field)
    fov.validate_non_grouped_collection(samples)
    if samples._is_generated:
        raise ValueError("Patches, clips and views of frames can't be segmented: go back to the samples they are of.")
    is_video = samples.media_type == "video"
    if is_video != label_field.startswith(samples._FRAMES_PREFIX):
        wanted = f"{samples._FRAMES_PREFIX}{label_field}" if is_video else label_field.removeprefix("frames.")
        raise ValueError(f"Masks of {samples.media_type}s go into a field such as '{wanted}', not '{label_field}'.")
    name = label_field.removeprefix(samples._FRAMES_PREFIX)
    found = samples._root_dataset.get_field(label_field)
    if found is None:
        check_field_name(name)
        return
    if "." in name:
        raise ValueError(f"'{label_field}' is inside another field: choose a field of its own for the masks.")
    if not _holds(found, (fol.Detections,)):
        kind = found.document_type.__name__ if isinstance(found, fof.EmbeddedDocumentField) else type(found).__name__
        raise ValueError(f"'{label_field}' holds {kind}, not Detections: choose another field for the masks.")
    if found.read_only:
        raise ValueError(f"'{label_field}' is read-only: choose another field for the masks.")


def check_prompt_field(samples: Samples, prompt_field: str, in_place: bool) -> None:
    """Raises ValueError where this field can't prompt or, `in_place`, can't take the masks itself."""
    _check_is_text("prompt_field", prompt_field)
    fov.validate_non_grouped_collection(samples)
    if samples.media_type == "video" or samples._is_generated:
        raise ValueError(
            "Prompts have to be on a dataset's own images. Go back from patches to their samples; of videos, make a "
            "dataset of frames: dataset.to_frames(sample_frames=True).clone()."
        )
    found = samples.get_field(prompt_field)
    if found is None:
        raise ValueError(f"There is no field '{prompt_field}' to take prompts from, or the view hides it.")
    if not _holds(found, PROMPT_TYPES):
        raise ValueError(f"'{prompt_field}' holds neither detections nor keypoints, so it can't prompt.")
    if not in_place:
        return
    if not _holds(found, (fol.Detections, fol.Detection)):
        raise ValueError(f"'{prompt_field}' holds keypoints, which can't carry masks: name a field for the masks.")
    if found.read_only:
        raise ValueError(f"'{prompt_field}' is read-only: name a field for the masks.")


def _holds(found: fof.Field, kinds: tuple[type, ...]) -> bool:
    return isinstance(found, fof.EmbeddedDocumentField) and issubclass(found.document_type, kinds)


def _declare(dataset: fo.Dataset, label_field: str) -> None:
    """Adds the field, if there is none.

    FiftyOne shares one object for a dataset among the threads of the App, each of which reloads it: a field that one
    adds just then is lost.
    """
    for _ in range(_TRIES):
        if dataset.has_field(label_field):
            return
        name, of_frames = dataset._handle_frame_field(label_field)
        add = dataset.add_frame_field if of_frames else dataset.add_sample_field
        add(name, fof.EmbeddedDocumentField, embedded_doc_type=fol.Detections)
        dataset.reload()


def _declare_attributes(dataset: fo.Dataset, label_field: str) -> None:
    root, _ = dataset._get_label_field_root(label_field)
    for name, kind in MASK_ATTRIBUTES.items():
        if not dataset.has_field(f"{root}.{name}"):
            dataset.add_sample_field(f"{root}.{name}", kind)


# Prompts of the dataset ---------------------------------------------------------------------------------------------


def _labels_with_masks(samples: Samples, label_field: str) -> dict[str, list[str]]:
    """By the id of each sample, the ids of its labels that have masks, also of those that the view hides."""
    labels = unfiltered(samples).filter_labels(label_field, HAS_MASK)
    return dict(zip(*labels.values(["id", f"{label_field}.detections.id"])))


def _left(
    prompts: Sequence[fol.Detection | fol.Keypoint], in_place: bool, replace: bool, answered: Sequence[str]
) -> fol.Label | None:
    """Those of a sample's prompts that have no mask yet; None if there are none."""
    left = [p for p in prompts if replace or (not _has_mask(p) if in_place else p.id not in answered)]
    if not left:
        return None
    return fol.Keypoints(keypoints=left) if isinstance(left[0], fol.Keypoint) else fol.Detections(detections=left)


def _has_mask(detection: fol.Detection) -> bool:
    return detection.mask is not None or detection.mask_path is not None


# What is noted ----------------------------------------------------------------------------------------------------


def parameters_of(config: MobileSAMv2ModelConfig) -> dict:
    """What of a model's configuration decides what it finds."""
    found = {name: value for name, value in vars(config).items() if name not in _RUNTIME}
    for name in CHECKPOINTS:
        del found[name]
    found["weights"] = weights_sha256(config.name, config.files)  # wherever the files are
    if config.confidence_thresh is None and config.prompting == "object_aware":
        found["confidence_thresh"] = CONFIDENCE
    return found


def check_same_parameters(samples: Samples, label_field: str, parameters: dict) -> None:
    """Raises ValueError where a run with these parameters would go on with masks that were made with others."""
    dataset = samples._root_dataset
    runs = recorded_runs(dataset, label_field)
    if not runs:
        return
    changed = []
    for run in reversed(runs):
        changed = changed or _changed(run.parameters, parameters)
        if run.replace and not run.cancelled:
            break
    if not changed or len(unsegmented(dataset, label_field)) == len(dataset):
        return
    raise ValueError(
        f"'{label_field}' has masks that were made with other parameters ({'; '.join(changed)}). To go on with it take "
        f"the same ones; else replace what is there, or choose another field."
    )


def _changed(earlier: dict, parameters: dict) -> list[str]:
    """What of the parameters is another than that of an earlier run, in words."""
    return [
        f"{name} {earlier.get(name)} then, {value} now"
        for name, value in parameters.items()
        if not _are_same(earlier.get(name), value)
    ]


def _are_same(then: object, now: object) -> bool:
    if isinstance(then, dict) and isinstance(now, dict):  # files that aren't here have not been read
        return all(then[name] == now[name] for name in then.keys() & now.keys())
    return then == now


@contextmanager
def _recorded(
    samples: Samples,
    model: MobileSAMv2Model,
    label_field: str,
    parameters: dict,
    shard: Shard | None = None,
    replace: bool = False,
) -> Iterator[SegmentationRun]:
    """A run that the dataset knows of from now on, whatever ends it. Takes `Cancelled` for an end."""
    run = SegmentationRun(label_field, parameters, shard=shard, replace=replace, mask_dir=mask_folder(model.config))
    dataset = samples._root_dataset
    with on_record(samples, run):
        check_mask_folder(model.config)
        settle_leftovers(dataset, run)
        try:
            yield run
        except Cancelled:
            settle_leftovers(dataset, run)
            raise
        settle_leftovers(dataset, run)
