"""MobileSAMv2 as a FiftyOne model: samples -> MobileSAMv2 -> labels with masks."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import fiftyone.core.labels as fol
import fiftyone.core.models as fom
import fiftyone.zoo.models as fozm
import numpy as np
import torch
from bson import ObjectId

from ..errors import Failure, message_of
from ..labels.detections import LABEL_BYTES_PER_SAMPLE, DetectionWriter, ImageMasks
from ..labels.leftovers import is_referred_to, settle
from ..labels.mask_files import MaskFiles
from ..labels.prompts import keypoint_prompt, labels_of
from ..modeling.arrays import ImageArray
from ..modeling.checkpoints.files import fetch_model
from ..modeling.defaults import CONFIDENCE
from ..modeling.grid_prompts import GridFilter
from ..modeling.masks import Segmentation
from ..modeling.mobilesamv2 import MobileSAMv2
from .config import PARAMETERS, MobileSAMv2ModelConfig, Parameter, mask_folder
from .reading import ImageGetItem, ImageItem

if TYPE_CHECKING:
    from fiftyone.operators import types
    from fiftyone.operators.executor import ExecutionContext

logger = logging.getLogger(__name__)
T = TypeVar("T")


APPLIED = "apply_model"  # in place of a field's name, which FiftyOne does not tell a model
SETTLE_AFTER = 86_400  # seconds
MAX_UNCONFIRMED = 1000  # images whose labels FiftyOne may not have stored yet: many times what it collects


class ZooModelConfig(MobileSAMv2ModelConfig, fozm.HasZooModel):
    """The configuration as FiftyOne's zoo builds it, from the manifest. `zoo.MobileSAMv2ModelConfig` is this class."""

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ZooModelConfig:
        return cls(d)

    def __setattr__(self, name: str, value: object) -> None:
        # The zoo tells where its note of the download is; the files themselves are in the weights folder.
        if name not in ("model_name", "model_path"):
            super().__setattr__(name, value)


class MobileSAMv2Model(fom.Model, fom.SupportsGetItem, fom.TorchModelMixin):
    """MobileSAMv2 for `apply_model`.

    Without prompts, every image gets :class:`fiftyone.core.labels.Detections` of all its objects, labelled "object".
    With ``apply_model(..., prompt_field="ground_truth")`` the boxes or keypoints of that field become masks and keep
    label, id and attributes.

    An image that can't be read or segmented is logged, listed in :attr:`failures`, and its field is left as it was;
    the others of its batch are stored. With the parameter ``raise_failures=True`` it raises; `skip_failures` of
    `apply_model` does not reach a model.

    Attributes:
        failures: the images of the current or last run that were not segmented.
        num_images, num_labels: how many images that run has gone through, and how many objects it has found.
        writer: how what is found becomes detections.
    """

    def __init__(self, config: MobileSAMv2ModelConfig) -> None:
        self.config = config
        self.model = MobileSAMv2.from_pretrained(
            config.name, config.device, getattr(torch, config.dtype), **config.files
        )
        self.failures: list[Failure] = []
        self.num_images = 0
        self.num_labels = 0
        self.writer = DetectionWriter(0 if config.masks_on_disk else LABEL_BYTES_PER_SAMPLE)
        self._unconfirmed: deque[MaskFiles] = deque()
        self._preprocess = True

    def __enter__(self) -> MobileSAMv2Model:
        self.failures = []
        self.num_images = 0
        self.num_labels = 0
        self.model.seconds.clear()
        self._unconfirmed.clear()
        # What `apply_model` has not stored a day after it was made, it never will: it was killed.
        is_stored = partial(is_referred_to, if_unknown=True)
        settle(apply_model_folder(self.config), lambda *_: True, is_stored, SETTLE_AFTER)
        return self

    def __exit__(self, *args: object) -> None:
        if args[:1] in ((), (None,)):  # FiftyOne has stored all labels by now
            for files in self._unconfirmed:
                files.confirm()
        self._unconfirmed.clear()
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

    def build_get_item(self, field_mapping: dict[str, str] | None = None) -> ImageGetItem:
        return ImageGetItem(field_mapping, skip_failures=not self.config.raise_failures)

    def predict(self, arg: ImageArray | ImageItem) -> fol.Label | None:
        """Labels of one image; None where it has no prompts. Raises what goes wrong."""
        return self.predict_all([arg])[0]

    def predict_all(self, args: Sequence[ImageArray | ImageItem]) -> list[fol.Label | None]:
        """Labels of images: uint8 RGB arrays [H, W, 3] of any sizes, or items of a data loader.

        What goes wrong with an array is raised; with an item, as it says.
        """
        items = [arg if isinstance(arg, ImageItem) else ImageItem(image=np.asarray(arg)) for arg in args]
        found = self.segment_all(items)
        return [each and self._attempt(item, self._to_detections, item, each) for item, each in zip(items, found)]

    def segment_all(self, items: Sequence[ImageItem]) -> list[ImageMasks | None]:
        """The part of :meth:`predict_all` that takes a model: what is found, before it becomes labels."""
        good = [item for item in items if item.error is None]
        for item in items:
            if item.error is not None:
                self.fail(item, item.error)
        try:
            found = self._segment(good)
        except Exception as error:
            if not all(item.skip_failures for item in items):
                raise
            # One image may have failed the others, or they need too much memory together: each gets a try of its own.
            if len(good) > 1:
                told = message_of(error)
                logger.warning("%d images failed as a batch, so each is segmented by itself: %s", len(good), told)
            found = [self._attempt(item, lambda item: self._segment([item])[0], item) for item in good]
        self.num_images += len(items)
        self.num_labels += sum(len(each.masks) for each in found if each)
        of_good = iter(found)
        return [next(of_good) if item.error is None else None for item in items]

    def _to_detections(self, item: ImageItem, found: ImageMasks) -> fol.Detections:
        files = MaskFiles(apply_model_folder(self.config), item.sample_id or str(ObjectId()), APPLIED)
        try:
            detections = self.writer.detections(found, files)
        except BaseException:
            files.discard()
            raise
        if item.sample_id is None:  # of an array: the caller decides what becomes of the labels
            files.confirm()
        elif not files.is_empty:
            self._unconfirmed.append(files)
            if len(self._unconfirmed) > MAX_UNCONFIRMED:
                self._unconfirmed.popleft().confirm()
        return detections

    def _attempt(self, item: ImageItem, work: Callable[..., T], *args: object) -> T | None:
        """None where it fails, which is recorded, or raised where the item says so."""
        try:
            return work(*args)
        except Exception as error:
            if not item.skip_failures:
                raise
            self.fail(item, message_of(error))
            return None

    def fail(self, item: ImageItem, error: str) -> None:
        """Notes an image that was not segmented."""
        failure = Failure(item.sample_id, item.filepath, error)
        self.failures.append(failure)
        logger.warning("Sample %s was not segmented: %s", item.sample_id, failure)

    def _segment(self, items: Sequence[ImageItem]) -> list[ImageMasks | None]:
        if items and items[0].prompted:
            return [self._segment_anything(item) for item in items]
        config = self.config
        found = self.model.segment_everything(
            [item.pixels for item in items],
            prompting=config.prompting,
            conf=CONFIDENCE if config.confidence_thresh is None else config.confidence_thresh,
            iou=config.iou,
            max_prompts=config.max_prompts,
            points_per_side=config.points_per_side,
            grid_filter=GridFilter(config.pred_iou_thresh, config.stability_score_thresh),
        )
        return [ImageMasks(self._wanted(masks)) for masks in found]

    def _wanted(self, found: Segmentation) -> Segmentation:
        if self.config.confidence_thresh is not None:
            found = found.select(np.flatnonzero(found.confidence >= self.config.confidence_thresh))
        if self.config.min_area:
            found = found.select(np.flatnonzero(found.areas >= self.config.min_area))
        if self.config.max_masks is not None:
            found = found.select(np.argsort(-found.confidence, kind="stable")[: self.config.max_masks])
        return found

    def _segment_anything(self, item: ImageItem) -> ImageMasks | None:
        prompts = labels_of(item.prompts)
        if not prompts:
            return None
        height, width = item.pixels.shape[:2]
        scale = np.array([width, height], np.float32)
        if isinstance(prompts[0], fol.Detection):
            boxes = np.array([prompt.bounding_box for prompt in prompts], np.float32).reshape(-1, 2, 2)
            corners = (np.stack([boxes[:, 0], boxes[:, 0] + boxes[:, 1]], 1) * scale).reshape(-1, 4)
            found = self.model.segment_anything([item.pixels], boxes=[corners])[0]
        else:
            points, point_labels = zip(*(keypoint_prompt(prompt) for prompt in prompts))
            in_pixels = [p * scale for p in points]
            found = self.model.segment_anything([item.pixels], points=[in_pixels], point_labels=[point_labels])[0]
        if self.config.confidence_thresh is not None:
            kept = np.flatnonzero(found.predicted_iou >= self.config.confidence_thresh)
            found, prompts = found.select(kept), [prompts[i] for i in kept]
        return ImageMasks(found, prompts)


# FiftyOne's interface to a source of zoo models ---------------------------------------------------------------------
def apply_model_folder(config: MobileSAMv2ModelConfig) -> str:
    """Where masks in files go that `apply_model` stores: with those of any dataset, for a model is told of none."""
    return os.path.join(mask_folder(config), APPLIED)


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
    for parameter in PARAMETERS.values():
        if parameter.is_in_forms:
            _add_input(inputs, parameter)
    return types.Property(inputs)


def _add_input(inputs: types.Object, parameter: Parameter) -> None:
    only = f" ({parameter.applies_to} only)" if parameter.applies_to else ""
    shown = {"default": parameter.default, "label": parameter.title, "description": parameter.description + only}
    if parameter.choices:
        inputs.enum(parameter.name, list(parameter.choices), **shown)
    elif parameter.kind is bool:
        inputs.bool(parameter.name, **shown)
    elif parameter.kind is str:
        inputs.str(parameter.name, **shown)
    else:
        add = inputs.int if parameter.kind is int else inputs.float
        add(parameter.name, min=parameter.min, max=parameter.max, **shown)


def parse_parameters(name: str, ctx: ExecutionContext, params: MutableMapping[str, Any]) -> None:
    """Drops what the form left empty, so that the defaults apply."""
    for key in [key for key, value in params.items() if value is None or value == ""]:
        del params[key]
