"""Images -> box prompts: a class-agnostic ultralytics YOLO detector, run as in MobileSAMv2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms
from ultralytics.data.augment import LetterBox
from ultralytics.utils.ops import xywh2xyxy

from .arrays import ImageArray
from .defaults import CONFIDENCE, MAX_NMS_CANDIDATES, MAX_PROMPTS, NMS_IOU

INPUT_SIZE = 1024  # as in the release

# Boxes that end this close to the border are extended to it: 20 px of the network input in the release.
BORDER_SNAPPING = 20 / INPUT_SIZE  # of its long side

_STRIDE = 32


@dataclass(frozen=True)
class BoxPrompts:
    """Box prompts of one image, most confident first.

    Attributes:
        boxes: float32 [N, 4], xyxy in pixels of the image.
        scores: float32 [N], the detector's confidence.
    """

    boxes: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.boxes)


def letterbox(image: ImageArray, input_size: int) -> Tensor:
    """uint8 RGB [H, W, 3] -> float32 [1, 3, h, w] in 0..1, long side `input_size`, sides multiples of 32.

    The shape depends only on the image, so an image is preprocessed the same way in every batch.
    """
    resized = LetterBox((input_size, input_size), auto=True, stride=_STRIDE)(image=image)
    return torch.from_numpy(resized).permute(2, 0, 1)[None].float() / 255


def snap_to_border(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Moves the ends of `boxes` ([N, 4] xyxy) that lie near the border of `size` (h, w) onto it.

    Near is 20 px if the long side has 1024 px.
    """
    height, width = size
    margin = BORDER_SNAPPING * max(size)
    ends = torch.tensor([width, height], dtype=boxes.dtype, device=boxes.device)
    starts, stops = boxes[:, :2], boxes[:, 2:]
    starts = torch.where(starts < margin, torch.zeros_like(starts), starts)
    stops = torch.where(stops > ends - margin, ends.expand_as(stops), stops)
    return torch.cat([starts, stops], dim=1)


def to_image(boxes: Tensor, network_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] in pixels of the letterboxed network input -> pixels of the image, clipped to it.

    Sizes are (h, w). As in the release (ultralytics 8.0.120), both axes share one gain and padding is whole pixels.
    Later versions use the rounded size of each axis, which shifts boxes by up to a quarter of a pixel.
    """
    gain = min(network_size[0] / size[0], network_size[1] / size[1])
    pad = torch.tensor(
        [round((n - s * gain) / 2 - 0.1) for n, s in zip(network_size[::-1], size[::-1])], device=boxes.device
    )
    ends = torch.tensor(size[::-1], dtype=boxes.dtype, device=boxes.device)
    corners = (boxes.reshape(-1, 2, 2) - pad) / gain
    return torch.minimum(corners.clamp(min=0), ends).reshape(-1, 4)


def surest_boxes(raw: Tensor, conf: float, iou: float, max_prompts: int) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression of one image's boxes.

    Args:
        raw: [5 or more, anchors], a detector's output: cx, cy, w, h in network pixels, score, ...
        conf, iou, max_prompts: minimum score, NMS threshold and maximum number of boxes.

    Returns:
        float32 [N, 4] xyxy in network pixels and [N] scores, most confident first.
    """
    candidates = raw[:5].T.float()
    candidates = candidates[candidates[:, 4] > conf]
    order = candidates[:, 4].argsort(descending=True, stable=True)[:MAX_NMS_CANDIDATES]
    boxes, scores = xywh2xyxy(candidates[order, :4]), candidates[order, 4]
    kept = batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou)[:max_prompts]
    return boxes[kept], scores[kept]


def boxes_from_raw(
    raw: Tensor, network_size: tuple[int, int], size: tuple[int, int], conf: float, iou: float, max_prompts: int
) -> BoxPrompts:
    """:func:`surest_boxes`, snapped to the border and scaled back to the image.

    Args:
        network_size: (h, w) of the letterboxed network input.
        size: (h, w) of the image.
    """
    boxes, scores = surest_boxes(raw, conf, iou, max_prompts)
    boxes = to_image(snap_to_border(boxes, network_size), network_size, size)
    return BoxPrompts(boxes.cpu(), scores.cpu())


class ObjectDiscovery(nn.Module):
    """A detector and its input size.

    Args:
        detector: an ultralytics detection or segmentation model with one class.
        input_size: pixels of the long side of the network input.
    """

    def __init__(self, detector: nn.Module, input_size: int = INPUT_SIZE) -> None:
        super().__init__()
        self.detector = detector
        self.input_size = input_size

    def forward(
        self, image: ImageArray, conf: float = CONFIDENCE, iou: float = NMS_IOU, max_prompts: int = MAX_PROMPTS
    ) -> BoxPrompts:
        """Boxes of the objects in one uint8 RGB image [H, W, 3]; may be empty."""
        pixels = letterbox(image, self.input_size).to(next(self.detector.parameters()))
        raw = self.detector(pixels)[0]
        if isinstance(raw, tuple):  # a segmentation model: predictions and mask prototypes
            raw = raw[0]
        height, width = pixels.shape[-2:]
        return boxes_from_raw(raw[0], (height, width), image.shape[:2], conf, iou, max_prompts)
