"""MobileSAMv2 for FiftyOne: segment everything in a dataset by discovering the objects first.

The package is a Python API, a source of zoo models and an App plugin. Names are imported on first use, so that
importing the package is fast.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from fiftyone.operators.executor import ExecutionContext
    from fiftyone.plugins.context import PluginContext

    from fiftyone_mobilesamv2.curation.repair import repair
    from fiftyone_mobilesamv2.evaluation.coco import load_coco
    from fiftyone_mobilesamv2.evaluation.lvis import load_lvis
    from fiftyone_mobilesamv2.evaluation.proposals import evaluate_proposals
    from fiftyone_mobilesamv2.modeling.masks import Segmentation
    from fiftyone_mobilesamv2.modeling.mobilesamv2 import MobileSAMv2
    from fiftyone_mobilesamv2.runs.deletion import delete_masks
    from fiftyone_mobilesamv2.runs.record import failed_samples, recorded_runs
    from fiftyone_mobilesamv2.runs.segment import segment_everything
    from fiftyone_mobilesamv2.training.train import train
    from fiftyone_mobilesamv2.zoo.model import MobileSAMv2Model

__version__ = "0.1.0"

_EXPORTS = {
    "MobileSAMv2": "fiftyone_mobilesamv2.modeling.mobilesamv2",
    "evaluate_proposals": "fiftyone_mobilesamv2.evaluation.proposals",
    "recorded_runs": "fiftyone_mobilesamv2.runs.record",
    "failed_samples": "fiftyone_mobilesamv2.runs.record",
    "segment_everything": "fiftyone_mobilesamv2.runs.segment",
    "train": "fiftyone_mobilesamv2.training.train",
    "delete_masks": "fiftyone_mobilesamv2.runs.deletion",
    "repair": "fiftyone_mobilesamv2.curation.repair",
    "load_coco": "fiftyone_mobilesamv2.evaluation.coco",
    "load_lvis": "fiftyone_mobilesamv2.evaluation.lvis",
    "Segmentation": "fiftyone_mobilesamv2.modeling.masks",
}

__all__ = [
    "MobileSAMv2",
    "Segmentation",
    "delete_masks",
    "download_model",
    "evaluate_proposals",
    "failed_samples",
    "load_coco",
    "load_lvis",
    "load_model",
    "parse_parameters",
    "recorded_runs",
    "repair",
    "resolve_input",
    "segment_everything",
    "train",
]


def _package(name: str) -> ModuleType:
    # FiftyOne imports a plugin or a model source by file path and under its own module name. Everything except this
    # file is imported absolutely, so that there is only one set of classes, which workers can unpickle by name.
    spec = importlib.util.find_spec("fiftyone_mobilesamv2")
    if spec is None or spec.origin is None:  # or a namespace package, such as a clone's folder
        sys.path.append(str(Path(__file__).resolve().parents[1]))
    return importlib.import_module(name)


if not TYPE_CHECKING:  # otherwise a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name in _EXPORTS:
            return getattr(_package(_EXPORTS[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals() | _EXPORTS)


def download_model(model_name: str, model_path: str) -> None:
    """FiftyOne zoo hook: downloads and verifies a model's files."""
    from importlib.metadata import distributions

    # If there is a record at `model_path`, FiftyOne imports the package by name instead of this file. That works in
    # every process only if the package is installed with pip (a source tree may have metadata, but no RECORD);
    # otherwise, no record is written.
    is_installed = any(package.read_text("RECORD") for package in distributions(name="fiftyone-mobilesamv2"))
    _package("fiftyone_mobilesamv2.zoo").download_model(model_name, model_path if is_installed else None)


def load_model(model_name: str, model_path: str, **kwargs: Any) -> MobileSAMv2Model:
    """FiftyOne zoo hook: loads a model."""
    model: MobileSAMv2Model = _package("fiftyone_mobilesamv2.zoo").load_model(model_name, **kwargs)
    return model


def register(plugin: PluginContext) -> None:
    """FiftyOne plugin hook: registers the operators and panels; importing the package registers its zoo models."""
    _package("fiftyone_mobilesamv2.operators").register(plugin)
    _package("fiftyone_mobilesamv2.panels").register(plugin)


def resolve_input(model_name: str, ctx: ExecutionContext) -> Any:
    """FiftyOne zoo hook: the form of a model's parameters."""
    return _package("fiftyone_mobilesamv2.zoo").resolve_input(model_name, ctx)


def parse_parameters(model_name: str, ctx: ExecutionContext, params: dict[str, Any]) -> None:
    """FiftyOne zoo hook: converts the form's values to arguments of `load_model`."""
    _package("fiftyone_mobilesamv2.zoo").parse_parameters(model_name, ctx, params)


if __name__ == "fiftyone_mobilesamv2":
    _registration = _package("fiftyone_mobilesamv2.registration")
    _registration.offer_zoo_models()
    _registration.offer_evaluation_method()
