"""Low-res logits -> binary masks, each cropped to its own tight box.

The released code upsamples every mask of an image to full size at once. This module computes one mask at a time, and
only the region where the mask can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .arrays import FloatArray, IntArray, MaskArray
from .rle import RLE, rle_from_crop

# SAM's stability score compares the mask at these distances above and below the threshold (segment-anything's
# automatic mask generator, `stability_score_offset`).
STABILITY_OFFSET = 1.0
# `upsample` sums four products in each of its two steps, with weights >= 0. In any order of summation, the error of
# such a float32 sum is below this factor times the sum of absolute values: 10 roundings of 2^-24 come from the sum, 4
# from our weights.
_ROUNDING = 2**-20
# Maximum number of pixels that are decided one by one, at a few KB each; upsampling the whole mask takes a few MB.
_MAX_DOUBTS = 1024


@dataclass
class Segmentation:
    """The masks of one image.

    Attributes:
        boxes: int [N, 4], xyxy in pixels: the tight box of each mask, ends exclusive; zeros where a mask is empty.
        masks: N bool arrays; mask i has the shape of box i.
        confidence: float32 [N]: the detector's score for the box prompt; the predicted IoU if no detector was used.
        predicted_iou: float32 [N]: the decoder's own estimate of the mask's IoU with the object.
        stability: float32 [N]: IoU of the masks at logit +1 and -1.
        size: (height, width) of the image.
        points: float32 [N, 2], the point prompt of each mask if the grid search produced it; otherwise None.
    """

    boxes: IntArray
    masks: list[MaskArray]
    confidence: FloatArray
    predicted_iou: FloatArray
    stability: FloatArray
    size: tuple[int, int]
    points: FloatArray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def areas(self) -> IntArray:
        """int64 [N], pixels of each mask."""
        return np.array([np.count_nonzero(mask) for mask in self.masks], np.int64)

    def select(self, indices: Sequence[int] | IntArray) -> Segmentation:
        """The masks `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        return Segmentation(
            boxes=self.boxes[indices],
            masks=[self.masks[i] for i in indices],
            confidence=self.confidence[indices],
            predicted_iou=self.predicted_iou[indices],
            stability=self.stability[indices],
            size=self.size,
            points=None if self.points is None else self.points[indices],
        )

    def full_mask(self, index: int) -> MaskArray:
        """Mask `index` at its place in the image, bool [H, W]."""
        full = np.zeros(self.size, bool)
        x0, y0, x1, y1 = self.boxes[index]
        full[y0:y1, x0:x1] = self.masks[index]
        return full

    def rle(self) -> list[RLE]:
        """The masks as compressed COCO RLE of the full image: `{"size": [H, W], "counts": bytes}`."""
        return [rle_from_crop(mask, box, self.size) for mask, box in zip(self.masks, self.boxes)]


def upsample(low_res_logits: Tensor, image_size: int, input_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """SAM's upsampling of whole logit maps: to the network input, cropped to remove its padding, then to the image.

    This is the definition that :func:`crop_masks` reproduces; it allocates N full-size float maps.

    Args:
        low_res_logits: [N, L, L].
        image_size: side of the padded network input.
        input_size: (h, w) of the resized image in the network input.
        size: (h, w) of the image.

    Returns:
        float32 [N, H, W]
    """
    logits = F.interpolate(low_res_logits[None].float(), (image_size, image_size), mode="bilinear", align_corners=False)
    logits = logits[..., : input_size[0], : input_size[1]]
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0]


@dataclass(frozen=True)
class Axis:
    """One axis of :func:`upsample` as a matrix, since interpolation is linear and separable.

    Attributes:
        weights: float32 [n, L]; pixel i of the image is `weights[i] @ low_res`.
        first, last: [n]: the range of low-res cells that pixel i depends on, inclusive.
    """

    weights: Tensor
    first: Tensor
    last: Tensor

    def pixels_near(self, cells: slice) -> slice:
        """The pixels that depend on any of these low-res cells."""
        near = torch.nonzero((self.first < cells.stop) & (self.last >= cells.start)).flatten()
        return slice(int(near[0]), int(near[-1]) + 1) if len(near) else slice(0, 0)

    def cells_of(self, pixels: slice) -> slice:
        """The low-res cells that these pixels depend on."""
        return slice(int(self.first[pixels].min()), int(self.last[pixels].max()) + 1)


def _bilinear_matrix(n_in: int, n_out: int, device: torch.device) -> Tensor:
    """float32 [n_out, n_in]: 1-D `F.interpolate(..., mode="bilinear", align_corners=False)`.

    Computed by `interpolate` itself, so that the weights carry its float32 rounding of positions: 6e-5 at pixel 1000.
    """
    return F.interpolate(torch.eye(n_in, device=device)[None], n_out, mode="linear", align_corners=False)[0].T


@lru_cache(maxsize=16)  # every batch of prompts of an image needs the same two
def upsampling_axis(logit_size: int, image_size: int, input_length: int, length: int, device: torch.device) -> Axis:
    """The axis of an image of `length` pixels that covers `input_length` of the network input's `image_size`."""
    matrix = (
        _bilinear_matrix(input_length, length, device) @ _bilinear_matrix(logit_size, image_size, device)[:input_length]
    )
    used = matrix != 0
    first = used.int().argmax(1)
    last = logit_size - 1 - used.flip(1).int().argmax(1)
    return Axis(matrix, first.cpu(), last.cpu())


def crop_masks(
    low_res_logits: Tensor, image_size: int, input_size: tuple[int, int], size: tuple[int, int]
) -> tuple[IntArray, list[MaskArray], FloatArray]:
    """`upsample(...) > 0`, each mask cropped to its tight box: the same pixels, without the full-size maps.

    Arguments as for :func:`upsample`.

    Returns:
        boxes int32 [N, 4] xyxy with exclusive ends (zeros for an empty mask), masks (bool arrays), stability
        float32 [N] (0 for an empty mask).
    """
    logits = low_res_logits.detach().float()
    rows, columns = (
        upsampling_axis(logits.shape[-1], image_size, n_in, n_out, logits.device)
        for n_in, n_out in zip(input_size, size)
    )
    column_weights = columns.weights.T.contiguous()
    row_used, column_used = ((logits.amax(axis) > -STABILITY_OFFSET).cpu().numpy() for axis in (2, 1))
    # Both orders of summation may round.
    tolerances = (logits.abs().amax((1, 2)) * 2 * _ROUNDING).tolist() if len(logits) else []

    boxes = np.zeros((len(logits), 4), np.int32)
    masks: list[MaskArray] = [np.zeros((0, 0), bool)] * len(logits)
    stability = np.zeros(len(logits), np.float32)
    for i, tolerance in enumerate(tolerances):
        used_rows, used_columns = _extent(row_used[i]), _extent(column_used[i])
        if used_rows is None or used_columns is None:
            continue
        r, c = rows.pixels_near(used_rows), columns.pixels_near(used_columns)
        if r.start == r.stop or c.start == c.stop:  # it lies entirely in the padding
            continue
        in_rows, in_columns = rows.cells_of(r), columns.cells_of(c)
        upsampled = rows.weights[r, in_rows] @ logits[i, in_rows, in_columns] @ column_weights[in_columns, c]
        values = upsampled.cpu().numpy()  # NumPy compares and counts several times faster than torch does on a CPU
        mask, possible = values > tolerance, values >= -tolerance
        if np.count_nonzero(mask) != np.count_nonzero(possible):
            doubt_y, doubt_x = np.nonzero(possible & ~mask)
            few = len(doubt_y) <= _MAX_DOUBTS
            decided = _decided(logits[i], rows.weights[r][doubt_y], columns.weights[c][doubt_x]) if few else None
            if decided is None:
                values = upsample(logits[i : i + 1], image_size, input_size, size)[0, r, c].cpu().numpy()
                mask = values > 0
            else:
                mask[doubt_y, doubt_x] = decided
        y, x = _extent(mask.any(1)), _extent(mask.any(0))
        if y is None or x is None:
            continue
        above, below = (np.count_nonzero(values > offset) for offset in (STABILITY_OFFSET, -STABILITY_OFFSET))
        stability[i] = above / below
        boxes[i] = c.start + x.start, r.start + y.start, c.start + x.stop, r.start + y.stop
        masks[i] = mask[y, x].copy()
    return boxes, masks, stability


def _decided(logits: Tensor, row_weights: Tensor, column_weights: Tensor) -> MaskArray | None:
    """Whether each of K pixels is above 0, or None if rounding leaves any of them in doubt.

    Args:
        logits: [L, L].
        row_weights, column_weights: [K, L], from :class:`Axis`.
    """
    logits, row_weights, column_weights = (x.cpu().double() for x in (logits, row_weights, column_weights))
    values = ((row_weights @ logits) * column_weights).sum(1)
    doubt = ((row_weights @ logits.abs()) * column_weights).sum(1) * _ROUNDING
    return (values > 0).numpy() if bool((values.abs() > doubt).all()) else None


def _extent(used: MaskArray) -> slice | None:
    """The range from the first to the last true entry of a bool vector; None if all are false."""
    (indices,) = np.nonzero(used)
    return slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else None


def concatenate(segmentations: Sequence[Segmentation], size: tuple[int, int]) -> Segmentation:
    """The masks of several segmentations of one image of `size` (h, w), in order."""
    with_points = bool(segmentations) and all(part.points is not None for part in segmentations)
    return Segmentation(
        boxes=np.concatenate([np.zeros((0, 4), np.int32), *(part.boxes for part in segmentations)]),
        masks=[mask for part in segmentations for mask in part.masks],
        confidence=np.concatenate([np.zeros(0, np.float32), *(part.confidence for part in segmentations)]),
        predicted_iou=np.concatenate([np.zeros(0, np.float32), *(part.predicted_iou for part in segmentations)]),
        stability=np.concatenate([np.zeros(0, np.float32), *(part.stability for part in segmentations)]),
        size=size,
        points=np.concatenate([part.points for part in segmentations]) if with_points else None,
    )
