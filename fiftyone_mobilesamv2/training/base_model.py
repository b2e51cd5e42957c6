"""The model that a training starts from, or that labels images as a teacher."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..modeling.checkpoints.catalog import PretrainedModel, Weights
from ..modeling.checkpoints.files import fetch_model
from ..modeling.checkpoints.loading import load_decoder, load_embedding_detector, load_encoder
from ..modeling.checkpoints.lookup import find_trained, pretrained_model
from ..modeling.complete_files import complete_file
from ..modeling.defaults import CONFIDENCE, NMS_IOU
from ..modeling.embedding_discovery import EmbeddingDetector, EmbeddingDiscovery
from ..modeling.image_encoders import encoder_config
from ..modeling.mobilesamv2 import MobileSAMv2
from .discovery import covered_shares
from .examples import Example, Seen
from .networks import Networks

# A label explains what the base finds if they overlap this much, or if the label covers this share of it, as in
# `find_unlabeled_objects`.
_EXPLAINING_IOU, _EXPLAINING_COVER = 0.5, 0.7


class Base:
    """A zoo model or trained model, with its files.

    Args:
        name: its name or folder.
        device: where to run it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.entry: PretrainedModel = pretrained_model(name)
        self.paths: dict[str, Path] = fetch_model(name)

    @cached_property
    def model(self) -> MobileSAMv2:
        return self.with_files({})

    @cached_property
    def seen(self) -> Seen:
        """The images that it knows from its own training; none if it is a model of the catalog."""
        trained = find_trained(self.name)
        recorded = trained.training["contents"] if trained else {}
        return Seen(**{key: frozenset(contents) for key, contents in recorded.items()})

    @property
    def finds_in_embedding(self) -> bool:
        """Whether its detector reads the image embedding, rather than images."""
        return isinstance(self.model.discovery, EmbeddingDiscovery)

    def networks(self, with_detector: bool, seed: int) -> Networks:
        """Its networks as they are trained.

        Args:
            with_detector: with a detector in the embedding, an untrained one if it has none.
            seed: of untrained weights.
        """
        encoder, config = self.entry.encoder, encoder_config(self.entry.encoder)
        detector = None
        if self.finds_in_embedding:
            detector = load_embedding_detector(self.paths["detector_checkpoint"], encoder)
        elif with_detector:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                detector = EmbeddingDetector(config.embed_dim, config.image_size // config.embed_size)
        return Networks(
            config,
            load_encoder(self.paths["encoder_checkpoint"], encoder),
            load_decoder(self.paths["decoder_checkpoint"], encoder),
            detector,
        )

    def with_files(self, files: Mapping[str, Path]) -> MobileSAMv2:
        """The model with other files in place of its own: argument -> path."""
        paths: Any = self.paths | dict(files)
        return MobileSAMv2.from_checkpoints(
            self.entry.encoder, **paths, detector_size=self.entry.detector_size, device=self.device
        )

    def with_ignored(self, examples: Sequence[Example], tell: Callable[[float], None]) -> list[Example]:
        """The examples, in which what this model finds and no label explains is ignored.

        Args:
            tell: called with the finished share; may raise Cancelled.
        """
        with_ignored = []
        for example in examples:
            with_ignored.append(self._with_ignored(example))
            tell(len(with_ignored) / len(examples))
        return with_ignored

    def _with_ignored(self, example: Example) -> Example:
        (found,) = self.model.discover([example.read()], conf=CONFIDENCE, iou=NMS_IOU)
        labels = torch.from_numpy(np.concatenate([example.boxes, example.ignored]))
        if len(labels) and len(found):
            covered = covered_shares(found.boxes, labels)
            areas = (labels[:, 2:] - labels[:, :2]).prod(1)
            inside = covered * (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1)[:, None]
            union = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1)[:, None] + areas - inside
            explained = ((inside / union.clamp(min=1e-9) >= _EXPLAINING_IOU) | (covered >= _EXPLAINING_COVER)).any(1)
        else:
            explained = torch.zeros(len(found), dtype=torch.bool)
        unexplained = found.boxes[~explained].numpy().astype(np.float32)
        return dataclasses.replace(example, ignored=np.concatenate([example.ignored, unexplained]))

    def labeled(self, example: Example) -> Example:
        """The example with the boxes that this model finds as its labels."""
        (found,) = self.model.discover([example.read()], conf=CONFIDENCE, iou=NMS_IOU)
        return dataclasses.replace(example, boxes=found.boxes.numpy().astype(np.float32), masks=None)

    def files_of_new(self, files: Mapping[str, Path], folder: Path) -> dict[str, Path | Weights]:
        """The files of a model in `folder` that has `files` of its own and this model's otherwise.

        The catalog's files are referred to. Those of another trained model are copied, so that it can be deleted.
        """
        all_files: dict[str, Path | Weights] = {}
        for argument, weights in self.entry.weights.items():
            if argument in files:
                all_files[argument] = files[argument]
            elif weights.folder is None:
                all_files[argument] = weights
            else:
                path = folder / weights.filename
                with complete_file(path) as temporary:
                    shutil.copyfile(self.paths[argument], temporary)
                all_files[argument] = path
        return all_files
