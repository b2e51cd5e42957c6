"""Registers the package's zoo models, evaluation method and plugin with FiftyOne.

The `offer_...` functions do so for this process and its children, `install` and `uninstall` for all processes of the
user.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from .fiftyone_settings import config_file, fiftyone_config, model_zoo_dir, setting

PACKAGE = Path(__file__).resolve().parent
MANIFEST = PACKAGE / "manifest.json"

# Folder below FiftyOne's `model_zoo_dir` for the files of a model source with this name.
SOURCE_NAME = "mobilesamv2/fiftyone_mobilesamv2"
PLUGIN = f"@{SOURCE_NAME}"  # its name in fiftyone.yml

_MANIFESTS_VARIABLE = "FIFTYONE_MODEL_ZOO_MANIFEST_PATHS"

EVALUATION_METHOD = "proposals"
_EVALUATION_CONFIG = "fiftyone_mobilesamv2.evaluation.proposals.ProposalEvaluationConfig"
_METHODS_VARIABLE = "FIFTYONE_DETECTION_BACKENDS"


def offer_zoo_models() -> None:
    """Makes the package's models available to `load_zoo_model` in this process, even before FiftyOne is imported.

    Does nothing if they are registered as a model source, since FiftyOne would warn about every duplicate name.
    """
    if (model_zoo_dir() / SOURCE_NAME / MANIFEST.name).exists():
        return
    given = setting("model_zoo_manifest_paths", _MANIFESTS_VARIABLE) or []
    paths = given.split(":") if isinstance(given, str) else list(given)
    if str(MANIFEST) in paths:
        return
    paths.append(str(MANIFEST))
    # The variable overrides the config file, so it includes the file's paths.
    os.environ[_MANIFESTS_VARIABLE] = ":".join(paths)
    if config := fiftyone_config():
        config.model_zoo_manifest_paths = paths


def offer_evaluation_method() -> None:
    """Makes `evaluate_detections(method="proposals")` work in this process, even before FiftyOne is imported."""
    if given := os.environ.get(_METHODS_VARIABLE):
        methods = given.split(",")
    else:  # "*": FiftyOne's own methods. The variable overrides the config file, so it includes the file's methods.
        settings = config_file("FIFTYONE_EVALUATION_CONFIG_PATH", "evaluation_config.json")
        methods = ["*", *(settings.get("detection_backends") or {})]
    if EVALUATION_METHOD not in methods:
        methods.append(EVALUATION_METHOD)
    os.environ[_METHODS_VARIABLE] = ",".join(methods)
    os.environ[f"FIFTYONE_DETECTION_{EVALUATION_METHOD.upper()}_CONFIG_CLS"] = _EVALUATION_CONFIG
    if config := getattr(sys.modules.get("fiftyone"), "evaluation_config", None):
        config.detection_backends.setdefault(EVALUATION_METHOD, {})["config_cls"] = _EVALUATION_CONFIG


def install() -> list[Path]:
    """Registers the models and the plugin for all of the user's FiftyOne processes, with links to this package.

    The links of the model source are in a separate folder, because FiftyOne stores its records of downloaded models
    beside them.

    Returns:
        The links; existing ones are recreated.

    Raises:
        FileExistsError: a file or folder that is not a link has the path of one. Nothing has then been changed.
    """
    source, links = _source_folder(), _links()
    if source.is_symlink():  # a manual link to the whole package, into which FiftyOne would write
        source.unlink()
    for link in links:
        if link.exists() and not link.is_symlink():
            raise FileExistsError(f"{link} exists and is not a link that this command created. Move it elsewhere.")
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=target.is_dir())
    return list(links)


def uninstall() -> list[Path]:
    """Undoes :func:`install` and returns the removed links. Weights are kept."""
    source = _source_folder()
    removed = [link for link in (source, *_links()) if link.is_symlink()]
    for link in removed:
        link.unlink()
    if any(link.is_relative_to(source) for link in removed):
        for model in json.loads(MANIFEST.read_text())["models"]:
            (source / model["base_filename"]).unlink(missing_ok=True)
        for folder in (source, source.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return removed


def _source_folder() -> Path:
    import fiftyone as fo

    return Path(fo.config.model_zoo_dir) / SOURCE_NAME


def _links() -> dict[Path, Path]:
    import fiftyone as fo

    # A wheel has the plugin's manifest inside the package (setup.py), a checkout beside it.
    plugin = PACKAGE if (PACKAGE / "fiftyone.yml").exists() else PACKAGE.parent
    source = _source_folder()
    return {
        source / "__init__.py": PACKAGE / "__init__.py",
        source / MANIFEST.name: MANIFEST,
        Path(fo.config.plugins_dir) / "fiftyone_mobilesamv2": plugin,
    }
