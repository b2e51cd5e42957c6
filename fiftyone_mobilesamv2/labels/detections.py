"""Segmentations -> detections as FiftyOne stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import fiftyone.core.labels as fol
import numpy as np
from bson import ObjectId

from ..modeling.masks import Segmentation

LABEL = "object"
_DOCUMENT = fol.Detection(label=LABEL).to_mongo().to_dict()  # what the database holds of every object
# MongoDB takes documents of at most 16,793,600 bytes. The labels of a field get 7 MiB, which leaves room for a second
# field like it and for the attributes that an evaluation adds.
LABEL_BYTES_PER_SAMPLE = 7 * 2**20
DETECTION_BYTES = 600  # of a detection without its mask: names and values of its attributes


class Found(NamedTuple):
    """The masks of an image, and the prompt of each, if there were prompts."""

    masks: Segmentation
    prompts: Sequence[fol.Detection | fol.Keypoint] | None = None


def _attributes(found: Segmentation, index: int) -> dict:
    return {"confidence": float(found.confidence[index]), **mask_attributes(found, index)}


def mask_attributes(found: Segmentation, index: int) -> dict:
    """The attributes that every mask is stored with; the box is relative, [x, y, width, height]."""
    height, width = found.size
    x0, y0, x1, y1 = (int(v) for v in found.boxes[index])
    mask = found.masks[index]
    return {
        "bounding_box": [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height],
        "mask": mask,
        "predicted_iou": float(found.predicted_iou[index]),
        "stability": float(found.stability[index]),
        "area_px": int(np.count_nonzero(mask)),
    }


def mask_in_box(found: Segmentation, index: int, box: Sequence[float]) -> np.ndarray:
    """bool: what a mask has inside a relative box [x, y, width, height], in pixels of the box.

    Some may be outside the image. A box without an area has one, at its corner.
    """
    (height, width), (x, y, w, h) = found.size, box
    left, top, right, bottom = round(x * width), round(y * height), round((x + w) * width), round((y + h) * height)
    cut = np.zeros((max(bottom - top, 1), max(right - left, 1)), bool)
    mask, (x0, y0, x1, y1) = found.masks[index], found.boxes[index]
    x0_cut, y0_cut = max(x0, left), max(y0, top)
    x1_cut, y1_cut = min(x1, left + cut.shape[1]), min(y1, top + cut.shape[0])
    if x0_cut < x1_cut and y0_cut < y1_cut:
        inside = mask[y0_cut - y0 : y1_cut - y0, x0_cut - x0 : x1_cut - x0]
        cut[y0_cut - top : y1_cut - top, x0_cut - left : x1_cut - left] = inside
    return cut


def prompted_detection(
    prompt: fol.Detection | fol.Keypoint, found: Segmentation, index: int, keep_box: bool = False
) -> fol.Detection:
    """The detection that a prompt becomes: its mask, and the prompt's own label, id and attributes.

    Where the decoder finds nothing, the mask is None and a box stays as it was.

    Args:
        keep_box: a detection keeps its box, and its mask is cut to that.
    """
    attributes = mask_attributes(found, index)
    if keep_box:
        box = attributes["bounding_box"] = prompt.bounding_box
        mask = attributes["mask"] = mask_in_box(found, index, box)
        attributes["area_px"] = int(np.count_nonzero(mask))
    if isinstance(prompt, fol.Detection):
        detection = prompt.copy()
    else:
        kept = {name: value for name, value in prompt.iter_fields() if name in ("label", "tags", "index")}
        kept |= {name: value for name, value in prompt.iter_attributes() if name != "sam_labels"}
        detection = fol.Detection(bounding_box=[0, 0, 0, 0], **kept)
    detection._id = ObjectId(prompt.id)
    if not found.masks[index].size:
        attributes["bounding_box"] = detection.bounding_box
        attributes["mask"] = None
    for name, value in attributes.items():
        detection[name] = value
    detection.mask_path = None
    if detection.confidence is None:
        detection.confidence = attributes["predicted_iou"]
    return detection
