"""FiftyOne's settings and the names in its model zoo, read without importing FiftyOne, which takes seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any


def model_zoo_dir() -> Path:
    """The folder for the files of FiftyOne's model zoo."""
    if folder := setting("model_zoo_dir", "FIFTYONE_MODEL_ZOO_DIR"):
        return Path(str(folder)).expanduser()
    datasets = setting("default_dataset_dir", "FIFTYONE_DEFAULT_DATASET_DIR") or "~/fiftyone"
    return Path(str(datasets)).expanduser() / "__models__"


def setting(key: str, variable: str) -> str | list[str] | None:
    """A setting of FiftyOne: that of this process, else that of an environment variable or of the config file."""
    if config := fiftyone_config():
        value: str | list[str] | None = getattr(config, key)
        return value
    if value := os.environ.get(variable):
        return value
    return config_file("FIFTYONE_CONFIG_PATH", "config.json").get(key)


def config_file(variable: str, name: str) -> dict[str, Any]:
    """The content of the config file at the path in an environment variable, or of ~/.fiftyone/`name`."""
    path = Path(os.environ.get(variable, f"~/.fiftyone/{name}")).expanduser()
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # the file does not exist, or FiftyOne will report the problem
        content = {}
    return content if isinstance(content, dict) else {}


def fiftyone_config() -> Any:
    """FiftyOne's configuration in this process; None if FiftyOne has not been imported."""
    # Also None while FiftyOne is being imported: its setting `module_path` imports packages during its own import.
    return getattr(sys.modules.get("fiftyone"), "config", None)


def own_zoo_models() -> set[str]:
    """The names of the models of FiftyOne's own zoo; empty if FiftyOne is not installed.

    >>> "clip-vit-base32-torch" in own_zoo_models()
    True
    """
    spec = importlib.util.find_spec("fiftyone")
    folders = [] if spec is None else spec.submodule_search_locations or []
    manifests = [path for folder in folders for path in Path(folder).glob("zoo/models/manifest-*.json")]
    return {model["base_name"] for path in manifests for model in json.loads(path.read_text())["models"]}
