"""All models that can be loaded: those of the catalog, and trained ones by their name or folder."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from ...errors import ArgumentError, CheckpointError
from .catalog import MODELS, PretrainedModel, Weights
from .trained import TrainedModel, read_registered, read_trained, registered_folder, trained_models
from .trained_files import CONFIG


def models() -> dict[str, PretrainedModel]:
    """The models of the catalog and the registered trained ones, by name.

    >>> models()["mobilesamv2-vith-torch"].encoder
    'sam_vit_h'
    """
    return MODELS | {name: trained.model for name, trained in trained_models().items()}


def pretrained_model(name: str | PathLike[str]) -> PretrainedModel:
    """The model `name`: of the catalog, else a registered trained one, else the trained model in the folder `name`.

    Raises:
        ValueError: there is no such model.
        CheckpointError: the trained model's configuration is missing or damaged.

    >>> pretrained_model("mobilesamv2-vith-torch").encoder
    'sam_vit_h'
    """
    if isinstance(name, str) and name in MODELS:
        return MODELS[name]
    if trained := find_trained(name):
        return trained.model
    known = ", ".join(models())
    raise ArgumentError(f"Unknown model {os.fspath(name)!r}; choose one of {known}, or give a trained model's folder.")


def find_trained(name: str | PathLike[str]) -> TrainedModel | None:
    """The trained model with this name or in this folder; None if it is a model of the catalog or unknown.

    Raises:
        CheckpointError: the trained model's configuration is missing or damaged.
    """
    if isinstance(name, str) and name in MODELS:
        return None
    if isinstance(name, str) and registered_folder(name):
        return read_registered(name)
    return read_trained(name) if _is_folder(name) else None


def model_name(name: str | PathLike[str]) -> str:
    """The name of a model, wherever this process runs: of a folder, the name it is registered by, or its full path.

    >>> model_name("mobilesamv2-demo-torch")
    'mobilesamv2-demo-torch'
    """
    if not _is_folder(name) or (isinstance(name, str) and (name in MODELS or registered_folder(name))):
        return os.fspath(name)
    try:
        trained = read_trained(name)
        registered = registered_folder(trained.name)
        if registered and registered.samefile(trained.folder):
            return trained.name
    except (CheckpointError, OSError):  # loading it will report the problem
        pass
    return os.path.abspath(name)


def _is_folder(name: str | PathLike[str]) -> bool:
    """Whether this is the path of a folder: for a name without a separator, of a folder with a trained model."""
    is_path = not isinstance(name, str) or any(mark in name for mark in (os.sep, os.altsep) if mark)
    try:
        return Path(name).is_dir() if is_path else (Path(name) / CONFIG).is_file()
    except (OSError, ValueError):  # too long, or not a path
        return False


def model_files(name: str) -> list[Weights]:
    """The files of the model `name`, without duplicates: one file may hold several parts.

    >>> [weights.filename for weights in model_files("mobilesamv2-vitb-torch")]
    ['sam_vit_b_01ec64.pth', 'ObjectAwareModel.pt']
    """
    return _files_of(pretrained_model(name))


def all_files() -> list[Weights]:
    """The files of all models, without duplicates."""
    return list(dict.fromkeys(weights for model in models().values() for weights in _files_of(model)))


def _files_of(model: PretrainedModel) -> list[Weights]:
    return list(dict.fromkeys(model.weights.values()))
