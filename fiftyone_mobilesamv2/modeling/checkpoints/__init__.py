"""Weights files: what exists (:mod:`.catalog`), downloading (:mod:`.files`) and loading (:mod:`.loading`)."""

from ...errors import CheckpointError, DownloadError
from .catalog import MODELS, HubFile, PretrainedModel, Weights, model_files, pretrained_model

__all__ = [
    "MODELS",
    "CheckpointError",
    "DownloadError",
    "HubFile",
    "PretrainedModel",
    "Weights",
    "model_files",
    "pretrained_model",
]
