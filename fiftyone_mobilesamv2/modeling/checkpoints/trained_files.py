"""The folder of a trained model: reading and writing it.

A folder holds everything but the files of the catalog that the model uses, so it can be copied to another machine:

- ``config.json``: what the model consists of (:class:`TrainedModel`) and how it was trained
- ``manifest.json`` and ``__init__.py``, with which FiftyOne's zoo lists and loads the model
- ``*.safetensors``: the trained weights, whose hashes are in ``config.json``
- ``README.md``, ``curve.csv``, ``curve.png``: written by the training
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ...errors import ArgumentError, CheckpointError, message_of, plain
from ...fiftyone_settings import own_zoo_models
from ..complete_files import complete_file
from .catalog import MODELS, PretrainedModel, Weights
from .manifest import manifest_entry
from .verification import COPY_AGAIN, file_hashes

CONFIG = "config.json"
MANIFEST = "manifest.json"
HOOKS = "__init__.py"
EXTRAS = ("README.md", "curve.csv", "curve.png")
FORMAT = 1

PARTS = {"discovery": "object discovery", "masks": "masks"}  # what can be trained, in words
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OWN_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")

# FiftyOne imports this file to load the model, perhaps in a process that has not imported the package.
_HOOKS_CODE = '''"""Lets FiftyOne's model zoo load this model, which fiftyone_mobilesamv2 trained."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.find_spec("fiftyone_mobilesamv2")
if spec is None or spec.origin is None:  # not installed, but perhaps a source of zoo models beside this one
    sys.path.append(str(Path(__file__).parents[2]))

from fiftyone_mobilesamv2 import download_model, load_model, parse_parameters, resolve_input
'''


@dataclass(frozen=True)
class TrainedModel:
    """A trained model.

    Attributes:
        folder: its folder, or the link by which it is registered.
        part: what was trained: "discovery" (the detector) or "masks".
        base: the model that the training started from.
        dataset: the name of the dataset that it was trained on.
        created: when its files were complete.
        training: what the training recorded: settings, counts, results, versions, and as "contents" the hashes of the
            images that it and its bases were "trained_on", and those it "held_out".
        model: its encoder, weights and descriptions, as for a model of the catalog.
    """

    folder: Path
    name: str
    part: str
    base: str
    dataset: str
    created: datetime
    training: dict[str, Any]
    model: PretrainedModel

    @property
    def own_files(self) -> list[Weights]:
        """The weights in its folder; its other files are those of the catalog."""
        return [weights for weights in dict.fromkeys(self.model.weights.values()) if weights.folder is not None]


def check_name(name: str) -> None:
    """Checks the name for a new trained model.

    Raises:
        ValueError: a folder or FiftyOne's zoo can't have it, or it is a model of the catalog or of FiftyOne's own zoo.

    >>> check_name("my-cells")
    """
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise ArgumentError(f"A model can't have the name {plain(name)!r}: use {_NAME_RULE}.")
    if name in MODELS or name in own_zoo_models():
        raise ArgumentError(f"A model of the zoo already has the name {name!r}: choose another one.")


# Reading -------------------------------------------------------------------------------------------------------------


def _matching(pattern: re.Pattern[str], words: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(words)
        return value

    return AfterValidator(check)


_NAME_RULE = "at most 100 letters, digits, '.', '_' and '-', beginning with a letter or digit"
_Text = Annotated[str, Field(min_length=1)]
_Name = Annotated[str, _matching(NAME, f"be {_NAME_RULE}")]
_Filename = Annotated[str, _matching(_OWN_FILE, "be the name of a .safetensors file in the same folder")]
_Sha256 = Annotated[str, _matching(re.compile("[0-9a-f]{64}"), "be 64 hexadecimal digits")]


class _OwnFile(BaseModel):
    model_config = ConfigDict(strict=True)

    filename: _Filename
    size: Annotated[int, Field(gt=0)]
    sha256: _Sha256


class _CatalogFile(BaseModel):
    model_config = ConfigDict(strict=True)

    catalog: _Text


class _Files(BaseModel):
    encoder_checkpoint: dict[str, Any]
    decoder_checkpoint: dict[str, Any]
    detector_checkpoint: dict[str, Any]


class _Contents(BaseModel):
    model_config = ConfigDict(strict=True)

    trained_on: list[str] = []
    held_out: list[str] = []


class _Training(BaseModel):
    model_config = ConfigDict(extra="allow")

    contents: _Contents = _Contents()


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)

    format: Literal[1]
    name: _Name
    encoder: _Text
    detector_size: Annotated[int, Field(ge=32, le=8192)]
    part: Literal["discovery", "masks"]
    base: _Text
    dataset: _Text
    images: Literal["photos", "scenes"]
    created: _Text
    files: _Files
    training: _Training


def read_trained(folder: str | PathLike[str]) -> TrainedModel:
    """Reads the trained model in `folder`. Its weights are not read.

    Raises:
        CheckpointError: its configuration is missing or damaged, or describes what this version can't load.
    """
    folder = Path(os.path.abspath(folder))
    path = folder / CONFIG
    try:
        if not path.is_file():
            raise CheckpointError(
                f"{path} does not exist, so {folder} is not the folder of a trained model, or not all of it: "
                f"{COPY_AGAIN}."
            )
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read ({message_of(error)}): {COPY_AGAIN}.") from error
    return _parsed(folder, content)


def _parsed(folder: Path, content: object) -> TrainedModel:
    path = folder / CONFIG
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise CheckpointError(f'{path} is not the configuration of a trained model: it has no number "format".')
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, and this version reads format {FORMAT}: "
            "update fiftyone_mobilesamv2."
        )
    config = _validated(_Config, content, path, "")
    if config.name in MODELS:
        raise CheckpointError(f"{path}: the name {config.name!r} is that of a model of the catalog.")
    encoders = list(dict.fromkeys(model.encoder for model in MODELS.values()))
    if config.encoder not in encoders:
        raise CheckpointError(f"{path}: unknown encoder {config.encoder!r}, expected one of {', '.join(encoders)}.")
    try:
        created = datetime.fromisoformat(config.created)
    except ValueError:
        raise CheckpointError(f"{path}: created is {config.created!r}, expected a time in ISO format.") from None
    encoder, decoder, detector = (_weights(folder, key, entry) for key, entry in vars(config.files).items())
    dataset = "".join(character if character.isprintable() else "?" for character in config.dataset)
    base = MODELS.get(config.base)
    model = PretrainedModel(
        config.encoder,
        encoder,
        decoder,
        detector,
        f"{base.description if base else config.encoder}; {PARTS[config.part]} trained on {dataset}",
        f"trained on {dataset}",
        detector_size=config.detector_size,
        images=config.images,
        author="trained with fiftyone_mobilesamv2",
        # At the beginning of all training is the one model of the catalog with this encoder.
        licenses=next(each.licenses for each in MODELS.values() if each.encoder == config.encoder),
        training_data=(dataset, None),
    )
    return TrainedModel(
        folder, config.name, config.part, config.base, config.dataset, created, config.training.model_dump(), model
    )


def _weights(folder: Path, key: str, entry: dict[str, Any]) -> Weights:
    path, where = folder / CONFIG, f"files.{key}."
    if "catalog" not in entry:
        own = _validated(_OwnFile, entry, path, where)
        return Weights(own.filename, (), max(1, round(own.size / 1e6)), own.size, own.sha256, folder=folder)
    name = _validated(_CatalogFile, entry, path, where).catalog
    if name not in (catalog := _catalog_files()):
        raise CheckpointError(f"{path}: {where}catalog is {name!r}, expected one of {', '.join(catalog)}.")
    return catalog[name]


def _catalog_files() -> dict[str, Weights]:
    return {weights.filename: weights for model in MODELS.values() for weights in model.weights.values()}


def _validated(kind: type[Any], content: object, path: Path, where: str) -> Any:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        name = where + ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise CheckpointError(f"{path} lacks {name}: {COPY_AGAIN}.") from None
        found = repr(first["input"])
        found = found if len(found) <= 100 else f"{found[:100]}..."
        expected = re.sub(r"^(Value error, |\w+ should )", "", first["msg"])
        raise CheckpointError(f"{path}: {name} is {found}, but should {expected}.") from None


# Writing -------------------------------------------------------------------------------------------------------------


def write_trained(
    folder: str | PathLike[str],
    *,
    name: str,
    encoder: str,
    detector_size: int,
    part: str,
    base: str,
    dataset: str,
    images: str,
    files: Mapping[str, Path | Weights],
    training: Mapping[str, Any],
) -> TrainedModel:
    """Makes a folder with trained weights a trained model, by writing config.json and what FiftyOne needs.

    Args:
        folder: contains the trained weights already.
        files: the file of each part, under the keys of :attr:`PretrainedModel.weights`: a safetensors file in `folder`,
            or a file of the catalog. Missing ones are those of `base`.
        training: what to record of the training, as JSON can store it.

    Raises:
        ValueError: the name can't be used, or a file is not one of those.
        CheckpointError: an argument does not fit the format.
    """
    check_name(name)
    folder = Path(os.path.abspath(folder))
    parts = (MODELS[base].weights if base in MODELS else {}) | dict(files)
    if missing := _Files.model_fields.keys() - parts:
        raise ArgumentError(f"files lacks {', '.join(sorted(missing))}, and {base!r} is not a model of the catalog.")
    created = datetime.now(timezone.utc).replace(microsecond=0)
    content = {
        "format": FORMAT,
        "name": name,
        "encoder": encoder,
        "detector_size": detector_size,
        "part": part,
        "base": base,
        "dataset": dataset,
        "images": images,
        "created": created.isoformat(),
        "files": {key: _entry(folder, file) for key, file in parts.items()},
        "training": dict(training),
    }
    trained = _parsed(folder, content)
    weights = dict.fromkeys(trained.model.weights.values())
    size = sum(each.size or each.megabytes * 10**6 for each in weights)
    entry = manifest_entry(name, trained.model, CONFIG, "trained", size, created)
    texts = {
        HOOKS: _HOOKS_CODE,
        MANIFEST: _json({"name": f"mobilesamv2/trained/{name}", "models": [entry]}),
        CONFIG: _json(content),  # last: with it, the model is complete
    }
    for filename, text in texts.items():
        with complete_file(folder / filename) as temporary:
            temporary.write_text(text, "utf-8")
    return trained


def _entry(folder: Path, file: Path | Weights) -> dict[str, Any]:
    if isinstance(file, Weights):
        if file != _catalog_files().get(file.filename):
            raise ArgumentError(f"{file.filename} is not a file of the catalog: copy it to {folder} and give its path.")
        return {"catalog": file.filename}
    if file.parent.resolve() != folder.resolve() or not _OWN_FILE.fullmatch(file.name) or not file.is_file():
        raise ArgumentError(f"{file} is not a safetensors file in {folder}: write the trained weights there first.")
    return {"filename": file.name, "size": file.stat().st_size, "sha256": file_hashes(file)[0]}


def _json(content: object) -> str:
    return f"{json.dumps(content, indent=4)}\n"
