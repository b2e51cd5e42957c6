"""Files of weights: which there are (:mod:`.catalog`), getting them here (:mod:`.files`), reading them
(:mod:`.loading`)."""

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
