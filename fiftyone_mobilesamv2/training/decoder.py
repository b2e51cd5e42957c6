"""Trains the demo model's image encoder and prompt-guided decoder together, from box and point prompts.

    python -m fiftyone_mobilesamv2.training.decoder --output runs/demo/decoder

Run again after an interruption, training continues from the last saved step.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..modeling.arrays import FloatArray, ImageArray, MaskArray
from ..modeling.image_encoders import encoder_config, preprocess
from ..modeling.prompt_guided_decoder import PromptGuidedDecoder
from .scenes import TRAIN_SEED, make_scene

ENCODER = "resnet_demo"
PROMPTS_PER_IMAGE = 8  # half boxes, half points
EMA_DECAY = 0.995
SAVE_EVERY = 100


class PromptedScenes(Dataset[tuple[Tensor, ...]]):
    """Scenes with random prompts; item i is always the same.

    Each item: network input [3, S, S]; target masks [P, L, L] in 0..1 at the resolution of the low-res logits; outlines
    of all objects [L, L]; boxes [P / 2, 4] for the first half of the masks and points [P / 2, 1, 2] for the second, in
    network-input pixels.
    """

    def __init__(self, length: int, image_size: int, logit_size: int) -> None:
        self.length, self.image_size, self.logit_size = length, image_size, logit_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        scene = make_scene(TRAIN_SEED, index)
        rng = np.random.default_rng((TRAIN_SEED, index, 1))
        pixels, (height, width) = preprocess(scene.image, self.image_size)
        scale = self.image_size / max(scene.labels.shape)

        chosen = rng.permutation(np.resize(rng.permutation(scene.num_objects), PROMPTS_PER_IMAGE))
        masks = scene.masks()[chosen]
        half = PROMPTS_PER_IMAGE // 2
        boxes = scene.boxes()[chosen[:half]]
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        # A detector's boxes are slightly off; SAM adds noise of a tenth of the side, at most 20 px (section A).
        jitter = np.clip(rng.normal(0, 0.05, boxes.shape) * sides, -20, 20)
        points = np.stack([self._point_inside(rng, mask) for mask in masks[half:]])

        resized = F.interpolate(torch.from_numpy(masks)[None].float(), size=(height, width), mode="area")[0]
        padded = F.pad(resized, (0, self.image_size - width, 0, self.image_size - height))
        targets = F.avg_pool2d(padded, self.image_size // self.logit_size)
        return (
            pixels,
            targets,
            self._outlines(scene.labels, (height, width)),
            torch.from_numpy((boxes + jitter) * scale).float(),
            torch.from_numpy(points * scale).float()[:, None],
        )

    def _outlines(self, labels: ImageArray, size: tuple[int, int]) -> Tensor:
        """[L, L], 1 on the outline of any of the scene's objects."""
        outline = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        resized = F.interpolate(torch.from_numpy(outline)[None, None].float(), size=size, mode="area")[0]
        padded = F.pad(resized, (0, self.image_size - size[1], 0, self.image_size - size[0]))
        return (F.avg_pool2d(padded, self.image_size // self.logit_size)[0] > 0.25).float()

    @staticmethod
    def _point_inside(rng: np.random.Generator, mask: MaskArray) -> FloatArray:
        y, x = np.nonzero(mask)
        i = rng.integers(len(y))
        return np.array([x[i] + 0.5, y[i] + 0.5])


def mask_losses(logits: Tensor, iou: Tensor, targets: Tensor) -> Tensor:
    """SAM's losses, 20 * focal + dice + the squared error of the predicted IoU (section 3 of the paper).

    Args:
        logits: [N, M, L, L].
        iou: [N, M].
        targets: [N, L, L] in 0..1.

    Returns:
        [N, M]
    """
    targets = targets[:, None].expand_as(logits)
    p = torch.sigmoid(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = (p - targets).abs()
    # RetinaNet's alpha of 0.25 favours the background; these objects are small, so they get the larger weight.
    alpha = 0.75 * targets + 0.25 * (1 - targets)
    focal = (alpha * wrong**2 * cross_entropy).mean((2, 3))
    dice = 1 - (2 * (p * targets).sum((2, 3)) + 1) / (p.sum((2, 3)) + targets.sum((2, 3)) + 1)
    predicted, true = logits.detach() > 0, targets > 0.5
    actual = (predicted & true).sum((2, 3)) / (predicted | true).sum((2, 3)).clamp(min=1)
    return 20 * focal + dice + (iou - actual) ** 2


class DemoTrainer:
    """The model, averaged model, optimizer and step, which are saved and restored together."""

    def __init__(self, output: Path, steps: int, batch_size: int, learning_rate: float, device: str) -> None:
        torch.manual_seed(0)
        self.output, self.steps, self.batch_size, self.learning_rate = output, steps, batch_size, learning_rate
        self.device = device
        self.config = encoder_config(ENCODER)
        self.decoder = PromptGuidedDecoder(self.config.embed_dim, self.config.embed_size, self.config.image_size)
        self.model = nn.ModuleDict({"image_encoder": self.config.build(), "decoder": self.decoder})
        self.model.to(device).to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        # Predicts the outlines of all objects from the embedding: a dense signal that trains the encoder faster than
        # prompts alone. Only used in training.
        self.outline_head = nn.Conv2d(self.config.embed_dim, 16, 1).to(device)
        parameters = [*self.model.parameters(), *self.outline_head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.02)
        self.step = 0

    @property
    def checkpoint(self) -> Path:
        return self.output / "last.pt"

    def state(self) -> dict[str, Any]:
        names = ("model", "ema", "outline_head", "optimizer")
        return {"step": self.step, **{name: getattr(self, name).state_dict() for name in names}}

    def save(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(self.state(), partial)
        partial.replace(self.checkpoint)  # atomic: a kill leaves the old or the new checkpoint

    def restore(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.step = state.pop("step")
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)

    def loss(self, pixels: Tensor, targets: Tensor, outlines: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
        features = self.model["image_encoder"](pixels.contiguous(memory_format=torch.channels_last))
        decoder = self.decoder
        half = PROMPTS_PER_IMAGE // 2
        positions = decoder.positions()
        total: Tensor = features.new_zeros(())
        for i in range(len(pixels)):
            prompts = torch.cat(
                [
                    decoder.embed_prompts(boxes=boxes[i]),
                    decoder.embed_prompts(
                        points=points[i], point_labels=torch.ones(half, 1, dtype=torch.int, device=points.device)
                    ),
                ]
            )
            logits, iou = decoder(decoder.image_side(features[i], positions), prompts, slice(None))
            losses = mask_losses(logits.float(), iou.float(), targets[i])
            # A box is unambiguous and uses the single-mask token. A single point uses the best of three masks;
            # a small share of their mean keeps training the other two.
            point_losses = losses[half:, 1:]
            total = (
                total + losses[:half, 0].mean() + 0.9 * point_losses.min(1).values.mean() + 0.1 * point_losses.mean()
            )
        outline_logits = F.pixel_shuffle(self.outline_head(features).float(), 4)[:, 0]
        return total / len(pixels) + F.binary_cross_entropy_with_logits(outline_logits, outlines)

    def run(self) -> None:
        """Trains from the current step to the last."""
        logit_size = 4 * self.config.embed_size
        scenes = PromptedScenes(self.steps * self.batch_size, self.config.image_size, logit_size)
        remaining = torch.utils.data.Subset(scenes, range(self.step * self.batch_size, len(scenes)))
        loader = DataLoader(remaining, self.batch_size, num_workers=1, prefetch_factor=4)
        autocast = torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)
        progress = tqdm(loader, initial=self.step, total=self.steps, desc="training", mininterval=5)
        average: float | None = None
        for batch in progress:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * schedule(self.step, self.steps)
            self.model.train()
            with autocast:
                loss = self.loss(*(tensor.to(self.device) for tensor in batch))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self._average_weights()
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            progress.set_postfix(loss=f"{average:.3f}")
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self.save()

    @torch.no_grad()
    def _average_weights(self) -> None:
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        for averaged, current in zip(self.ema.state_dict().values(), self.model.state_dict().values()):
            if averaged.is_floating_point():
                averaged.lerp_(current, 1 - decay)
            else:
                averaged.copy_(current)


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Learning rate factor: linear warm-up, then cosine decay to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/decoder"))
    parser.add_argument("--steps", type=int, default=2100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    trainer = DemoTrainer(args.output, args.steps, args.batch_size, args.learning_rate, args.device)
    if trainer.checkpoint.exists():
        trainer.restore()
    trainer.run()


if __name__ == "__main__":
    main()
