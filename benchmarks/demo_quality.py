"""How good the demo weights are: on unseen scenes, and on photos, of which they never saw one.

    python benchmarks/demo_quality.py --scenes 200 --photos ../shared/photos

Prints, and writes as JSON: the mean mask IoU from ground-truth boxes and from one point inside each object; mask
AR@K and decoder time of object-aware prompting and of the 32x32 grid with the same weights, interleaved image by image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_utils
from tqdm import tqdm

from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.evaluation.average_recall import average_recall
from fiftyone_mobilesamv2.images import read_image
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

MODEL = "mobilesamv2-demo-torch"


def scenes(count: int) -> Iterator[tuple[np.ndarray, list[dict]]]:
    """Unseen scenes and the RLE of their objects."""
    for index in range(count):
        scene = make_scene(TEST_SEED, index)
        yield scene.image, [mask_utils.encode(np.asfortranarray(mask)) for mask in scene.masks()]


def photos(folder: Path) -> Iterator[tuple[np.ndarray, list[dict]]]:
    """Photos with COCO annotations and the RLE of their objects, crowds left out."""
    coco = json.loads((folder / "instances.json").read_text())
    for entry in coco["images"]:
        size = entry["height"], entry["width"]
        objects = [a for a in coco["annotations"] if a["image_id"] == entry["id"] and not a.get("iscrowd")]
        rles = [mask_utils.merge(mask_utils.frPyObjects(a["segmentation"], *size)) for a in objects]
        yield read_image(folder / "images" / entry["file_name"]), rles


def measure_prompts(model: MobileSAMv2, images: Iterator[tuple[np.ndarray, list[dict]]], total: int) -> dict:
    """Mean IoU of the masks that ground-truth boxes, and one random point inside each object, prompt for."""
    from_boxes, from_points = [], []
    for number, (image, objects) in enumerate(tqdm(images, total=total, desc="boxes and points")):
        if not objects:
            continue
        rng = np.random.default_rng(number)
        boxes = mask_utils.toBbox(objects)
        boxes[:, 2:] += boxes[:, :2]
        inside = [np.argwhere(mask_utils.decode(rle))[:, ::-1] for rle in objects]
        points = [pixels[rng.integers(len(pixels))][None] + 0.5 for pixels in inside]
        for ious, found in (
            (from_boxes, model.segment_anything([image], boxes=[boxes])[0]),
            (from_points, model.segment_anything([image], points=[points])[0]),
        ):
            ious += [mask_utils.iou([a], [b], [0])[0, 0] for a, b in zip(found.rle(), objects)]
    return {"mean IoU from boxes": float(np.mean(from_boxes)), "mean IoU from points": float(np.mean(from_points))}


def measure_everything(model: MobileSAMv2, images: Iterator[tuple[np.ndarray, list[dict]]], total: int) -> dict:
    """AR@K and decoder time (prompts to logits) of both ways of prompting."""
    results: dict[str, dict] = {name: {"images": [], "decode": 0.0, "masks": 0} for name in ("object_aware", "grid")}
    for image, objects in tqdm(images, total=total, desc="everything"):
        for prompting, result in results.items():
            model.seconds.clear()
            found = model.segment_everything([image], prompting=prompting)[0]
            result["decode"] += model.seconds["decode"]
            result["masks"] += len(found)
            ranked = found.select(np.argsort(-found.confidence, kind="stable"))
            result["images"].append((ranked.rle(), objects))
    measured = {
        name: {
            **average_recall(result["images"]),
            "masks per image": result["masks"] / total,
            "decoder ms per image": 1000 * result["decode"] / total,
        }
        for name, result in results.items()
    }
    ratio = results["grid"]["decode"] / results["object_aware"]["decode"]
    return {**measured, "grid / object_aware decoder time": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--photos", type=Path, help="folder with images/ and instances.json (COCO)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo_quality.json"))
    args = parser.parse_args()
    model = MobileSAMv2.from_pretrained(MODEL, device="cpu")
    measured = {
        "threads": torch.get_num_threads(),
        "scenes": {
            "count": args.scenes,
            **measure_prompts(model, scenes(args.scenes), args.scenes),
            **measure_everything(model, scenes(args.scenes), args.scenes),
        },
    }
    if args.photos:
        found = list(photos(args.photos))
        measured["photos"] = {
            "count": len(found),
            **measure_prompts(model, iter(found), len(found)),
            **measure_everything(model, iter(found), len(found)),
        }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
