"""SAM's grid search: the baseline that object discovery replaces.

Each point of a grid yields three masks, most of which are discarded by predicted IoU, by stability and by box NMS.
Source: segment-anything's `SamAutomaticMaskGenerator` with one crop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from .arrays import FloatArray, MaskArray
from .defaults import BOX_NMS_THRESH, PRED_IOU_THRESH, STABILITY_SCORE_THRESH
from .masks import Segmentation

POINTS_PER_BATCH = 64


@dataclass(frozen=True)
class GridFilter:
    """Thresholds that filter the grid's masks; the defaults are SAM's.

    Attributes:
        pred_iou_thresh: minimum predicted IoU; 0 or less keeps all.
        stability_score_thresh: minimum stability score; 0 or less keeps all.
        box_nms_thresh: if the IoU of two boxes is above this, the mask with the lower predicted IoU is dropped.
    """

    pred_iou_thresh: float = PRED_IOU_THRESH
    stability_score_thresh: float = STABILITY_SCORE_THRESH
    box_nms_thresh: float = BOX_NMS_THRESH

    def by_predicted_iou(self, iou: Tensor) -> Tensor:
        """bool [N]: which masks to keep, given their predicted IoU [N]."""
        return iou > self.pred_iou_thresh if self.pred_iou_thresh > 0 else torch.ones_like(iou, dtype=torch.bool)

    def by_stability(self, stability: FloatArray) -> MaskArray:
        """bool [N]: which masks to keep, given their stability scores [N]."""
        threshold = self.stability_score_thresh
        return stability >= threshold if threshold > 0 else np.ones(len(stability), bool)


SAM_GRID_FILTER = GridFilter()


def grid_points(points_per_side: int, size: tuple[int, int]) -> FloatArray:
    """Cell centres, float32 [points_per_side ** 2, 2], xy in pixels of an image of `size` (h, w), row by row."""
    offset = 0.5 / points_per_side
    side = np.linspace(offset, 1 - offset, points_per_side)
    x, y = np.meshgrid(side, side)
    height, width = size
    return np.stack([x * width, y * height], axis=-1).reshape(-1, 2).astype(np.float32)


def suppress_duplicates(segmentation: Segmentation, box_nms_thresh: float) -> Segmentation:
    """Box NMS by predicted IoU; returns the remaining masks, highest predicted IoU first."""
    # SAM's boxes end at the last pixel rather than after it, and SAM computes their IoU that way.
    boxes = torch.from_numpy(segmentation.boxes).float() - torch.tensor([0, 0, 1, 1])
    return segmentation.select(nms(boxes, torch.from_numpy(segmentation.predicted_iou), box_nms_thresh).numpy())
