"""Trains the demo model on scenes, from untrained weights, and writes it as it is packaged.

    python -m fiftyone_mobilesamv2.training.demo discovery
    python -m fiftyone_mobilesamv2.training.demo masks
    python -m fiftyone_mobilesamv2.training.demo package

Run again after an interruption, a training continues from its last save.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ..modeling.checkpoints.catalog import DEMO_MODEL, MODELS
from ..modeling.checkpoints.files import PACKAGED_WEIGHTS
from ..modeling.checkpoints.loading import load_decoder, load_detector, load_encoder, read_tensors
from ..modeling.complete_files import complete_file
from ..modeling.image_encoders import encoder_config
from ..modeling.prompt_guided_decoder import PromptGuidedDecoder
from .discovery import DiscoverySettings, new_detector, train_discovery
from .masks import MaskSettings, train_masks
from .measuring import box_recall
from .networks import Networks
from .parts import half
from .progress import Report, Step
from .scenes import TRAIN_SEED, VALIDATION_SEED, SceneExamples

ENCODER = MODELS[DEMO_MODEL].encoder
INPUT_SIZE = MODELS[DEMO_MODEL].detector_size  # scenes are 256 to 512 px
SAM, DETECTOR = "demo_sam.safetensors", "demo_detector.safetensors"


def train_demo_detector(output: Path, scenes: int, validation: int, epochs: int, device: str) -> None:
    """Trains a YOLOv8n of one class, or resumes training."""
    torch.manual_seed(0)  # of the untrained weights
    held_out = list(SceneExamples(VALIDATION_SEED, validation))
    settings = DiscoverySettings(epochs=epochs, image_size=INPUT_SIZE, device=device)
    with training_bar() as report:
        trained = train_discovery(
            new_detector("n"),
            list(SceneExamples(TRAIN_SEED, scenes)),
            settings,
            output,
            report,
            lambda detector: box_recall(detector.fuse(verbose=False), INPUT_SIZE, held_out),  # type: ignore[operator]
        )
    with complete_file(output / DETECTOR) as temporary:
        save_file(trained.tensors, temporary)


def train_demo_masks(output: Path, scenes: int, settings: MaskSettings) -> None:
    """Trains the image encoder and the prompt-guided decoder together, or resumes training."""
    torch.manual_seed(settings.seed)  # of the untrained weights
    config = encoder_config(ENCODER)
    decoder = PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    networks = Networks(config, config.build(), decoder)
    with training_bar() as report:
        examples = SceneExamples(TRAIN_SEED, scenes)
        trained = train_masks(networks, examples, settings, output, report, validate=None)
    # The layout of a whole SAM: image_encoder.*, prompt_encoder.*, mask_decoder.*
    encoder = {f"image_encoder.{name}": tensor for name, tensor in trained.tensors["image_encoder"].items()}
    with complete_file(output / SAM) as temporary:
        save_file(encoder | trained.tensors["decoder"], temporary)


def package(runs: Path, output: Path) -> list[Path]:
    """Writes the weights of both trainings in half precision and checks that they load; then replaces earlier files.

    Args:
        runs: the folder of the two trainings.
        output: the folder for the files.
    """
    output.mkdir(parents=True, exist_ok=True)
    files = [output / SAM, output / DETECTOR]
    with complete_file(files[0]) as sam, complete_file(files[1]) as detector:
        for temporary, trained in ((sam, runs / "masks" / SAM), (detector, runs / "discovery" / DETECTOR)):
            save_file(half(read_tensors(trained)), temporary)
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        load_encoder(sam, ENCODER)
        load_decoder(sam, ENCODER)
        load_detector(detector)
    return files


@contextmanager
def training_bar() -> Iterator[Report]:
    with tqdm(desc="Training", mininterval=5) as bar:

        def show(step: Step) -> None:
            bar.total, bar.n = step.total, step.done
            bar.set_postfix(loss=f"{step.loss:.3f}")

        yield show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("discovery", "masks", "package"))
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"))
    parser.add_argument("--output", type=Path, default=PACKAGED_WEIGHTS, help="folder for the packaged files")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.step == "discovery":
        train_demo_detector(args.runs / "discovery", args.scenes, 100, args.epochs, args.device)
    elif args.step == "masks":
        settings = MaskSettings(
            epochs=args.epochs,
            batch_size=8,
            learning_rate=8e-4,
            learn="encoder",
            prompts_per_image=8,
            device=args.device,
            untrained=("image_encoder", "decoder"),
        )
        train_demo_masks(args.runs / "masks", args.scenes, settings)
    else:
        for file in package(args.runs, args.output):
            print(f"{file} {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
