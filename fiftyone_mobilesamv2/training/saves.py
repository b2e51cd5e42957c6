"""Saves of a training that was stopped or killed, from which it goes on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling.complete_files import complete_file
from .examples import Example

logger = logging.getLogger(__name__)


class Saves:
    """A file with the last save of a training; a kill leaves the last complete one.

    Args:
        path: the file.
        fingerprint: of the training: only its own saves are read.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def load(self) -> dict[str, Any] | None:
        """The last save; None if there is none of this training."""
        if not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            is_own = state.pop("fingerprint") == self.fingerprint
        except Exception as error:  # damaged files raise anything from RuntimeError to KeyError
            logger.warning("%s can't be read (%s): the training starts anew.", self.path, error)
            return None
        if not is_own:
            logger.warning("%s is of other settings, weights or images: the training starts anew.", self.path)
            return None
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces the save. `state` holds tensors and plain values, also in lists and dictionaries."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(self.path) as temporary:
            torch.save({**state, "fingerprint": self.fingerprint}, temporary)


def fingerprint(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], examples: Sequence[Example]) -> str:
    """Differs for trainings with other settings, other weights at the start, or other examples."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.ndim else b"")
    for example in examples:
        digest.update(json.dumps([example.id, len(example.boxes)]).encode())
        digest.update(example.boxes.tobytes() + example.ignored.tobytes())
    return digest.hexdigest()
