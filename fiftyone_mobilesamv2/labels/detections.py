"""Segmentations -> stored detections: the one writer for `apply_model`, runs, prompts and videos."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import fiftyone.core.labels as fol
import numpy as np
from bson import ObjectId

from ..fiftyone_internals import Document
from ..modeling.arrays import MaskArray
from ..modeling.masks import Segmentation
from .fields import RUN_ID
from .mask_files import MaskFiles
from .masks import serialized

logger = logging.getLogger(__name__)

LABEL = "object"
_DOCUMENT = fol.Detection(label=LABEL).to_mongo().to_dict()  # common to all objects in the database
# MongoDB limits documents to 16,793,600 bytes. 7 MiB for the labels of one field leave room for a second such field and
# for the attributes that an evaluation adds.
LABEL_BYTES_PER_SAMPLE = 7 * 2**20
DETECTION_BYTES = 600  # size of a detection without its mask: names and values of its attributes


class ImageMasks(NamedTuple):
    """The masks of an image and, for prompted masks, the prompt of each."""

    masks: Segmentation
    prompts: Sequence[fol.Detection | fol.Keypoint] | None = None


def mask_attributes(segmentation: Segmentation, index: int) -> Document:
    """The attributes that are stored with every mask; the box is relative, [x, y, width, height]."""
    height, width = segmentation.size
    x0, y0, x1, y1 = (int(v) for v in segmentation.boxes[index])
    mask = segmentation.masks[index]
    return {
        "bounding_box": [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height],
        "mask": mask,
        "predicted_iou": float(segmentation.predicted_iou[index]),
        "stability": float(segmentation.stability[index]),
        "area_px": int(np.count_nonzero(mask)),
    }


def mask_in_box(segmentation: Segmentation, index: int, box: Sequence[float]) -> MaskArray:
    """The part of a mask inside a relative box [x, y, width, height], as bool pixels of the box.

    The box may extend beyond the image. A box without an area yields one pixel, at its corner.
    """
    (height, width), (x, y, w, h) = segmentation.size, box
    left, top, right, bottom = round(x * width), round(y * height), round((x + w) * width), round((y + h) * height)
    cut = np.zeros((max(bottom - top, 1), max(right - left, 1)), bool)
    mask, (x0, y0, x1, y1) = segmentation.masks[index], segmentation.boxes[index]
    x0_cut, y0_cut = max(x0, left), max(y0, top)
    x1_cut, y1_cut = min(x1, left + cut.shape[1]), min(y1, top + cut.shape[0])
    if x0_cut < x1_cut and y0_cut < y1_cut:
        inside = mask[y0_cut - y0 : y1_cut - y0, x0_cut - x0 : x1_cut - x0]
        cut[y0_cut - top : y1_cut - top, x0_cut - left : x1_cut - left] = inside
    return cut


def prompted_detection(
    prompt: fol.Detection | fol.Keypoint, segmentation: Segmentation, index: int, keep_box: bool = False
) -> fol.Detection:
    """The detection for a prompt: its mask, with the prompt's label, id and attributes.

    If the decoder finds nothing, the mask is None and a box prompt keeps its box.

    Args:
        keep_box: keep a detection's box and crop its mask to it.
    """
    attributes = mask_attributes(segmentation, index)
    if keep_box:
        box = attributes["bounding_box"] = prompt.bounding_box
        mask = attributes["mask"] = mask_in_box(segmentation, index, box)
        attributes["area_px"] = int(np.count_nonzero(mask))
    if isinstance(prompt, fol.Detection):
        detection = prompt.copy()
    else:
        kept = {name: value for name, value in prompt.iter_fields() if name in ("label", "tags", "index")}
        kept |= {name: value for name, value in prompt.iter_attributes() if name != "sam_labels"}
        detection = fol.Detection(bounding_box=[0, 0, 0, 0], **kept)
    detection._id = ObjectId(prompt.id)
    if not segmentation.masks[index].size:
        attributes["bounding_box"] = detection.bounding_box
        attributes["mask"] = None
    for name, value in attributes.items():
        detection[name] = value
    detection.mask_path = None
    if detection.confidence is None:
        detection.confidence = attributes["predicted_iou"]
    return detection


@dataclass
class DetectionWriter:
    """Converts an image's masks to detections, storing masks in their documents or in files.

    Attributes:
        label_bytes: maximum size of an image's labels in the database; masks beyond it go to files. With 0, all do.
        keep_boxes: whether prompted detections keep their boxes, to which their masks are cropped; otherwise they get
            tight ones.
        run_id: the id of the run that makes the labels, which they all get.
    """

    label_bytes: int = LABEL_BYTES_PER_SAMPLE
    keep_boxes: bool = False
    run_id: str | None = None

    def documents(self, image_masks: ImageMasks, files: MaskFiles) -> list[Document]:
        """The detections as database documents.

        At 320 masks per image, building FiftyOne's objects takes ten times as long and holds the GIL, which blocks the
        model.
        """
        documents = self._without_masks(image_masks)
        for document, mask, content in self._stored_masks(documents, files):
            if mask is not None:
                document["mask"] = content
        return [document for document, _ in documents]

    def detections(self, image_masks: ImageMasks, files: MaskFiles) -> fol.Detections:
        """The same detections as FiftyOne objects, whose masks FiftyOne compresses again in its own way."""
        documents = self._without_masks(image_masks)
        kept = {id(document): mask for document, mask, _ in self._stored_masks(documents, files)}
        detections = []
        for document, _ in documents:
            detection = fol.Detection.from_dict(document)
            detection.mask = kept.get(id(document))
            detections.append(detection)
        return fol.Detections(detections=detections)

    def _without_masks(self, image_masks: ImageMasks) -> list[tuple[Document, MaskArray | None]]:
        """The document of each detection without its mask, and the mask, bool [h, w]."""
        documents = []
        for i in range(len(image_masks.masks)):
            if image_masks.prompts is None:
                attributes = mask_attributes(image_masks.masks, i)
                mask = attributes.pop("mask")
                confidence = float(image_masks.masks.confidence[i])
                documents.append((_DOCUMENT | {"_id": ObjectId(), "confidence": confidence} | attributes, mask))
            else:
                detection = prompted_detection(image_masks.prompts[i], image_masks.masks, i, self.keep_boxes)
                mask, detection.mask = detection.mask, None
                documents.append((detection.to_mongo().to_dict(), mask))
        if self.run_id is not None:
            for document, _ in documents:
                document[RUN_ID] = self.run_id
        return documents

    def _stored_masks(
        self, documents: Sequence[tuple[Document, MaskArray | None]], files: MaskFiles
    ) -> list[tuple[Document, MaskArray | None, bytes]]:
        """Writes masks to files, largest first, until the rest fits, and sets the paths in their documents.

        Returns:
            (document, mask, serialized mask) of each detection with a mask; the mask is None if it is in a file.
        """
        with_masks = [(document, mask) for document, mask in documents if mask is not None]
        contents = [serialized(mask) if self.label_bytes else b"" for _, mask in with_masks]
        in_files = self._beyond_budget([len(content) for content in contents], len(documents))
        stored: list[tuple[Document, MaskArray | None, bytes]] = []
        for i, ((document, mask), content) in enumerate(zip(with_masks, contents)):
            if i in in_files:
                document["mask_path"] = files.add(mask)
                stored.append((document, None, b""))
            else:
                stored.append((document, mask, content))
        if in_files and self.label_bytes:
            logger.info(
                "Stored %d of %d masks of an image in %s: they don't fit into its document",
                len(in_files),
                len(with_masks),
                files.folder,
            )
        return stored

    def _beyond_budget(self, mask_bytes: Sequence[int], num_detections: int) -> set[int]:
        """The indices of the masks that go to files."""
        total = DETECTION_BYTES * num_detections + sum(mask_bytes)
        beyond: set[int] = set()
        for i in sorted(range(len(mask_bytes)), key=mask_bytes.__getitem__, reverse=True):
            if total <= self.label_bytes:
                break
            total -= mask_bytes[i]
            beyond.add(i)
        return beyond
