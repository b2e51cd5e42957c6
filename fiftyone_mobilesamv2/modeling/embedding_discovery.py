"""Image embedding -> box prompts: object discovery that reuses the encoding that the masks are decoded from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import C2f, Conv, Detect

from .object_discovery import BoxPrompts, surest_boxes

_WIDTH = 128  # channels of the pyramid


class _Head(Detect):
    # ultralytics sets this on `Detect` itself whenever it builds a model, to True for a YOLOv8: heads that are built
    # later have other convolutions then.
    legacy = False


class EmbeddingDetector(nn.Module):
    """Finds objects in an image embedding: a simple feature pyramid and YOLOv8's head.

    The pyramid, half, the same and twice the stride of the one map that a plain backbone gives, is that of "Exploring
    Plain Vision Transformer Backbones for Object Detection" (ViTDet, arXiv 2203.16527), section 3.

    Args:
        embed_dim: channels of the embedding.
        stride: pixels of the network input per cell of the embedding.
    """

    def __init__(self, embed_dim: int, stride: int) -> None:
        super().__init__()
        half = _WIDTH // 2
        self.reduce = Conv(embed_dim, _WIDTH, 1)
        self.up = nn.Sequential(nn.ConvTranspose2d(_WIDTH, half, 2, 2), C2f(half, half, 1))
        self.same = C2f(_WIDTH, _WIDTH, 1)
        self.down = nn.Sequential(Conv(_WIDTH, _WIDTH, 3, 2), C2f(_WIDTH, _WIDTH, 1))
        self.detect = _Head(1, ch=(half, _WIDTH, _WIDTH))
        self.detect.stride = torch.tensor([stride / 2, stride, stride * 2])
        self.detect.bias_init()

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, C, G, G] -> what :class:`Detect` returns: in inference, first [B, 5, anchors]: cx, cy, w, h, score."""
        x = self.reduce(embedding)
        out: Tensor = self.detect([self.up(x), self.same(x), self.down(x)])
        return out


class EmbeddingDiscovery(nn.Module):
    """Object discovery from the embedding that masks are decoded from.

    Args:
        detector: finds the objects.
    """

    def __init__(self, detector: EmbeddingDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(
        self,
        embedding: Tensor,
        input_size: tuple[int, int],
        size: tuple[int, int],
        conf: float,
        iou: float,
        max_prompts: int,
    ) -> BoxPrompts:
        """Boxes of the objects in one image; may be empty.

        Args:
            embedding: [C, G, G].
            input_size, size: (h, w) of the image in the network input, and of the image itself.
            conf, iou, max_prompts: minimum score, NMS threshold and maximum number of boxes.
        """
        raw = self.detector(embedding[None].to(next(self.detector.parameters())))[0]
        boxes, scores = surest_boxes(raw[0], conf, iou, max_prompts)
        scale = torch.tensor([size[1] / input_size[1], size[0] / input_size[0]] * 2, device=boxes.device)
        ends = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype, device=boxes.device)
        boxes = torch.minimum((boxes * scale).clamp(min=0), ends)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)  # others lie in the padding
        return BoxPrompts(boxes[has_area].cpu(), scores[has_area].cpu())
