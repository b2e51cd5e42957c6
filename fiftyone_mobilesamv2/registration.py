"""Telling FiftyOne about the package: its zoo models and its plugin.

`offer_zoo_models` does it for this process and its children; `install` and `uninstall` for every process of the user.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
MANIFEST = PACKAGE / "manifest.json"

# Where FiftyOne looks for the files of a source of models that has this name, below its `model_zoo_dir`.
SOURCE_NAME = "mobilesamv2/fiftyone_mobilesamv2"

_MANIFESTS_VARIABLE = "FIFTYONE_MODEL_ZOO_MANIFEST_PATHS"


def offer_zoo_models() -> None:
    """Makes `load_zoo_model` know the package's models in this process, whether FiftyOne is imported already or not.

    Nothing is done where they are registered as a source: FiftyOne would warn of every name that it meets twice.
    """
    if (_model_zoo_dir() / SOURCE_NAME / MANIFEST.name).exists():
        return
    paths = _setting("model_zoo_manifest_paths", _MANIFESTS_VARIABLE) or []
    paths = paths.split(":") if isinstance(paths, str) else list(paths)
    if str(MANIFEST) not in paths:
        # The variable replaces what the config file says, so it carries that along.
        os.environ[_MANIFESTS_VARIABLE] = ":".join([*paths, str(MANIFEST)])
    if fiftyone := sys.modules.get("fiftyone"):
        known = fiftyone.config.model_zoo_manifest_paths or []
        if str(MANIFEST) not in known:
            fiftyone.config.model_zoo_manifest_paths = [*known, str(MANIFEST)]


def install() -> list[Path]:
    """Registers the models and the plugin for every FiftyOne of this user, by links to this package.

    Returns:
        the links; each that was there before is made anew.

    Raises:
        FileExistsError: something that is no link is in the place of one.
    """
    links = _links()
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        elif link.exists():
            raise FileExistsError(f"{link} is in the way: it is no link that this command made. Move it elsewhere.")
        link.symlink_to(target, target_is_directory=True)
    return list(links)


def uninstall() -> list[Path]:
    """Undoes :func:`install`. Returns the links that were removed."""
    removed = [link for link in _links() if link.is_symlink()]
    for link in removed:
        link.unlink()
        if not any(link.parent.iterdir()):
            link.parent.rmdir()
    return removed


def _links() -> dict[Path, Path]:
    import fiftyone as fo

    plugin = PACKAGE.parent if (PACKAGE.parent / "fiftyone.yml").exists() else PACKAGE
    return {
        Path(fo.config.model_zoo_dir) / SOURCE_NAME: PACKAGE,
        Path(fo.config.plugins_dir) / "fiftyone_mobilesamv2": plugin,
    }


def _model_zoo_dir() -> Path:
    if folder := _setting("model_zoo_dir", "FIFTYONE_MODEL_ZOO_DIR"):
        return Path(folder).expanduser()
    datasets = _setting("default_dataset_dir", "FIFTYONE_DEFAULT_DATASET_DIR") or "~/fiftyone"
    return Path(datasets).expanduser() / "__models__"


def _setting(key: str, variable: str) -> str | list[str] | None:
    """A setting as FiftyOne reads it, without the second that importing FiftyOne takes."""
    if variable in os.environ:
        return os.environ[variable]
    path = Path(os.environ.get("FIFTYONE_CONFIG_PATH", "~/.fiftyone/config.json")).expanduser()
    try:
        return json.loads(path.read_text()).get(key)
    except FileNotFoundError:
        return None
