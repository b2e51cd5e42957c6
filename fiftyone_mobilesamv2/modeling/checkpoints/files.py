"""The files of models on this machine: where they are, fetching what is missing, verifying and deleting them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import CheckpointError, DownloadError
from .catalog import DEMO_MODEL, MODELS, Weights, model_files, pretrained_model
from .downloads import DownloadProgress, download, partial_path
from .verification import file_hashes, file_sha256, find_problem, read_record, record_path, verify

WEIGHTS_DIR_VARIABLE = "FIFTYONE_MOBILESAMV2_WEIGHTS_DIR"
PACKAGED_WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


def weights_dir() -> Path:
    """The folder of downloaded weights: $FIFTYONE_MOBILESAMV2_WEIGHTS_DIR, else a folder of the user's cache."""
    if folder := os.environ.get(WEIGHTS_DIR_VARIABLE):
        return Path(folder).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "fiftyone_mobilesamv2"


def local_path(weights: Weights) -> Path:
    """Where the file is, or will be once downloaded.

    A file in the weights folder that has one of its old names counts if it has the right hash.

    >>> local_path(pretrained_model("mobilesamv2-demo-torch").encoder_weights).name
    'demo_sam.safetensors'
    """
    if weights.is_packaged:
        return PACKAGED_WEIGHTS / weights.filename
    path = weights_dir() / weights.filename
    if not path.is_file():
        for old in old_paths(weights):
            if find_problem(old, weights, record_path(old)) is None:
                return old
    return path


def old_paths(weights: Weights) -> list[Path]:
    """Files in the weights folder under old names of `weights`, whatever is in them.

    Without a published hash there is no way to tell whether they are the same.
    """
    if not (weights.sha256 or weights.git_blob):
        return []
    return [path for name in weights.old_names if (path := weights_dir() / name).is_file()]


def is_here(weights: Weights) -> bool:
    """Whether the file is on this machine."""
    return local_path(weights).is_file()


# Fetching ------------------------------------------------------------------------------------------------------------


def fetch_model(name: str, skip: Collection[str] = (), progress: DownloadProgress | None = None) -> dict[str, Path]:
    """Makes sure of the files of the model `name`, downloading what is missing.

    Args:
        skip: arguments whose files the caller has: "encoder_checkpoint", "decoder_checkpoint", "detector_checkpoint".
        progress: told of downloads, in place of a bar on stderr. What it raises ends the download, to be resumed.

    Returns:
        argument -> verified path.

    Raises:
        ValueError: no model has that name.
        CheckpointError: a file that is here is not the expected one (it is left where it is).
        DownloadError: files are missing and no source gave them.

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
    """The verified path of a file, downloaded if it is not there; `progress` as for :func:`fetch_model`.

    Raises:
        CheckpointError: the file that is there is not the expected one (it is left where it is).
        DownloadError: it is not there, and no source gave the expected file.
    """
    path = local_path(weights)
    if not path.is_file():
        if weights.is_packaged:
            raise CheckpointError(f"{path} is part of the package and is missing: reinstall fiftyone_mobilesamv2.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                # Another process may have been faster.
                reasons = {} if path.is_file() else download(weights, path, progress)
        except OSError as error:
            reasons = {str(path.parent): f"can't be written to: {error}"}
        if reasons:
            raise _download_error(None, {weights: reasons})
    verify(path, weights)
    return path


def _download_error(model: str | None, failures: Mapping[Weights, Mapping[str, str]]) -> DownloadError:
    """What to tell: each file with its first source and reason, and where to put it; all the rest as details."""
    names = ", ".join(weights.filename for weights in failures)
    lines = [f"{names} could not be downloaded." if model is None else f"{model} lacks files, and downloading failed:"]
    details = []
    for weights, reasons in failures.items():
        source, reason = next(iter(reasons.items()))
        lines.append(f"- {weights.filename} ({weights.megabytes:,} MB) from {source}: {reason}")
        details.append(f"{weights.filename}: {weights.describe()}")
        details += [f"  {source}: {reason}" for source, reason in reasons.items()]
        details += [f"  {path} is another file" for path in old_paths(weights)]
    lines.append(f"Put what is missing into {weights_dir()} (or the folder that {WEIGHTS_DIR_VARIABLE} names).")
    if model is not None:
        lines.append(f"Or try the model that comes with the package, {DEMO_MODEL}.")
        lines.append(f"All sources, hashes and reasons: fiftyone-mobilesamv2 models --download {model} --details")
    reasons = {source: reason for of_file in failures.values() for source, reason in of_file.items()}
    return DownloadError("\n".join(lines), reasons, "\n".join(details))


def megabytes_to_download(name: str) -> int:
    """How much of the model `name` is missing here.

    >>> megabytes_to_download("mobilesamv2-demo-torch")
    0
    """
    return sum(weights.megabytes for weights in model_files(name) if not is_here(weights))


# Deleting ------------------------------------------------------------------------------------------------------------


def deletable_files(name: str) -> list[Weights]:
    """What :func:`delete_model` would delete: the files that are here, whole or in part, except those of the package
    and those that another model needs whose files are all here."""
    others = [other for other in MODELS if other != name]
    ready = [other for other in others if all(map(is_here, model_files(other)))]
    needed = {weights for other in ready for weights in model_files(other)}
    return [
        weights
        for weights in model_files(name)
        if not weights.is_packaged
        and weights not in needed
        and (is_here(weights) or partial_path(local_path(weights)).exists())
    ]


def delete_model(name: str) -> list[Weights]:
    """Deletes the downloaded files of the model `name` that no other model here needs, and returns them.

    The records of their hashes stay: they show whether a file has changed at its source when it is downloaded again.

    Raises:
        CheckpointError: one of the files is being downloaded.
        OSError: one can't be deleted.
    """
    files = deletable_files(name)
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
    """What verifying a file found.

    Attributes:
        sha256: of a file that is right, else None.
        problem: what is wrong, else None.
    """

    sha256: str | None = None
    problem: str | None = None


def verify_model(name: str, progress: Callable[[int, Weights], None] = lambda *_: None) -> dict[Weights, Verified]:
    """Reads every byte of the model's files that are here, and checks them as :func:`verify` does.

    Args:
        progress: told of the number of files that are done, and of the next one.
    """
    found = {}
    for number, weights in enumerate(model_files(name)):
        progress(number, weights)
        if not is_here(weights):
            found[weights] = Verified(problem="is not here")
            continue
        try:
            found[weights] = Verified(verified_sha256(weights))
        except CheckpointError as error:
            found[weights] = Verified(problem=str(error))
    return found


def verified_sha256(weights: Weights) -> str:
    """The sha256 of a file that is here, which is read to its end and checked as by :func:`verify`."""
    path = local_path(weights)
    verify(path, weights, reread=True)
    # Of files that lie where nothing can be written there is no record.
    return read_record(record_path(path)).get("sha256") or file_hashes(path)[0]


def weights_sha256(name: str, files: Mapping[str, str | PathLike[str]]) -> dict[str, str]:
    """The sha256 of every file that the model `name` runs with, of those that are here.

    Args:
        files: as for :meth:`MobileSAMv2.from_pretrained`: argument -> path of a file to use instead.

    Returns:
        argument -> hash.
    """
    paths = {key: local_path(weights) for key, weights in pretrained_model(name).weights.items()}
    paths |= {key: Path(path) for key, path in files.items()}
    return {key: file_sha256(path) for key, path in paths.items() if path.is_file()}
