"""Evaluates the demo weights on unseen scenes, and on photos, a kind of image that they were not trained on.

    python benchmarks/demo_quality.py --scenes 200 --photos ../shared/photos

Prints, and writes as JSON: the mean mask IoU from ground-truth boxes and from one point inside each object; mask
AR@K and decoder time of object-aware prompting and, on scenes, of the 32x32 grid with the same weights.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

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
    """Mean IoU of the masks from ground-truth boxes, and from one random point inside each object."""
    from_boxes, from_points = [], []
    for number, (image, objects) in enumerate(tqdm(images, total=total, desc="boxes and points")):
        if not objects:
            continue
        rng = np.random.default_rng(number)
        boxes = mask_utils.toBbox(objects)
        boxes[:, 2:] += boxes[:, :2]
        inside = [np.argwhere(mask_utils.decode(rle))[:, ::-1] for rle in objects]
        points = [pixels[rng.integers(len(pixels))][None] + 0.5 for pixels in inside]
        for ious, segmentation in (
            (from_boxes, model.segment_anything([image], boxes=[boxes])[0]),
            (from_points, model.segment_anything([image], points=[points])[0]),
        ):
            ious += [mask_utils.iou([a], [b], [0])[0, 0] for a, b in zip(segmentation.rle(), objects)]
    return {"mean IoU from boxes": float(np.mean(from_boxes)), "mean IoU from points": float(np.mean(from_points))}


# SAM's filters are tuned to the predicted IoU of its own weights, which the demo model's seldom reaches. Without these
# filters, the grid keeps all masks that survive box NMS.
PROMPTINGS = {
    "object_aware": {"prompting": "object_aware"},
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
    return {
        name: {
            **average_recall(ranked_masks[name]),
            "masks per image": masks[name] / total,
            "decoder ms per image": 1000 * seconds[name] / total,
            "decoder time / object_aware": seconds[name] / seconds["object_aware"],
        }
        for name in promptings
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--grid-scenes", type=int, default=30, help="number of scenes to also run the slow grid on")
    parser.add_argument("--photos", type=Path, help="folder with images/ and instances.json (COCO)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo_quality.json"))
    args = parser.parse_args()
    model = MobileSAMv2.from_pretrained(MODEL, device="cpu")
    measured = {
        "threads": torch.get_num_threads(),
        f"{args.scenes} scenes": {
            **measure_prompts(model, scenes(args.scenes), args.scenes),
            **measure_everything(model, scenes(args.scenes), args.scenes, ["object_aware"]),
        },
        f"{args.grid_scenes} scenes": measure_everything(
            model, scenes(args.grid_scenes), args.grid_scenes, list(PROMPTINGS)
        ),
    }
    if args.photos:
        images = list(photos(args.photos))
        measured[f"{len(images)} photos"] = {
            **measure_prompts(model, iter(images), len(images)),
            **measure_everything(model, iter(images), len(images), ["object_aware"]),
        }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
