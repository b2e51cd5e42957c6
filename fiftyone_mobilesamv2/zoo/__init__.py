"""MobileSAMv2 as a FiftyOne model: samples -> MobileSAMv2 -> labels with masks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import MobileSAMv2Model, download_model, load_model, parse_parameters, resolve_input
    from .model import ZooModelConfig as MobileSAMv2ModelConfig

__all__ = [
    "MobileSAMv2Model",
    "MobileSAMv2ModelConfig",
    "download_model",
    "load_model",
    "parse_parameters",
    "resolve_input",
]


def __getattr__(name: str) -> object:
    # The model needs torch and FiftyOne, which `zoo.config` must not import.
    if name in __all__:
        name = {"MobileSAMv2ModelConfig": "ZooModelConfig"}.get(name, name)
        return getattr(import_module(".model", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
