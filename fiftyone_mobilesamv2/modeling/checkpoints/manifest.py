"""Entries of the manifests in which FiftyOne's model zoo finds models."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from .catalog import SOURCE_URL, PretrainedModel

# The pip distributions that the package imports, for users of the model source without pip.
PACKAGES = (
    "torch",
    "torchvision",
    "ultralytics",
    "timm",
    "pycocotools",
    "safetensors",
    "tenacity",
    "pydantic",
    "cachetools",
)


def manifest_entry(
    name: str, model: PretrainedModel, filename: str, tag: str, size: int, date_added: datetime
) -> dict[str, Any]:
    """A model's entry in a manifest.

    Args:
        filename: the file beside the manifest whose existence tells FiftyOne that the model is downloaded.
        tag: a tag for this kind of model, besides those that all of the package's models have.
        size: the size of its files in bytes.
    """
    data, url = model.training_data
    tags = ("instances", "segmentation", "segment-anything", "zero-shot", "torch", "mobilesamv2", tag)
    return {
        "base_name": name,
        "base_filename": filename,
        "author": model.author,
        "license": model.licenses,
        "source": SOURCE_URL,
        "description": "MobileSAMv2: segments everything by discovering the objects first. Image encoder: "
        + model.description,
        "tags": list(tags),
        "size_bytes": size,
        "date_added": date_added.strftime("%Y-%m-%d %H:%M:%S"),
        "requirements": {"packages": list(PACKAGES), "cpu": {"support": True}, "gpu": {"support": True}},
        "training_data": [{"name": data, "url": url}],
    }
