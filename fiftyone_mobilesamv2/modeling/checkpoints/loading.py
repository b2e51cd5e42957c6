"""What is in files of weights, by content and not by name, and the modules that they fit.

Layouts that load:

- a whole SAM: ``image_encoder.*``, ``prompt_encoder.*``, ``mask_decoder.*`` (MobileSAM v1, Meta's SAM)
- any of these inside ``{"state_dict": ...}`` or ``{"model": ...}`` (EfficientViT-SAM, MobileSAM v2)
- an encoder's tensors under their own names
- ``{"PromtEncoder": ..., "MaskDecoder": ...}`` (MobileSAMv2's prompt-guided decoder; the spelling is the file's own)
- a pickled ultralytics detector, or the tensors of one
- all of that as ``.safetensors``

Nothing in a file is ever executed: :mod:`.saved_tensors` takes the tensors out of a pickle, whatever classes of torch
and ultralytics it names (the detector's does), and refuses it if it names anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import ArgumentError, CheckpointError
from ..image_encoders import encoder_config
from ..prompt_guided_decoder import PromptGuidedDecoder
from .saved_tensors import SavedModule, named_tensors, read_saved

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_encoder(path: str | PathLike[str], name: str) -> nn.Module:
    """The image encoder `name` with the weights of a file in any layout.

    Raises:
        CheckpointError: the file's tensors are not exactly the encoder's.
    """
    config = encoder_config(name)
    tensors = read_tensors(path)
    prefixed = [key for key in tensors if "image_encoder." in key]
    if prefixed:
        inner = {key.split("image_encoder.", 1)[1]: tensors[key] for key in prefixed}
        if len(inner) < len(prefixed):
            raise CheckpointError(f"{path} holds more than one image encoder: {_some(prefixed)}.")
        tensors = inner
    module = config.build()
    tensors = {config.rename(key): tensor for key, tensor in tensors.items()}
    _load_strictly(module, tensors, f"{path} does not fit the image encoder {name}")
    return module


def load_decoder(path: str | PathLike[str], encoder: str) -> PromptGuidedDecoder:
    """The prompt-guided decoder that goes with `encoder`, with the weights of a file in any layout.

    Raises:
        CheckpointError: the file's tensors are not exactly the decoder's.
    """
    config = encoder_config(encoder)
    parts = {"prompt_encoder": "prompt_encoder", "mask_decoder": "mask_decoder"}
    parts |= {"PromtEncoder": "prompt_encoder", "MaskDecoder": "mask_decoder"}
    tensors = {}
    for key, tensor in read_tensors(path).items():
        match = re.search(rf"(?:^|\.)({'|'.join(parts)})\.(.+)$", key)
        if match:
            tensors[f"{parts[match[1]]}.{match[2]}"] = tensor
    decoder = PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    _load_strictly(decoder, tensors, f"{path} does not fit the prompt-guided decoder of {encoder}")
    return decoder


def load_detector(path: str | PathLike[str]) -> nn.Module:
    """The class-agnostic YOLOv8 whose tensors a file holds, fused for inference.

    The architecture is ultralytics' own for the scale that the tensors have; nothing of the file but tensors is used.
    The mask branch of a segmentation model (the release's detector is one) is left out: boxes don't depend on it.

    Raises:
        CheckpointError: the file holds no YOLOv8 with one class.
    """
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    mask_branch = ("model.22.cv4.", "model.22.proto.")
    tensors = {key: tensor for key, tensor in read_tensors(path).items() if not key.startswith(mask_branch)}
    scales = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}
    names = ("model.0.conv.weight", "model.22.cv3.0.2.weight", "model.22.dfl.conv.weight")
    convolutions = [tensors[name] for name in names if name in tensors and tensors[name].ndim == 4]
    if len(convolutions) < len(names):
        raise CheckpointError(f"{path} holds no YOLOv8 detector: found tensors {_some(tensors)}.")
    stem, scores, bins = convolutions
    if stem.shape[0] not in scales or not 1 <= bins.shape[1] <= 64:
        raise CheckpointError(f"{path} holds no YOLOv8 detector: found tensors {_some(tensors)}.")
    if len(scores) != 1:
        raise CheckpointError(f"{path} detects {len(scores)} classes; object discovery needs one class, 'object'.")
    name = f"yolov8{scales[stem.shape[0]]}.yaml"
    # The release regresses box sides over 26 bins (as FastSAM does), where YOLOv8 has 16.
    config = yaml_model_load(name) | {"nc": 1, "reg_max": bins.shape[1]}
    unfused = DetectionModel(config, verbose=False)
    _load_strictly(unfused, tensors, f"{path} does not fit {name}")
    model: nn.Module = unfused.eval().fuse(verbose=False)
    _check_numbers(model.state_dict(), f"{path} is no detector that can be used")
    return model


def read_tensors(path: str | PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file by name, nested names joined by dots; wrappers that say nothing are taken off.

    Raises:
        CheckpointError: the file is missing, is no checkpoint, or holds something other than tensors and plain data.
    """
    path = Path(path)
    try:
        is_file = path.is_file()  # nor a folder, nor a pipe, which would be waited for
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.") from error
    if not is_file:
        raise CheckpointError(f"There is no file {path}.")
    kind = "safetensors file" if path.suffix == ".safetensors" else "checkpoint that can be read"
    try:
        content = _load_safetensors(path) if path.suffix == ".safetensors" else read_saved(path)
        for _ in range(3):  # {"model": {"state_dict": ...}}, ultralytics prefers "ema"; it can hold itself
            if isinstance(content, dict):
                inside = (content.get(key) for key in ("ema", "model", "state_dict"))
                content = next((value for value in inside if isinstance(value, dict | SavedModule)), content)
        if isinstance(content, dict | SavedModule):
            return dict(named_tensors(content))
    except Exception as error:  # of a file that is damaged anything comes, from RuntimeError to KeyError
        raise CheckpointError(f"{path} is not a {kind}: {_first_line(error)}.") from error
    raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name.")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path)

    def check_unique(pairs: list[tuple[str, object]]) -> None:
        if len(dict(pairs)) < len(pairs):
            raise ArgumentError("its header has a name twice")

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=check_unique)
    return tensors


def _load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], complaint: str) -> None:
    expected = module.state_dict()
    missing = [key for key in expected if key not in tensors]
    surplus = [key for key in tensors if key not in expected]
    shapes, types = [], []
    for key, value in expected.items():
        if key in tensors and tensors[key].shape != value.shape:
            shapes.append(f"{key} {tuple(tensors[key].shape)} instead of {tuple(value.shape)}")
        # The integers are counters of batch norms, which inference doesn't use: whatever they were saved as.
        elif key in tensors and value.is_floating_point() and tensors[key].dtype not in _FLOATS:
            types.append(f"{key} {tensors[key].dtype} instead of {value.dtype}")
    problems = {"missing": missing, "surplus": surplus, "of the wrong shape": shapes, "of the wrong type": types}
    _complain(complaint, problems)
    weights = {key: tensors[key].to(value.dtype) for key, value in expected.items()}
    _check_numbers(weights, complaint)
    module.load_state_dict(weights)


def _check_numbers(weights: Mapping[str, Tensor], complaint: str) -> None:
    not_finite, negative = [], []
    for key, weight in weights.items():
        if weight.is_floating_point():
            low, high = weight.aminmax()  # NaN if any is; takes a quarter of the time of isfinite().all()
            if not (low.isfinite() and high.isfinite()):
                not_finite.append(key)
            elif key.endswith("running_var") and low < 0:
                negative.append(key)
    _complain(complaint, {"with NaN or infinite values": not_finite, "with negative variances": negative})


def _complain(complaint: str, problems: Mapping[str, Collection[str]]) -> None:
    """Raises CheckpointError if there are any."""
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"{complaint}: {found}")


def _some(names: Collection[str]) -> str:
    shown = ", ".join(_printable(name[:100]) for name in list(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown or "none"


def _first_line(error: Exception) -> str:
    return _printable((str(error).splitlines() or [type(error).__name__])[0][:300].rstrip("."))


def _printable(text: str) -> str:
    """Of what a file says, without what would end the line or command a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
