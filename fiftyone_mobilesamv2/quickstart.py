"""The quickstart: segments all objects in your images, or in photos and synthetic scenes, and keeps the dataset for the
App."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import cv2
import fiftyone as fo
import fiftyone.core.utils as fou
import numpy as np
from tqdm import tqdm

from . import zoo
from .errors import ArgumentError
from .evaluation.coco import load_coco
from .evaluation.proposals import evaluate_proposals
from .images import read_image
from .installed_photos import installed_photos
from .labels.fields import GROUND_TRUTH_FIELD
from .labels.masks import cropped_masks
from .modeling.arrays import ImageArray, IntArray, MaskArray
from .modeling.checkpoints.files import included_model
from .runs.segment import segment_everything
from .training.scenes import write_coco

DATASET_NAME = "mobilesamv2-quickstart"
LABEL_FIELD = "segmentations"
EVAL_KEY = "ar"

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}


def run(images: Path | None, model_name: str | None, scenes: int, batch_size: int, output: Path) -> fo.Dataset:
    """Creates the dataset, segments it, prints a summary and writes `overlays.png`.

    Args:
        images: a folder of images; None takes the photos of installed packages, and makes `scenes` synthetic scenes,
            whose masks are known.
        model_name: None takes the one that is part of the package.
        output: the folder for the scenes and the picture.
    """
    paths = [] if images is None else find_images(images)
    model_name = model_name or included_model()
    print(f"Loading {model_name} ...")
    # Loaded with the zoo's parameters but without the zoo, so that neither registration nor requirements matter.
    model = zoo.load_model(model_name)
    # An earlier run's dataset is replaced only below, when all arguments have proved valid.
    output.mkdir(parents=True, exist_ok=True)
    dataset = (
        example_dataset(output / "scenes", scenes) if images is None else image_dataset(images.resolve().name, paths)
    )
    seconds = segment(dataset, model, batch_size)
    print(summary(dataset, model, seconds))
    picture = output / "overlays.png"
    cv2.imwrite(str(picture), overlays(dataset)[:, :, ::-1])
    print(f"\nOverlays: {picture}")
    print(f"Look at the masks in the App: fiftyone app launch {dataset.name}")
    print("Then, with its operators (key `): find duplicates, promote masks to labels, train on your labels.")
    return dataset


def example_dataset(folder: Path, count: int) -> fo.Dataset:
    """A dataset of photos, and of scenes that no model was trained on, with their objects' masks as ground truth."""
    images, annotations = write_coco(folder, count)
    if fo.dataset_exists(DATASET_NAME):
        fo.delete_dataset(DATASET_NAME)
    scenes = load_coco(images, annotations, gt_field=GROUND_TRUTH_FIELD)
    scenes.tag_samples("scene")
    dataset = fo.Dataset(DATASET_NAME, persistent=True)
    # Photos are what the grid and overlays.png show first.
    dataset.add_samples([fo.Sample(str(path), tags=["photo"]) for path in installed_photos()], progress=False)
    with fou.SetAttributes(fo.config, show_progress_bars=False):
        dataset.add_collection(scenes)
    scenes.delete()
    return dataset


def find_images(folder: Path) -> list[Path]:
    """The image files below `folder`. Reports and skips paths that are not UTF-8, which the database can't store.

    Raises:
        ValueError: the folder does not exist or contains no images.
    """
    if not folder.is_dir():
        raise ArgumentError(f"{folder} is not a folder.")
    paths = []
    for path in sorted(folder.resolve().rglob("*")):
        if path.suffix.lower() not in _IMAGE_SUFFIXES:
            continue
        try:
            str(path).encode()
        except UnicodeEncodeError:
            print(f"Skipped: {str(path)!r} is not UTF-8. Rename it.", file=sys.stderr)
        else:
            paths.append(path)
    if not paths:
        raise ArgumentError(f"{folder} contains no images ({', '.join(sorted(_IMAGE_SUFFIXES))}).")
    return paths


def image_dataset(name: str, paths: list[Path]) -> fo.Dataset:
    """A dataset of images, which replaces that of an earlier run on a folder of this name."""
    dataset = fo.Dataset(f"{DATASET_NAME}-{name}", overwrite=True, persistent=True)
    dataset.add_samples([fo.Sample(str(path)) for path in paths], progress=False)
    return dataset


def segment(dataset: fo.Dataset, model: zoo.MobileSAMv2Model, batch_size: int) -> float:
    """Runs the model over the dataset with a progress bar. Returns the time in seconds."""
    start = time.perf_counter()
    # A bar that also counts objects replaces FiftyOne's.
    own_bar_only = fou.SetAttributes(fo.config, show_progress_bars=False)
    with own_bar_only, tqdm(total=len(dataset), desc="Segmenting", unit="images") as bar:

        def report(progress: fo.ProgressBar) -> None:
            bar.set_postfix(objects=model.num_labels, refresh=False)
            bar.update(progress.iteration - bar.n)

        segment_everything(dataset, model, LABEL_FIELD, batch_size=batch_size, progress=report)
    return time.perf_counter() - start


def summary(dataset: fo.Dataset, model: zoo.MobileSAMv2Model, seconds: float) -> str:
    """The number of objects, the time of each stage and, if the dataset has ground truth, mask AR@K."""
    counts = np.array([n or 0 for n in dataset.values(fo.ViewField(f"{LABEL_FIELD}.detections").length())])
    images = len(dataset)
    lines = [
        "",
        f"{images} images in {seconds:.1f} s ({images / seconds:.2f} images/s), {len(model.failures)} failed",
        f"{counts.sum()} objects: {counts.mean():.1f} per image, median {np.median(counts):.0f}, max {counts.max()}",
        "Time per image: " + ", ".join(f"{stage} {1000 * t / images:.0f} ms" for stage, t in model.seconds.items()),
    ]
    if dataset.has_field(GROUND_TRUTH_FIELD):
        labeled = dataset.exists(GROUND_TRUTH_FIELD)
        results = evaluate_proposals(labeled, LABEL_FIELD, GROUND_TRUTH_FIELD, EVAL_KEY, progress=False)
        what = f"Mask AR of the objects in {len(labeled)} scenes"
        lines.append(f"{what}, by size (evaluation '{EVAL_KEY}' in the App):\n{results.report()}")
    return "\n".join(lines)


def overlays(dataset: fo.Dataset, columns: int = 4, rows: int = 3, tile: int = 320) -> ImageArray:
    """uint8 RGB: the dataset's first images with their masks in colour; the most confident masks are on top."""
    sheet = np.full((rows * tile, columns * tile, 3), 30, np.uint8)
    for number, sample in enumerate(dataset.match(fo.ViewField(LABEL_FIELD) != None).limit(rows * columns)):  # noqa: E711
        image = read_image(sample.filepath)
        ranked = sorted(sample[LABEL_FIELD].detections, key=lambda d: d.confidence)
        drawn = draw_masks(image, cropped_masks([d.to_mongo() for d in ranked], image.shape[:2]))
        scale = (tile - 4) / max(image.shape[:2])
        size = [max(1, int(side * scale)) for side in image.shape[1::-1]]
        small = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        y, x = (number // columns) * tile, (number % columns) * tile
        sheet[y : y + small.shape[0], x : x + small.shape[1]] = small
    return sheet


def draw_masks(image: ImageArray, masks: list[tuple[MaskArray, IntArray]]) -> ImageArray:
    """A copy of uint8 RGB `image` with each (bool mask, xyxy box) filled half-transparently and outlined."""
    drawn: ImageArray = image.copy()
    for index, (mask, (x0, y0, x1, y1)) in enumerate(masks):
        hue = int(180 * ((index * 0.618034) % 1))  # golden ratio: consecutive masks get distant hues
        color = cv2.cvtColor(np.array([[[hue, 220, 255]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0]
        region = drawn[y0:y1, x0:x1]
        region[mask] = (region[mask] * 0.5 + color * 0.5).astype(np.uint8)
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, color.tolist(), 1, offset=(int(x0), int(y0)))
    return drawn
