"""ultralytics' own training, on images that FiftyOne exports in YOLO format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fiftyone as fo
import numpy as np
from pycocotools import mask as mask_utils
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer

from fiftyone_mobilesamv2.evaluation.average_recall import KS, AverageRecall
from fiftyone_mobilesamv2.training.discovery import DiscoverySettings, ultralytics_options
from fiftyone_mobilesamv2.training.examples import Example
from fiftyone_mobilesamv2.training.measuring import CONFIDENCE, MAX_PROPOSALS

FIELD = "ground_truth"


def export(
    dataset: Any, training: Sequence[Example], held_out: Sequence[Example], folder: Path, as_polygons: bool = False
) -> Path:
    """Writes both parts of a dataset with one class, with boxes or polygons. Returns the file that lists them."""
    field, classes = FIELD, dict.fromkeys(dataset.distinct(f"{FIELD}.detections.label"), "object")
    if as_polygons:
        field = "polygons"
        for sample in dataset.iter_samples(autosave=True):
            sample[field] = sample[FIELD].to_polylines(tolerance=1)
            for polyline in sample[field].polylines:  # ultralytics refuses an image with an outline of two points
                polyline.points = [shape for shape in polyline.points if len(shape) > 2]
    for part, examples in (("train", training), ("val", held_out)):
        view = dataset.select([example.id for example in examples]).map_labels(field, classes)
        view.export(
            export_dir=str(folder),
            dataset_type=fo.types.YOLOv5Dataset,
            label_field=field,
            split=part,
            classes=["object"],
        )
    return folder / "dataset.yaml"


def train_detector(
    model: Any, settings: DiscoverySettings, data: Path, folder: Path, on_batch_end: Callable[[int], None]
) -> nn.Module:
    """Trains with our settings, and returns the averaged weights of the last epoch. `on_batch_end` gets the epoch."""

    class Trainer(DetectionTrainer):
        def setup_model(self) -> None:  # it would load a pickle
            self.model = model

    options = ultralytics_options(settings, folder) | {"data": str(data), "val": False, "single_cls": True}
    trainer = Trainer(overrides=options)
    trainer.add_callback("on_train_batch_end", lambda trainer: on_batch_end(trainer.epoch))
    trainer.train()
    averaged: nn.Module = trainer.ema.ema.eval()
    return averaged


def train_segmentation(start: nn.Module | None, data: Path, folder: Path, epochs: int, image_size: int) -> YOLO:
    """Trains a YOLOv8n-seg with ultralytics' default settings, and returns the weights that it found best.

    Args:
        start: a YOLOv8n that it takes the weights of its backbone, neck and box head from; None starts untrained.
    """

    class Trainer(SegmentationTrainer):
        def setup_model(self) -> None:
            self.model = self.get_model(cfg="yolov8n-seg.yaml", weights=start, verbose=False)

    trainer = Trainer(
        overrides={
            "model": "yolov8n-seg.yaml",
            "data": str(data),
            "epochs": epochs,
            "imgsz": image_size,
            "device": "cpu",
            "workers": 0,
            "plots": False,
            "project": str(folder.resolve()),
            "name": "ultralytics",
            "exist_ok": True,
        }
    )
    trainer.train()
    return YOLO(trainer.best)


def recalls(model: YOLO, examples: Sequence[Example], image_size: int) -> dict[int, float]:
    """K -> AR@K of its masks, with as many proposals, as unsure ones, as our models are measured with."""
    recall = AverageRecall(KS)
    for example in examples:
        (found,) = model.predict(
            example.read()[:, :, ::-1],
            imgsz=image_size,
            conf=CONFIDENCE,
            max_det=MAX_PROPOSALS,
            retina_masks=True,
            verbose=False,
        )
        masks = [] if found.masks is None else found.masks.data.numpy().astype(np.uint8)
        recall.add([mask_utils.encode(np.asfortranarray(mask)) for mask in masks], list(example.masks or ()))
    values = recall.metrics()
    return {k: values[f"AR@{k}"] for k in KS}
