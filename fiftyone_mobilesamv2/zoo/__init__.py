"""MobileSAMv2 as a FiftyOne model: samples -> MobileSAMv2 -> labels with masks."""

from .config import MobileSAMv2ModelConfig
from .model import MobileSAMv2Model, download_model, load_model, parse_parameters, resolve_input

__all__ = [
    "MobileSAMv2Model",
    "MobileSAMv2ModelConfig",
    "download_model",
    "load_model",
    "parse_parameters",
    "resolve_input",
]
