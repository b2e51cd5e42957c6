"""Model files on this machine: locating, fetching, verifying and deleting them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import CheckpointError, DownloadError
from .catalog import DEMO_MODEL, MODELS, PHOTO_MODEL, Weights
from .downloads import DownloadProgress, download, partial_path
from .lookup import find_trained, model_files, models, pretrained_model
from .trained import delete_trained
from .verification import COPY_AGAIN, file_hashes, file_sha256, find_problem, read_record, record_path, verify

WEIGHTS_DIR_VARIABLE = "FIFTYONE_MOBILESAMV2_WEIGHTS_DIR"
PACKAGED_WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


def weights_dir() -> Path:
    """The folder for downloaded weights: $FIFTYONE_MOBILESAMV2_WEIGHTS_DIR, or a folder in the user's cache."""
    if folder := os.environ.get(WEIGHTS_DIR_VARIABLE):
        return Path(folder).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "fiftyone_mobilesamv2"


def local_path(weights: Weights) -> Path:
    """Where the file is, or will be once downloaded.

    A file in the weights folder under one of the old names counts if its hash matches.

    >>> local_path(pretrained_model("mobilesamv2-demo-torch").encoder_weights).name
    'demo_sam.safetensors'
    """
    if weights.folder is not None:
        return weights.folder / weights.filename
    if weights.is_packaged:
        return PACKAGED_WEIGHTS / weights.filename
    path = weights_dir() / weights.filename
    if not path.is_file():
        for old in old_paths(weights):
            if find_problem(old, weights, record_path(old)) is None:
                return old
    return path


def old_paths(weights: Weights) -> list[Path]:
    """Files in the weights folder under old names of `weights`, whatever their content.

    Empty if `weights` has no published hash, since there is then no way to tell whether they are the same file.
    """
    if not (weights.sha256 or weights.git_blob):
        return []
    return [path for name in weights.old_names if (path := weights_dir() / name).is_file()]


def is_local(weights: Weights) -> bool:
    """Whether the file is on this machine."""
    return local_path(weights).is_file()


def is_complete(name: str) -> bool:
    """Whether all files of the model `name` are on this machine.

    >>> is_complete("mobilesamv2-demo-torch")
    True
    """
    return all(map(is_local, model_files(name)))


def included_model() -> str:
    """The model that needs no download: that for photos, or the demo model in a package without the former's weights.

    >>> pretrained_model(included_model()).encoder_weights.is_packaged
    True
    """
    return PHOTO_MODEL if is_complete(PHOTO_MODEL) else DEMO_MODEL


# Fetching ------------------------------------------------------------------------------------------------------------


def fetch_model(name: str, skip: Collection[str] = (), progress: DownloadProgress | None = None) -> dict[str, Path]:
    """Verifies the files of the model `name`, downloading missing ones.

    Args:
        skip: arguments whose files are not needed: "encoder_checkpoint", "decoder_checkpoint", "detector_checkpoint".
        progress: called as data arrives, instead of showing a progress bar on stderr. An exception that it raises
            stops the download, which can be resumed later.

    Returns:
        Argument -> verified path.

    Raises:
        ValueError: no model has that name.
        CheckpointError: a local file is not the expected one (it is left in place).
        DownloadError: files are missing and no source provided them.

    >>> sorted(fetch_model("mobilesamv2-demo-torch"))
    ['decoder_checkpoint', 'detector_checkpoint', 'encoder_checkpoint']
    """
    needed = {key: weights for key, weights in pretrained_model(name).weights.items() if key not in skip}
    paths: dict[Weights, Path] = {}
    failures: dict[Weights, dict[str, str]] = {}
    for weights in dict.fromkeys(needed.values()):
        try:
            paths[weights] = fetch(weights, progress)
        except DownloadError as error:
            failures[weights] = error.reasons
    if failures:
        raise _download_error(name, failures)
    return {key: paths[weights] for key, weights in needed.items()}


def fetch(weights: Weights, progress: DownloadProgress | None = None) -> Path:
    """The verified path of a file, downloaded if missing; `progress` as for :func:`fetch_model`.

    Raises:
        CheckpointError: the local file is not the expected one (it is left in place).
        DownloadError: the file is missing, and no source provided the expected one.
    """
    path = local_path(weights)
    if not path.is_file():
        if weights.folder is not None:
            raise CheckpointError(f"{path} is missing: {COPY_AGAIN}.")
        if weights.is_packaged:
            raise CheckpointError(f"{path} is part of the package and is missing: reinstall fiftyone_mobilesamv2.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                # Another process may have downloaded it meanwhile.
                reasons = {} if path.is_file() else download(weights, path, progress)
        except OSError as error:
            reasons = {str(path.parent): f"can't be written to: {error.strerror or error}"}
        if reasons:
            raise _download_error(None, {weights: reasons})
    verify(path, weights)
    return path


def _download_error(model: str | None, failures: Mapping[Weights, Mapping[str, str]]) -> DownloadError:
    """An error with the first failed source of each file and where to put the files; its details have the rest."""
    names = ", ".join(weights.filename for weights in failures)
    lines = [
        f"{names} could not be downloaded."
        if model is None
        else f"Files of {model} are missing and could not be downloaded:"
    ]
    details = []
    for weights, reasons in failures.items():
        source, reason = next(iter(reasons.items()))
        lines.append(f"- {weights.filename} ({weights.megabytes:,} MB) from {source}: {reason}")
        details.append(f"{weights.filename}: {weights.describe()}")
        details += [f"  {source}: {reason}" for source, reason in reasons.items()]
        details += [f"  {path} is another file" for path in old_paths(weights)]
    lines.append(f"Put the missing files into {weights_dir()} (or set {WEIGHTS_DIR_VARIABLE} to another folder).")
    if model is not None:
        lines.append(f"Or try the model that is included in the package, {included_model()}.")
        lines.append(f"All sources, hashes and reasons: fiftyone-mobilesamv2 models --download {model} --details")
    reasons = {source: reason for file_reasons in failures.values() for source, reason in file_reasons.items()}
    return DownloadError("\n".join(lines), reasons, "\n".join(details))


def megabytes_to_download(name: str) -> int:
    """Size of the missing files of the model `name`, in MB.

    >>> megabytes_to_download("mobilesamv2-demo-torch")
    0
    """
    return sum(weights.megabytes for weights in model_files(name) if weights.sources and not is_local(weights))


# Deleting ------------------------------------------------------------------------------------------------------------


def deletable_files(name: str) -> list[Weights]:
    """The files that :func:`delete_model` would delete.

    Of a model of the catalog, these are its complete and partial downloads, except those that :func:`kept_files` lists.
    Of a trained model, these are the files in its folder.
    """
    kept = kept_files(name)
    return [
        weights
        for weights in model_files(name)
        if weights not in kept and (is_local(weights) or partial_path(local_path(weights)).exists())
    ]


def kept_files(name: str) -> dict[Weights, str]:
    """The files that :func:`delete_model` would keep, and why.

    >>> {weights.filename: why for weights, why in kept_files("mobilesamv2-demo-torch").items()}
    {'demo_sam.safetensors': 'it comes with the package', 'demo_detector.safetensors': 'it comes with the package'}
    """
    is_trained = find_trained(name) is not None
    others = {other: list(model.weights.values()) for other, model in models().items() if other != name}
    ready = {weights for files in others.values() if all(map(is_local, files)) for weights in files}
    kept = {}
    for weights in model_files(name):
        trained = [other for other, files in others.items() if other not in MODELS and weights in files]
        if weights.is_packaged:
            kept[weights] = "it comes with the package"
        elif is_trained and weights.folder is None:
            kept[weights] = "it is not part of the trained model"
        elif trained and weights.folder is None:
            kept[weights] = f"{', '.join(trained)} {'needs' if len(trained) == 1 else 'need'} it"
        elif weights in ready:
            kept[weights] = "another downloaded model needs it"
    return kept


def delete_model(name: str) -> list[Weights]:
    """Deletes and returns the files of the model `name`, except those that :func:`kept_files` lists.

    The records of the hashes of downloaded files are kept: they reveal whether a file has changed at its source when it
    is downloaded again. With its files, all of a trained model is deleted (:func:`.trained.delete_trained`).

    Raises:
        CheckpointError: one of the files is being downloaded.
        OSError: a file can't be deleted.
    """
    files = deletable_files(name)
    if trained := find_trained(name):
        delete_trained(trained)
        return files
    for weights in files:
        path = local_path(weights)
        try:
            with FileLock(f"{path}.lock", timeout=0):
                path.unlink(missing_ok=True)
                partial_path(path).unlink(missing_ok=True)
        except Timeout as error:
            raise CheckpointError(f"{path} is being downloaded by another process: cancel that first.") from error
    return files


# Hashes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verified:
    """The result of verifying a file.

    Attributes:
        sha256: the hash of a valid file, otherwise None.
        problem: what is wrong with an invalid file, otherwise None.
    """

    sha256: str | None = None
    problem: str | None = None


def verify_model(name: str, progress: Callable[[int, Weights], None] = lambda *_: None) -> dict[Weights, Verified]:
    """Reads the model's local files completely and checks them as :func:`verify` does.

    Args:
        progress: called with the number of finished files and the next file.
    """
    results = {}
    for number, weights in enumerate(model_files(name)):
        progress(number, weights)
        if not is_local(weights):
            results[weights] = Verified(problem="is missing")
            continue
        try:
            results[weights] = Verified(verified_sha256(weights))
        except CheckpointError as error:
            results[weights] = Verified(problem=str(error))
    return results


def verified_sha256(weights: Weights) -> str:
    """The sha256 of a local file, which is read completely and checked as by :func:`verify`."""
    path = local_path(weights)
    verify(path, weights, reread=True)
    # Files in read-only folders have no record.
    return read_record(record_path(path)).get("sha256") or file_hashes(path)[0]


def weights_sha256(name: str, files: Mapping[str, str | PathLike[str]]) -> dict[str, str]:
    """The sha256 of every local file of the model `name`.

    Args:
        files: as for :meth:`MobileSAMv2.from_pretrained`: argument -> path of a file to use instead.

    Returns:
        Argument -> hash.
    """
    paths = {key: local_path(weights) for key, weights in pretrained_model(name).weights.items()}
    paths |= {key: Path(path) for key, path in files.items()}
    return {key: file_sha256(path) for key, path in paths.items() if path.is_file()}
