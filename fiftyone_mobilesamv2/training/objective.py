"""What is minimised: the losses of prompted masks, and of object discovery from the same embedding."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.embedding_discovery import EmbeddingDetector
from ..modeling.prompt_guided_decoder import PromptGuidedDecoder
from .discovery import DiscoveryLoss
from .learning import mixed_precision
from .mask_losses import mask_losses, prompt_losses
from .prompted_images import PromptedImage
from .yolo_data import IGNORED, OBJECT

# Of object discovery beside masks, which are the harder part.
_DISCOVERY_WEIGHT = 0.5
# ultralytics' own, of 8.4 (cfg/default.yaml).
_GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}


class Objective:
    """Computes gradients.

    Args:
        image_encoder, decoder: what is trained, in part or as a whole.
        detector: trained beside them, unless it is None.
        with_masks: whether masks count.
        device: where the modules are.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        decoder: PromptGuidedDecoder,
        detector: EmbeddingDetector | None,
        with_masks: bool,
        device: torch.device,
    ) -> None:
        self.image_encoder, self.decoder, self.detector = image_encoder, decoder, detector
        self.with_masks, self.device = with_masks, device
        if detector is not None:
            model: Any = SimpleNamespace(
                parameters=detector.parameters, args=SimpleNamespace(**_GAINS), model=[detector.detect]
            )
            self.discovery_loss = DiscoveryLoss(model)

    def backward(self, images: Sequence[PromptedImage], count: int) -> float:
        """Adds the gradients of the images' losses, of which `count` make a mean, and returns these losses' share."""
        pixels = torch.stack([image.pixels for image in images])
        with mixed_precision(self.device):
            features = self.image_encoder(pixels.to(self.device, memory_format=torch.channels_last)).float()
        # Graphs of decoders, which take most of the memory, are freed one by one.
        leaf = features.detach().requires_grad_(features.requires_grad)
        total = 0.0
        for embedding, image in zip(leaf, images):
            if image.prompts and self.with_masks:
                with mixed_precision(self.device):
                    loss = self._mask_loss(embedding, image) / count
                loss.backward()
                total += loss.item()
        if self.detector is not None:
            loss = _DISCOVERY_WEIGHT * self._discovery_loss(leaf, images) / count
            loss.backward()
            total += loss.item()
        if leaf.grad is not None:
            features.backward(leaf.grad)
        return total

    def _mask_loss(self, embedding: Tensor, image: PromptedImage) -> Tensor:
        """The mean loss of an image's prompts. embedding: [C, G, G]."""
        side = self.decoder.image_side(embedding, self.decoder.positions())
        losses = []
        for prompts in (each.to(self.device) for each in image.prompts):
            tokens = self.decoder.embed_prompts(prompts.boxes, prompts.points, prompts.point_labels)
            logits, iou = self.decoder(side, tokens, prompts.masks)
            losses.append(prompt_losses(mask_losses(logits.float(), iou.float(), prompts.targets)))
        return torch.cat(losses).mean()

    def _discovery_loss(self, embeddings: Tensor, images: Sequence[PromptedImage]) -> Tensor:
        """The sum of the images' losses. embeddings: [B, C, G, G]."""
        assert self.detector is not None
        with mixed_precision(self.device):
            found: Any = self.detector(embeddings)
        found = {
            name: [each.float() for each in value] if name == "feats" else value.float()
            for name, value in found.items()
        }
        corners = torch.cat([torch.cat([image.boxes, image.ignored]) for image in images])
        counts = torch.tensor([len(image.boxes) + len(image.ignored) for image in images])
        kinds = [kind for each in images for kind in [OBJECT] * len(each.boxes) + [IGNORED] * len(each.ignored)]
        side = images[0].pixels.shape[-1]
        batch = {
            "batch_idx": torch.repeat_interleave(torch.arange(len(images)), counts).float(),
            "cls": torch.tensor(kinds, dtype=torch.float32)[:, None],
            "bboxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1) / side,
        }
        losses, _ = self.discovery_loss(found, {name: tensor.to(self.device) for name, tensor in batch.items()})
        total: Tensor = losses.sum()
        return total
