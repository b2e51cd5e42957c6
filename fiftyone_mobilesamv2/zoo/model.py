"""MobileSAMv2 as a FiftyOne model: samples -> MobileSAMv2 -> labels with masks."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import fiftyone.core.labels as fol
import fiftyone.core.models as fom
import fiftyone.core.utils as fou
import numpy as np
from bson import ObjectId

from ..errors import Failure
from ..labels.detections import (
    _DOCUMENT,
    DETECTION_BYTES,
    LABEL,
    LABEL_BYTES_PER_SAMPLE,
    Found,
    _attributes,
    prompted_detection,
)
from ..labels.mask_files import MaskFiles
from ..labels.masks import serialized
from ..labels.prompts import keypoint_prompt, labels_of
from ..modeling.arguments import PROMPTINGS
from ..modeling.checkpoints.files import fetch_model
from ..modeling.grid_prompts import MAX_POINTS_PER_SIDE, POINTS_PER_SIDE, SAM_GRID_FILTER, GridFilter
from ..modeling.masks import Segmentation
from ..modeling.mobilesamv2 import MobileSAMv2
from ..modeling.object_discovery import CONFIDENCE, MAX_NMS_CANDIDATES, MAX_PROMPTS, NMS_IOU
from .config import DTYPES, MobileSAMv2ModelConfig, mask_folder
from .reading import ImageGetItem, ImageItem

if TYPE_CHECKING:
    from fiftyone.operators import types
    from fiftyone.operators.executor import ExecutionContext

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
