"""Models and their files: which exist (:mod:`.lookup`), downloading (:mod:`.files`) and loading (:mod:`.loading`)."""

from ...errors import CheckpointError, DownloadError
from .catalog import MODELS, HubFile, PretrainedModel, Weights
from .lookup import model_files, models, pretrained_model

__all__ = [
    "MODELS",
    "CheckpointError",
    "DownloadError",
    "HubFile",
    "PretrainedModel",
    "Weights",
    "model_files",
    "models",
    "pretrained_model",
]
