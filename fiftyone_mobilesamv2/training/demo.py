"""Trains the demo model's image encoder and prompt-guided decoder together on scenes, from untrained weights.

    python -m fiftyone_mobilesamv2.training.demo --output runs/demo/masks

Run again after an interruption, training continues from the last save.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ..modeling.complete_files import complete_file
from ..modeling.image_encoders import encoder_config
from ..modeling.prompt_guided_decoder import PromptGuidedDecoder
from .masks import MaskSettings, train_masks
from .progress import Step
from .scenes import TRAIN_SEED, SceneExamples

ENCODER = "resnet_demo"
WEIGHTS = "sam.safetensors"


def train_demo(output: Path, scenes: int, settings: MaskSettings) -> Path:
    """Trains, or resumes training. Returns the file of the weights, in the layout of a whole SAM."""
    torch.manual_seed(settings.seed)  # of the untrained weights
    config = encoder_config(ENCODER)
    encoder = config.build()
    decoder = PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    with tqdm(desc="Training", mininterval=5) as bar:

        def show(step: Step) -> None:
            bar.total, bar.n = step.total, step.done
            bar.set_postfix(loss=f"{step.loss:.3f}")

        examples = SceneExamples(TRAIN_SEED, scenes)
        trained = train_masks(ENCODER, encoder, decoder, examples, settings, output, show, validate=None)
    if trained.stopped is not None:
        print(trained.stopped)
    tensors = {f"image_encoder.{name}": tensor for name, tensor in (trained.encoder_tensors or {}).items()}
    with complete_file(output / WEIGHTS) as temporary:
        save_file(tensors | trained.decoder_tensors, temporary)
    return output / WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/masks"))
    parser.add_argument("--scenes", type=int, default=2100)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    settings = MaskSettings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        learn="encoder",
        prompts_per_image=8,
        device=args.device,
        from_scratch=True,
    )
    print(train_demo(args.output, args.scenes, settings))


if __name__ == "__main__":
    main()
