"""Compares the speed of segmenting datasets with existing tools; measures startup, and growth of time and memory.

Needs FiftyOne and its database, in which it creates and deletes datasets; bench.py runs it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import cv2
import fiftyone as fo
import fiftyone.utils.sam as fous
import segment_anything
import torch
from core import DTYPES, add_growth
from fiftyone import ViewField as F
from measure import (
    Report,
    Row,
    in_new_process,
    in_turns,
    read_rgb,
    resident_memory,
    section,
    speedup,
)
from model_quality import MODEL, measure_everything, scenes
from released import CONFIDENCE, PlausibleMasks, object_like_logits, write_checkpoints
from tqdm import tqdm
from ultralytics.models.sam import Predictor as SAMPredictor
from ultralytics.models.sam.build import build_mobile_sam
from ultralytics.utils import ASSETS

from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.modeling.defaults import POINTS_PER_SIDE
from fiftyone_mobilesamv2.runs.segment import segment_everything
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene
from fiftyone_mobilesamv2.zoo.config import MobileSAMv2ModelConfig
from fiftyone_mobilesamv2.zoo.model import MobileSAMv2Model

# Prompts of an image with many objects, and the paper's maximum.
PROMPTS = (64, 320)
IMAGES = 2  # copies of one photo, in which random weights find enough objects
GRID_SCENES = 3
# SAM's search runs on a quarter of its 32x32 points, which already took 124 s and 205 s for an image. So the target of
# 30 is divided by four, too.
COARSE_GRID = 16
GRID_TARGET = 30 * (COARSE_GRID / POINTS_PER_SIDE) ** 2

SCENES = 50  # number of different scenes; a dataset repeats them
SCENE_COUNTS = (100, 200, 500, 1000, 2000)
BATCH_SIZE = 8

STARTS = 3
_IMPORT = "import time; t = time.perf_counter(); import fiftyone_mobilesamv2; print(time.perf_counter() - t)"
_FIRST_IMAGE = f"""
import sys
from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.images import read_image
model = MobileSAMv2.from_pretrained({MODEL!r}, device="cpu")
print(len(model.segment_everything([read_image(sys.argv[1])])[0]), flush=True)
"""


@contextmanager
def temporary_dataset(paths: Sequence[Path]) -> Iterator[fo.Dataset]:
    """A dataset with one sample for each path; paths may repeat."""
    dataset = fo.Dataset(f"benchmark-{uuid.uuid4().hex}")
    try:
        dataset.add_samples([fo.Sample(filepath=str(path)) for path in paths], progress=False)
        dataset.compute_metadata(progress=False)
        yield dataset
    finally:
        dataset.delete()


# Against the grid -----------------------------------------------------------------------------------------------------


def measure_grid(report: Report) -> None:
    """Compares object-aware prompts with SAM's 32x32 grid, using the demo model on unseen scenes."""
    model = MobileSAMv2.from_pretrained(MODEL, device="cpu")
    ways = ["object_aware", "grid, unfiltered"]
    ours, grid = measure_everything(model, scenes(GRID_SCENES), GRID_SCENES, ways).values()
    how = f"{grid['decoder ms per image']:.0f} -> {ours['decoder ms per image']:.1f} ms an image, demo model"
    times = grid["decoder time / object_aware"]
    report.add(Row(5, "decoder time, grid 32x32 / object-aware", times, "x", 30, how, GRID_SCENES))
    gained = ours["AR@1000"] - grid["AR@1000"]
    how = f"{grid['AR@1000']:.3f} -> {ours['AR@1000']:.3f}"
    report.add(Row(5, "AR@1000, object-aware less grid's", gained, "", 0, how, GRID_SCENES))


# Datasets -------------------------------------------------------------------------------------------------------------


def measure_datasets(report: Report, folder: Path, released: Mapping[int, Sequence[float]]) -> None:
    """Images per second from files to stored labels, at SAM's input size.

    Args:
        folder: the folder for checkpoints and images.
        released: the released code's seconds per image, by number of prompts.
    """
    files = write_checkpoints(folder)
    sam = files["encoder_checkpoint"]
    paths = []
    for number in range(IMAGES):
        paths.append(folder / f"{number}.jpg")
        shutil.copy(ASSETS / "bus.jpg", paths[-1])
    ours = {}
    with temporary_dataset(paths) as dataset:
        for dtype in DTYPES:
            with section(f"Datasets, {dtype}"):
                parameters = {"device": "cpu", "dtype": dtype, "confidence_thresh": CONFIDENCE}
                parameters |= {name: str(path) for name, path in files.items()}
                model = MobileSAMv2Model(MobileSAMv2ModelConfig({"name": "mobilesamv2-tinyvit-torch", **parameters}))
                model.model.decoder.register_forward_hook(PlausibleMasks(object_like_logits()))
                for prompts in PROMPTS:
                    ours[dtype, prompts] = time_dataset(report, dataset, model, prompts)
        grids = {}
        with section(f"FiftyOne's SAM, {COARSE_GRID}x{COARSE_GRID} grid, one image"):
            model = fiftyone_sam(sam)
            run = partial(dataset[:1].apply_model, model, "sam", skip_failures=False, progress=False)
            grids["FiftyOne's SAM"] = in_turns({"": run}, 1)[""]
        with section(f"ultralytics' SAM, {COARSE_GRID}x{COARSE_GRID} grid, one image"):
            settings = {"model": str(sam), "device": "cpu", "verbose": False, "save": False}
            settings |= {"conf": 0.25, "imgsz": 1024, "retina_masks": True}  # the settings of `ultralytics.SAM`
            predictor = SAMPredictor(overrides=settings)
            run = partial(predictor, str(paths[0]), points_stride=COARSE_GRID)
            grids["ultralytics' SAM"] = in_turns({"": run}, 1)[""]
    for (dtype, prompts), seconds in ours.items():
        title = f"dataset, {prompts} prompts, {dtype}, against"
        report.add(speedup(6, f"{title} the released loop", 5, released[prompts], seconds))
        for name, slow in grids.items():
            report.add(speedup(6, f"{title} {name}, {COARSE_GRID}x{COARSE_GRID}", GRID_TARGET, slow, seconds))


def time_dataset(report: Report, dataset: fo.Dataset, model: MobileSAMv2Model, prompts: int) -> list[float]:
    """Seconds per image of a dataset run; with the fastest model and the most masks, also adds a row on storing."""
    model.config.max_prompts = prompts
    images = [read_rgb(path) for path in dataset.values("filepath")]
    calls = {"stored": lambda: segment_everything(dataset, model, replace=True, batch_size=1, progress=False)}
    runs = 1
    if model.config.dtype == "bfloat16" and prompts == max(PROMPTS):
        runs = 2
        calls["alone"] = lambda: [
            model.model.segment_everything([image], conf=CONFIDENCE, max_prompts=prompts) for image in images
        ]
    seconds = {name: [s / len(images) for s in times] for name, times in in_turns(calls, runs).items()}
    counts = dataset.values(F("segmentations.detections").length())
    if set(counts) != {prompts}:
        raise RuntimeError(f"Stored {counts} masks instead of {prompts} for each image")
    if "alone" in seconds:
        alone, stored = median(seconds["alone"]), median(seconds["stored"])
        how = f"{alone:.2f} s -> {stored:.2f} s an image"
        name = f"loading and storing {prompts} masks adds to the model's time, share"
        report.add(Row(6, name, stored / alone - 1, "", 0.1, how, runs, at_most=True))
    return seconds["stored"]


def fiftyone_sam(checkpoint: Path) -> fous.SegmentAnythingModel:
    """FiftyOne's own SAM model with TinyViT as its encoder. With random weights, no mask passes SAM's filters."""
    sam = segment_anything.build_sam_vit_b()
    sam.image_encoder = build_mobile_sam().image_encoder
    sam.load_state_dict(torch.load(checkpoint))
    config = {"model": sam.eval(), "model_path": str(checkpoint), "auto_kwargs": {"points_per_side": COARSE_GRID}}
    return fous.SegmentAnythingModel(fous.SegmentAnythingModelConfig(config))


# Start ----------------------------------------------------------------------------------------------------------------


def measure_start(report: Report) -> None:
    """Seconds of new processes; all but the first read files from the operating system's cache."""
    image = str(ASSETS / "bus.jpg")
    imports, firsts = [], []
    for _ in tqdm(range(STARTS), desc="starts"):
        run = subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True)
        imports.append(float(run.stdout))
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", _FIRST_IMAGE, image], stdout=subprocess.PIPE, text=True) as run:
            masks = run.stdout.readline()
            firsts.append(time.perf_counter() - start)
        if run.returncode or not int(masks):
            raise RuntimeError("The demo model did not segment the photo")
    report.add(
        Row(7, "import fiftyone_mobilesamv2", median(imports), "s", 0.3, runs=STARTS, at_most=True),
        Row(
            7,
            "first image, from the start of Python to its masks",
            median(firsts),
            "s",
            5,
            "demo model",
            STARTS,
            at_most=True,
        ),
    )


# Growth ---------------------------------------------------------------------------------------------------------------


def measure_growth(report: Report, folder: Path) -> None:
    for index in range(SCENES):
        cv2.imwrite(str(folder / f"scene{index}.png"), make_scene(TEST_SEED, index).image[:, :, ::-1])
    counts, seconds, megabytes = in_new_process(grow, folder)
    add_growth(report, "time by images", counts, seconds, "images, small scenes", "s since the start of the run")
    labels = {"xlabel": "images, small scenes", "ylabel": "MB of the process"}
    report.curves["memory by images"] = {"x": counts, "y": megabytes, **labels}
    how = f"{megabytes[0]:.0f} MB -> {megabytes[-1]:.0f} MB"
    name = f"memory at {counts[-1]} images less that at {counts[0]}"
    report.add(Row(8, name, megabytes[-1] - megabytes[0], "MB", 50, how, at_most=True))


def grow(folder: Path) -> tuple[list[int], list[float], list[float]]:
    """One run on the largest dataset: images done, seconds since the start, and this process's memory in MB."""
    # Few prompts, since another curve shows how time grows with them.
    parameters = {"name": MODEL, "device": "cpu", "dtype": "bfloat16", "max_prompts": 2}
    model = MobileSAMv2Model(MobileSAMv2ModelConfig(parameters))
    counts, seconds, megabytes = [], [], []

    def record(bar: fo.ProgressBar) -> None:
        if len(counts) < len(SCENE_COUNTS) and bar.iteration >= SCENE_COUNTS[len(counts)]:
            counts.append(bar.iteration)
            seconds.append(time.perf_counter() - start)
            megabytes.append(resident_memory())
            print(f"   {bar.iteration} images after {seconds[-1]:.0f} s", flush=True)

    with temporary_dataset([folder / f"scene{i % SCENES}.png" for i in range(SCENE_COUNTS[-1])]) as dataset:
        start = time.perf_counter()
        segment_everything(dataset, model, batch_size=BATCH_SIZE, progress=record)
    return counts, seconds, megabytes


# All ------------------------------------------------------------------------------------------------------------------


def measure(report: Report, folder: Path, released: Mapping[int, Sequence[float]]) -> None:
    """Adds all rows about datasets; arguments as for :func:`measure_datasets`."""
    with section("Start"):
        measure_start(report)
    with section("Object-aware prompts against the grid"):
        measure_grid(report)
    with section("Growth with images"):
        measure_growth(report, folder)
    measure_datasets(report, folder, released)
