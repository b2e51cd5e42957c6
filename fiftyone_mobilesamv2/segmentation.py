"""Running a model over a dataset: what is left to do, and where masks go."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.odm as foo
import fiftyone.core.sample as fos
import fiftyone.core.utils as fou
import fiftyone.core.validation as fov
from bson import CodecOptions, ObjectId
from bson.raw_bson import RawBSONDocument
from fiftyone import ViewField as F
from mongoengine.errors import ValidationError
from pymongo.errors import CursorNotFound, PyMongoError, WriteError

from . import database
from .cluster import check_workers, on_cluster
from .database import AWAY, first_line, patiently, safely
from .mask_files import MaskFiles, make_folder, settle
from .modeling import checkpoints
from .modeling.object_discovery import CONFIDENCE
from .progress import Cancelled
from .segmentation_runs import SegmentationRun, declare_dead, on_record, recorded_runs
from .shards import Shard
from .stored_labels import LabelError, StoredImage, check_field_name, stored_images
from .zoo import CHECKPOINTS, Found, ImageGetItem, ImageItem, MobileSAMv2Model, MobileSAMv2ModelConfig, mask_folder

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
_MOST_SELECTED = 800_000  # 16 MB, MongoDB's limit for a command, at 20 bytes an id
_DELETED = "'{}' was deleted while masks were being stored in it."

# The documents of an image's masks -> what else must hold of its sample, and the values, as expressions, that it gets.
Update = Callable[[list[dict]], tuple[dict, dict]]


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
    config = model if isinstance(model, MobileSAMv2ModelConfig) else model.config
    if shard is not None and cluster is not None:
        raise ValueError("A part can't be spread over a cluster: give either shard or cluster.")
    check_workers(cluster, workers)
    _check_batch_size(batch_size)
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
        return dataclasses.replace(run, cancelled=False)
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
                _settle(dataset, run)
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
    _check_batch_size(batch_size)
    check_prompt_field(samples, prompt_field, in_place=label_field is None)
    dataset = samples._root_dataset
    if label_field is not None:
        check_label_field(samples, label_field)
        _declare(dataset, label_field)
    parameters = parameters_of(model.config) | {"prompting": prompt_field}
    with _recorded(samples, model, label_field or prompt_field, parameters) as run:
        if label_field is None:
            root, is_list = dataset._get_label_field_root(prompt_field)
            update = partial(_masks_in_place, root=root, is_list=is_list)
        else:
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
    if samples is dataset or not samples._stages:
        return dataset
    if dataset.media_type == "group":
        dataset = dataset.select_group_slices(_allow_mixed=True)
    ids = samples.values("id")
    if len(ids) > _MOST_SELECTED:
        raise ValueError(
            f"The view has {len(ids):,} samples, and FiftyOne can select at most {_MOST_SELECTED:,}. Take all of the "
            f"dataset, or one part of the view after the other, such as view[:{_MOST_SELECTED}]."
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


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
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
    given_up = threading.Event()
    images = _each_once(samples, field_names, given_up)
    store = partial(_store, samples._root_dataset, model, update, run, given_up)

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
                before, behind = behind, writer.submit(store, items, found)
                before.result()
                _note(run, model)
                bar.update(len(batch))
        except BaseException:
            given_up.set()
            raise
        finally:
            if error := behind.exception():
                logger.error("The last images that were segmented could not be stored: %s", error)
        behind.result()


def _each_once(samples: Samples, field_names: Sequence[str], given_up: threading.Event) -> Iterator[StoredImage]:
    seen = set()  # a view that is sorted by what is written may come across a sample twice
    failed_at, since = -1, 0.0
    while True:
        try:
            for image in stored_images(samples, field_names):
                if image.sample_id not in seen:
                    seen.add(image.sample_id)
                    yield image
            return
        except CursorNotFound:  # MongoDB forgets those that nobody asks for ten minutes, and all when it restarts
            pass
        except AWAY as error:
            if failed_at != len(seen):
                logger.warning("Reading samples was interrupted: %s", first_line(error))
                failed_at, since = len(seen), time.monotonic()
            elif given_up.is_set() or time.monotonic() - since > database.PATIENCE:
                raise
            given_up.wait(0.5)


def _store(
    dataset: fo.Dataset,
    model: MobileSAMv2Model,
    update: Update,
    run: SegmentationRun,
    given_up: threading.Event,
    items: Sequence[ImageItem],
    found: Sequence[Found | None],
) -> None:
    """Stores what was found in images: each wholly or not at all, and none fails for another.

    Raises:
        PyMongoError: the database can't be written to. OSError: the disk is full. ValueError: the field is gone.
    """
    stored = []
    for item, masks in zip(items, found):
        if masks is None:
            continue
        files = MaskFiles(_dataset_mask_folder(dataset, run.mask_dir), item.sample_id, run.label_field)
        documents: list[dict] = []
        is_stored = False
        try:
            documents = model.to_documents(masks)
            model.store_masks(documents, files)
            if not files.are_there():
                raise ValueError("another run has taken this one for dead, and has deleted them")
            condition, values = update(documents)
            values["last_modified_at"] = datetime.now(timezone.utc)
            change = {"_id": ObjectId(item.sample_id)} | condition, [{"$set": values}]
            # One by one and not in bulk, which neither tells which of them were there nor takes 48 MB at once.
            result = patiently(partial(safely(dataset._sample_collection).update_one, *change), given_up)
            # A first try whose answer got lost leaves nothing to do for the second.
            is_stored = result.matched_count == 1 or _has_labels(dataset, run.label_field, item.sample_id, documents)
        except Exception as error:
            if isinstance(error, PyMongoError) and not isinstance(error, WriteError):
                raise  # perhaps they are stored: the next run will know what to do with the files
            if isinstance(error, OSError):  # the next ones would fare the same
                _discard(files)
                raise _no_room(model.config, error) from error
            cause = error.details["errmsg"] if isinstance(error, WriteError) else str(error)
            model.fail(item, f"its masks can't be stored: {cause[:200]}")
        if is_stored:
            files.confirm()
            stored.append(item.sample_id)
            run.objects += len(documents)
        else:
            _discard(files)
    # First this: samples with values in no field can't be reloaded.
    patiently(lambda: _check_is_there(dataset, run.label_field.split(".")[0]), given_up)
    patiently(lambda: fos.Sample._reload_docs(dataset._sample_collection_name, sample_ids=stored), given_up)


def _no_room(config: MobileSAMv2ModelConfig, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"{os.strerror(error.errno or 0)}: masks can't be stored in {mask_folder(config)}. Make room there, or choose "
        f"another folder by `mask_dir`; then run the same again, and it goes on",
    )


def _discard(files: MaskFiles) -> None:
    with suppress(OSError):  # what is left is settled by the next run
        files.discard()


def _has_labels(dataset: fo.Dataset, label_field: str, sample_id: str, documents: Sequence[dict]) -> bool:
    if not documents:
        return False
    root, _ = dataset._get_label_field_root(label_field)
    query = {"_id": ObjectId(sample_id), f"{root}._id": documents[0]["_id"]}
    return patiently(lambda: dataset._sample_collection.find_one(query, {"_id": True})) is not None


def _dataset_mask_folder(dataset: fo.Dataset, mask_dir: str) -> str:
    return os.path.join(mask_dir, str(dataset._doc.id))


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
    found["weights"] = checkpoints.weights_sha256(config.name, config.files)  # wherever the files are
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
        _check_mask_folder(model.config)
        _settle(dataset, run)
        try:
            yield run
        except Cancelled:
            _settle(dataset, run)
            raise
        _settle(dataset, run)


def _check_mask_folder(config: MobileSAMv2ModelConfig) -> None:
    """Raises OSError where masks are to go to disk and can't: at once, and not after a night."""
    if config.masks_on_disk:
        try:
            make_folder(Path(mask_folder(config)))
            with tempfile.TemporaryFile(dir=mask_folder(config)):
                pass
        except OSError as error:
            raise _no_room(config, error) from error


def _settle(dataset: fo.Dataset, run: SegmentationRun) -> None:
    """Deletes the masks on disk that runs which were killed have left, and that the database doesn't know of."""
    earlier = (each.mask_dir for each in recorded_runs(dataset, run.label_field))
    folders = {run.mask_dir, *earlier} - {None}

    def is_mine(sample_id: str, label_field: str) -> bool:
        return label_field == run.label_field and (run.shard is None or run.shard.has(sample_id))

    if images := sum(settle(_dataset_mask_folder(dataset, each), is_mine, _is_known) for each in folders):
        logger.info("Deleted the masks of %d images that a run which was killed had not stored yet", images)


def _is_known(sample_id: str, folder: str) -> bool:
    """Whether this sample, of any dataset, has anything about such a folder.

    Any: a clone has the same samples. Anything: labels may have gone to another field.
    """
    database = foo.get_db_conn().with_options(codec_options=CodecOptions(document_class=RawBSONDocument))
    query = {"_id": ObjectId(sample_id)}
    for collection in patiently(lambda: foo.get_db_conn().datasets.distinct("sample_collection_name")):
        found = patiently(partial(database[collection].find_one, query))
        if found is not None and folder.encode() in found.raw:
            return True
    return False


@contextmanager
def _counted(run: SegmentationRun, model: MobileSAMv2Model) -> Iterator[None]:
    """Notes what the model has done, at the end, too."""
    try:
        yield
    finally:
        _note(run, model)


def _note(run: SegmentationRun, model: MobileSAMv2Model) -> None:
    run.images = model.num_images
    run.failures = list(model.failures)
    run.num_failures = len(run.failures)
    run.seconds |= model.seconds
