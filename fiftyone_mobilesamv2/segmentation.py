"""Running a model over a dataset: what is left to do, and where masks go."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.utils as fou
import fiftyone.core.validation as fov
from bson import ObjectId
from fiftyone import ViewField as F
from mongoengine.errors import ValidationError
from pymongo import UpdateOne
from pymongo.errors import PyMongoError

from .modeling.object_discovery import CONFIDENCE
from .progress import Cancelled
from .segmentation_runs import Failure, SegmentationRun, record, recorded_runs
from .stored_labels import LabelError, StoredImage, check_field_name, stored_images
from .zoo import (
    LABEL_BYTES_PER_SAMPLE,
    ImageGetItem,
    ImageItem,
    MobileSAMv2Model,
    MobileSAMv2ModelConfig,
)

if TYPE_CHECKING:
    import fiftyone as fo

    Samples = fo.core.collections.SampleCollection

_KINDS = {"Detection": fol.Detection, "Keypoint": fol.Keypoint}
PROMPT_TYPES = (fol.Detections, fol.Keypoints, fol.Detection, fol.Keypoint)

HAS_MASK = (F("mask") != None) | (F("mask_path") != None)  # noqa: E711  of a detection

_MASK_ATTRIBUTES = {"predicted_iou": fof.FloatField, "stability": fof.FloatField, "area_px": fof.IntField}

# Of a model's configuration, what says where it runs and not what it finds.
_RUNTIME = {"model_name", "model_path", "device", "masks_on_disk", "mask_dir"}
MONGODB_BYTES = 16 * 2**20  # of a document, at most
_TRIES = 5
_REFUSED = (PyMongoError, ValueError)  # FiftyOne makes the latter of what MongoDB says of several documents
_PROMPTS_AT_ONCE = 100  # MongoDB looks for each of them among all labels of the document


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
        while len(todo):
            try:
                with _counted(run, model):
                    todo.apply_model(
                        model,
                        label_field=label_field,
                        batch_size=batch_size,
                        num_workers=_workers(samples),
                        progress=progress,
                    )
                break
            except _REFUSED:  # one document costs FiftyOne's whole run
                left = _untouched(todo, run).exclude([failure.sample_id for failure in run.failures])
                full = left.select(_without_room(left))
                if not len(full):
                    raise
                run.failures += _failures(full, f"its document has no room for '{label_field}': MongoDB takes 16 MB")
                todo = left.exclude(full.values("id"))
        if not samples._root_dataset.has_field(label_field):
            raise ValueError(f"'{label_field}' was deleted while masks were being stored in it.")
        run.failures += _failures(
            _untouched(todo, run).exclude([failure.sample_id for failure in run.failures]),
            f"it was segmented, but '{label_field}' could not be stored: the log says why",
        )
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
    with _recorded(samples, label_field or prompt_field, parameters) as run, model, _counted(run, model):
        _answer_prompts(samples, model, prompt_field, label_field, replace, batch_size, progress)
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


def _workers(samples: Samples) -> int | None:
    # Videos are read frame by frame without workers. A worker is a fork of this process, which may be the App's server.
    return None if samples.media_type == "video" else 0


# Prompts of the dataset ---------------------------------------------------------------------------------------------


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


def _answer_prompts(
    samples: Samples,
    model: MobileSAMv2Model,
    prompt_field: str,
    label_field: str | None,
    replace: bool,
    batch_size: int,
    progress: bool | Callable | None,
) -> None:
    dataset = samples._root_dataset
    if label_field is not None:
        _declare(dataset, label_field)
    root, is_list = dataset._get_label_field_root(label_field or prompt_field)
    for name, kind in _MASK_ATTRIBUTES.items():
        dataset.add_sample_field(f"{root}.{name}", kind)
    answered = {} if label_field is None or replace else _labels_with_masks(samples, label_field)
    read = ImageGetItem({"prompt_field": prompt_field})

    seen: set[str] = set()  # a view that is sorted by what is written may come across a sample twice

    def items(images: Sequence[StoredImage]) -> Iterator[ImageItem]:
        for image in images:
            path, id = image.name, str(image.sample_id)
            if id in seen:
                continue
            seen.add(id)
            try:
                prompts = [_KINDS[label["_cls"]].from_dict(label) for label in image.labels(prompt_field)]
            except (LabelError, KeyError, ValidationError, TypeError, ValueError, zlib.error) as error:
                yield ImageItem(id, path, error=f"its prompts can't be read: {error}", prompted=True)
                continue
            left = _left(prompts, label_field is None, replace, answered.get(id) or ())
            if left is not None:
                yield read({"id": id, "filepath": path, "prompt_field": left})

    keep_boxes = fou.SetAttributes(model, keep_boxes=label_field is None)
    with keep_boxes, fou.ProgressBar(samples, progress=progress) as bar:
        for batch in fou.iter_batches(stored_images(samples, [prompt_field]), batch_size):
            batch = list(batch)
            read_items = list(items(batch))
            operations = []
            for item, labels in zip(read_items, model.predict_all(read_items)):
                if labels is None:
                    continue
                if label_field is None:
                    operations += _mask_updates(ObjectId(item.sample_id), root, is_list, labels.detections)
                else:
                    operations.append(_merge(ObjectId(item.sample_id), label_field, labels))
            model.failures += _write(dataset, operations, read_items)
            bar.update(len(batch))


def _write(dataset: fo.Dataset, operations: Sequence[UpdateOne], items: Sequence[ImageItem]) -> list[Failure]:
    """Updates samples; returns those whose documents have no room for it, which get none of theirs."""
    ids, failures = [item.sample_id for item in items], []
    if not operations:
        return failures
    try:
        dataset._bulk_write(operations, ids=ids, ordered=True)
    except _REFUSED:
        for item in items:
            own = [operation for operation in operations if str(operation._filter["_id"]) == item.sample_id]
            try:
                if own:
                    dataset._bulk_write(own, ids=[item.sample_id], ordered=True)
            except _REFUSED as error:
                failures.append(
                    Failure(item.sample_id, item.filepath, f"its masks can't be stored: {str(error)[:200]}")
                )
    return failures


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


def _merge(sample_id: ObjectId, label_field: str, labels: fol.Detections) -> UpdateOne:
    """Adds labels to a field, in place of those with the same ids. In one step, so that nobody's are lost."""
    found = [label.to_mongo().to_dict() for label in labels.detections]
    others = {
        "$filter": {
            "input": {"$ifNull": [f"${label_field}.detections", []]},
            "cond": {"$not": {"$in": ["$$this._id", [label["_id"] for label in found]]}},
        }
    }
    values = {
        f"{label_field}._cls": "Detections",
        f"{label_field}.detections": {"$concatArrays": [others, {"$literal": found}]},
        "last_modified_at": datetime.now(timezone.utc),
    }
    return UpdateOne({"_id": sample_id}, [{"$set": values}])


def _mask_updates(
    sample_id: ObjectId, root: str, is_list: bool, detections: Sequence[fol.Detection]
) -> Iterator[UpdateOne]:
    """Labels are told by id: others may have come and gone since they were read."""
    detections = [d for d in detections if _has_mask(d)]
    # Else a label that has become None meanwhile, or a single one that is another now, would be written to.
    there = {"_id": sample_id, f"{root}._id": {"$in": [ObjectId(d.id) for d in detections]}}
    for start in range(0, len(detections), _PROMPTS_AT_ONCE):
        values: dict[str, object] = {"last_modified_at": datetime.now(timezone.utc)}
        filters = []
        for detection in detections[start : start + _PROMPTS_AT_ONCE]:
            path = root
            if is_list:
                path += f".$[l{len(filters)}]"
                filters.append({f"l{len(filters)}._id": ObjectId(detection.id)})
            values |= {
                f"{path}.mask": None if detection.mask is None else fou.serialize_numpy_array(detection.mask),
                f"{path}.mask_path": detection.mask_path,
                **{f"{path}.{name}": detection[name] for name in _MASK_ATTRIBUTES},
            }
        yield UpdateOne(there, {"$set": values}, array_filters=filters or None)


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
        run.objects += model.num_labels
        run.failures += model.failures
        for stage, seconds in model.seconds.items():
            run.seconds[stage] = run.seconds.get(stage, 0) + seconds


def _untouched(samples: Samples, run: SegmentationRun) -> Samples:
    """The samples that nothing was stored on since the run began. Of videos, whose frames get the labels: none."""
    if samples.media_type == "video":
        return samples.limit(0)
    return samples.match(F("last_modified_at") < datetime.fromisoformat(run.started))


def _without_room(samples: Samples) -> list[str]:
    """Those whose documents leave less than what the labels of an image may take."""
    room = {"$expr": {"$gt": [{"$bsonSize": "$$ROOT"}, MONGODB_BYTES - LABEL_BYTES_PER_SAMPLE]}}
    pipeline = [{"$match": {"_id": {"$in": [ObjectId(id) for id in samples.values("id")]}}}, {"$match": room}]
    found = samples._root_dataset._sample_collection.aggregate([*pipeline, {"$project": {"_id": True}}])
    return [str(document["_id"]) for document in found]


def _failures(samples: Samples, error: str) -> list[Failure]:
    return [Failure(id, path, error) for id, path in zip(*samples.values(["id", "filepath"]))]
