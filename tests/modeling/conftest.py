"""Models with the seeded weights of the parity data, written as checkpoints in the released layouts."""

import importlib.util
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from fiftyone_mobilesamv2.modeling.mobilesamv2 import MobileSAMv2


class Seeded:
    """The parity folder: its weights, its images, what the release computes with them."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch
        spec = importlib.util.spec_from_file_location("parity_seeded", folder / "seeded.py")
        seeded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(seeded)
        self.tensor, self.image = seeded.seeded_tensor, seeded.test_image
        self.model = lru_cache(maxsize=2)(self._model)

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())

    def encoder_tensors(self, encoder: str) -> dict[str, torch.Tensor]:
        keys = self.json(f"{encoder}.keys.json")
        return {key: self.tensor(f"image_encoder.{key}", tuple(shape)) for key, shape in keys.items()}

    def decoder_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        prefixes = {"PromtEncoder": "prompt_encoder.", "MaskDecoder": "mask_decoder."}
        return {
            part: {key: self.tensor(prefixes[part] + key, tuple(shape)) for key, shape in keys.items()}
            for part, keys in self.json("prompt_guided_decoder.keys.json").items()
        }

    def encoder_checkpoint(self, encoder: str) -> Path:
        path = self.scratch / f"{encoder}.pt"
        if not path.exists():
            torch.save(self.encoder_tensors(encoder), path)
        return path

    def decoder_checkpoint(self) -> Path:
        path = self.scratch / "decoder.pt"
        if not path.exists():
            torch.save(self.decoder_tensors(), path)
        return path

    @property
    def detector_checkpoint(self) -> Path:
        return self.folder / "object_aware_model_n_seeded.pt"

    def _model(self, encoder: str) -> MobileSAMv2:
        return MobileSAMv2.from_checkpoints(
            encoder, self.encoder_checkpoint(encoder), self.decoder_checkpoint(), self.detector_checkpoint, device="cpu"
        )


@pytest.fixture(scope="session")
def seeded(parity, tmp_path_factory) -> Seeded:
    return Seeded(parity, tmp_path_factory.mktemp("seeded"))
