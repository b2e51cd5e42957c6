"""Measures what training on a dataset's own labels brings, beside ultralytics' own training on the same images.

    python benchmarks/training.py nuclei cropweed facade --photo-sets ../shared/photo_sets

Prints a table for each part. `nuclei`, `cropweed`, `facade`: images of other domains, 30 % (of facades, a third) to
measure with; and what is left of the recall of photos and scenes. `style`: the same with scenes of another style than
models of this package were trained on. `number`: how the recall of these rises with the number of labelled images.
`incomplete`: half of the labels are missing. `ultralytics`: three seeds each of our trainer and theirs. `learn`: how
much of the model learns masks, and how fast.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fault_setting import Database
from other_scenes import make_other_scene

# Share of the images to measure with.
DOMAINS = {"nuclei": ("domain_nuclei", 0.3), "cropweed": ("domain_cropweed", 0.3), "facade": ("facade", 1 / 3)}


def temporary_folder() -> Path:
    """A folder with a MongoDB that FiftyOne connects to, unless the environment names one. It is removed at exit.

    Not by a context manager: FiftyOne, which is imported later, cleans up its database at exit, before this.
    """
    folder = Path(tempfile.mkdtemp(prefix="training-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if not os.environ.get("FIFTYONE_DATABASE_URI"):
        database = Database(folder / "database")
        database.start()
        atexit.register(database.stop, signal.SIGKILL)
        os.environ["FIFTYONE_DATABASE_URI"] = database.uri
    os.environ |= {"FIFTYONE_MODEL_ZOO_DIR": str(folder / "zoo"), "FIFTYONE_DO_NOT_TRACK": "true"}
    return folder


def table(rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def scenes(folder: Path, count: int) -> Any:
    """A dataset of scenes of another style."""
    from fiftyone_mobilesamv2 import load_coco
    from fiftyone_mobilesamv2.training.scenes import write_coco

    return load_coco(*write_coco(folder / "scenes", count, make_other_scene), name=f"scenes-{folder.name}")


def photos(folder: Path) -> Any:
    import fiftyone as fo

    from fiftyone_mobilesamv2 import load_coco

    name = f"training-{folder.name}"
    if fo.dataset_exists(name):
        fo.delete_dataset(name)
    return load_coco(folder / "images", folder / "instances.json", name=name)


def run_both(base: str, dataset: Any, validation: float, output: Path, **settings: Any) -> list[list[object]]:
    """Trains discovery, then masks, and measures each."""
    from fiftyone_mobilesamv2 import train

    first = train(
        dataset,
        name="found",
        base=base,
        validation=validation,
        output=output / "found",
        keep_worse=True,
        part="discovery",
        **settings,
    )
    print(first, flush=True)
    second = train(
        dataset,
        name="both",
        base=str(output / "found"),
        validation=validation,
        output=output / "both",
        keep_worse=True,
        part="masks",
        **settings,
    )
    print(second, flush=True)
    rows: list[list[object]] = [["", "AR@10", "AR@100", "AR@1000", "IoU from boxes", "seconds"]]
    for name, measures, seconds in (
        ("before", first.before, 0),
        ("after discovery", first.after, first.seconds),
        ("after masks, too", second.after, second.seconds),
    ):
        recalls = [f"{measures.recalls[k]:.3f}" for k in (10, 100, 1000)]
        rows.append([name, *recalls, f"{measures.iou:.3f}", f"{seconds:.0f}"])
    return rows


def remembered(base: str, output: Path, photo_sets: Path | None) -> list[list[object]]:
    """What is left of the recall of scenes, and of photos that the photo model has not seen, after :func:`run_both`."""
    from fiftyone_mobilesamv2 import MobileSAMv2
    from fiftyone_mobilesamv2.training.measuring import measure
    from fiftyone_mobilesamv2.training.photo_model import photos as photo_examples
    from fiftyone_mobilesamv2.training.scenes import TEST_SEED, SceneExamples

    kinds = {"scenes": list(SceneExamples(TEST_SEED, 30))}
    if photo_sets:
        kinds["photos"] = photo_examples(photo_sets)[1]
    rows: list[list[object]] = [
        ["", *(f"{kind}, {value}" for kind in kinds for value in ("AR@1000", "IoU from boxes"))]
    ]
    for name, model in (("before", base), ("after discovery", output / "found"), ("after masks, too", output / "both")):
        loaded = MobileSAMv2.from_pretrained(model, device="cpu")
        measured = [measure(loaded, examples, lambda share: None) for examples in kinds.values()]
        rows.append([name, *(f"{value:.3f}" for each in measured for value in (each.recalls[1000], each.iou))])
    return rows


def by_number(base: str, dataset: Any, output: Path, **settings: Any) -> list[list[object]]:
    """Discovery, then masks, from 50, 100, 200 and 400 images; the others are to measure with."""
    ids = dataset.values("id")
    held_out = dataset.select(ids[400:])
    rows: list[list[object]] = [["labeled images", "AR@10", "AR@100", "AR@1000", "IoU from boxes", "seconds"]]
    for count in (50, 100, 200, 400):
        before, *_, after = run_both(base, dataset.select(ids[:count]), held_out, output / str(count), **settings)[1:]
        rows += [[0, *before[1:]]] if len(rows) == 1 else []
        rows.append([count, *after[1:]])
        print(rows[-1], flush=True)
    return rows


# Beside ultralytics ---------------------------------------------------------------------------------------------------


class Pace:
    """Images a second while training: the time between the ends of batches of an epoch."""

    def __init__(self, images_per_step: float) -> None:
        self.images_per_step, self.last, self.seconds, self.steps = images_per_step, (-1, 0.0), 0.0, 0

    def step(self, epoch: int) -> None:
        now = time.perf_counter()
        if epoch == self.last[0]:
            self.seconds += now - self.last[1]
            self.steps += 1
        self.last = epoch, now

    @property
    def images_per_second(self) -> float:
        return self.steps * self.images_per_step / self.seconds


def compare(dataset: Any, validation: float, output: Path, seeds: int, epochs: int) -> list[list[object]]:
    """Our trainer and ultralytics', from the same weights, on the same images, with the same settings."""
    from ultralytics_training import export, train_detector

    from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
    from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_yolo
    from fiftyone_mobilesamv2.training.discovery import DiscoverySettings, train_discovery
    from fiftyone_mobilesamv2.training.labeled_images import split
    from fiftyone_mobilesamv2.training.measuring import box_recall

    training, held_out = split(dataset, "ground_truth", validation, output / "frames", False)
    data = export(dataset, training.examples, held_out.examples, output / "yolo")
    base = PACKAGED_WEIGHTS / "demo_detector.safetensors"
    rows: list[list[object]] = [["trainer", "seed", "AR of boxes", "images/s"]]

    def recall(detector: Any) -> float:
        with torch.inference_mode():
            return box_recall(detector.fuse(verbose=False), 320, held_out.examples)

    for seed in range(seeds):
        settings = DiscoverySettings(epochs=epochs, image_size=320, seed=seed)
        steps = -(-len(training.examples) // settings.batch_size)
        pace = Pace(len(training.examples) / steps)
        folder = output / f"ours-{seed}"
        ours = train_discovery(
            load_yolo(base),
            training.examples,
            settings,
            folder,
            lambda step, pace=pace: pace.step(step.epoch),
            recall,
            folder,
        )
        rows.append(["ours", seed, f"{ours.curve[-1]['score']:.3f}", f"{pace.images_per_second:.2f}"])
        print(rows[-1], flush=True)
        pace = Pace(len(training.examples) / steps)
        theirs = train_detector(load_yolo(base), settings, data, output / f"theirs-{seed}", pace.step)
        rows.append(["ultralytics", seed, f"{recall(theirs):.3f}", f"{pace.images_per_second:.2f}"])
        print(rows[-1], flush=True)
    return rows


def segmentation_rows(dataset: Any, validation: float, output: Path, epochs: int) -> list[list[object]]:
    """YOLOv8n-seg, whose detector is of the demo model's size, trained by ultralytics on the same images."""
    from ultralytics_training import export, recalls, train_segmentation

    from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
    from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_yolo
    from fiftyone_mobilesamv2.training.labeled_images import split

    training, held_out = split(dataset, "ground_truth", validation, output / "frames", False)
    data = export(dataset, training.examples, held_out.examples, output / "yolo", as_polygons=True)
    rows: list[list[object]] = []
    for name, start in (
        ("YOLOv8n-seg by ultralytics, untrained at first", None),
        (
            "YOLOv8n-seg by ultralytics, from the demo detector",
            load_yolo(PACKAGED_WEIGHTS / "demo_detector.safetensors"),
        ),
    ):
        started = time.monotonic()
        model = train_segmentation(start, data, output / name.replace(" ", "-"), epochs, 320)
        seconds = time.monotonic() - started
        found = recalls(model, held_out.examples, 320)
        rows.append([name, *(f"{found[k]:.3f}" for k in (10, 100, 1000)), "", f"{seconds:.0f}"])
        print(rows[-1], flush=True)
    return rows


# Incomplete labels ----------------------------------------------------------------------------------------------------


def incomplete(base: str, dataset: Any, output: Path, **settings: Any) -> list[list[object]]:
    """Every second label of the images to learn from is deleted, at random; those to measure with are complete."""
    from fiftyone_mobilesamv2 import train

    ids = dataset.values("id")
    held_out = dataset.select(ids[40:])
    rng = np.random.default_rng(0)
    for sample in dataset.select(ids[:40]).iter_samples(autosave=True):
        labels = sample.ground_truth.detections
        kept = rng.permutation(len(labels))[: (len(labels) + 1) // 2]
        sample.ground_truth.detections = [labels[i] for i in sorted(kept)]
    rows: list[list[object]] = [["unlabeled objects", "seed", "AR@10", "AR@100", "AR@1000"]]
    for seed in range(3):
        for choice in ("ignore", "background"):
            run = train(
                dataset.select(ids[:40]),
                name=f"{choice}-{seed}",
                base=base,
                validation=held_out,
                unlabeled=choice,
                output=output / f"{choice}-{seed}",
                keep_worse=True,
                seed=seed,
                **settings,
            )
            rows.append([choice, seed, *(f"{run.after.recalls[k]:.3f}" for k in (10, 100, 1000))])
            print(rows[-1], run.counts, flush=True)
    return rows


# What learns ----------------------------------------------------------------------------------------------------------


def learning_rates(base: str, dataset: Any, validation: float, output: Path, epochs: int) -> list[list[object]]:
    """Masks with the decoder alone, the neck, or the whole encoder, at three learning rates."""
    from fiftyone_mobilesamv2 import train

    rows: list[list[object]] = [["learns", "learning rate", "IoU from boxes before", "after"]]
    for learn in ("decoder", "neck", "encoder"):
        for rate in (1e-4, 1e-3, 1e-2):
            run = train(
                dataset,
                name=f"{learn}-{rate}",
                part="masks",
                base=base,
                validation=validation,
                learn=learn,
                learning_rate=rate,
                epochs=epochs,
                output=output / f"{learn}-{rate}",
                keep_worse=True,
            )
            rows.append([learn, rate, f"{run.before.iou:.3f}", f"{run.after.iou:.3f}"])
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = ("style", "number", "incomplete", "ultralytics", "learn")
    parser.add_argument("parts", nargs="+", choices=(*DOMAINS, *others))
    parser.add_argument("--model", default="mobilesamv2-nano-torch", help="what training starts from")
    parser.add_argument("--photo-sets", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/training"), help="for what a measurement has reached")
    parser.add_argument("--epochs", type=int, help="default: that of train()")
    args = parser.parse_args()
    settings = {} if args.epochs is None else {"epochs": args.epochs}
    folder = temporary_folder()
    for part in args.parts:
        output = args.output / part
        output.mkdir(parents=True, exist_ok=True)
        if part in DOMAINS:
            name, share = DOMAINS[part]
            rows = run_both(args.model, photos(args.photo_sets / name), share, output, **settings)
            print(f"\n{table(remembered(args.model, output, args.photo_sets))}\n", flush=True)
        elif part == "style":
            dataset = scenes(folder, 70)
            rows = run_both(args.model, dataset, 30 / 70, output, **settings)
            rows += segmentation_rows(dataset, 30 / 70, output, args.epochs or 60)
        elif part == "number":
            rows = by_number(args.model, scenes(folder, 450), output, **settings)
        elif part == "incomplete":
            rows = incomplete(args.model, scenes(folder, 70), output, **settings)
        elif part == "learn":
            rows = learning_rates(args.model, photos(args.photo_sets / "domain_nuclei"), 0.3, output, args.epochs or 4)
        else:
            rows = compare(photos(args.photo_sets / "domain_nuclei"), 0.3, output, 3, args.epochs or 30)
        text = table(rows)
        (output / "table.md").write_text(text + "\n")
        print(f"\n{part}\n\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
