"""A picture of the doctor's results: the known objects, the masks from their boxes, and all objects found."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ..modeling.arrays import AnyArray, ImageArray, IntArray, MaskArray
from ..modeling.masks import Segmentation
from ..quickstart import draw_masks
from .ground_truth import KnownImage
from .segmentation_check import Measured

TILE = 360  # pixels of the long side of each image
ROWS = 8
CAPTIONS = ("known objects", "masks from their boxes", "everything")
_CAPTION_HEIGHT = 24
_GAP = 4


def picture(images: Sequence[KnownImage], measured: Measured) -> ImageArray:
    """uint8 RGB: a row per image with the known masks, the masks from their boxes with their IoU, and all masks."""
    rows = [_captions()]
    first = 0
    for known, prompted, everything in list(zip(images, measured.prompted, measured.everything))[:ROWS]:
        ious = measured.iou[first : first + len(known.masks)]
        first += len(known.masks)
        truth = [_cropped(mask, box) for mask, box in zip(known.masks, known.boxes.astype(int))]
        tiles = [_tile(draw_masks(known.image, masks)) for masks in (truth, _masks(prompted), _masks(everything))]
        for box, iou in zip(known.boxes, ious):
            _write(tiles[1], f"{iou:.2f}", box * TILE / max(known.image.shape[:2]))
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows)


def _captions() -> ImageArray:
    line = np.full((_CAPTION_HEIGHT, len(CAPTIONS) * (TILE + _GAP), 3), 30, np.uint8)
    for column, caption in enumerate(CAPTIONS):
        cv2.putText(line, caption, (column * (TILE + _GAP) + 6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255,) * 3, 1)
    return line


def _tile(image: ImageArray) -> ImageArray:
    scale = TILE / max(image.shape[:2])
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    tile = np.full((small.shape[0] + _GAP, TILE + _GAP, 3), 30, np.uint8)
    tile[: small.shape[0], : small.shape[1]] = small
    return tile


def _write(tile: ImageArray, text: str, box: AnyArray) -> None:
    """Writes text in the middle of a box, white with a dark outline."""
    x, y = int((box[0] + box[2]) / 2) - 14, int((box[1] + box[3]) / 2) + 5
    for color, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(tile, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, thickness, cv2.LINE_AA)


def _masks(segmentation: Segmentation) -> list[tuple[MaskArray, IntArray]]:
    """The masks and boxes by increasing confidence, so that the most confident are drawn on top."""
    order = np.argsort(segmentation.confidence, kind="stable")
    return [(segmentation.masks[i], segmentation.boxes[i]) for i in order if segmentation.masks[i].size]


def _cropped(mask: MaskArray, box: AnyArray) -> tuple[MaskArray, AnyArray]:
    x0, y0, x1, y1 = box
    return mask[y0:y1, x0:x1], box
