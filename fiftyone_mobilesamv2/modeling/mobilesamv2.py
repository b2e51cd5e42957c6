"""MobileSAMv2: segment everything by discovering objects first, or segment the objects that prompts point at.

image -> encode (once) -> discover boxes -> decode all prompts of the image against that one encoding -> crop
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .arguments import (
    check_count,
    check_images,
    check_prompting,
    check_prompts,
    checked_grid,
    checked_thresholds,
    coordinates,
    points_with_labels,
)
from .arrays import AnyArray, ImageArray
from .checkpoints.files import fetch_model
from .checkpoints.loading import load_decoder, load_discovery, load_encoder
from .checkpoints.lookup import model_name, pretrained_model
from .defaults import CONFIDENCE, MAX_PROMPTS, NMS_IOU, POINTS_PER_SIDE
from .devices import usable_device
from .embedding_discovery import EmbeddingDiscovery
from .grid_prompts import (
    POINTS_PER_BATCH,
    SAM_GRID_FILTER,
    GridFilter,
    grid_points,
    suppress_duplicates,
)
from .image_encoders import EncoderConfig, ImageEmbeddings, encoder_config, preprocess
from .inference import prepare_for_inference
from .masks import Segmentation, concatenate, crop_masks
from .object_discovery import INPUT_SIZE, BoxPrompts, ObjectDiscovery
from .prompt_guided_decoder import MULTIMASK, SINGLE_MASK, ImageSide, PromptGuidedDecoder

# Bounds the memory for logits: 64 x 256 x 256 float32 take 16 MiB; a grid's three masks per prompt take 48 MiB.
_PROMPTS_PER_PASS = POINTS_PER_BATCH


class MobileSAMv2(nn.Module):
    """An image encoder, a prompt-guided decoder and, for object-aware prompting, a detector.

    Create one with :meth:`from_pretrained` or :meth:`from_checkpoints`. The encoder and detector are modified for
    inference (:mod:`.inference`) and must not be trained afterwards.

    Args:
        image_encoder: images [B, 3, S, S] -> embeddings [B, C, G, G].
        decoder: a decoder that matches the encoder's embedding.
        config: the encoder's sizes.
        discovery: the detector, in images or in their embeddings; with None, only grid prompting and SegAny are there.
        device: where to run; None selects :func:`default_device`.
        dtype: precision of the heavy computation. Prompts, embeddings, boxes and final masks stay float32.

    Attributes:
        seconds: wall time spent per stage ("encode", "discover", "decode", "crop") since it was last cleared.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        decoder: PromptGuidedDecoder,
        config: EncoderConfig,
        discovery: ObjectDiscovery | EmbeddingDiscovery | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = image_encoder
        self.decoder = decoder
        self.discovery = discovery
        self.device = usable_device(device)
        self.dtype = dtype
        self.seconds: defaultdict[str, float] = defaultdict(float)
        for module in (image_encoder, *([discovery.detector] if discovery is not None else [])):
            prepare_for_inference(module, self.device, dtype)
        self.to(self.device).requires_grad_(False).eval()
        with torch.inference_mode():
            self._positions = decoder.positions(dtype)

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        **files: str | PathLike[str],
    ) -> MobileSAMv2:
        """Loads a model by its name, such as "mobilesamv2-tinyvit-torch"; downloads and verifies missing files.

        Args:
            name: one of :func:`.checkpoints.lookup.models`, or the folder of a trained model.
            files: `encoder_checkpoint`, `decoder_checkpoint`, `detector_checkpoint`: paths to use instead.

        Raises:
            ValueError: no model has that name.
            CheckpointError: a file is missing and cannot be downloaded, or is not the expected one.
        """
        model = pretrained_model(name := model_name(name))
        device = usable_device(device)  # before anything is downloaded
        paths = fetch_model(name, skip=files) | files
        return cls.from_checkpoints(
            model.encoder, **paths, detector_size=model.detector_size, device=device, dtype=dtype
        )

    @classmethod
    def from_checkpoints(
        cls,
        encoder: str,
        encoder_checkpoint: str | PathLike[str],
        decoder_checkpoint: str | PathLike[str],
        detector_checkpoint: str | PathLike[str] | None = None,
        detector_size: int = INPUT_SIZE,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> MobileSAMv2:
        """Loads a model from files in any released layout (see :mod:`.checkpoints.loading`).

        Args:
            encoder: name in the encoder registry.
            detector_size: long side, in pixels, to which images are resized for the detector.

        Raises:
            ValueError: no encoder has that name.
            CheckpointError: a file does not match; the message names it and the first offending tensors.
        """
        config = encoder_config(encoder)
        discovery = None if detector_checkpoint is None else load_discovery(detector_checkpoint, encoder, detector_size)
        decoder = load_decoder(decoder_checkpoint, encoder)
        return cls(load_encoder(encoder_checkpoint, encoder), decoder, config, discovery, device, dtype)

    @torch.inference_mode()
    def encode(self, images: Sequence[ImageArray]) -> ImageEmbeddings:
        """Encodes images of any sizes.

        Args:
            images: uint8 RGB arrays [H, W, 3].

        Raises:
            ValueError: an image has another type or shape; the message says which one.
        """
        check_images(images)
        features, input_sizes = [], []
        with self._timed("encode"):
            # One image at a time: the batch size decides which kernels run, and so the last bits of an embedding. At
            # 1024 px, a single image saturates the device.
            for image in images:
                pixels, input_size = preprocess(image, self.config.image_size)
                features.append(self.image_encoder(pixels[None].to(self.device, self.dtype)).float())
                input_sizes.append(input_size)
        if not features:
            size = self.config.embed_size
            features = [torch.zeros(0, self.config.embed_dim, size, size, device=self.device)]
        return ImageEmbeddings(torch.cat(features), [image.shape[:2] for image in images], input_sizes)

    @torch.inference_mode()
    def discover(
        self,
        images: Sequence[ImageArray],
        conf: float = CONFIDENCE,
        iou: float = NMS_IOU,
        max_prompts: int = MAX_PROMPTS,
        embeddings: ImageEmbeddings | None = None,
    ) -> list[BoxPrompts]:
        """Finds the objects in each image.

        Args:
            images: uint8 RGB arrays [H, W, 3].
            conf, max_prompts: minimum confidence and maximum number of boxes per image.
            iou: boxes whose IoU exceeds this are treated as the same object.
            embeddings: of the images, if they are known; a detector in the embedding would compute them.

        Raises:
            RuntimeError: the model has no detector.
            ValueError: an argument is invalid; the message names it.
        """
        thresholds = checked_thresholds(conf, iou, max_prompts)
        if self.discovery is None:
            raise RuntimeError(
                "Object-aware prompting needs a detector, and this model was created without one: pass "
                'detector_checkpoint=..., or use prompting="grid".'
            )
        check_images(images)
        inputs: Iterable[tuple[Any, ...]] = ((image,) for image in images)
        if isinstance(self.discovery, EmbeddingDiscovery):
            known = self.encode(images) if embeddings is None else embeddings
            inputs = zip(known.features, known.input_sizes, known.original_sizes)
        with self._timed("discover"):
            return [self.discovery(*each, *thresholds) for each in inputs]

    @torch.inference_mode()
    def decode(
        self, embeddings: ImageEmbeddings, boxes: Sequence[Tensor | AnyArray]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decodes box prompts, each against the encoding of its own image.

        Args:
            embeddings: the embeddings of B images.
            boxes: B arrays [N, 4], xyxy in pixels of the image.

        Returns:
            For each image, the low-res logits, float32 [N, L, L], and the predicted IoU, float32 [N].
        """
        check_count("boxes", boxes, len(embeddings))
        logits, ious = [], []
        for i, image_boxes in enumerate(boxes):
            prompts = self._embed(embeddings, i, boxes=coordinates(i, "boxes", image_boxes, 4))
            image_logits, image_iou = self._decode(self._image_side(embeddings, i), prompts)
            logits.append(image_logits[:, 0])
            ious.append(image_iou[:, 0])
        return logits, ious

    @torch.inference_mode()
    def segment_everything(
        self,
        images: Sequence[ImageArray],
        prompting: str = "object_aware",
        conf: float = CONFIDENCE,
        iou: float = NMS_IOU,
        max_prompts: int = MAX_PROMPTS,
        points_per_side: int = POINTS_PER_SIDE,
        grid_filter: GridFilter = SAM_GRID_FILTER,
    ) -> list[Segmentation]:
        """Segments all objects in each image.

        Object-aware: one mask for each box that :meth:`discover` finds, most confident first; only empty masks are
        dropped. Grid: SAM's grid search; masks are sorted by predicted IoU.

        Args:
            images: uint8 RGB arrays [H, W, 3].
            prompting: "object_aware" or "grid".
            conf, iou, max_prompts: as for :meth:`discover`; object-aware prompting only.
            points_per_side, grid_filter: grid prompting only.

        Raises:
            ValueError: an argument is invalid; the message names it.
        """
        thresholds = checked_thresholds(conf, iou, max_prompts)
        points_per_side, grid_filter = checked_grid(points_per_side, grid_filter)
        check_prompting(prompting)
        embeddings = self.encode(images)
        if prompting == "grid":
            return [self._grid_search(embeddings, i, points_per_side, grid_filter) for i in range(len(images))]
        segmentations = []
        for i, prompts in enumerate(self.discover(images, *thresholds, embeddings)):
            segmentation = self._segment(embeddings, i, self._embed(embeddings, i, boxes=prompts.boxes))
            segmentation.confidence = prompts.scores.float().numpy()
            segmentations.append(segmentation.select(np.flatnonzero(segmentation.areas)))
        return segmentations

    @torch.inference_mode()
    def segment_anything(
        self,
        images: Sequence[ImageArray],
        boxes: Sequence[Tensor | AnyArray] | None = None,
        points: Sequence[Sequence[AnyArray]] | None = None,
        point_labels: Sequence[Sequence[AnyArray]] | None = None,
    ) -> list[Segmentation]:
        """SegAny: one mask per prompt, in the order of the prompts; an empty mask where the decoder finds nothing.

        A prompt is a box, one or more points, or both. A single point is ambiguous: of its three masks, the one with
        the highest predicted IoU is returned. A box, or several points, uses the single-mask token.

        Args:
            images: B uint8 RGB arrays [H, W, 3].
            boxes: for each image, [N, 4], xyxy in pixels.
            points: for each image, N arrays [P, 2], xy in pixels; P may differ between prompts.
            point_labels: for each image, N arrays [P], 1 inside the object and 0 outside; None: all inside.

        Raises:
            ValueError: there are no prompts, or they do not match each other or the images.
            TypeError: an argument is not a sequence.
        """
        check_prompts(images, boxes, points, point_labels)
        embeddings = self.encode(images)
        segmentations = []
        for i in range(len(images)):
            image_points = [None if prompts is None else prompts[i] for prompts in (points, point_labels)]
            image_boxes = None if boxes is None else coordinates(i, "boxes", boxes[i], 4)
            segmentations.append(self._segment_prompted(embeddings, i, image_boxes, *image_points))
        return segmentations

    def _segment_prompted(
        self,
        embeddings: ImageEmbeddings,
        index: int,
        boxes: Tensor | None,
        points: Sequence[AnyArray] | None,
        point_labels: Sequence[AnyArray] | None,
    ) -> Segmentation:
        if points is None:
            return self._segment(embeddings, index, self._embed(embeddings, index, boxes=boxes))
        count = None if boxes is None else len(boxes)
        tensors, labels = points_with_labels(index, points, point_labels, count)
        # Prompts with the same number of points have the same number of tokens and are decoded together.
        groups: dict[int, list[int]] = defaultdict(list)
        for i, p in enumerate(tensors):
            groups[len(p)].append(i)
        segmentations: list[Segmentation] = []
        for num_points, members in groups.items():
            if num_points == 0 and boxes is None:
                raise ArgumentError(f"Image {index}: prompt {members[0]} has neither a box nor a point.")
            prompts = self._embed(
                embeddings,
                index,
                boxes=None if boxes is None else boxes[members],
                points=torch.stack([tensors[i] for i in members]) if num_points else None,
                point_labels=torch.from_numpy(np.stack([labels[i] for i in members])) if num_points else None,
            )
            segmentations.append(self._segment(embeddings, index, prompts, boxes is None and num_points == 1))
        order = np.argsort([i for members in groups.values() for i in members], kind="stable")
        return concatenate(segmentations, embeddings.original_sizes[index]).select(order)

    def _grid_search(
        self, embeddings: ImageEmbeddings, index: int, points_per_side: int, grid_filter: GridFilter
    ) -> Segmentation:
        size = embeddings.original_sizes[index]
        grid = grid_points(points_per_side, size)
        points = torch.from_numpy(grid)[:, None]
        prompts = self._embed(embeddings, index, points=points, point_labels=torch.ones(points.shape[:2]))
        side = self._image_side(embeddings, index)
        batches = []
        for start in range(0, len(prompts), _PROMPTS_PER_PASS):
            logits, iou = self._decode(side, prompts[start : start + _PROMPTS_PER_PASS], MULTIMASK)
            mask_points = np.repeat(grid[start : start + _PROMPTS_PER_PASS], iou.shape[1], axis=0)
            logits, iou = logits.flatten(0, 1), iou.flatten()
            good = grid_filter.by_predicted_iou(iou)
            batch = self._crop(embeddings, index, logits[good], iou[good])
            batch.points = mask_points[good.cpu().numpy()]
            batches.append(batch.select(np.flatnonzero((batch.areas > 0) & grid_filter.by_stability(batch.stability))))
        return suppress_duplicates(concatenate(batches, size), grid_filter.box_nms_thresh)

    def _segment(
        self, embeddings: ImageEmbeddings, index: int, prompts: Tensor, ambiguous: bool = False
    ) -> Segmentation:
        """One mask for each of the prompts [N, T, C] of image `index`."""
        side = self._image_side(embeddings, index)
        batches = []
        for prompt_batch in prompts.split(_PROMPTS_PER_PASS):
            logits, iou = self._decode(side, prompt_batch, MULTIMASK if ambiguous else SINGLE_MASK)
            best = iou.argmax(1)
            rows = torch.arange(len(iou), device=iou.device)
            batches.append(self._crop(embeddings, index, logits[rows, best], iou[rows, best]))
        return concatenate(batches, embeddings.original_sizes[index])

    def _embed(
        self,
        embeddings: ImageEmbeddings,
        index: int,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        point_labels: Tensor | None = None,
    ) -> Tensor:
        """Embeds prompts, in pixels of image `index`, as tokens [N, T, C]."""
        (height, width), (input_height, input_width) = embeddings.original_sizes[index], embeddings.input_sizes[index]
        scale = torch.tensor([input_width / width, input_height / height], dtype=torch.float32)
        if boxes is not None:
            boxes = (boxes.cpu().float().reshape(-1, 2, 2) * scale).reshape(-1, 4).to(self.device)
        if points is not None and point_labels is not None:
            points, point_labels = (points.float() * scale).to(self.device), point_labels.to(self.device)
        with self._timed("decode"):
            return self.decoder.embed_prompts(boxes, points, point_labels)

    def _image_side(self, embeddings: ImageEmbeddings, index: int) -> ImageSide:
        with self._timed("decode"):
            return self.decoder.image_side(embeddings.features[index], self._positions)

    def _decode(self, side: ImageSide, prompts: Tensor, masks: slice = SINGLE_MASK) -> tuple[Tensor, Tensor]:
        with self._timed("decode"):
            decoded: tuple[Tensor, Tensor] = self.decoder(side, prompts, masks)
        return decoded

    def _crop(self, embeddings: ImageEmbeddings, index: int, logits: Tensor, iou: Tensor) -> Segmentation:
        size = embeddings.original_sizes[index]
        with self._timed("crop"):
            boxes, masks, stability = crop_masks(logits, self.config.image_size, embeddings.input_sizes[index], size)
        predicted_iou = iou.cpu().numpy()
        return Segmentation(boxes, masks, predicted_iou.copy(), predicted_iou, stability, size)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # otherwise the next stage would be charged for it
        self.seconds[stage] += time.perf_counter() - start
