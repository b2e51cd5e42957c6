"""The networks of a model as they are trained."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..modeling.embedding_discovery import EmbeddingDetector
from ..modeling.image_encoders import EncoderConfig
from ..modeling.prompt_guided_decoder import PromptGuidedDecoder


@dataclass(frozen=True)
class Networks:
    """The networks of one model.

    Attributes:
        config: of the encoder.
        image_encoder, decoder: as loaded, not prepared for inference.
        detector: finds objects in the embedding; None if something else does.
    """

    config: EncoderConfig
    image_encoder: nn.Module
    decoder: PromptGuidedDecoder
    detector: EmbeddingDetector | None = None

    @property
    def modules(self) -> nn.ModuleDict:
        """All of them by name; the modules themselves, no copies."""
        return nn.ModuleDict({name: value for name, value in vars(self).items() if isinstance(value, nn.Module)})

    def copied(self) -> Networks:
        """Copies, for inference."""
        copies: Any = copy.deepcopy(self.modules).requires_grad_(False).eval()
        return dataclasses.replace(self, **dict(copies.items()))

    def replica(self) -> Networks:
        """Copies that share the weights, but have gradients and batch norms' statistics of their own."""
        replicas: Any = copy.deepcopy(self.modules)
        for mine, of_replica in zip(self.modules.parameters(), replicas.parameters()):
            of_replica.data = mine.data
        return dataclasses.replace(self, **dict(replicas.items()))
