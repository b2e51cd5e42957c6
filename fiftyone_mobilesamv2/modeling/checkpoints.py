"""Which files a model needs, where they come from, how they are verified and read.

Layouts that load (by content, not by name):

- a whole SAM: ``image_encoder.*``, ``prompt_encoder.*``, ``mask_decoder.*`` (MobileSAM v1, Meta's SAM)
- any of these inside ``{"state_dict": ...}`` or ``{"model": ...}`` (EfficientViT-SAM, MobileSAM v2)
- an encoder's tensors under their own names
- ``{"PromtEncoder": ..., "MaskDecoder": ...}`` (MobileSAMv2's prompt-guided decoder; the spelling is the file's own)
- a pickled ultralytics detector, or the tensors of one
- all of that as ``.safetensors``

Nothing in a file is ever executed: :mod:`.saved_tensors` takes the tensors out of a pickle, whatever classes of torch
and ultralytics it names (the detector's does), and refuses it if it names anything else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from .image_encoders import encoder_config
from .object_discovery import INPUT_SIZE
from .prompt_guided_decoder import PromptGuidedDecoder
from .saved_tensors import SavedModule, named_tensors, read_saved

logger = logging.getLogger(__name__)

WEIGHTS_DIR_VARIABLE = "FIFTYONE_MOBILESAMV2_WEIGHTS_DIR"
DOWNLOAD_HOSTS_VARIABLE = "FIFTYONE_MOBILESAMV2_DOWNLOAD_HOSTS"
PACKAGED_WEIGHTS = Path(__file__).resolve().parent.parent / "weights"

_RELEASE = "34bbbfdface3c18e5221aa7de6032d7220c6c6a1"
_RELEASE_URL = f"https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/{_RELEASE}"
_META_URL = "https://dl.fbaipublicfiles.com/segment_anything"
# Those of the sources below; the hub redirects to hosts of its own.
_HOSTS = re.compile(r"raw\.githubusercontent\.com|dl\.fbaipublicfiles\.com|([\w.-]+\.)?(huggingface\.co|hf\.co)")
_SECRETS = re.compile(r"(?<=//)[^\s'\"]*@|\?[^\s'\"]+")  # in a URL: user and password, and the query


class CheckpointError(RuntimeError):
    """A file of weights is missing, is not the one that was expected, or does not fit the model."""


@dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face hub."""

    repo: str
    path: str

    def __str__(self) -> str:
        return f"https://huggingface.co/{self.repo}/resolve/main/{self.path}"


@dataclass(frozen=True)
class Weights:
    """One file of weights.

    Attributes:
        filename: its name in the weights folder.
        sources: where it can be downloaded, in the order in which they are tried: hub files and URLs.
        megabytes: about how large it is.
        size: its exact size in bytes, where known.
        sha256: its hash, or the first digits of it where its publisher gives no more.
        git_blob: its git blob id, sha1 of b"blob <size>\\0" + content, which pins it as well.
    """

    filename: str
    sources: tuple[HubFile | str, ...]
    megabytes: int
    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None

    def describe(self) -> str:
        """What the file should be, for an error message."""
        facts = [f"{self.size:,} bytes" if self.size else f"about {self.megabytes} MB"]
        if self.sha256:
            facts.append(f"sha256 {self.sha256}" + ("" if len(self.sha256) == 64 else "..."))
        if self.git_blob:
            facts.append(f"git blob {self.git_blob}")
        return ", ".join(facts)


MOBILE_SAM = Weights(
    "mobile_sam.pt",
    (f"{_RELEASE_URL}/weights/mobile_sam.pt", HubFile("dhkim2810/MobileSAM", "mobile_sam.pt")),
    megabytes=41,
    size=40_728_226,
    sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    git_blob="7ef2d090979fd9853adf17b7a99c8b94a1c5a6a7",
)
PROMPT_GUIDED_DECODER = Weights(
    "Prompt_guided_Mask_Decoder.pt",
    (
        f"{_RELEASE_URL}/MobileSAMv2/PromptGuidedDecoder/Prompt_guided_Mask_Decoder.pt",
        HubFile("RogerQi/MobileSAMV2", "Prompt_guided_Mask_Decoder.pt"),
    ),
    megabytes=15,
    git_blob="c13b15a3a4496dbcba5f4f0d3e8453f41d818420",
)
OBJECT_AWARE_MODEL = Weights(
    "ObjectAwareModel.pt",
    (
        HubFile("yuwendu/MobileSAM_utils", "weight/ObjectAwareModel.pt"),
        HubFile("RogerQi/MobileSAMV2", "ObjectAwareModel.pt"),
    ),
    megabytes=140,
    sha256="4d99244a9c7a4d7330af28d1801ebee362fa469ac564b57c8eab48b43e4e64a1",
)


def _efficientvit(name: str, megabytes: int, size: int | None = None, sha256: str | None = None) -> Weights:
    source = HubFile("mit-han-lab/efficientvit-sam", f"{name}.pt")
    return Weights(f"{name}.pt", (source,), megabytes, size, sha256)


def _meta_sam(name: str, megabytes: int, sha256: str) -> Weights:
    filename = f"sam_{name}_{sha256}.pth"  # Meta's file names carry the first digits of the hash
    return Weights(filename, (f"{_META_URL}/{filename}",), megabytes, sha256=sha256)


@dataclass(frozen=True)
class PretrainedModel:
    """A model of the zoo: an encoder of the registry and the files it runs with."""

    encoder: str
    encoder_weights: Weights
    decoder_weights: Weights = PROMPT_GUIDED_DECODER
    detector_weights: Weights = OBJECT_AWARE_MODEL
    detector_size: int = INPUT_SIZE

    @property
    def weights(self) -> dict[str, Weights]:
        """The files by the name of the argument that takes their path."""
        return {
            "encoder_checkpoint": self.encoder_weights,
            "decoder_checkpoint": self.decoder_weights,
            "detector_checkpoint": self.detector_weights,
        }


_DEMO_SAM = Weights("demo_sam.safetensors", (), megabytes=12)
_DEMO_DETECTOR = Weights("demo_detector.safetensors", (), megabytes=6)

MODELS: dict[str, PretrainedModel] = {
    "mobilesamv2-tinyvit-torch": PretrainedModel("tiny_vit", MOBILE_SAM),
    "mobilesamv2-efficientvit-l0-torch": PretrainedModel("efficientvit_l0", _efficientvit("l0", 140)),
    "mobilesamv2-efficientvit-l1-torch": PretrainedModel("efficientvit_l1", _efficientvit("l1", 190)),
    "mobilesamv2-efficientvit-l2-torch": PretrainedModel(
        "efficientvit_l2",
        _efficientvit("l2", 246, 245_724_244, "f087f8287d5b3791020be8b0346a35dae0849dd191bf165178bf947e0df868cc"),
    ),
    "mobilesamv2-vitb-torch": PretrainedModel("sam_vit_b", _meta_sam("vit_b", 375, "01ec64")),
    "mobilesamv2-vitl-torch": PretrainedModel("sam_vit_l", _meta_sam("vit_l", 1250, "0b3195")),
    "mobilesamv2-vith-torch": PretrainedModel("sam_vit_h", _meta_sam("vit_h", 2565, "4b8939")),
    # Comes with the package; the detector was trained at this size (training/detector.py).
    "mobilesamv2-demo-torch": PretrainedModel("resnet_demo", _DEMO_SAM, _DEMO_SAM, _DEMO_DETECTOR, detector_size=320),
}


def pretrained_model(name: str) -> PretrainedModel:
    """The zoo's entry `name`.

    Raises:
        ValueError: no model has that name.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}; choose one of {', '.join(MODELS)}.")
    return MODELS[name]


def model_files(name: str) -> list[Weights]:
    """The files of the model `name`, each once: one may hold several parts."""
    return list(dict.fromkeys(pretrained_model(name).weights.values()))


# Where files are ----------------------------------------------------------------------------------------------------


def weights_dir() -> Path:
    """The folder of downloaded weights: $FIFTYONE_MOBILESAMV2_WEIGHTS_DIR, else a folder of the user's cache."""
    if folder := os.environ.get(WEIGHTS_DIR_VARIABLE):
        return Path(folder).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "fiftyone_mobilesamv2"


def local_path(weights: Weights) -> Path:
    """Where the file is, or will be once downloaded."""
    packaged = PACKAGED_WEIGHTS / weights.filename
    return packaged if not weights.sources else weights_dir() / weights.filename


# What a download reports: the file's name, the bytes that have come, and those that it has, where the server says so.
DownloadProgress = Callable[[str, int, int | None], None]


def fetch_model(name: str, skip: Collection[str] = (), progress: DownloadProgress | None = None) -> dict[str, Path]:
    """Makes sure of the files of the model `name`, downloading what is missing.

    Args:
        skip: arguments whose files the caller has: "encoder_checkpoint", "decoder_checkpoint", "detector_checkpoint".
        progress: told of downloads, in place of a bar on stderr. What it raises ends the download, to be resumed.

    Returns:
        argument -> verified path.

    Raises:
        CheckpointError: with all files that are missing and where to put them, or the file that is wrong.
    """
    needed = {key: weights for key, weights in pretrained_model(name).weights.items() if key not in skip}
    paths, failures = {}, []
    for key, weights in needed.items():
        try:
            paths[key] = fetch(weights, progress)
        except DownloadError as error:
            failures.append((weights, error))
    if failures:
        lines = [f"Weights of {name} are missing and could not be downloaded. Put these files into {weights_dir()}"]
        lines[0] += f" (or set {WEIGHTS_DIR_VARIABLE} to the folder that has them, or pass their paths):"
        for weights, error in failures:
            lines.append(f"- {weights.filename} ({weights.describe()})")
            lines += [f"    from {source}: {reason}" for source, reason in error.reasons.items()]
        raise CheckpointError("\n".join(lines))
    return paths


class DownloadError(CheckpointError):
    """No source gave the file. `reasons`: source -> why not."""

    def __init__(self, weights: Weights, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        tried = "; ".join(f"{source}: {reason}" for source, reason in reasons.items()) or "it has no source"
        super().__init__(f"{weights.filename} could not be downloaded ({tried}).")


def fetch(weights: Weights, progress: DownloadProgress | None = None) -> Path:
    """The verified path of a file, downloaded if it is not there; `progress` as for :func:`fetch_model`.

    Raises:
        CheckpointError: the file that is there is not the expected one (it is left where it is).
        DownloadError: it is not there, and no source gave the expected file.
    """
    path = local_path(weights)
    if not path.is_file():
        if not weights.sources:
            raise CheckpointError(f"{path} is part of the package and is missing: reinstall fiftyone_mobilesamv2.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.is_file():  # else another process was faster
                    _download(weights, path, progress)
        except OSError as error:
            raise DownloadError(weights, {str(path.parent): f"can't be written to: {error}"}) from error
    verify(path, weights)
    return path


def _download(weights: Weights, path: Path, progress: DownloadProgress | None) -> None:
    """Downloads to a file beside `path`, which takes its place only when it is the right one."""
    partial = _partial_path(path)
    left_over = partial.exists()
    reasons = {}
    for source in weights.sources:
        try:
            _transfer(_url(source), partial, weights.size or 2_000_000 * weights.megabytes, progress)
        except Exception as error:  # from OSError to the types of the hub's HTTP client, which share no other base
            reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            reasons[_without_secrets(str(source))] = _without_secrets(" ".join(reason.split()))
            continue  # what has come stays, to be resumed
        if problem := _problem(partial, weights, _record_path(path)):
            partial.unlink()
            if left_over:  # by an earlier attempt, perhaps of another file: once more from the start
                return _download(weights, path, progress)
            reasons[_without_secrets(str(source))] = f"the file there {problem}"
            continue
        partial.replace(path)
        return
    raise DownloadError(weights, reasons)


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _url(source: HubFile | str) -> str:
    if isinstance(source, str):
        return source
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    # The hub's library answers where a file is (mirrors, offline mode, tokens). Its own downloader would try a dead
    # network for 23 seconds a file, and keep a folder beside the weights.
    url = hf_hub_url(source.repo, source.path)
    _check_host(url)  # a mirror's, perhaps: the user's token goes there
    return get_hf_file_metadata(url).location


def _check_host(url: str) -> None:
    """Raises CheckpointError unless weights may be downloaded from there: over https from the hosts of the sources, or
    from what $FIFTYONE_MOBILESAMV2_DOWNLOAD_HOSTS names, such as "https://mirror.example http://10.0.0.5:8000"."""
    parts = urllib.parse.urlsplit(url)
    origin = f"{parts.scheme}://{parts.netloc}".lower()
    if parts.scheme == "https" and _HOSTS.fullmatch(parts.netloc.lower()):
        return
    if "@" not in origin and origin in os.environ.get(DOWNLOAD_HOSTS_VARIABLE, "").lower().split():
        return
    raise CheckpointError(
        f"{_without_secrets(origin)} is none of the hosts that weights are downloaded from; if you trust it, add it to "
        f"{DOWNLOAD_HOSTS_VARIABLE}"
    )


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> urllib.request.Request | None:
        _check_host(args[-1])
        return super().redirect_request(*args)


def _without_secrets(text: str) -> str:
    return _SECRETS.sub("", text)


def _transfer(url: str, partial: Path, limit: int, progress: DownloadProgress | None) -> None:
    """Downloads `url` to `partial`, going on where an earlier attempt stopped. Takes no more than `limit` bytes."""
    _check_host(url)
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.build_opener(_CheckedRedirects).open(request, timeout=30)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # all of it is here already
            return
        raise
    with response:
        if response.status != 206:  # the server sends the whole file whatever was asked
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        too_large = CheckpointError(f"the file there is not {partial.stem}: it has more than {limit:,} bytes")
        if total is not None and total > limit:
            raise too_large
        bar = tqdm(
            initial=start,
            total=total,
            unit="B",
            unit_scale=True,
            desc=partial.stem,
            file=sys.stderr,
            disable=progress is not None,
        )
        with partial.open("ab" if start else "wb") as file, bar:
            while chunk := response.read(1 << 20):
                if file.tell() + len(chunk) > limit:
                    file.truncate(0)
                    raise too_large
                file.write(chunk)
                bar.update(len(chunk))
                if progress is not None:
                    progress(partial.stem, file.tell(), total)
    if total is not None and partial.stat().st_size < total:
        raise OSError(f"the connection broke after {partial.stat().st_size:,} of {total:,} bytes; try again to resume")


def deletable_files(name: str) -> list[Weights]:
    """What :func:`delete_model` would delete: the files that are here, whole or in part, but those of the package and
    those that another model needs whose files are all here."""
    others = [other for other in MODELS if other != name]
    ready = [other for other in others if all(local_path(weights).is_file() for weights in model_files(other))]
    needed = {weights for other in ready for weights in model_files(other)}
    return [
        weights
        for weights in model_files(name)
        if weights.sources
        and weights not in needed
        and (local_path(weights).exists() or _partial_path(local_path(weights)).exists())
    ]


def delete_model(name: str) -> list[Weights]:
    """Deletes the downloaded files of the model `name` that no other model here needs, and returns them.

    The records of their hashes stay: by these, a file that changes at its source is told when it is downloaded again.

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
                _partial_path(path).unlink(missing_ok=True)
        except Timeout as error:
            raise CheckpointError(f"{path} is being downloaded by another process: cancel that first.") from error
    return files


# Whether they are the right ones ------------------------------------------------------------------------------------


def verify(path: Path, weights: Weights, reread: bool = False) -> None:
    """Checks that the file at `path` is `weights`: its size and hash where they are known, else the hash that was
    recorded when it was first used. A file that has not changed since it was checked is not read again, but `reread`.

    Raises:
        CheckpointError: it is another file.
    """
    if problem := _problem(path, weights, _record_path(path), reread):
        remedy = "delete the file to have it downloaded again" if weights.sources else "reinstall fiftyone_mobilesamv2"
        raise CheckpointError(f"{path} {problem}; {remedy}.")


def verified_sha256(weights: Weights) -> str:
    """The sha256 of a file that is here, which is read to its end and checked as by :func:`verify`."""
    path = local_path(weights)
    verify(path, weights, reread=True)
    # Of files that lie where nothing can be written there is no record.
    return _read_record(_record_path(path)).get("sha256") or file_hashes(path)[0]


def weights_sha256(name: str, files: Mapping[str, str | PathLike]) -> dict[str, str]:
    """The sha256 of every file that the model `name` runs with, as far as they are here.

    Args:
        files: as for :meth:`MobileSAMv2.from_pretrained`: argument -> path of a file to use instead.

    Returns:
        argument -> hash.
    """
    paths = {key: local_path(weights) for key, weights in pretrained_model(name).weights.items()}
    paths |= {key: Path(path) for key, path in files.items()}
    found = {}
    for key, path in paths.items():
        if path.is_file():
            stat = path.stat()
            found[key] = _sha256(path, stat.st_mtime_ns, stat.st_size)
    return found


@lru_cache(maxsize=100)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    record = _read_record(_record_path(path))
    if {"size": size, "mtime_ns": mtime_ns}.items() <= record.items() and "sha256" in record:
        return record["sha256"]
    return file_hashes(path)[0]


def _problem(path: Path, weights: Weights, record_path: Path, reread: bool = False) -> str | None:
    """What is wrong with the file at `path`, if anything; what was found of a good one is recorded."""
    try:
        stat = path.stat()
        if weights.size is not None and stat.st_size != weights.size:
            return f"is not {weights.filename}: it has {stat.st_size:,} bytes, expected {weights.describe()}"
        known = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        record = _read_record(record_path)
        recorded = record.get("sha256"), record.get("git_blob")
        if not reread and known.items() <= record.items() and _matches(weights, *recorded):
            return None
        sha256, git_blob = file_hashes(path)
    except OSError as error:
        return f"can't be read ({error})"
    if not _matches(weights, sha256, git_blob):
        return f"is not {weights.filename}: its sha256 is {sha256}, expected {weights.describe()}"
    if not (weights.sha256 or weights.git_blob) and record and recorded[0] != sha256:
        return (
            f"has changed since {weights.filename} was first used: its sha256 was {recorded[0]} and is {sha256} now. "
            f"If that is as it should be, delete {record_path}; else"
        )
    if weights.sources:  # the package's own files lie where nothing should be written
        try:
            # Written aside and moved: another process may be reading.
            aside = record_path.with_name(f"{record_path.name}.{os.getpid()}-{threading.get_ident()}")
            aside.write_text(json.dumps({**known, "sha256": sha256, "git_blob": git_blob}))
            aside.replace(record_path)
        except OSError as error:
            logger.debug("Could not record the hash of %s: %s", path, error)
    return None


def file_hashes(path: Path) -> tuple[str, str]:
    """sha256 and git blob id of a file, as hex."""
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def _matches(weights: Weights, sha256: str | None, git_blob: str | None) -> bool:
    return (weights.sha256 is None or (sha256 or "").startswith(weights.sha256)) and (
        weights.git_blob is None or git_blob == weights.git_blob
    )


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified.json")


def _read_record(record_path: Path) -> dict:
    try:
        record = json.loads(record_path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{record_path} can't be read ({error}); delete it.") from error
    return record if isinstance(record, dict) else {}


# What is in them ----------------------------------------------------------------------------------------------------

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_encoder(path: str | PathLike, name: str) -> nn.Module:
    """The image encoder `name` with the weights of a file in any layout.

    Raises:
        CheckpointError: the file's tensors are not exactly the encoder's.
    """
    config = encoder_config(name)
    tensors = read_tensors(path)
    prefixed = [key for key in tensors if "image_encoder." in key]
    if prefixed:
        inner = {key.split("image_encoder.", 1)[1]: tensors[key] for key in prefixed}
        if len(inner) < len(prefixed):
            raise CheckpointError(f"{path} holds more than one image encoder: {_some(prefixed)}.")
        tensors = inner
    module = config.build()
    tensors = {config.rename(key): tensor for key, tensor in tensors.items()}
    _load_strictly(module, tensors, f"{path} does not fit the image encoder {name}")
    return module


def load_decoder(path: str | PathLike, encoder: str) -> PromptGuidedDecoder:
    """The prompt-guided decoder that goes with `encoder`, with the weights of a file in any layout.

    Raises:
        CheckpointError: the file's tensors are not exactly the decoder's.
    """
    config = encoder_config(encoder)
    parts = {"prompt_encoder": "prompt_encoder", "mask_decoder": "mask_decoder"}
    parts |= {"PromtEncoder": "prompt_encoder", "MaskDecoder": "mask_decoder"}
    tensors = {}
    for key, tensor in read_tensors(path).items():
        match = re.search(rf"(?:^|\.)({'|'.join(parts)})\.(.+)$", key)
        if match:
            tensors[f"{parts[match[1]]}.{match[2]}"] = tensor
    decoder = PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    _load_strictly(decoder, tensors, f"{path} does not fit the prompt-guided decoder of {encoder}")
    return decoder


def load_detector(path: str | PathLike) -> nn.Module:
    """The class-agnostic YOLOv8 whose tensors a file holds, fused for inference.

    The architecture is ultralytics' own for the scale that the tensors have; nothing of the file but tensors is used.
    The mask branch of a segmentation model (the release's detector is one) is left out: boxes don't depend on it.

    Raises:
        CheckpointError: the file holds no YOLOv8 with one class.
    """
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    mask_branch = ("model.22.cv4.", "model.22.proto.")
    tensors = {key: tensor for key, tensor in read_tensors(path).items() if not key.startswith(mask_branch)}
    scales = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}
    stem, scores = tensors.get("model.0.conv.weight"), tensors.get("model.22.cv3.0.2.weight")
    bins = tensors.get("model.22.dfl.conv.weight")
    convolutions = [tensor is not None and tensor.ndim == 4 for tensor in (stem, scores, bins)]
    if not all(convolutions) or stem.shape[0] not in scales or not 1 <= bins.shape[1] <= 64:
        raise CheckpointError(f"{path} holds no YOLOv8 detector: found tensors {_some(tensors)}.")
    if len(scores) != 1:
        raise CheckpointError(f"{path} detects {len(scores)} classes; object discovery needs one class, 'object'.")
    name = f"yolov8{scales[stem.shape[0]]}.yaml"
    # The release regresses box sides over 26 bins (as FastSAM does), where YOLOv8 has 16.
    config = yaml_model_load(name) | {"nc": 1, "reg_max": bins.shape[1]}
    model = DetectionModel(config, verbose=False)
    _load_strictly(model, tensors, f"{path} does not fit {name}")
    model = model.eval().fuse(verbose=False)
    _check_numbers(model.state_dict(), f"{path} is no detector that can be used")
    return model


def read_tensors(path: str | PathLike) -> dict[str, Tensor]:
    """All tensors of a file by name, nested names joined by dots; wrappers that say nothing are taken off.

    Raises:
        CheckpointError: the file is missing, is no checkpoint, or holds something other than tensors and plain data.
    """
    path = Path(path)
    try:
        is_file = path.is_file()  # nor a folder, nor a pipe, which would be waited for
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.") from error
    if not is_file:
        raise CheckpointError(f"There is no file {path}.")
    kind = "safetensors file" if path.suffix == ".safetensors" else "checkpoint that can be read"
    try:
        content = _load_safetensors(path) if path.suffix == ".safetensors" else read_saved(path)
        for _ in range(3):  # {"model": {"state_dict": ...}}, ultralytics prefers "ema"; it can hold itself
            if isinstance(content, dict):
                inside = (content.get(key) for key in ("ema", "model", "state_dict"))
                content = next((value for value in inside if isinstance(value, dict | SavedModule)), content)
        if isinstance(content, dict | SavedModule):
            return dict(named_tensors(content))
    except Exception as error:  # of a file that is damaged anything comes, from RuntimeError to KeyError
        raise CheckpointError(f"{path} is not a {kind}: {_first_line(error)}.") from error
    raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name.")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path)

    def check_unique(pairs: list[tuple[str, object]]) -> None:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("its header has a name twice")

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=check_unique)
    return tensors


def _load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], complaint: str) -> None:
    expected = module.state_dict()
    missing = [key for key in expected if key not in tensors]
    surplus = [key for key in tensors if key not in expected]
    shapes, types = [], []
    for key, value in expected.items():
        if key in tensors and tensors[key].shape != value.shape:
            shapes.append(f"{key} {tuple(tensors[key].shape)} instead of {tuple(value.shape)}")
        # The integers are counters of batch norms, which inference doesn't use: whatever they were saved as.
        elif key in tensors and value.is_floating_point() and tensors[key].dtype not in _FLOATS:
            types.append(f"{key} {tensors[key].dtype} instead of {value.dtype}")
    problems = {"missing": missing, "surplus": surplus, "of the wrong shape": shapes, "of the wrong type": types}
    _complain(complaint, problems)
    weights = {key: tensors[key].to(value.dtype) for key, value in expected.items()}
    _check_numbers(weights, complaint)
    module.load_state_dict(weights)


def _check_numbers(weights: Mapping[str, Tensor], complaint: str) -> None:
    not_finite, negative = [], []
    for key, weight in weights.items():
        if weight.is_floating_point():
            low, high = weight.aminmax()  # NaN if any is; takes a quarter of the time of isfinite().all()
            if not (low.isfinite() and high.isfinite()):
                not_finite.append(key)
            elif key.endswith("running_var") and low < 0:
                negative.append(key)
    _complain(complaint, {"with NaN or infinite values": not_finite, "with negative variances": negative})


def _complain(complaint: str, problems: Mapping[str, Collection[str]]) -> None:
    """Raises CheckpointError if there are any."""
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"{complaint}: {found}")


def _some(names: Collection[str]) -> str:
    shown = ", ".join(_printable(name[:100]) for name in list(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown or "none"


def _first_line(error: Exception) -> str:
    return _printable((str(error).splitlines() or [type(error).__name__])[0][:300].rstrip("."))


def _printable(text: str) -> str:
    """Of what a file says, without what would end the line or command a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
