"""The state of an interrupted training in a file, and what it belongs to."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import StorageError, message_of
from ..modeling.complete_files import complete_file
from .examples import Example

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a training saves besides tensors, as plain data.

    Attributes:
        step: steps taken.
        images_at_once: images whose gradients are computed in one pass; the rest of a batch follows in others.
        loss: running mean.
        epoch_losses: of the current epoch's steps.
        curve, best_score, skipped, stopped: of the result.
    """

    step: int = 0
    images_at_once: int = 1
    loss: float | None = None
    epoch_losses: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    best_score: float | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None


def fingerprint(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], examples: Iterable[Example]) -> str:
    """Identifies a training: two with the same fingerprint take the same steps.

    Args:
        settings: what determines the steps, as plain data.
        tensors: the weights from which the training starts.
        examples: their ids, boxes and masks count, their pixels don't.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for example in examples:
        digest.update(f"{example.id} {len(example.boxes)}".encode())
        digest.update(example.boxes.tobytes())
        digest.update(example.ignored.tobytes())
        for mask in example.masks or ():
            digest.update(mask["counts"])
    return digest.hexdigest()


def save_training(path: Path, state: Mapping[str, Any]) -> None:
    """Writes the state of a training; a kill leaves the earlier file.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(path) as temporary:
            torch.save(dict(state), temporary)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the disk is full
        raise StorageError(f"The training can't be saved in {path}: {message_of(error)}") from error


def saved_training(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The state that :func:`save_training` wrote, with tensors on the CPU; None if there is none of this training.

    Warns if there is one of another training, which the next save will replace.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] == fingerprint:
            return state
        cause = "is of a training with other settings, weights or examples"
    except Exception as error:  # damaged files raise anything
        cause = f"can't be read ({message_of(error).splitlines()[0]})"
    logger.warning("%s %s. Training starts afresh.", path, cause)
    return None
