"""Writes the trained demo model as it is packaged: half precision, safetensors, only tensors.

python -m fiftyone_mobilesamv2.training.export --runs runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..modeling.checkpoints.files import PACKAGED_WEIGHTS
from ..modeling.checkpoints.loading import load_decoder, load_detector, load_encoder, read_tensors
from ..modeling.complete_files import complete_file
from .demo import ENCODER, WEIGHTS


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts floating-point tensors to half precision, each with its own storage."""
    return {
        key: (tensor.half() if tensor.is_floating_point() else tensor).clone().contiguous()
        for key, tensor in tensors.items()
    }


def export(runs: Path, output: Path) -> list[Path]:
    """Exports the weights of both training runs and checks that they load; then replaces earlier files.

    Args:
        runs: the folder that contains `masks/` and `detector/`.
        output: the folder for the files.
    """
    sam = read_tensors(runs / "masks" / WEIGHTS)
    detector = read_tensors(runs / "detector" / "train" / "weights" / "last.pt")

    output.mkdir(parents=True, exist_ok=True)
    files = [output / "demo_sam.safetensors", output / "demo_detector.safetensors"]
    with complete_file(files[0]) as sam_file, complete_file(files[1]) as detector_file:
        save_file(half(sam), sam_file)
        save_file(half(detector), detector_file)
        for file in (sam_file, detector_file):
            file.chmod(0o644)  # safetensors makes files readable only by their owner; others read an installed package
        load_encoder(sam_file, ENCODER)
        load_decoder(sam_file, ENCODER)
        load_detector(detector_file)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"))
    parser.add_argument("--output", type=Path, default=PACKAGED_WEIGHTS)
    args = parser.parse_args()
    for file in export(args.runs, args.output):
        print(f"{file} {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
