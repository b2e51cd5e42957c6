"""MobileSAMv2 as a FiftyOne model: samples -> MobileSAMv2 -> labels with masks."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import fiftyone as fo
import fiftyone.core.config as foc
import fiftyone.core.labels as fol
import fiftyone.core.models as fom
import fiftyone.core.utils as fou
import fiftyone.utils.torch as fout
import fiftyone.zoo.models as fozm
import numpy as np
import torch
from bson import ObjectId

from .images import read_image
from .mask_files import MaskFiles
from .modeling.checkpoints.files import fetch_model
from .modeling.grid_prompts import POINTS_PER_SIDE, SAM_GRID_FILTER, GridFilter
from .modeling.masks import Segmentation
from .modeling.mobilesamv2 import MAX_POINTS_PER_SIDE, PROMPTINGS, MobileSAMv2, checked_number
from .modeling.object_discovery import CONFIDENCE, MAX_NMS_CANDIDATES, MAX_PROMPTS, NMS_IOU
from .segmentation_runs import Failure
from .stored_labels import serialized

if TYPE_CHECKING:
    from fiftyone.operators import types
    from fiftyone.operators.executor import ExecutionContext

logger = logging.getLogger(__name__)

T = TypeVar("T")

LABEL = "object"
_DOCUMENT = fol.Detection(label=LABEL).to_mongo().to_dict()  # what the database holds of every object

# MongoDB takes documents of at most 16,793,600 bytes. The labels of a field get 7 MiB, which leaves room for a second
# field like it and for the attributes that an evaluation adds.
LABEL_BYTES_PER_SAMPLE = 7 * 2**20
DETECTION_BYTES = 600  # of a detection without its mask: names and values of its attributes

_IN_NO_PATH = re.compile("[\0\ud800-\udfff]")  # the latter are bytes that are no UTF-8: no database takes them
_MOST_STORED = 2**63 - 1  # as a whole number

_LARGEST_BOX = 2  # sides of the image that a box has: a mask of it takes as many pixels; the evaluation takes no more

CHECKPOINTS = ("encoder_checkpoint", "decoder_checkpoint", "detector_checkpoint")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MobileSAMv2ModelConfig(foc.Config, fozm.HasZooModel):
    """Parameters of a :class:`MobileSAMv2Model`; all can be given to `load_zoo_model`.

    Args:
        name: the zoo model.
        device (None): "cuda", "mps", "cpu"; None takes what there is, in this order.
        dtype ("float32"): "float32", "bfloat16" or "float16", for the heavy computation.
        prompting ("object_aware"): "object_aware", or "grid" for SAM's grid search.
        confidence_thresh (None): least confidence of a mask. Object-aware, None means the paper's 0.4 of the detector;
            with the grid or with prompts of your own the confidence is the predicted IoU, and None keeps all.
        iou (0.9): boxes of the detector that overlap more are the same object.
        max_prompts (320): most boxes of an image.
        points_per_side (32): points of the grid along each side.
        pred_iou_thresh (0.88), stability_score_thresh (0.95): least predicted IoU and stability of the grid's masks;
            SAM's values, and 0 keeps all.
        min_area (0): least area of a mask in pixels. A prompt of your own gets its mask whatever the area.
        max_masks (None): most masks stored for an image, most confident first.
        masks_on_disk (False): store every mask as a PNG file; else only those that don't fit into the database.
        mask_dir (None): folder for these files; None: "mobilesamv2_masks" in FiftyOne's `default_dataset_dir`.
        encoder_checkpoint, decoder_checkpoint, detector_checkpoint (None): files to use instead of the zoo's.
    """

    def __init__(self, d: dict) -> None:
        d = self.init(d)
        read = partial(self.parse_raw, {key: value for key, value in d.items() if value is not None})
        self.name = read("name", default=None)
        device = read("device", default=None)
        self.device = str(device) if isinstance(device, torch.device) else device
        self.dtype = read("dtype", default="float32")
        self.prompting = read("prompting", default="object_aware")
        self.confidence_thresh = read("confidence_thresh", default=None)
        self.iou = read("iou", default=NMS_IOU)
        self.max_prompts = read("max_prompts", default=MAX_PROMPTS)
        self.points_per_side = read("points_per_side", default=POINTS_PER_SIDE)
        self.pred_iou_thresh = read("pred_iou_thresh", default=SAM_GRID_FILTER.pred_iou_thresh)
        self.stability_score_thresh = read("stability_score_thresh", default=SAM_GRID_FILTER.stability_score_thresh)
        self.min_area = read("min_area", default=0)
        self.max_masks = read("max_masks", default=None)
        self.masks_on_disk = read("masks_on_disk", default=False)
        self.mask_dir = read("mask_dir", default=None)
        for name in CHECKPOINTS:
            setattr(self, name, read(name, default=None))
        self.check()
        if unknown := [key for key in d if key not in vars(self)]:
            known = [key for key in vars(self) if key not in ("model_name", "model_path")]
            raise ValueError(f"Unknown parameter {', '.join(unknown)} of {self.name}; it takes {', '.join(known)}.")

    def check(self) -> None:
        """Raises ValueError for a parameter that is not what it should be."""
        for key in ("name", "device", "dtype", "prompting", "mask_dir", *CHECKPOINTS):
            value = getattr(self, key)
            is_text = isinstance(value, str) and value and not _IN_NO_PATH.search(value)
            if not is_text and (value is not None or key == "name"):
                raise ValueError(f"{key} must be text that can be a name or a path, not {value!r}.")
        for key, choices in (("prompting", PROMPTINGS), ("dtype", DTYPES)):
            value = getattr(self, key)
            if value not in choices:
                raise ValueError(f"{key} must be one of {', '.join(choices)}, not {value!r}.")
        if not isinstance(self.masks_on_disk, bool):
            raise ValueError(f"masks_on_disk must be True or False, not {self.masks_on_disk!r}.")
        whole = {
            "max_prompts": (1, MAX_NMS_CANDIDATES),
            "points_per_side": (1, MAX_POINTS_PER_SIDE),
            "min_area": (0, _MOST_STORED),
            "max_masks": (1, _MOST_STORED),
        }
        for key, (least, most) in whole.items():
            if getattr(self, key) is not None:
                setattr(self, key, checked_number(key, getattr(self, key), least, most, whole=True))
        for key in ("confidence_thresh", "iou", "pred_iou_thresh", "stability_score_thresh"):
            if getattr(self, key) is not None:
                setattr(self, key, checked_number(key, getattr(self, key), 0, 1))

    @property
    def files(self) -> dict[str, str]:
        """The files to use instead of the zoo's, by the name of their parameter."""
        return {name: value for name in CHECKPOINTS if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class ImageItem:
    """What a data loader's worker hands over: an image and its prompts, or why there is none.

    Attributes:
        prompted: whether the prompts, and not all objects, are to be segmented.
        skip_failures: whether an error is to be recorded; otherwise it is raised.
    """

    sample_id: str | None = None
    filepath: str | None = None
    image: np.ndarray | None = None
    prompts: fol.Label | None = None
    error: str | None = None
    prompted: bool = False
    skip_failures: bool = False


class Found(NamedTuple):
    """The masks of an image, and the prompt of each, if there were prompts."""

    masks: Segmentation
    prompts: Sequence[fol.Detection | fol.Keypoint] | None = None


class ImageGetItem(fout.GetItem):
    """Reads the image of a sample, and its prompts where a `prompt_field` is mapped.

    Args:
        field_mapping: may map "prompt_field" to a field of detections or keypoints.
        skip_failures: hand an unreadable image over as an error of its own. Raised, it would cost its whole batch.
    """

    def __init__(self, field_mapping: dict | None = None, skip_failures: bool = True) -> None:
        self.has_prompts = "prompt_field" in (field_mapping or {})
        self.skip_failures = skip_failures
        super().__init__(field_mapping=field_mapping)

    @property
    def required_keys(self) -> list[str]:
        return ["id", "filepath"] + (["prompt_field"] if self.has_prompts else [])

    def __call__(self, d: dict) -> ImageItem:
        item = ImageItem(d["id"], d["filepath"], prompted=self.has_prompts, skip_failures=self.skip_failures)
        try:
            if self.has_prompts:
                check_prompts(d["prompt_field"])
            return replace(item, image=read_image(d["filepath"]), prompts=d.get("prompt_field"))
        except (OSError, TypeError, ValueError, MemoryError) as error:
            if not self.skip_failures:
                raise
            return replace(item, error=f"{type(error).__name__}: {error}")


class MobileSAMv2Model(fom.Model, fom.SupportsGetItem, fom.TorchModelMixin):
    """MobileSAMv2 for `apply_model`.

    Without prompts, every image gets :class:`fiftyone.core.labels.Detections` of all its objects, labelled "object".
    With ``apply_model(..., prompt_field="ground_truth")`` the boxes or keypoints of that field become masks and keep
    label, id and attributes.

    An image that can't be read or segmented is logged, listed in :attr:`failures`, and its field is left as it was;
    the others of its batch are stored. With ``apply_model(..., skip_failures=False)`` it raises.

    Attributes:
        failures: the images of the current or last run that were not segmented.
        num_images, num_labels: how many images that run has gone through, and how many objects it has found.
        keep_boxes: whether prompted detections keep their boxes, to which their masks are cut; else tight ones.
        label_bytes: what the labels of an image may take in the database; masks beyond it go to disk.
    """

    def __init__(self, config: MobileSAMv2ModelConfig) -> None:
        self.config = config
        self.model = MobileSAMv2.from_pretrained(config.name, config.device, DTYPES[config.dtype], **config.files)
        self.failures: list[Failure] = []
        self.num_images = 0
        self.num_labels = 0
        self.keep_boxes = False
        self.label_bytes = 0 if config.masks_on_disk else LABEL_BYTES_PER_SAMPLE
        self._preprocess = True

    def __enter__(self) -> MobileSAMv2Model:
        self.config.check()  # `apply_model` has a `confidence_thresh` of its own, which it puts there
        self.failures = []
        self.num_images = 0
        self.num_labels = 0
        self.model.seconds.clear()
        return self

    def __exit__(self, *args: object) -> None:
        if self.failures:
            logger.warning("%d images were not segmented; model.failures lists them", len(self.failures))

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall time per stage ("discover", "encode", "decode", "crop") of the current or last run."""
        return self.model.seconds

    @property
    def media_type(self) -> str:
        return "image"

    @property
    def ragged_batches(self) -> bool:
        # True would make FiftyOne run batches of one: images of several sizes come as a list, see `collate_fn`.
        return False

    @property
    def has_collate_fn(self) -> bool:
        return True

    @staticmethod
    def collate_fn(batch: list[ImageItem]) -> list[ImageItem]:
        return batch

    @property
    def transforms(self) -> None:
        return None

    @property
    def preprocess(self) -> bool:
        return self._preprocess

    @preprocess.setter
    def preprocess(self, value: bool) -> None:
        self._preprocess = value

    @property
    def _using_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def build_get_item(self, field_mapping: dict | None = None) -> ImageGetItem:
        # `apply_model` tells nobody whether it skips failures, but its own data loader: this method's caller.
        return ImageGetItem(field_mapping, bool(sys._getframe(1).f_locals.get("skip_failures", True)))

    def predict(self, arg: np.ndarray | ImageItem) -> fol.Label | None:
        """Labels of one image; None where it has no prompts. Raises what goes wrong."""
        return self.predict_all([arg])[0]

    def predict_all(self, args: Sequence[np.ndarray | ImageItem]) -> list[fol.Label | None]:
        """Labels of images: uint8 RGB arrays [H, W, 3] of any sizes, or items of a data loader.

        What goes wrong with an array is raised; with an item, as it says.
        """
        items = [arg if isinstance(arg, ImageItem) else ImageItem(image=np.asarray(arg)) for arg in args]
        found = self.segment_all(items)
        return [each and self._attempt(item, self._to_labels, each) for item, each in zip(items, found)]

    def segment_all(self, items: Sequence[ImageItem]) -> list[Found | None]:
        """The part of :meth:`predict_all` that takes a model: what is found, before it becomes labels."""
        good = [item for item in items if item.error is None]
        for item in items:
            if item.error is not None:
                self.fail(item, item.error)
        try:
            found = self._segment(good)
        except Exception:
            if not all(item.skip_failures for item in items):
                raise
            # One image may have failed the others: each gets a try of its own.
            found = [self._attempt(item, lambda item: self._segment([item])[0], item) for item in good]
        self.num_images += len(items)
        self.num_labels += sum(len(each.masks) for each in found if each)
        of_good = iter(found)
        return [next(of_good) if item.error is None else None for item in items]

    def to_documents(self, found: Found) -> list[dict]:
        """The detections as FiftyOne stores them, but for their masks, which are still arrays.

        At 320 masks an image FiftyOne's own objects take ten times as long, all of it inside Python's lock, which the
        model then waits for.
        """
        if found.prompts is None:
            return [_DOCUMENT | {"_id": ObjectId()} | _attributes(found.masks, i) for i in range(len(found.masks))]
        documents = []
        for detection in self._prompted_detections(found):
            mask, detection.mask = detection.mask, None
            documents.append(detection.to_mongo().to_dict() | ({} if mask is None else {"mask": mask}))
        return documents

    def store_masks(self, documents: Sequence[dict], files: MaskFiles) -> None:
        """Puts the masks of :meth:`to_documents` where they are kept: into the documents, or into files."""
        with_masks = [document for document in documents if "mask" in document]
        contents = [serialized(document["mask"]) if self.label_bytes else b"" for document in with_masks]
        beyond = self._beyond_budget([len(content) for content in contents], len(documents))
        for i, (document, content) in enumerate(zip(with_masks, contents)):
            mask = document.pop("mask")
            if i in beyond:
                document["mask_path"] = files.add(mask)
            else:
                document["mask"] = content

    def _attempt(self, item: ImageItem, work: Callable[..., T], *args: object) -> T | None:
        """None where it fails, which is recorded, or raised where the item says so."""
        try:
            return work(*args)
        except Exception as error:
            if not item.skip_failures:
                raise
            self.fail(item, f"{type(error).__name__}: {error}")
            return None

    def fail(self, item: ImageItem, error: str) -> None:
        """Notes an image that was not segmented."""
        self.failures.append(Failure(item.sample_id, item.filepath, error))
        logger.warning("%s (sample %s) was not segmented: %s", item.filepath, item.sample_id, error)

    def _segment(self, items: Sequence[ImageItem]) -> list[Found | None]:
        if items and items[0].prompted:
            return [self._segment_anything(item) for item in items]
        config = self.config
        found = self.model.segment_everything(
            [item.image for item in items],
            prompting=config.prompting,
            conf=CONFIDENCE if config.confidence_thresh is None else config.confidence_thresh,
            iou=config.iou,
            max_prompts=config.max_prompts,
            points_per_side=config.points_per_side,
            grid_filter=GridFilter(config.pred_iou_thresh, config.stability_score_thresh),
        )
        return [Found(self._wanted(masks)) for masks in found]

    def _wanted(self, found: Segmentation) -> Segmentation:
        if self.config.confidence_thresh is not None:
            found = found.select(np.flatnonzero(found.confidence >= self.config.confidence_thresh))
        if self.config.min_area:
            found = found.select(np.flatnonzero(found.areas >= self.config.min_area))
        if self.config.max_masks is not None:
            found = found.select(np.argsort(-found.confidence, kind="stable")[: self.config.max_masks])
        return found

    def _segment_anything(self, item: ImageItem) -> Found | None:
        prompts = labels_of(item.prompts)
        if not prompts:
            return None
        height, width = item.image.shape[:2]
        scale = np.array([width, height], np.float32)
        if isinstance(prompts[0], fol.Detection):
            boxes = np.array([prompt.bounding_box for prompt in prompts], np.float32).reshape(-1, 2, 2)
            boxes = (np.stack([boxes[:, 0], boxes[:, 0] + boxes[:, 1]], 1) * scale).reshape(-1, 4)
            found = self.model.segment_anything([item.image], boxes=[boxes])[0]
        else:
            points, point_labels = zip(*(keypoint_prompt(prompt) for prompt in prompts))
            points = [p * scale for p in points]
            found = self.model.segment_anything([item.image], points=[points], point_labels=[point_labels])[0]
        if self.config.confidence_thresh is not None:
            kept = np.flatnonzero(found.predicted_iou >= self.config.confidence_thresh)
            found, prompts = found.select(kept), [prompts[i] for i in kept]
        return Found(found, prompts)

    def _to_labels(self, found: Found) -> fol.Detections:
        if found.prompts is None:
            detections = [fol.Detection(label=LABEL, **_attributes(found.masks, i)) for i in range(len(found.masks))]
        else:
            detections = self._prompted_detections(found)
        return self._within_budget(fol.Detections(detections=detections))

    def _prompted_detections(self, found: Found) -> list[fol.Detection]:
        return [prompted_detection(prompt, found.masks, i, self.keep_boxes) for i, prompt in enumerate(found.prompts)]

    def _within_budget(self, labels: fol.Detections) -> fol.Detections:
        with_masks = [detection for detection in labels.detections if detection.mask is not None]
        # zlib makes 1.28 bits per pixel of noise, and the array has a header: a bound that costs nothing.
        bound = sum(detection.mask.size / 6 + 200 for detection in with_masks)
        if DETECTION_BYTES * len(labels.detections) + bound > self.label_bytes:
            sizes = [len(fou.serialize_numpy_array(detection.mask)) for detection in with_masks]
            for i in self._beyond_budget(sizes, len(labels.detections)):
                with_masks[i].export_mask(self._mask_path(), update=True)
        return labels

    def _beyond_budget(self, mask_bytes: Sequence[int], num_detections: int) -> set[int]:
        """Which masks go to disk: the largest, until the rest fits into the sample's document."""
        total = DETECTION_BYTES * num_detections + sum(mask_bytes)
        beyond: set[int] = set()
        for i in sorted(range(len(mask_bytes)), key=mask_bytes.__getitem__, reverse=True):
            if total <= self.label_bytes:
                break
            total -= mask_bytes[i]
            beyond.add(i)
        if beyond and self.label_bytes:
            logger.info(
                "Stored %d of %d masks of an image in %s: they don't fit into its document",
                len(beyond),
                len(mask_bytes),
                mask_folder(self.config),
            )
        return beyond

    def _mask_path(self) -> str:
        name = str(ObjectId())  # and not the detection's, which may have a file that is needed until this one is stored
        # Ids end in a counter: 256 folders that fill evenly.
        return os.path.join(mask_folder(self.config), name[-2:], f"{name}.png")


def mask_folder(config: MobileSAMv2ModelConfig) -> str:
    """Where masks on disk go."""
    return os.path.abspath(config.mask_dir or os.path.join(fo.config.default_dataset_dir, "mobilesamv2_masks"))


def _attributes(found: Segmentation, index: int) -> dict:
    return {"confidence": float(found.confidence[index]), **mask_attributes(found, index)}


def mask_attributes(found: Segmentation, index: int) -> dict:
    """The attributes that every mask is stored with; the box is relative, [x, y, width, height]."""
    height, width = found.size
    x0, y0, x1, y1 = (int(v) for v in found.boxes[index])
    mask = found.masks[index]
    return {
        "bounding_box": [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height],
        "mask": mask,
        "predicted_iou": float(found.predicted_iou[index]),
        "stability": float(found.stability[index]),
        "area_px": int(np.count_nonzero(mask)),
    }


def mask_in_box(found: Segmentation, index: int, box: Sequence[float]) -> np.ndarray:
    """bool: what a mask has inside a relative box [x, y, width, height], in pixels of the box.

    Some may be outside the image. A box without an area has one, at its corner.
    """
    (height, width), (x, y, w, h) = found.size, box
    left, top, right, bottom = round(x * width), round(y * height), round((x + w) * width), round((y + h) * height)
    cut = np.zeros((max(bottom - top, 1), max(right - left, 1)), bool)
    mask, (x0, y0, x1, y1) = found.masks[index], found.boxes[index]
    x0_cut, y0_cut = max(x0, left), max(y0, top)
    x1_cut, y1_cut = min(x1, left + cut.shape[1]), min(y1, top + cut.shape[0])
    if x0_cut < x1_cut and y0_cut < y1_cut:
        inside = mask[y0_cut - y0 : y1_cut - y0, x0_cut - x0 : x1_cut - x0]
        cut[y0_cut - top : y1_cut - top, x0_cut - left : x1_cut - left] = inside
    return cut


def prompted_detection(
    prompt: fol.Detection | fol.Keypoint, found: Segmentation, index: int, keep_box: bool = False
) -> fol.Detection:
    """The detection that a prompt becomes: its mask, and the prompt's own label, id and attributes.

    Where the decoder finds nothing, the mask is None and a box stays as it was.

    Args:
        keep_box: a detection keeps its box, and its mask is cut to that.
    """
    attributes = mask_attributes(found, index)
    if keep_box:
        box = attributes["bounding_box"] = prompt.bounding_box
        mask = attributes["mask"] = mask_in_box(found, index, box)
        attributes["area_px"] = int(np.count_nonzero(mask))
    if isinstance(prompt, fol.Detection):
        detection = prompt.copy()
    else:
        kept = {name: value for name, value in prompt.iter_fields() if name in ("label", "tags", "index")}
        kept |= {name: value for name, value in prompt.iter_attributes() if name != "sam_labels"}
        detection = fol.Detection(bounding_box=[0, 0, 0, 0], **kept)
    detection._id = ObjectId(prompt.id)
    if not found.masks[index].size:
        attributes["bounding_box"] = detection.bounding_box
        attributes["mask"] = None
    for name, value in attributes.items():
        detection[name] = value
    detection.mask_path = None
    if detection.confidence is None:
        detection.confidence = attributes["predicted_iou"]
    return detection


def labels_of(prompts: fol.Label | None) -> list[fol.Detection] | list[fol.Keypoint]:
    """The single labels of a field of prompts."""
    if prompts is None:
        return []
    if isinstance(prompts, fol.Detections):
        return prompts.detections
    return prompts.keypoints if isinstance(prompts, fol.Keypoints) else [prompts]


def keypoint_prompt(keypoint: fol.Keypoint) -> tuple[np.ndarray, np.ndarray]:
    """Relative points [P, 2] and their labels [P]: 1 inside the object, 0 outside (the attribute "sam_labels", as with
    FiftyOne's own SAM; without it all are inside). Points that the image does not show (NaN, or not in 0..1) are left
    out.

    Raises:
        ValueError: there is not one label a point, or one is neither 0 nor 1.
    """
    points = np.array(keypoint.points, np.float64).reshape(-1, 2)
    labels = keypoint["sam_labels"] if keypoint.has_field("sam_labels") else None
    if labels is None:
        labels = [1] * len(points)
    if not isinstance(labels, Sequence | np.ndarray) or [v in (0, 1) for v in labels] != [True] * len(points):
        raise ValueError(
            f"keypoint {keypoint.id} has sam_labels={labels}: 1, inside the object, or 0, outside, was expected for "
            f"each of its {len(points)} points"
        )
    visible = ((points >= 0) & (points <= 1)).all(1)
    return points[visible].astype(np.float32), np.array(labels, np.int64)[visible]


def check_prompts(prompts: fol.Label | None) -> None:
    """Raises ValueError for labels that can't be prompts."""
    if not isinstance(prompts, fol.Detections | fol.Keypoints | fol.Detection | fol.Keypoint | None):
        raise ValueError(f"prompts must be detections or keypoints, not {type(prompts).__name__}")
    for prompt in labels_of(prompts):
        if isinstance(prompt, fol.Detection):
            if not _is_in_image(prompt.bounding_box):
                raise ValueError(
                    f"detection {prompt.id} has no usable bounding box: [x, y, width, height], relative to the image "
                    f"and at least partly in it, was expected, not {prompt.bounding_box}"
                )
        elif not len(keypoint_prompt(prompt)[0]):
            raise ValueError(f"keypoint {prompt.id} has no point that the image shows")


def _is_in_image(box: Sequence[float] | None) -> bool:
    """Whether a relative box, perhaps without an area, is at least partly in the image."""
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        return False
    return 0 <= width <= _LARGEST_BOX and 0 <= height <= _LARGEST_BOX and -width <= x <= 1 and -height <= y <= 1


# FiftyOne's interface to a source of zoo models ---------------------------------------------------------------------


def download_model(name: str, path: str | None) -> None:
    """Makes sure of a model's files. `path` gets a note of them: FiftyOne takes a model for downloaded if it exists."""
    files = fetch_model(name)
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps({key: str(file) for key, file in files.items()}))
    except OSError as error:  # the zoo may be read-only; the files are verified again at every load
        logger.debug("Could not write %s: %s", path, error)


def load_model(name: str, **parameters: object) -> MobileSAMv2Model:
    """The zoo model `name` with :class:`MobileSAMv2ModelConfig`'s parameters."""
    return MobileSAMv2Model(MobileSAMv2ModelConfig({"name": name, **parameters}))


def resolve_input(name: str, ctx: ExecutionContext) -> types.Property:
    """The form of a model's parameters in the App's "apply zoo model"."""
    from fiftyone.operators import types

    inputs = types.Object()
    inputs.enum(
        "prompting",
        list(PROMPTINGS),
        default="object_aware",
        label="Prompting",
        description="object_aware finds the objects first; grid is SAM's search, many times slower",
    )
    inputs.float(
        "confidence_thresh",
        min=0,
        max=1,
        label="Least confidence",
        description=f"Of the detector; {CONFIDENCE} where empty",
    )
    inputs.int("max_prompts", min=1, max=MAX_NMS_CANDIDATES, default=MAX_PROMPTS, label="Most objects an image")
    inputs.float(
        "iou", min=0, max=1, default=NMS_IOU, label="NMS IoU", description="Boxes that overlap more are one object"
    )
    inputs.int(
        "points_per_side",
        min=1,
        max=MAX_POINTS_PER_SIDE,
        default=POINTS_PER_SIDE,
        label="Grid points per side",
        description="grid only",
    )
    for name, label in (("pred_iou_thresh", "Least predicted IoU"), ("stability_score_thresh", "Least stability")):
        inputs.float(
            name,
            min=0,
            max=1,
            default=getattr(SAM_GRID_FILTER, name),
            label=label,
            description="grid only; 0 keeps all",
        )
    inputs.int("min_area", min=0, default=0, label="Smallest area", description="Of a mask, in pixels; 0 keeps all")
    inputs.int("max_masks", min=1, label="Most masks stored an image", description="All where empty")
    inputs.bool("masks_on_disk", default=False, label="Store masks on disk", description="As PNG files")
    inputs.str("device", label="Device", description="cuda, mps or cpu; the best there is where empty")
    inputs.enum("dtype", list(DTYPES), default="float32", label="Precision")
    return types.Property(inputs)


def parse_parameters(name: str, ctx: ExecutionContext, params: Mapping) -> None:
    """Drops what the form left empty, so that the defaults apply."""
    for key in [key for key, value in params.items() if value is None or value == ""]:
        del params[key]
