"""Loads weights files into modules. The content decides what a file is, not its name.

Supported layouts:

- a whole SAM: ``image_encoder.*``, ``prompt_encoder.*``, ``mask_decoder.*`` (MobileSAM v1, Meta's SAM)
- any of these inside ``{"state_dict": ...}`` or ``{"model": ...}`` (EfficientViT-SAM, MobileSAM v2)
- an encoder's tensors under their own names
- ``{"PromtEncoder": ..., "MaskDecoder": ...}`` (MobileSAMv2's prompt-guided decoder; the spelling is the file's)
- a pickled ultralytics detector, or its tensors
- the tensors of a detector in the embedding
- all of these as ``.safetensors``

Nothing in a file is ever executed: :mod:`.saved_tensors` extracts the tensors from a pickle that names classes of torch
and ultralytics (as the detector's does), and rejects a pickle that names anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import ArgumentError, CheckpointError
from ..embedding_discovery import EmbeddingDetector, EmbeddingDiscovery
from ..image_encoders import encoder_config
from ..object_discovery import ObjectDiscovery
from ..prompt_guided_decoder import PromptGuidedDecoder
from .saved_tensors import SavedModule, named_tensors, read_saved

if TYPE_CHECKING:
    from ultralytics.nn.tasks import DetectionModel

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_encoder(path: str | PathLike[str], name: str) -> nn.Module:
    """Loads the image encoder `name` from a file in any supported layout.

    Raises:
        CheckpointError: the file's tensors do not match the encoder's exactly.
    """
    config = encoder_config(name)
    tensors = read_tensors(path)
    prefixed = [key for key in tensors if "image_encoder." in key]
    if prefixed:
        inner = {key.split("image_encoder.", 1)[1]: tensors[key] for key in prefixed}
        if len(inner) < len(prefixed):
            raise CheckpointError(f"{path} contains more than one image encoder: {_abbreviated(prefixed)}.")
        tensors = inner
    module = config.build()
    tensors = {config.rename(key): tensor for key, tensor in tensors.items()}
    _load_strictly(module, tensors, f"{path} does not match the image encoder {name}")
    return module


def load_decoder(path: str | PathLike[str], encoder: str) -> PromptGuidedDecoder:
    """Loads the prompt-guided decoder for `encoder` from a file in any supported layout.

    Raises:
        CheckpointError: the file's tensors do not match the decoder's exactly.
    """
    config = encoder_config(encoder)
    modules = {"prompt_encoder": "prompt_encoder", "mask_decoder": "mask_decoder"}
    modules |= {"PromtEncoder": "prompt_encoder", "MaskDecoder": "mask_decoder"}
    tensors = {}
    for key, tensor in read_tensors(path).items():
        match = re.search(rf"(?:^|\.)({'|'.join(modules)})\.(.+)$", key)
        if match:
            tensors[f"{modules[match[1]]}.{match[2]}"] = tensor
    decoder = PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    _load_strictly(decoder, tensors, f"{path} does not match the prompt-guided decoder of {encoder}")
    return decoder


def load_discovery(path: str | PathLike[str], encoder: str, detector_size: int) -> ObjectDiscovery | EmbeddingDiscovery:
    """Loads what finds objects: in the embedding of `encoder`, or a YOLOv8 that sees images at `detector_size`.

    Raises:
        CheckpointError: the file contains neither.
    """
    if "detect.dfl.conv.weight" in read_tensors(path):
        return EmbeddingDiscovery(load_embedding_detector(path, encoder))
    return ObjectDiscovery(load_detector(path), detector_size)


def load_embedding_detector(path: str | PathLike[str], encoder: str) -> EmbeddingDetector:
    """Loads the detector in the embedding of `encoder`, as it is trained.

    Raises:
        CheckpointError: the file's tensors do not match the detector's exactly.
    """
    config = encoder_config(encoder)
    detector = EmbeddingDetector(config.embed_dim, config.image_size // config.embed_size)
    _load_strictly(detector, read_tensors(path), f"{path} does not match the detector in the embedding of {encoder}")
    return detector


def load_detector(path: str | PathLike[str]) -> nn.Module:
    """Loads a class-agnostic YOLOv8 from the tensors in a file, fused for inference; see :func:`load_yolo`.

    Raises:
        CheckpointError: the file does not contain a YOLOv8 with one class.
    """
    model: nn.Module = load_yolo(path).eval().fuse(verbose=False)
    _check_values(model.state_dict(), f"{path} is not a usable detector")
    return model


def load_yolo(path: str | PathLike[str]) -> DetectionModel:
    """Loads a class-agnostic YOLOv8 from the tensors in a file, as it is trained.

    The architecture is ultralytics' own, at the scale of the tensors; only tensors are read from the file. The mask
    branch of a segmentation model (which the release's detector is) is dropped: boxes don't depend on it.

    Raises:
        CheckpointError: the file does not contain a YOLOv8 with one class.
    """
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    mask_branch = ("model.22.cv4.", "model.22.proto.")
    tensors = {key: tensor for key, tensor in read_tensors(path).items() if not key.startswith(mask_branch)}
    scales = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}
    names = ("model.0.conv.weight", "model.22.cv3.0.2.weight", "model.22.dfl.conv.weight")
    convolutions = [tensors[name] for name in names if name in tensors and tensors[name].ndim == 4]
    if len(convolutions) < len(names):
        raise CheckpointError(f"{path} does not contain a YOLOv8 detector: found tensors {_abbreviated(tensors)}.")
    stem, scores, bins = convolutions
    if stem.shape[0] not in scales or not 1 <= bins.shape[1] <= 64:
        raise CheckpointError(f"{path} does not contain a YOLOv8 detector: found tensors {_abbreviated(tensors)}.")
    if len(scores) != 1:
        raise CheckpointError(
            f"{path} detects {len(scores)} classes; object discovery needs a detector with one class, 'object'."
        )
    name = f"yolov8{scales[stem.shape[0]]}.yaml"
    # The release regresses box sides over 26 bins (like FastSAM) rather than YOLOv8's 16.
    config = yaml_model_load(name) | {"nc": 1, "reg_max": bins.shape[1]}
    model = DetectionModel(config, verbose=False)
    _load_strictly(model, tensors, f"{path} does not match {name}")
    return model


def read_tensors(path: str | PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file by name, with nested names joined by dots; outer wrappers are removed.

    Raises:
        CheckpointError: the file is missing, is not a checkpoint, or contains more than tensors and plain data.
    """
    path = Path(path)
    try:
        is_file = path.is_file()  # excludes folders, and pipes, which would block
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.") from error
    if not is_file:
        raise CheckpointError(f"{path} does not exist or is not a file.")
    kind = "valid safetensors file" if path.suffix == ".safetensors" else "valid checkpoint"
    try:
        content = _load_safetensors(path) if path.suffix == ".safetensors" else read_saved(path)
        # {"model": {"state_dict": ...}}; ultralytics prefers "ema". Bounded, because a dictionary can contain itself.
        for _ in range(3):
            if isinstance(content, dict):
                inside = (content.get(key) for key in ("ema", "model", "state_dict"))
                content = next((value for value in inside if isinstance(value, dict | SavedModule)), content)
        if isinstance(content, dict | SavedModule):
            return dict(named_tensors(content))
    except Exception as error:  # damaged files raise anything from RuntimeError to KeyError
        raise CheckpointError(f"{path} is not a {kind}: {_first_line(error)}.") from error
    raise CheckpointError(f"{path} contains a {type(content).__name__}, not named tensors.")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path)

    def check_unique(pairs: list[tuple[str, object]]) -> None:
        if len(dict(pairs)) < len(pairs):
            raise ArgumentError("its header contains a duplicate name")

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=check_unique)
    return tensors


def _load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], message: str) -> None:
    expected = module.state_dict()
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    shapes, types = [], []
    for key, value in expected.items():
        if key in tensors and tensors[key].shape != value.shape:
            shapes.append(f"{key} {tuple(tensors[key].shape)} instead of {tuple(value.shape)}")
        # Integers are batch norm counters, which inference doesn't use: any dtype is accepted.
        elif key in tensors and value.is_floating_point() and tensors[key].dtype not in _FLOATS:
            types.append(f"{key} {tensors[key].dtype} instead of {value.dtype}")
    problems = {"missing": missing, "unexpected": unexpected, "of the wrong shape": shapes, "of the wrong type": types}
    _raise_problems(message, problems)
    weights = {key: tensors[key].to(value.dtype) for key, value in expected.items()}
    _check_values(weights, message)
    module.load_state_dict(weights)


def _check_values(weights: Mapping[str, Tensor], message: str) -> None:
    not_finite, negative = [], []
    for key, weight in weights.items():
        if weight.is_floating_point():
            low, high = weight.aminmax()  # NaN if any value is; takes a quarter of the time of isfinite().all()
            if not (low.isfinite() and high.isfinite()):
                not_finite.append(key)
            elif key.endswith("running_var") and low < 0:
                negative.append(key)
    _raise_problems(message, {"with NaN or infinite values": not_finite, "with negative variances": negative})


def _raise_problems(message: str, problems: Mapping[str, Collection[str]]) -> None:
    """Raises CheckpointError if there are any problems."""
    if any(problems.values()):
        details = "; ".join(f"{len(names)} {kind}: {_abbreviated(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"{message}: {details}")


def _abbreviated(names: Collection[str]) -> str:
    shown = ", ".join(_printable(name[:100]) for name in list(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown or "none"


def _first_line(error: Exception) -> str:
    return _printable((str(error).splitlines() or [type(error).__name__])[0][:300].rstrip("."))


def _printable(text: str) -> str:
    """`text`, taken from a file, without line breaks and terminal control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)
