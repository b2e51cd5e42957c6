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
import fiftyone.utils.torch as fout
import fiftyone.zoo.models as fozm
import numpy as np
import torch
from bson import ObjectId

from ..errors import Failure, message_of
from ..fiftyone_internals import apply_model_variables
from ..labels.detections import LABEL_BYTES_PER_SAMPLE, DetectionWriter, ImageMasks
from ..labels.fields import check_apply_model
from ..labels.leftovers import is_referred_to, settle
from ..labels.mask_files import MaskFiles
from ..labels.prompts import keypoint_prompt, labels_of
from ..modeling.arrays import ImageArray
from ..modeling.checkpoints.files import fetch_model
from ..modeling.checkpoints.lookup import find_trained
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


APPLIED = "apply_model"  # in place of the field's name, which FiftyOne does not pass to a model
SETTLE_AFTER = 86_400  # seconds: a day
MAX_UNCONFIRMED = 1000  # images whose labels may not be stored yet: many times what FiftyOne collects before storing


class ZooModelConfig(MobileSAMv2ModelConfig, fozm.HasZooModel):
    """The configuration, as FiftyOne's zoo builds it from the manifest. `zoo.MobileSAMv2ModelConfig` is this class."""

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ZooModelConfig:
        return cls(d)

    def __setattr__(self, name: str, value: object) -> None:
        # The zoo sets these to its own record of the download. The files themselves are in the weights folder.
        if name not in ("model_name", "model_path"):
            super().__setattr__(name, value)


class MobileSAMv2Model(fom.Model, fom.SupportsGetItem, fom.TorchModelMixin):
    """MobileSAMv2 for `apply_model`.

    Without prompts, every image gets :class:`fiftyone.core.labels.Detections` of all its objects, labelled "object".
    With ``apply_model(..., prompt_field="ground_truth")``, the boxes or keypoints of that field become masks and keep
    their labels, ids and attributes.

    An image that can't be read or segmented is logged and listed in :attr:`failures`, and its field is left unchanged;
    the rest of its batch is stored. With the parameter ``raise_failures=True``, the failure is raised instead. FiftyOne
    does not pass the `skip_failures` of `apply_model` to the model.

    Attributes:
        failures: the images of the current or last run that could not be segmented.
        num_images, num_labels: the number of images that this run has processed, and of objects that it has found.
        writer: converts masks to detections.
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
        if (call := apply_model_variables()) is not None:
            check_apply_model(
                call["samples"],
                call["label_field"],
                call["field_mapping"].get("prompt_field"),
                fout.recommend_num_workers(call["num_workers"]),
            )
        self.failures = []
        self.num_images = 0
        self.num_labels = 0
        self.model.seconds.clear()
        self._unconfirmed.clear()
        # If `apply_model` has not stored labels within a day, the process was killed, and their mask files are useless.
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
        # True would make FiftyOne run batches of one image. `collate_fn` returns a list, so sizes may differ.
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
        """The labels of one image; None if it has no prompts. Failures are handled as in :meth:`predict_all`."""
        return self.predict_all([arg])[0]

    def predict_all(self, args: Sequence[ImageArray | ImageItem]) -> list[fol.Label | None]:
        """The labels of images: uint8 RGB arrays [H, W, 3] of any sizes, or items of a data loader.

        A failure with an array is raised. With an item, its `skip_failures` decides.
        """
        items = [arg if isinstance(arg, ImageItem) else ImageItem(image=np.asarray(arg)) for arg in args]
        masks = self.segment_all(items)
        return [each and self._attempt(item, self._to_detections, item, each) for item, each in zip(items, masks)]

    def segment_all(self, items: Sequence[ImageItem]) -> list[ImageMasks | None]:
        """The masks of images, before they become labels: the part of :meth:`predict_all` that runs the model."""
        good = [item for item in items if item.error is None]
        for item in items:
            if item.error is not None:
                self.fail(item, item.error)
        try:
            masks = self._segment(good)
        except Exception as error:
            if not all(item.skip_failures for item in items):
                raise
            # One image may have made the batch fail, or it needs too much memory as a whole: segment each image alone.
            if len(good) > 1:
                cause = message_of(error)
                logger.warning("%d images failed as a batch; each is segmented by itself: %s", len(good), cause)
            masks = [self._attempt(item, lambda item: self._segment([item])[0], item) for item in good]
        self.num_images += len(items)
        self.num_labels += sum(len(each.masks) for each in masks if each)
        of_good = iter(masks)
        return [next(of_good) if item.error is None else None for item in items]

    def _to_detections(self, item: ImageItem, masks: ImageMasks) -> fol.Detections:
        files = MaskFiles(apply_model_folder(self.config), item.sample_id or str(ObjectId()), APPLIED)
        try:
            detections = self.writer.detections(masks, files)
        except BaseException:
            files.discard()
            raise
        if item.sample_id is None:  # an array: the caller decides what to do with the labels
            files.confirm()
        elif not files.is_empty:
            self._unconfirmed.append(files)
            if len(self._unconfirmed) > MAX_UNCONFIRMED:
                self._unconfirmed.popleft().confirm()
        return detections

    def _attempt(self, item: ImageItem, work: Callable[..., T], *args: object) -> T | None:
        """The result of `work(*args)`. A failure is recorded and gives None, or is raised if the item requires that."""
        try:
            return work(*args)
        except Exception as error:
            if not item.skip_failures:
                raise
            self.fail(item, message_of(error))
            return None

    def fail(self, item: ImageItem, error: str) -> None:
        """Records and logs an image that could not be segmented."""
        failure = Failure(item.sample_id, item.filepath, error)
        self.failures.append(failure)
        logger.warning("Sample %s was not segmented: %s", item.sample_id, failure)

    def _segment(self, items: Sequence[ImageItem]) -> list[ImageMasks | None]:
        if items and items[0].prompted:
            return [self._segment_anything(item) for item in items]
        config = self.config
        results = self.model.segment_everything(
            [item.pixels for item in items],
            prompting=config.prompting,
            conf=CONFIDENCE if config.confidence_thresh is None else config.confidence_thresh,
            iou=config.iou,
            max_prompts=config.max_prompts,
            points_per_side=config.points_per_side,
            grid_filter=GridFilter(config.pred_iou_thresh, config.stability_score_thresh),
        )
        return [ImageMasks(self._filtered(masks)) for masks in results]

    def _filtered(self, masks: Segmentation) -> Segmentation:
        if self.config.confidence_thresh is not None:
            masks = masks.select(np.flatnonzero(masks.confidence >= self.config.confidence_thresh))
        if self.config.min_area:
            masks = masks.select(np.flatnonzero(masks.areas >= self.config.min_area))
        if self.config.max_masks is not None:
            masks = masks.select(np.argsort(-masks.confidence, kind="stable")[: self.config.max_masks])
        return masks

    def _segment_anything(self, item: ImageItem) -> ImageMasks | None:
        prompts = labels_of(item.prompts)
        if not prompts:
            return None
        height, width = item.pixels.shape[:2]
        scale = np.array([width, height], np.float32)
        if isinstance(prompts[0], fol.Detection):
            boxes = np.array([prompt.bounding_box for prompt in prompts], np.float32).reshape(-1, 2, 2)
            corners = (np.stack([boxes[:, 0], boxes[:, 0] + boxes[:, 1]], 1) * scale).reshape(-1, 4)
            masks = self.model.segment_anything([item.pixels], boxes=[corners])[0]
        else:
            points, point_labels = zip(*(keypoint_prompt(prompt) for prompt in prompts))
            in_pixels = [p * scale for p in points]
            masks = self.model.segment_anything([item.pixels], points=[in_pixels], point_labels=[point_labels])[0]
        if self.config.confidence_thresh is not None:
            kept = np.flatnonzero(masks.predicted_iou >= self.config.confidence_thresh)
            masks, prompts = masks.select(kept), [prompts[i] for i in kept]
        return ImageMasks(masks, prompts)


# FiftyOne's interface to a source of zoo models ---------------------------------------------------------------------
def apply_model_folder(config: MobileSAMv2ModelConfig) -> str:
    """The folder for mask files of `apply_model`. All datasets share it, since a model doesn't know its dataset."""
    return os.path.join(mask_folder(config), APPLIED)


def download_model(name: str, path: str | None) -> None:
    """Verifies a model's files, downloading missing ones.

    Then lists them in the file `path`, if given: FiftyOne considers a model downloaded if that file exists. For a
    trained model, the file is its configuration.
    """
    files = fetch_model(name)
    if path is None or find_trained(name):
        return
    try:
        Path(path).write_text(json.dumps({key: str(file) for key, file in files.items()}))
    except OSError as error:  # the zoo's folder may be read-only; the files are verified at every load anyway
        logger.debug("Could not write %s: %s", path, error)


def load_model(name: str | os.PathLike[str], **parameters: object) -> MobileSAMv2Model:
    """The model `name`, or the trained model in that folder, with parameters of :class:`MobileSAMv2ModelConfig`."""
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
    """Drops empty inputs of the form, so that the defaults apply."""
    for key in [key for key, value in params.items() if value is None or value == ""]:
        del params[key]
