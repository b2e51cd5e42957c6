"""What learns, at which rate and precision, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from ultralytics.nn.modules import DFL

from ..modeling.image_encoders import EncoderConfig

Learn = Literal["detector", "decoder", "neck", "encoder"]

_EMA_DECAY = 0.995
_RATE_OF_TRAINED = 0.2


def set_learning(
    modules: nn.ModuleDict, config: EncoderConfig, learn: Learn, untrained: Sequence[str], frozen: Sequence[str]
) -> None:
    """Sets which parameters get gradients, and the mode of every submodule: what doesn't learn is in inference mode.

    Args:
        modules: "image_encoder", "decoder" and maybe "detector", which always learns.
        config: of the encoder.
        learn: "detector" (alone), "decoder", "neck" (decoder and neck) or "encoder" (decoder and the whole encoder).
        untrained: submodules whose batch norms learn their statistics; the others use those they have.
        frozen: submodules that don't learn after all.
    """
    encoder = modules["image_encoder"]
    neck = [encoder.get_submodule(name) for name in config.neck]
    of_encoder: dict[Learn, list[nn.Module]] = {"detector": [], "decoder": [], "neck": neck, "encoder": [encoder]}
    learning = [*of_encoder[learn], *([modules["decoder"]] if learn != "detector" else [])]
    learning += [modules["detector"]] if "detector" in modules else []
    modules.requires_grad_(False).eval()
    for module in learning:
        module.requires_grad_(True).train()
    for module in modules.modules():
        if isinstance(module, DFL):  # its weights are the numbers of its bins
            module.requires_grad_(False)
    for name in frozen:
        modules.get_submodule(name).requires_grad_(False).eval()
    prefixes = tuple(f"{name}." for name in untrained)
    for name, module in modules.named_modules():
        if isinstance(module, _BatchNorm) and not name.startswith(prefixes):
            module.eval()


def parameter_groups(modules: nn.ModuleDict, learning_rate: float, untrained: Sequence[str]) -> list[dict[str, Any]]:
    """What learns, with its highest learning rate: lower for trained weights beside untrained ones."""
    prefixes = tuple(f"{name}." for name in untrained)
    learning = [(name, parameter) for name, parameter in modules.named_parameters() if parameter.requires_grad]
    new = [parameter for name, parameter in learning if name.startswith(prefixes)]
    old = [parameter for name, parameter in learning if not name.startswith(prefixes)]
    rates = (new, learning_rate), (old, learning_rate * _RATE_OF_TRAINED if new else learning_rate)
    return [{"params": group, "lr": rate, "highest": rate} for group, rate in rates if group]


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
