"""Evaluates a model's masks on scenes that no model has seen, and on photos.

    python benchmarks/model_quality.py --model mobilesamv2-nano-torch --scenes 200 --photos ../shared/photos

Prints, and writes as JSON: the mean mask IoU from ground-truth boxes and from one point inside each object, and what a
filled box and an ellipse in it would reach; mask AR@K and decoder time of object-aware prompting and of the 32x32 grid
with the same weights.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_utils
from tqdm import tqdm

from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.evaluation.average_recall import average_recall
from fiftyone_mobilesamv2.images import read_image
from fiftyone_mobilesamv2.modeling.grid_prompts import GridFilter
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

MODEL = "mobilesamv2-demo-torch"
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 10**10)}  # COCO's, in pixels


def scenes(count: int) -> Iterator[tuple[np.ndarray, list[dict]]]:
    """Unseen scenes, with the RLE of their objects."""
    for index in range(count):
        scene = make_scene(TEST_SEED, index)
        yield scene.image, [mask_utils.encode(np.asfortranarray(mask)) for mask in scene.masks()]


def photos(folder: Path) -> Iterator[tuple[np.ndarray, list[dict]]]:
    """Photos with COCO annotations, with the RLE of their objects except crowds."""
    coco = json.loads((folder / "instances.json").read_text())
    for entry in coco["images"]:
        size = entry["height"], entry["width"]
        objects = [a for a in coco["annotations"] if a["image_id"] == entry["id"] and not a.get("iscrowd")]
        rles = [mask_utils.merge(mask_utils.frPyObjects(a["segmentation"], *size)) for a in objects]
        yield read_image(folder / "images" / entry["file_name"]), rles


def measure_prompts(model: MobileSAMv2, images: Iterator[tuple[np.ndarray, list[dict]]], total: int) -> dict:
    """Mean IoU with the objects of masks from ground-truth boxes, of masks from one random point inside each, and of
    the boxes and the ellipses in them."""
    ious: dict[str, list[float]] = {"boxes": [], "points": [], "filled box": [], "ellipse": []}
    areas: list[float] = []
    for number, (image, objects) in enumerate(tqdm(images, total=total, desc="boxes and points")):
        if not objects:
            continue
        rng = np.random.default_rng(number)
        boxes = mask_utils.toBbox(objects)
        boxes[:, 2:] += boxes[:, :2]
        inside = [np.argwhere(mask_utils.decode(rle))[:, ::-1] for rle in objects]
        points = [pixels[rng.integers(len(pixels))][None] + 0.5 for pixels in inside]
        masks = {
            "boxes": model.segment_anything([image], boxes=[boxes])[0].rle(),
            "points": model.segment_anything([image], points=[points])[0].rle(),
            "filled box": [painted(box, image.shape[:2], cv2.rectangle) for box in boxes],
            "ellipse": [painted(box, image.shape[:2], ellipse) for box in boxes],
        }
        areas += mask_utils.area(objects).tolist()
        for name, found in masks.items():
            ious[name] += [mask_utils.iou([a], [b], [0])[0, 0] for a, b in zip(found, objects)]
    measured = {f"mean IoU from {name}": float(np.mean(values)) for name, values in ious.items()}
    for size, (low, high) in SIZES.items():
        chosen = [iou for iou, area in zip(ious["boxes"], areas) if low <= area < high]
        measured[f"mean IoU from boxes, {size}"] = float(np.mean(chosen)) if chosen else None
    return measured


def painted(box: np.ndarray, size: tuple[int, int], paint: Callable) -> dict:
    """The RLE of what `paint` makes of an xyxy box with exclusive ends, in an image of `size`, (height, width)."""
    mask = np.zeros(size, np.uint8)
    x0, y0, x1, y1 = (int(side) for side in np.round(box))
    paint(mask, (x0, y0), (x1 - 1, y1 - 1), 1, -1)
    return mask_utils.encode(np.asfortranarray(mask))


def ellipse(mask: np.ndarray, start: tuple[int, int], end: tuple[int, int], color: int, thickness: int) -> None:
    """Draws the ellipse in a box, with cv2.rectangle's arguments."""
    bits = 4
    center = [round((a + b) / 2 * 2**bits) for a, b in zip(start, end)]
    axes = [round((b - a + 1) / 2 * 2**bits) for a, b in zip(start, end)]
    cv2.ellipse(mask, center, axes, 0, 0, 360, color, thickness, shift=bits)


# SAM's filters are tuned to the predicted IoU of its own weights, which small models' seldom reach. Without these
# filters, the grid keeps all masks that survive box NMS. "320 prompts" are the most that the paper has; how many there
# are with the threshold that a model is used with depends on the image.
PROMPTINGS = {
    "object_aware": {"prompting": "object_aware"},
    "object_aware, 320 prompts": {"prompting": "object_aware", "conf": 0.0},
    "grid": {"prompting": "grid"},
    "grid, unfiltered": {"prompting": "grid", "grid_filter": GridFilter(0, 0)},
}


def measure_everything(
    model: MobileSAMv2, images: Iterator[tuple[np.ndarray, list[dict]]], total: int, promptings: list[str]
) -> dict:
    """AR@K and decoder time (prompts to logits) of prompting methods, which take turns on each image."""
    ranked_masks: dict[str, list] = {name: [] for name in promptings}
    seconds, masks = Counter(), Counter()
    for image, objects in tqdm(images, total=total, desc="everything"):
        for name in promptings:
            model.seconds.clear()
            segmentation = model.segment_everything([image], **PROMPTINGS[name])[0]
            seconds[name] += model.seconds["decode"]
            masks[name] += len(segmentation)
            ranked = segmentation.select(np.argsort(-segmentation.confidence, kind="stable"))
            ranked_masks[name].append((ranked.rle(), objects))
    measured = {
        name: {
            **average_recall(ranked_masks[name]),
            "masks per image": masks[name] / total,
            "decoder ms per image": 1000 * seconds[name] / total,
        }
        for name in promptings
    }
    for name in promptings:
        if "grid" in name:
            for other in promptings:
                if other.startswith("object_aware"):
                    measured[name][f"decoder time / {other}"] = seconds[name] / seconds[other]
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="name of a model, or folder of a trained one")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--photos", type=Path, help="folder with images/ and instances.json (COCO)")
    parser.add_argument(
        "--grid", type=int, default=30, help="on how many images of each kind to run the slow grid, too"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/model_quality.json"))
    args = parser.parse_args()
    model = MobileSAMv2.from_pretrained(args.model, device="cpu")
    images = {"scenes": list(scenes(args.scenes)), "photos": list(photos(args.photos)) if args.photos else []}
    measured: dict = {"model": args.model, "threads": torch.get_num_threads()}
    for kind, labeled in images.items():
        total, few = len(labeled), labeled[: args.grid]
        if total:
            measured[f"{total} {kind}"] = {
                **measure_prompts(model, iter(labeled), total),
                **measure_everything(model, iter(labeled), total, [name for name in PROMPTINGS if "grid" not in name]),
            }
        if few:
            measured[f"the grid, {len(few)} {kind}"] = measure_everything(model, iter(few), len(few), list(PROMPTINGS))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
