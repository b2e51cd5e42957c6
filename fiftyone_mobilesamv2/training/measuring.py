"""How well a model finds and segments the objects of labelled images, before and after a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_utils
from torch import nn

from ..evaluation.average_recall import KS, AverageRecall, Shapes
from ..modeling.arrays import FloatArray
from ..modeling.defaults import NMS_IOU
from ..modeling.mobilesamv2 import MobileSAMv2
from ..modeling.object_discovery import ObjectDiscovery
from .examples import Example

# Many proposals with a low confidence: AR@K ranks them, so that the model's threshold doesn't matter.
CONFIDENCE, MAX_PROPOSALS = 0.05, KS[-1]


@dataclass(frozen=True)
class Measures:
    """What was measured on labelled images.

    Attributes:
        images, objects: how many there were.
        recalls: K -> AR@K of masks, or of boxes if not all images have masks.
        of_masks: whether these are recalls of masks.
        iou: mean IoU of each object's mask with the mask that its box prompts; None without masks.
    """

    images: int
    objects: int
    recalls: dict[int, float]
    of_masks: bool
    iou: float | None

    @property
    def recall(self) -> float:
        """The mean of AR@K over K, as in MobileSAMv2's tables."""
        return float(np.mean(list(self.recalls.values())))

    def __str__(self) -> str:
        recalls = ", ".join(f"AR@{k} {value:.3f}" for k, value in self.recalls.items())
        kind = "masks" if self.of_masks else "boxes"
        iou = "" if self.iou is None else f", IoU from boxes {self.iou:.3f}"
        return f"{recalls} ({kind}){iou}"

    def to_dict(self) -> dict[str, object]:
        """JSON-serializable."""
        return {
            "images": self.images,
            "objects": self.objects,
            **{f"AR@{k}": value for k, value in self.recalls.items()},
            "of": "masks" if self.of_masks else "boxes",
            "IoU from boxes": self.iou,
        }


def measure(model: MobileSAMv2, examples: Sequence[Example], tell: Callable[[float], None]) -> Measures:
    """Measures a model with a detector.

    Args:
        tell: called with the finished share; may raise Cancelled.
    """
    of_masks = all(example.masks is not None for example in examples)
    recall = AverageRecall(KS)
    ious: list[float] = []
    for done, example in enumerate(examples, 1):
        image = example.read()
        if of_masks:
            found = model.segment_everything([image], conf=CONFIDENCE, iou=NMS_IOU, max_prompts=MAX_PROPOSALS)[0]
            recall.add(found.rle(), list(example.masks or ()))
            ious += _ious_from_boxes(model, example)
        else:
            (prompts,) = model.discover([image], conf=CONFIDENCE, iou=NMS_IOU, max_prompts=MAX_PROPOSALS)
            recall.add(xywh(prompts.boxes.numpy()), xywh(example.boxes))
        tell(done / len(examples))
    values = recall.metrics()
    recalls = {k: values[f"AR@{k}"] for k in KS}
    objects = sum(len(example.boxes) for example in examples)
    return Measures(len(examples), objects, recalls, of_masks, float(np.mean(ious)) if ious else None)


def mask_iou(model: MobileSAMv2, examples: Iterable[Example]) -> float:
    """The mean IoU of each object's mask with the mask that its box prompts; what chooses the best weights."""
    return float(np.mean([iou for example in examples if example.masks for iou in _ious_from_boxes(model, example)]))


def _ious_from_boxes(model: MobileSAMv2, example: Example) -> list[float]:
    if not len(example.boxes):
        return []
    (found,) = model.segment_anything([example.read()], boxes=[example.boxes])
    pairs = zip(found.rle(), example.masks or ())
    return [float(mask_utils.iou([predicted], [wanted], [0])[0, 0]) for predicted, wanted in pairs]


def box_recall(detector: nn.Module, input_size: int, examples: Iterable[Example]) -> float:
    """The mean of AR@K of a detector's boxes over K: what chooses the best weights during a training."""
    discovery, recall = ObjectDiscovery(detector, input_size), AverageRecall(KS)
    for example in examples:
        prompts = discovery(example.read(), CONFIDENCE, NMS_IOU, MAX_PROPOSALS)
        recall.add(xywh(prompts.boxes.float().numpy()), xywh(example.boxes))
    return recall.metrics()["AR"]


def xywh(corners: FloatArray) -> Shapes:
    """Boxes [N, 4] given by two corners, as x, y, width, height."""
    boxes: FloatArray = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).astype(float)
    return boxes
