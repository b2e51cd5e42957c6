"""Running a model over a dataset: what is left to do, and where masks go."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.odm as foo
import fiftyone.core.sample as fos
import fiftyone.core.utils as fou
import fiftyone.core.validation as fov
from bson import ObjectId
from fiftyone import ViewField as F
from mongoengine.errors import ValidationError
from pymongo.errors import CursorNotFound, PyMongoError, WriteError

from .modeling.object_discovery import CONFIDENCE
from .progress import Cancelled
from .segmentation_runs import SegmentationRun, record, recorded_runs
from .stored_labels import LabelError, StoredImage, check_field_name, stored_images
from .zoo import Found, ImageGetItem, ImageItem, MobileSAMv2Model, MobileSAMv2ModelConfig

if TYPE_CHECKING:
    import fiftyone as fo

    Samples = fo.core.collections.SampleCollection

logger = logging.getLogger(__name__)

_KINDS = {"Detection": fol.Detection, "Keypoint": fol.Keypoint}
PROMPT_TYPES = (fol.Detections, fol.Keypoints, fol.Detection, fol.Keypoint)

HAS_MASK = (F("mask") != None) | (F("mask_path") != None)  # noqa: E711  of a detection

_MASK_ATTRIBUTES = {"predicted_iou": fof.FloatField, "stability": fof.FloatField, "area_px": fof.IntField}

# Of a model's configuration, what says where it runs and not what it finds.
_RUNTIME = {"model_name", "model_path", "device", "masks_on_disk", "mask_dir"}
_TRIES = 5
_DELETED = "'{}' was deleted while masks were being stored in it."

# The documents of an image's masks -> what else must hold of its sample, and the values, as expressions, that it gets.
Update = Callable[[list[dict]], tuple[dict, dict]]


def segment_everything(
    samples: Samples,
    model: MobileSAMv2Model,
    label_field: str = "segmentations",
    replace: bool = False,
    batch_size: int = 8,
    progress: bool | Callable | None = None,
) -> SegmentationRun:
    """Stores the masks of all objects of every image, as `apply_model` does, and keeps a record of it in the dataset.

    Args:
        samples: a dataset or view of images, or of videos: then `label_field` is one of frames, as "frames.x".
        label_field: a new field, or one of detections.
        replace: replaces the labels of samples that have some. Else these are left as they are, so that a run that was
            stopped goes on.
        progress: as everywhere in FiftyOne. A callback may raise :class:`~fiftyone_mobilesamv2.progress.Cancelled`.

    Returns:
        the run, which `segmentation_runs.recorded_runs` lists from then on, whether it came to its end or not.

    Raises:
        ValueError: the field can't take masks; or it would go on with masks that were made with other parameters.
    """
    check_label_field(samples, label_field)
    samples = unfiltered(samples)
    todo = samples if replace else unsegmented(samples, label_field)
    parameters = parameters_of(model.config)
    if not replace:
        check_same_parameters(samples, label_field, parameters)
    _declare(samples._root_dataset, label_field)
    with _recorded(samples, label_field, parameters) as run:
        if samples.media_type != "video":
            _declare_attributes(samples._root_dataset, label_field)
            read_image = ImageGetItem()

            def read(image: StoredImage) -> ImageItem:
                return read_image({"id": str(image.sample_id), "filepath": image.name})

            update = partial(_new_labels, label_field=label_field, replace=replace)
            _pipeline(todo, model, [], read, update, run, batch_size, progress)
        elif len(todo):
            try:  # FiftyOne reads videos frame by frame, one after the other
                with _counted(run, model):
                    todo.apply_model(model, label_field=label_field, batch_size=batch_size, progress=progress)
            finally:
                run.objects = model.num_labels
            if not samples._root_dataset.has_field(label_field):
                raise ValueError(_DELETED.format(label_field))
    return run


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
    check_prompt_field(samples, prompt_field, in_place=label_field is None)
    if label_field is not None:
        check_label_field(samples, label_field)
    parameters = parameters_of(model.config) | {"prompting": prompt_field}
    dataset = samples._root_dataset
    with _recorded(samples, label_field or prompt_field, parameters) as run:
        if label_field is None:
            root, is_list = dataset._get_label_field_root(prompt_field)
            update = partial(_masks_in_place, root=root, is_list=is_list)
        else:
            _declare(dataset, label_field)
            update = partial(_merged_labels, label_field=label_field)
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
            _pipeline(samples, model, [prompt_field], read, update, run, batch_size, progress)
    return run


def unfiltered(samples: Samples) -> Samples:
    """The same samples with all that they have: what a view hides is not to be taken for absent."""
    dataset = samples._root_dataset
    if samples is dataset:
        return samples
    if dataset.media_type == "group":
        dataset = dataset.select_group_slices(_allow_mixed=True)
    return dataset.select(samples.values("id"))


def unsegmented(samples: Samples, label_field: str) -> Samples:
    """The samples without labels in this field. An image in which nothing was found has labels: none."""
    samples = unfiltered(samples)
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


def check_label_field(samples: Samples, label_field: str) -> None:
    """Raises ValueError where masks can't be stored in this field of these samples."""
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


# Reading, segmenting and storing ------------------------------------------------------------------------------------


def _pipeline(
    samples: Samples,
    model: MobileSAMv2Model,
    field_names: Sequence[str],
    read: Callable[[StoredImage], ImageItem | None],
    update: Update,
    run: SegmentationRun,
    batch_size: int,
    progress: bool | Callable | None,
) -> None:
    """Segments images in batches. While the model is at one, the next is read, and the one before stored.

    There is one thread that reads and one that stores: images are stored in their order, and no more than three batches
    are in memory. Decoding and compressing take each a few percent of the model's time, and don't hold Python's lock:
    more threads would only take cores from the model. A worker process would be a fork of this one, which may be the
    App's server.

    Whatever ends this, the batches that are through the model are stored first.

    Args:
        field_names: what `read` looks at of a stored image. `read` returns None where there is nothing to do.
        run: of which images, objects, failures and seconds are noted.
    """
    images = _each_once(samples, field_names)

    def read_batch() -> list[ImageItem | None]:
        return [read(image) for image in islice(images, batch_size)]

    with (
        _counted(run, model),
        model,
        fou.ProgressBar(total=len(samples), progress=progress) as bar,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
    ):
        ahead, behind = reader.submit(read_batch), Future()
        behind.set_result(None)
        try:
            while batch := ahead.result():
                ahead = reader.submit(read_batch)
                items = [item for item in batch if item is not None]
                found = model.segment_all(items)
                before, behind = behind, writer.submit(_store, samples._root_dataset, model, items, found, update, run)
                before.result()
                bar.update(len(batch))
        finally:
            if error := behind.exception():
                logger.error("The last images that were segmented could not be stored: %s", error)
        behind.result()


def _each_once(samples: Samples, field_names: Sequence[str]) -> Iterator[StoredImage]:
    seen = set()  # a view that is sorted by what is written may come across a sample twice
    while True:
        try:
            for image in stored_images(samples, field_names):
                if image.sample_id not in seen:
                    seen.add(image.sample_id)
                    yield image
            return
        except CursorNotFound:  # MongoDB forgets those that nobody asks for ten minutes
            pass


def _store(
    dataset: fo.Dataset,
    model: MobileSAMv2Model,
    items: Sequence[ImageItem],
    found: Sequence[Found | None],
    update: Update,
    run: SegmentationRun,
) -> None:
    """Stores what was found in images: each wholly or not at all, and none fails for another.

    Raises:
        PyMongoError: the database can't be written to. ValueError: the field is gone.
    """
    stored = []
    for item, masks in zip(items, found):
        if masks is None:
            continue
        documents: list[dict] = []
        is_stored = False
        try:
            documents = model.to_documents(masks)
            model.store_masks(documents)
            condition, values = update(documents)
            values["last_modified_at"] = datetime.now(timezone.utc)
            # One by one and not in bulk, which neither tells which of them were there nor takes 48 MB at once.
            result = dataset._sample_collection.update_one(
                {"_id": ObjectId(item.sample_id)} | condition, [{"$set": values}]
            )
            is_stored = result.matched_count == 1
        except Exception as error:
            if isinstance(error, PyMongoError) and not isinstance(error, WriteError):
                raise
            cause = error.details["errmsg"] if isinstance(error, WriteError) else str(error)
            model.fail(item, f"its masks can't be stored: {cause[:200]}")
        if is_stored:
            stored.append(item.sample_id)
            run.objects += len(documents)
            continue
        for document in documents:
            if "mask_path" in document:
                with suppress(OSError):
                    os.remove(document["mask_path"])
    _check_is_there(dataset, run.label_field.split(".")[0])  # first: samples with values in no field can't be reloaded
    fos.Sample._reload_docs(dataset._sample_collection_name, sample_ids=stored)


def _check_is_there(dataset: fo.Dataset, label_field: str) -> None:
    """Raises ValueError where someone has deleted the field. Samples with values in none can't be loaded any more."""
    there = {"_id": dataset._doc.id, "sample_fields.name": label_field}
    if foo.get_db_conn().datasets.find_one(there, {"_id": True}) is None:
        dataset._sample_collection.update_many({label_field: {"$exists": True}}, {"$unset": {label_field: ""}})
        raise ValueError(_DELETED.format(label_field))


def _new_labels(documents: list[dict], label_field: str, replace: bool) -> tuple[dict, dict]:
    """Where labels are not to be replaced, what someone else has put there meanwhile stays."""
    labels = {"_cls": "Detections", "detections": documents}
    return {} if replace else {label_field: None}, {label_field: {"$literal": labels}}


def _merged_labels(documents: list[dict], label_field: str) -> tuple[dict, dict]:
    """Adds labels to a field, in place of those with the same ids. In one step, so that nobody's are lost."""
    others = {
        "$filter": {
            "input": {"$ifNull": [f"${label_field}.detections", []]},
            "cond": {"$not": {"$in": ["$$this._id", [document["_id"] for document in documents]]}},
        }
    }
    labels = {"$concatArrays": [others, {"$literal": documents}]}
    return {}, {f"{label_field}._cls": "Detections", f"{label_field}.detections": labels}


def _masks_in_place(documents: list[dict], root: str, is_list: bool) -> tuple[dict, dict]:
    """Labels are told by id: others may have come and gone since they were read."""
    ids, masks = [], []
    for document in documents:
        if "mask" in document or "mask_path" in document:
            ids.append(document["_id"])
            masks.append({name: document.get(name) for name in ("mask", "mask_path", *_MASK_ATTRIBUTES)})
    label = "$$this" if is_list else f"${root}"
    index = {"$indexOfArray": [ids, f"{label}._id"]}
    mask = {"$arrayElemAt": [{"$literal": masks}, index]}
    given = {"$cond": [{"$gte": [index, 0]}, {"$mergeObjects": [label, mask]}, label]}
    # Else a label that has become None meanwhile, or a single one that is another now, would be written to.
    there = {f"{root}._id": {"$in": ids}}
    return there, {root: {"$map": {"input": f"${root}", "in": given}} if is_list else given}


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
    for name, kind in _MASK_ATTRIBUTES.items():
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
    if config.confidence_thresh is None and config.prompting == "object_aware":
        found["confidence_thresh"] = CONFIDENCE
    return found


def check_same_parameters(samples: Samples, label_field: str, parameters: dict) -> None:
    """Raises ValueError where a run with these parameters would go on with masks that were made with others."""
    dataset = samples._root_dataset
    runs = recorded_runs(dataset, label_field)
    if not runs or runs[-1].parameters == parameters or len(unsegmented(dataset, label_field)) == len(dataset):
        return
    earlier = runs[-1].parameters
    changed = [
        f"{name} {earlier.get(name)} then, {value} now"
        for name, value in parameters.items()
        if earlier.get(name) != value
    ]
    raise ValueError(
        f"'{label_field}' has masks that were made with other parameters ({'; '.join(changed)}). To go on with it take "
        f"the same ones; else replace what is there, or choose another field."
    )


@contextmanager
def _recorded(samples: Samples, label_field: str, parameters: dict) -> Iterator[SegmentationRun]:
    """A run that the dataset knows of from now on, whatever ends it. Takes `Cancelled` for an end."""
    run = SegmentationRun(label_field, parameters, datetime.now(timezone.utc).isoformat(), cancelled=True)
    record(samples, run)  # it may be killed
    start = time.perf_counter()
    try:
        yield run
        run.cancelled = False
    except Cancelled:
        pass
    finally:
        run.seconds["total"] = time.perf_counter() - start
        record(samples, run)


@contextmanager
def _counted(run: SegmentationRun, model: MobileSAMv2Model) -> Iterator[None]:
    """Adds to the run what the model does inside."""
    try:
        yield
    finally:
        run.images += model.num_images
        run.failures += model.failures
        for stage, seconds in model.seconds.items():
            run.seconds[stage] = run.seconds.get(stage, 0) + seconds
