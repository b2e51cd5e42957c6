"""Compares the time to measure AR@K of proposals with that of other evaluators.

    python benchmarks/evaluation.py --photos ../shared/photos

In memory: this package, pycocotools' COCOeval and faster-coco-eval (`pip install faster-coco-eval`) take turns matching
the same RLE masks, and must agree. Times include IoU and matching, but not reading and indexing the annotations.

From a FiftyOne dataset, which is deleted afterwards: `evaluate_proposals`, from labels to stored results; only loading
the labels; and FiftyOne's own `evaluate_detections`, which matches at one IoU instead of ten, on a few images because
it is slow.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fiftyone_mobilesamv2.evaluation.average_recall import AREA_RANGES, KS, AverageRecall, ranking

BASELINE_IMAGES = 2


@dataclass
class Photo:
    """A photo with its COCO annotations and proposals."""

    path: Path
    height: int
    width: int
    annotations: list[dict]
    objects: list[dict]  # RLE
    proposals: list[dict]  # RLE
    scores: np.ndarray


def read_photos(folder: Path, proposals_per_image: Iterable[int]) -> list[Photo]:
    """One photo for each number of proposals."""
    coco = json.loads((folder / "instances.json").read_text())
    photos = []
    for entry, count in zip(coco["images"], proposals_per_image):
        size = entry["height"], entry["width"]
        annotations = [a for a in coco["annotations"] if a["image_id"] == entry["id"]]
        objects = []
        for annotation in annotations:
            rle = mask_utils.frPyObjects(annotation["segmentation"], *size)
            objects.append(mask_utils.merge(rle) if isinstance(rle, list) else rle)
        rng = np.random.default_rng(entry["id"])
        proposals = make_proposals(objects, *size, count, rng)
        scores = rng.integers(0, 50, count) / 50  # with many ties
        photos.append(Photo(folder / "images" / entry["file_name"], *size, annotations, objects, proposals, scores))
    return photos


def make_proposals(objects: list[dict], height: int, width: int, count: int, rng: np.random.Generator) -> list[dict]:
    """Proposals as RLE: eroded, dilated, shifted, split and merged objects, and random ellipses.

    Works on the runs of the RLE, since decoding and encoding every proposal would take minutes.
    """
    edges = [_edges(rle) for rle in objects]

    def shifted(index: int, dx: int, dy: int) -> dict:
        # Pixels shifted out at the bottom reappear at the top of the next column, which is fine for a proposal.
        runs = np.clip(edges[index] + dx * height + dy, 0, height * width).reshape(-1, 2)
        runs = runs[runs[:, 0] < runs[:, 1]].ravel()
        counts = np.diff(runs, prepend=0, append=height * width)
        return mask_utils.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)

    proposals = []
    kinds = ["ellipse"] + ["erode", "dilate", "shift", "split"] * bool(objects) + ["merge"] * (len(objects) > 1)
    for kind in rng.choice(kinds, count):
        if objects:
            index, other = rng.choice(len(objects), 2, replace=len(objects) == 1)
            step = math.ceil(rng.uniform(0, 0.3) * mask_utils.area(objects[index]) ** 0.5)
        if kind == "ellipse":
            angles = np.linspace(0, 2 * np.pi, 40)
            centre, radii = rng.uniform(0, (width, height)), rng.uniform(2, 100, 2)
            points = centre + radii * np.stack([np.cos(angles), np.sin(angles)], 1)
            rle = mask_utils.frPyObjects([points.ravel().tolist()], height, width)[0]
        elif kind in ("erode", "dilate"):
            steps = ((0, 0), (step, 0), (-step, 0), (0, step), (0, -step))
            rle = mask_utils.merge([shifted(index, *by) for by in steps], intersect=kind == "erode")
        elif kind == "shift":
            rle = shifted(index, *rng.integers(-step, step + 1, 2))
        elif kind == "split":
            x, y, w, h = mask_utils.toBbox(objects[index])
            share = rng.uniform(0.4, 1)
            part = [[x, y, w * share, h]] if rng.random() < 0.5 else [[x, y, w, h * share]]
            half = mask_utils.frPyObjects(np.array(part), height, width)
            rle = mask_utils.merge([objects[index], *half], intersect=True)
        else:
            rle = mask_utils.merge([objects[index], objects[other]])
        proposals.append(rle)
    return proposals


def _edges(rle: dict) -> np.ndarray:
    """The start and end positions of the mask's runs, counted down the columns."""
    pixels = mask_utils.decode(rle).ravel("F").astype(np.int8)
    return np.flatnonzero(np.diff(pixels, prepend=0, append=0))


def indexed(photos: list[Photo], coco_class: type) -> tuple:
    """Ground truth and proposals, each as an instance of `coco_class`; all objects have the same category."""
    images, objects, proposals = [], [], []
    for number, photo in enumerate(photos, 1):
        images.append({"id": number, "height": photo.height, "width": photo.width})
        shared = {"image_id": number, "category_id": 1}
        for annotation, rle in zip(photo.annotations, photo.objects):
            objects.append({**annotation, **shared, "segmentation": rle, "id": len(objects) + 1})
        for rle, score in zip(photo.proposals, photo.scores):
            proposal = {"segmentation": rle, "score": float(score), "area": float(mask_utils.area(rle)), "iscrowd": 0}
            proposals.append({**shared, **proposal, "bbox": mask_utils.toBbox(rle).tolist(), "id": len(proposals) + 1})
    datasets = []
    for shapes in (objects, proposals):
        coco = coco_class()
        coco.dataset = {"images": images, "annotations": shapes, "categories": [{"id": 1, "name": "object"}]}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        datasets.append(coco)
    return tuple(datasets)


def run_coco(evaluation: COCOeval) -> np.ndarray:
    """Recall, [thresholds, area ranges, K]."""
    evaluation.params.useCats = 0
    evaluation.params.maxDets = list(KS)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["recall"][:, 0]


def run_ours(photos: list[Photo]) -> np.ndarray:
    recall = AverageRecall(KS)
    for photo in photos:
        order = ranking(photo.scores, KS[-1])
        is_crowd = [a["iscrowd"] for a in photo.annotations]
        areas = [a["area"] for a in photo.annotations]
        recall.add([photo.proposals[i] for i in order], photo.objects, is_crowd, areas)
    return np.stack([np.stack([recall.recalls(k, group) for k in KS], 1) for group in AREA_RANGES], 1)


def time_in_memory(photos: list[Photo], repeats: int) -> dict:
    import faster_coco_eval

    coco = indexed(photos, COCO)
    faster = indexed(photos, faster_coco_eval.COCO)
    evaluators = {
        "AverageRecall": lambda: run_ours(photos),
        "COCOeval": lambda: run_coco(COCOeval(*coco, "segm")),
        "faster-coco-eval, 1 thread": lambda: run_coco(
            faster_coco_eval.COCOeval_faster(*faster, "segm", rle_iou_max_workers=1)
        ),
        "faster-coco-eval, its threads": lambda: run_coco(faster_coco_eval.COCOeval_faster(*faster, "segm")),
    }
    seconds: dict[str, list] = {name: [] for name in evaluators}
    recalls = {}
    # Otherwise, times would include the garbage collector's walks over all annotations.
    gc.collect()
    gc.freeze()
    for _ in range(repeats):
        for name, run in evaluators.items():
            with contextlib.redirect_stdout(io.StringIO()):
                seconds[name].append(timed(lambda run=run, name=name: recalls.update({name: run()})))
    gc.unfreeze()
    ours = recalls["AverageRecall"]
    differences = {name: float(np.abs(theirs - ours).max()) for name, theirs in recalls.items()}
    if not max(differences.values()) < 1e-9:
        raise SystemExit(f"The evaluators disagree; largest differences in recall: {differences}")
    return {
        name: {
            "ms per image": 1000 * median(times) / len(photos),
            "time / AverageRecall": median(times) / median(seconds["AverageRecall"]),
            "largest difference of a recall": differences[name],
        }
        for name, times in seconds.items()
    }


def time_dataset(photos: list[Photo], repeats: int) -> dict:
    import fiftyone as fo

    from fiftyone_mobilesamv2 import evaluate_proposals

    dataset = fo.Dataset(f"benchmark-{uuid.uuid4().hex}")
    try:
        dataset.add_samples([make_sample(photo) for photo in photos], progress=False)
        dataset.compute_metadata(progress=False)
        few = dataset[:BASELINE_IMAGES]
        # FiftyOne reloads samples that are still in memory whenever fields are added, which would be timed.
        gc.collect()
        fields = {"pred_field": "segmentations", "gt_field": "ground_truth", "eval_key": "benchmark"}

        def load() -> None:
            for sample in dataset:
                sample["segmentations"]

        def ours(samples: fo.core.collections.SampleCollection) -> None:
            evaluate_proposals(samples, **fields, progress=False)

        def fiftyones() -> None:
            few.evaluate_detections(**fields, method="coco", use_masks=True, classwise=False, progress=False)

        runs = {
            "evaluate_proposals": (lambda: ours(dataset), len(photos)),
            "loading the labels": (load, len(photos)),
            f"evaluate_proposals of {BASELINE_IMAGES} images": (lambda: ours(few), BASELINE_IMAGES),
            f"evaluate_detections of {BASELINE_IMAGES} images": (fiftyones, BASELINE_IMAGES),
        }
        seconds: dict[str, list] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, (run, images) in runs.items():
                with contextlib.redirect_stdout(io.StringIO()):
                    seconds[name].append(timed(run) / images)
                dataset.delete_evaluations()
        return {name: {"s per image": median(times)} for name, times in seconds.items()}
    finally:
        dataset.delete()


def make_sample(photo: Photo):
    import fiftyone as fo

    def detection(rle: dict, **fields) -> fo.Detection:
        x, y, w, h = mask_utils.toBbox(rle).astype(int)
        box = [x / photo.width, y / photo.height, w / photo.width, h / photo.height]
        mask = mask_utils.decode(rle)[y : y + h, x : x + w].astype(bool)
        return fo.Detection(label="object", bounding_box=box, mask=mask, **fields)

    proposals = [(r, s) for r, s in zip(photo.proposals, photo.scores) if mask_utils.area(r)]
    sample = fo.Sample(str(photo.path))
    sample["segmentations"] = fo.Detections(detections=[detection(r, confidence=float(s)) for r, s in proposals])
    sample["ground_truth"] = fo.Detections(
        detections=[detection(r, iscrowd=bool(a["iscrowd"])) for r, a in zip(photo.objects, photo.annotations)]
    )
    return sample


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with images/ and instances.json (COCO)")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--proposals", type=int, default=1000, help="proposals per image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="JSON file to write the results to, too")
    args = parser.parse_args()
    photos = read_photos(args.photos, [args.proposals] * args.images)
    measured = {
        "images": len(photos),
        "proposals per image": args.proposals,
        "objects": sum(len(photo.objects) for photo in photos),
        "repeats": args.repeats,
        "CPUs": len(os.sched_getaffinity(0)),
        "in memory": time_in_memory(photos, args.repeats),
        "from a dataset": time_dataset(photos, args.repeats),
    }
    if args.json:
        args.json.write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
