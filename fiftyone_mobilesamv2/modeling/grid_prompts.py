"""SAM's grid search: the baseline that object discovery replaces.

A grid of points, three masks each, and most of them thrown away again: by predicted IoU, by stability, by box NMS.
Source: segment-anything's `SamAutomaticMaskGenerator` with one crop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from .arrays import FloatArray, MaskArray
from .masks import Segmentation

POINTS_PER_SIDE = 32
POINTS_PER_BATCH = 64
MAX_POINTS_PER_SIDE = 256  # low-res logits have no more cells along a side


@dataclass(frozen=True)
class GridFilter:
    """What is kept of the grid's masks; the defaults are SAM's.

    Attributes:
        pred_iou_thresh: minimum predicted IoU; 0 or less keeps all.
        stability_score_thresh: minimum stability score; 0 or less keeps all.
        box_nms_thresh: IoU of boxes above which the mask with the lower predicted IoU goes.
    """

    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7

    def by_predicted_iou(self, iou: Tensor) -> Tensor:
        """bool [N], which masks of these predicted IoUs are kept."""
        return iou > self.pred_iou_thresh if self.pred_iou_thresh > 0 else torch.ones_like(iou, dtype=torch.bool)

    def by_stability(self, stability: FloatArray) -> MaskArray:
        """bool [N], which masks of these stability scores are kept."""
        threshold = self.stability_score_thresh
        return stability >= threshold if threshold > 0 else np.ones(len(stability), bool)


SAM_GRID_FILTER = GridFilter()


def grid_points(points_per_side: int, size: tuple[int, int]) -> FloatArray:
    """float32 [points_per_side ** 2, 2], xy in pixels of an image of `size` (h, w), row by row, cells' centres."""
    offset = 0.5 / points_per_side
    side = np.linspace(offset, 1 - offset, points_per_side)
    x, y = np.meshgrid(side, side)
    height, width = size
    return np.stack([x * width, y * height], axis=-1).reshape(-1, 2).astype(np.float32)


def suppress_duplicates(found: Segmentation, box_nms_thresh: float) -> Segmentation:
    """Box NMS by predicted IoU; what is left comes in order of predicted IoU."""
    # SAM's boxes end at the last pixel, not behind it, and are compared as such.
    boxes = torch.from_numpy(found.boxes).float() - torch.tensor([0, 0, 1, 1])
    return found.select(nms(boxes, torch.from_numpy(found.predicted_iou), box_nms_thresh).numpy())
