"""Trains the demo model's class-agnostic detector: YOLOv8n with one class, using ultralytics' own trainer.

    python -m fiftyone_mobilesamv2.training.detector --output runs/demo/detector

Run again after an interruption, training continues from the last finished epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm
from ultralytics import YOLO

from ..modeling.complete_files import complete_file
from .scenes import TRAIN_SEED, VALIDATION_SEED, make_scene

ARCHITECTURE = "yolov8n.yaml"
INPUT_SIZE = 320  # scenes are 256 to 512 px; the demo model also discovers objects at this size


def write_yolo_dataset(folder: Path, train: int, validation: int) -> Path:
    """Writes scenes in YOLO's layout and returns the path of its `data.yaml`. Existing files are kept."""
    for split, seed, count in (("train", TRAIN_SEED, train), ("val", VALIDATION_SEED, validation)):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(count), desc=f"{split} scenes"):
            label_file = labels / f"{index:06d}.txt"
            if label_file.exists():
                continue
            scene = make_scene(seed, index)
            height, width = scene.labels.shape
            cv2.imwrite(str(images / f"{index:06d}.png"), scene.image[:, :, ::-1])
            boxes = scene.boxes() / np.array([width, height, width, height], np.float32)
            centers, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
            rows = [f"0 {x:.6f} {y:.6f} {w:.6f} {h:.6f}" for (x, y), (w, h) in zip(centers, sizes)]
            with complete_file(label_file) as temporary:
                temporary.write_text("\n".join(rows))
    data = folder / "data.yaml"
    data.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames: {{0: object}}\n")
    return data


def train_detector(output: Path, train: int, validation: int, epochs: int, device: str) -> Path:
    """Trains the detector, or resumes training. Returns the checkpoint of the last epoch (its averaged weights)."""
    data = write_yolo_dataset(output / "scenes", train, validation)
    last = output / "train" / "weights" / "last.pt"
    finished = output / "finished"
    if finished.exists():
        return last
    if last.exists():
        YOLO(last).train(resume=True)
    else:
        YOLO(ARCHITECTURE).train(
            data=str(data),
            epochs=epochs,
            imgsz=INPUT_SIZE,
            batch=16,
            device=device,
            project=str(output.resolve()),
            name="train",
            exist_ok=True,
            single_cls=True,
            pretrained=False,
            optimizer="AdamW",
            lr0=0.002,
            lrf=0.02,
            cos_lr=True,
            warmup_epochs=1,
            mosaic=0.5,
            close_mosaic=3,
            scale=0.3,
            flipud=0.5,
            workers=1,
            amp=False,
            plots=False,
            seed=0,
        )
    finished.touch()
    return last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/detector"))
    parser.add_argument("--train", type=int, default=2000, help="training scenes")
    parser.add_argument("--validation", type=int, default=100, help="validation scenes")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(train_detector(args.output, args.train, args.validation, args.epochs, args.device))


if __name__ == "__main__":
    main()
