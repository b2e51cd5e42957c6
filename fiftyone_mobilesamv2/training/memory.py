"""How much memory a training step needs, computed without doing one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
_COPIES = 5  # of each parameter: weights, their average, gradients, and AdamW's two moments
_TEMPORARY = 1.25  # what a step needs beyond what it keeps: measured on a CPU with YOLOv8n, 1.0 GB for 0.83 GB


def training_bytes(model: M, step: Callable[[M], Any]) -> int:
    """About the bytes that training a model takes: its parameters, and what a step keeps for the gradients.

    The step runs with tensors that have a shape and no content, so that it takes neither time nor memory.

    Args:
        step: the forward pass of a step, with a copy of the model on the device "meta".
    """
    # Some modules keep tensors that are neither parameters nor buffers, and are not moved by `to`.
    shapes = copy.deepcopy(model).to("meta").train()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = step(shapes)  # keeps the storages, so that their addresses are different
    del result
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return round(_TEMPORARY * (_COPIES * parameters + sum(kept.values())))


def available_bytes(device: torch.device) -> int:
    """The memory that is free on a device, or on the machine."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return psutil.virtual_memory().available


def fitting_batch_size(batch_size: int, needed: Callable[[int], int], device: torch.device) -> int:
    """The largest of `batch_size`, its half, its quarter, ... for which the device has memory; says what is needed.

    Args:
        needed: the bytes for a batch size, as of :func:`training_bytes`.
    """
    available, wanted = available_bytes(device), batch_size
    while (bytes_needed := needed(batch_size)) > available and batch_size > 1:
        batch_size //= 2
    gigabytes = f"{bytes_needed / 1e9:.1f} GB of {available / 1e9:.1f} GB that are free on {device}"
    if batch_size < wanted:
        logger.warning("A batch of %d images does not fit; training with %d, about %s.", wanted, batch_size, gigabytes)
    else:
        logger.info("Training with batches of %d images, about %s.", batch_size, gigabytes)
    return batch_size
