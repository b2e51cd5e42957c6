"""The two parts of a model that can learn: what each starts from, its settings, and the weights that it ends with."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..labels.documents import Skipped
from ..modeling.checkpoints.loading import load_yolo
from ..modeling.complete_files import complete_file
from ..modeling.embedding_discovery import EmbeddingDiscovery
from ..modeling.mobilesamv2 import MobileSAMv2
from .base_model import Base
from .discovery import BACKBONE_LAYERS, DiscoverySettings, new_detector, train_discovery
from .examples import Example
from .masks import MaskSettings, train_masks
from .measuring import box_recall, mask_iou, measure
from .memory import fitting_batch_size, training_bytes
from .networks import Networks
from .progress import Curve, Report
from .yolo_data import cached_image

# Below this many images, the detector's backbone keeps its weights. With 70 of domain_nuclei, the AR of boxes went from
# 0.16 to 0.27 with a frozen backbone and to 0.31 without (30 epochs).
MIN_IMAGES_FOR_BACKBONE = 50
# With few images, an epoch has few steps.
MIN_STEPS, MIN_EPOCHS, MAX_EPOCHS = 300, 10, 60


# Network -> the argument that takes its file.
_ARGUMENTS = {
    "image_encoder": "encoder_checkpoint",
    "decoder": "decoder_checkpoint",
    "detector": "detector_checkpoint",
}


@dataclass(frozen=True)
class Learned:
    """The result of learning one part.

    Attributes:
        tensors: file name -> its tensors.
        arguments: argument of `from_checkpoints` -> name of its file.
        settings: with which it was learned.
        curve, stopped: see :class:`.TrainingRun`.
        skipped: images that could not be read.
    """

    tensors: dict[str, dict[str, Tensor]]
    arguments: dict[str, str]
    settings: dict[str, Any]
    curve: Curve
    stopped: str | None
    skipped: list[Skipped]


def learn_discovery(
    base: Base,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    size: str | None,
    given: Mapping[str, Any],
    folder: Path,
    report: Report,
) -> Learned:
    """Trains the base's detector, or an untrained one of `size`, on examples with boxes."""
    image_size = base.entry.detector_size
    settings = DiscoverySettings(
        **{
            "epochs": default_epochs(len(examples), 16),
            "frozen_layers": BACKBONE_LAYERS if size is None and len(examples) < MIN_IMAGES_FOR_BACKBONE else 0,
            "image_size": image_size,
            "device": str(base.device),
            **given,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # a training goes on only from the untrained weights that it started with
        model = load_yolo(base.paths["detector_checkpoint"]) if size is None else new_detector(size)

    def needed(batch_size: int) -> int:
        shape = batch_size, 3, image_size, image_size
        return training_bytes(model, lambda shapes: shapes(torch.zeros(shape, device="meta")))

    batch_size = fitting_batch_size(settings.batch_size, needed, base.device)
    settings = dataclasses.replace(settings, batch_size=batch_size)
    cache = _cached(examples, image_size, folder / "images")
    result = train_discovery(
        model,
        examples,
        settings,
        folder,
        report,
        lambda detector: box_recall(detector.fuse(verbose=False), image_size, held_out),  # type: ignore[operator]
        cache,
    )
    name = "detector.safetensors"
    used = dataclasses.asdict(settings) | {"size": size}
    return Learned({name: result.tensors}, {"detector_checkpoint": name}, used, result.curve, result.stopped, [])


def _cached(examples: Sequence[Example], size: int, folder: Path) -> Path | None:
    """Keeps all images at the size of the network in a folder; None if they would take half of what is free there."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(examples) * size * size * 3 > shutil.disk_usage(folder).free / 2:
        return None
    for example in examples:
        cached_image(example, size, folder)
    return folder


def learn_networks(
    base: Base,
    networks: Networks,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    given: Mapping[str, Any],
    folder: Path,
    report: Report,
) -> Learned:
    """Trains the decoder and maybe the encoder on examples with masks, or only the detector in the embedding.

    A detector in the embedding is always trained along: it would no longer fit an encoder that has changed.
    """
    is_new = networks.detector is not None and not base.finds_in_embedding
    settings = MaskSettings(
        **{
            "epochs": default_epochs(len(examples), 4),
            "device": str(base.device),
            "untrained": ("detector",) if is_new else (),
            **given,
        }
    )
    without_masks = [dataclasses.replace(example, masks=None) for example in held_out]

    def score(networks: Networks) -> float:
        discovery = None if networks.detector is None else EmbeddingDiscovery(networks.detector)
        model = MobileSAMv2(networks.image_encoder, networks.decoder, networks.config, discovery, device=base.device)
        recall = 0.0 if discovery is None else measure(model, without_masks, lambda share: None).recall
        return recall if settings.learn == "detector" else recall + mask_iou(model, held_out)

    result = train_masks(networks, examples, settings, folder, report, score)
    files = {name: f"{_ARGUMENTS[name].removesuffix('_checkpoint')}.safetensors" for name in result.tensors}
    arguments = {_ARGUMENTS[name]: file for name, file in files.items()}
    tensors = {files[name]: learned for name, learned in result.tensors.items()}
    ids = {example.name: example.id for example in examples}
    skipped: list[Skipped] = [
        {"id": ids[name], "filepath": name, "cause": cause} for name, cause in result.skipped.items()
    ]
    return Learned(tensors, arguments, dataclasses.asdict(settings), result.curve, result.stopped, skipped)


def default_epochs(images: int, batch_size: int) -> int:
    """Enough steps for few images, and not too long for many.

    >>> default_epochs(70, 16), default_epochs(5000, 16)
    (60, 10)
    """
    return min(MAX_EPOCHS, max(MIN_EPOCHS, math.ceil(MIN_STEPS / math.ceil(images / batch_size))))


def write_weights(learned: Learned, folder: Path) -> dict[str, Path]:
    """Writes the weights in half precision. Returns argument -> path."""
    for name, tensors in learned.tensors.items():
        with complete_file(folder / name) as temporary:
            save_file(half(tensors), temporary)
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
    return {argument: folder / name for argument, name in learned.arguments.items()}


def half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts floating-point tensors to half precision, each with its own storage."""
    return {
        key: (tensor.half() if tensor.is_floating_point() else tensor).clone().contiguous()
        for key, tensor in tensors.items()
    }
