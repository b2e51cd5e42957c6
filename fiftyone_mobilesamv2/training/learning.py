"""What learns, at which rate and precision, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modeling.image_encoders import encoder_config

Learn = Literal["decoder", "neck", "encoder"]

_EMA_DECAY = 0.995


def set_learning(encoder: str, image_encoder: nn.Module, decoder: nn.Module, learn: Learn, from_scratch: bool) -> None:
    """Sets which parameters get gradients, and the mode of every submodule: what doesn't learn is in inference mode.

    Args:
        encoder: name in the encoder registry.
        learn: "decoder", "neck" (decoder and neck) or "encoder" (decoder and the whole encoder).
        from_scratch: whether batch norms learn their statistics; otherwise they use those they have.
    """
    image_encoder.requires_grad_(False).eval()
    decoder.requires_grad_(True).train()
    neck = [image_encoder.get_submodule(name) for name in encoder_config(encoder).neck]
    learning: dict[Learn, list[nn.Module]] = {"decoder": [], "neck": neck, "encoder": [image_encoder]}
    for module in learning[learn]:
        module.requires_grad_(True).train()
        for part in module.modules():
            if isinstance(part, _BatchNorm) and not from_scratch:
                part.eval()


def schedule(step: int, steps: int) -> float:
    """Learning rate factor: linear warm-up for a tenth of the steps, at most 100, then cosine decay to 2 %."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def average_weights(averaged: Mapping[str, Tensor], current: Mapping[str, Tensor], step: int) -> None:
    """Updates an exponential moving average in place. It is short at first, so that it suits short trainings too.

    Args:
        step: how many steps were taken to get to the current weights.
    """
    decay = min(_EMA_DECAY, step / (step + 10))
    for name, tensor in current.items():
        if tensor.is_floating_point():
            averaged[name].lerp_(tensor, 1 - decay)
        else:
            averaged[name].copy_(tensor)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the device computes in it; otherwise it does nothing."""
    supported = (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)) or (
        device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=supported)
