"""Parameters of a model."""

from __future__ import annotations

import os
import re
from functools import partial

import fiftyone as fo
import fiftyone.core.config as foc
import fiftyone.zoo.models as fozm
import torch

from ..errors import ArgumentError
from ..modeling.arguments import PROMPTINGS, checked_number
from ..modeling.grid_prompts import MAX_POINTS_PER_SIDE, POINTS_PER_SIDE, SAM_GRID_FILTER
from ..modeling.object_discovery import MAX_NMS_CANDIDATES, MAX_PROMPTS, NMS_IOU

_IN_NO_PATH = re.compile("[\0\ud800-\udfff]")  # the latter are bytes that are no UTF-8: no database takes them
_MAX_INT64 = 2**63 - 1  # as a whole number
CHECKPOINTS = ("encoder_checkpoint", "decoder_checkpoint", "detector_checkpoint")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MobileSAMv2ModelConfig(foc.Config, fozm.HasZooModel):
    """Parameters of a :class:`MobileSAMv2Model`; all can be given to `load_zoo_model`.

    Args:
        name: the zoo model.
        device (None): "cuda", "mps", "cpu"; None takes what there is, in this order.
        dtype ("float32"): "float32", "bfloat16" or "float16", for the heavy computation.
        prompting ("object_aware"): "object_aware", or "grid" for SAM's grid search.
        confidence_thresh (None): minimum confidence of a mask. None means the paper's 0.4 of the detector ;
            with the grid or with prompts of your own the confidence is the predicted IoU, and None keeps all.
        iou (0.9): boxes of the detector that overlap more are the same object.
        max_prompts (320): maximum number of boxes in an image.
        points_per_side (32): points of the grid along each side.
        pred_iou_thresh (0.88), stability_score_thresh (0.95): minimum predicted IoU and stability of the grid's masks;
            SAM's values, and 0 keeps all.
        min_area (0): minimum area of a mask in pixels. A prompt of your own gets its mask whatever the area.
        max_masks (None): maximum number of masks stored for an image, most confident first.
        masks_on_disk (False): store every mask as a PNG file; else only those that don't fit into the database.
        mask_dir (None): folder for these files; None: "mobilesamv2_masks" in FiftyOne's `default_dataset_dir`.
        raise_failures (False): raise where an image fails; else it is listed and the rest goes on.
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
        self.raise_failures = read("raise_failures", default=False)
        for name in CHECKPOINTS:
            setattr(self, name, read(name, default=None))
        self.check()
        if unknown := [key for key in d if key not in vars(self)]:
            known = [key for key in vars(self) if key not in ("model_name", "model_path")]
            raise ArgumentError(f"Unknown parameter {', '.join(unknown)} of {self.name}; it takes {', '.join(known)}.")

    def check(self) -> None:
        """Raises ValueError for a parameter that is not what it should be."""
        for key in ("name", "device", "dtype", "prompting", "mask_dir", *CHECKPOINTS):
            value = getattr(self, key)
            is_text = isinstance(value, str) and value and not _IN_NO_PATH.search(value)
            if not is_text and (value is not None or key == "name"):
                raise ArgumentError(f"{key} must be text that can be a name or a path, not {value!r}.")
        for key, choices in (("prompting", PROMPTINGS), ("dtype", DTYPES)):
            value = getattr(self, key)
            if value not in choices:
                raise ArgumentError(f"{key} must be one of {', '.join(choices)}, not {value!r}.")
        for key in ("masks_on_disk", "raise_failures"):
            if not isinstance(getattr(self, key), bool):
                raise ArgumentError(f"{key} must be True or False, not {getattr(self, key)!r}.")
        whole = {
            "max_prompts": (1, MAX_NMS_CANDIDATES),
            "points_per_side": (1, MAX_POINTS_PER_SIDE),
            "min_area": (0, _MAX_INT64),
            "max_masks": (1, _MAX_INT64),
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


def mask_folder(config: MobileSAMv2ModelConfig) -> str:
    """Where masks on disk go."""
    return os.path.abspath(config.mask_dir or os.path.join(fo.config.default_dataset_dir, "mobilesamv2_masks"))
