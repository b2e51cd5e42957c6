"""Trained models: which are registered, registering more, and deleting them.

A trained model is a folder (:mod:`.trained_files`). It is registered if its folder, or a link to it, is at
:func:`trained_dir` / its name: FiftyOne looks for manifests there, so ``foz.load_zoo_model(name)`` works in every
process.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path

from filelock import FileLock

from ...errors import ArgumentError, CheckpointError
from ...fiftyone_settings import model_zoo_dir
from ..complete_files import complete_file
from .trained_files import (
    CONFIG,
    EXTRAS,
    HOOKS,
    MANIFEST,
    NAME,
    TrainedModel,
    check_name,
    read_trained,
    write_trained,
)
from .verification import verify

__all__ = [
    "DeletedModel",
    "TrainedModel",
    "check_name",
    "delete_trained",
    "read_registered",
    "read_trained",
    "register",
    "registered_folder",
    "trained_dir",
    "trained_models",
    "unregister",
    "write_trained",
]

logger = logging.getLogger(__name__)


def trained_dir() -> Path:
    """The folder of trained models in FiftyOne's `model_zoo_dir`."""
    return model_zoo_dir() / "mobilesamv2" / "trained"


def registered_folder(name: str) -> Path | None:
    """The folder or link that registers the trained model `name`; None if there is no such model."""
    folder = trained_dir() / name if NAME.fullmatch(name) else None
    return folder if folder and os.path.lexists(folder) else None


def read_registered(name: str) -> TrainedModel:
    """The registered trained model `name`. Raises CheckpointError as :func:`read_trained` does."""
    folder = trained_dir() / name
    trained = read_trained(folder)
    if trained.name != name:
        raise CheckpointError(
            f"{folder} has the model {trained.name!r}, whose folder must have the same name: rename the folder."
        )
    return trained


def trained_models() -> dict[str, TrainedModel]:
    """The registered trained models by name, sorted. A broken one is left out, and a warning says why."""
    try:
        folders = sorted(trained_dir().iterdir())
    except OSError:  # no model has been trained yet
        return {}
    found = {}
    for folder in folders:
        # A folder with neither file is not a model yet: a training writes them last.
        is_model = folder.is_symlink() or (folder / CONFIG).is_file() or (folder / MANIFEST).is_file()
        if is_model and NAME.fullmatch(folder.name):
            try:
                found[folder.name] = read_registered(folder.name)
            except CheckpointError as error:
                _warn_once(str(error))
    return found


@lru_cache(maxsize=1000)
def _warn_once(message: str) -> None:
    logger.warning("A trained model is left out: %s", message)


# Registering ---------------------------------------------------------------------------------------------------------


def register(folder: str | PathLike[str], replace: bool = False) -> TrainedModel:
    """Registers a trained model, so that FiftyOne and this package find it by its name.

    Links to the folder, which stays where it is. A folder that is already in :func:`trained_dir` needs no link.

    Args:
        replace: if another folder is linked under this name, replace the link. That folder is kept.

    Returns:
        The registered model.

    Raises:
        ValueError: another model has the name.
        CheckpointError: a file is missing, or has changed since the training.
    """
    folder = Path(folder).resolve()
    trained = read_trained(folder)
    check_name(trained.name)
    for weights in trained.own_files:
        verify(folder / weights.filename, weights)
    link = trained_dir() / trained.name
    with _registering():
        if folder.parent == link.parent.resolve():
            return read_registered(folder.name)
        _link(link, folder, replace)
    return read_registered(trained.name)


def _link(link: Path, folder: Path, replace: bool) -> None:
    if os.path.lexists(link):
        other = link.resolve()
        if other == folder:
            return
        is_stale = link.is_symlink() and not (other / CONFIG).exists()  # that model was moved or deleted
        if not link.is_symlink() or not (replace or is_stale):
            raise ArgumentError(f"{link.name!r} is already the name of the trained model in {other}: delete it first.")
    with complete_file(link) as temporary:
        temporary.symlink_to(folder, target_is_directory=True)


def unregister(name: str) -> Path:
    """Removes the link to a trained model, and returns its folder, which is kept.

    Raises:
        ValueError: no trained model with this name is linked.
    """
    with _registering():
        link = registered_folder(name)
        if link is None:
            raise ArgumentError(f"No trained model is registered as {name!r}.")
        if not link.is_symlink():
            raise ArgumentError(f"{link} is the model's own folder: move it elsewhere, or delete the model.")
        folder = link.resolve()
        link.unlink()
    return folder


@contextmanager
def _registering() -> Iterator[None]:
    """Keeps other processes from changing links."""
    trained_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(trained_dir() / ".lock"):
        yield


@dataclass(frozen=True)
class DeletedModel:
    """What deleting a trained model did.

    Attributes:
        folder: the model's folder.
        deleted: the names of the deleted files.
        kept: the names of files in it that are not the model's; if there are any, the folder remains.
    """

    folder: Path
    deleted: list[str]
    kept: list[str]


def delete_trained(trained: TrainedModel) -> DeletedModel:
    """Deletes a trained model's own files, then its folder if nothing else is in it, and the link to it.

    Files of the catalog are kept.

    Raises:
        OSError: a file can't be deleted.
    """
    folder = trained.folder.resolve()
    # The configuration last: if this is interrupted, it can be repeated.
    names = [*(weights.filename for weights in trained.own_files), *EXTRAS, HOOKS, MANIFEST, CONFIG]
    deleted = [name for name in names if os.path.lexists(folder / name)]
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # of the file that FiftyOne imports
    for name in deleted:
        (folder / name).unlink(missing_ok=True)
    kept = sorted(path.name for path in folder.iterdir())
    if not kept:
        folder.rmdir()
    link = registered_folder(trained.name)
    if link is not None and link.is_symlink() and link.resolve() == folder:
        unregister(trained.name)
    return DeletedModel(folder, deleted, kept)
