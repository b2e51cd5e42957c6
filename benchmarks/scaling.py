"""Measures a run's load per image on the database, the disk and the network, and where a database saturates.

    python benchmarks/scaling.py

Uses the database at FIFTYONE_DATABASE_URI; if unset, FiftyOne starts one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

os.environ |= {"FIFTYONE_DO_NOT_TRACK": "true", "YOLO_AUTOINSTALL": "false"}

import cv2
import fiftyone as fo
import fiftyone.core.odm as foo
import ray
from bson import BSON, ObjectId
from dataset import temporary_dataset
from model_quality import MODEL
from released import CONFIDENCE, PlausibleMasks, object_like_logits, write_checkpoints
from ultralytics.utils import ASSETS

from fiftyone_mobilesamv2.runs.retry import with_journaled_writes
from fiftyone_mobilesamv2.runs.segment import segment_everything
from fiftyone_mobilesamv2.runs.shards import Shard
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene
from fiftyone_mobilesamv2.zoo.config import MobileSAMv2ModelConfig
from fiftyone_mobilesamv2.zoo.model import MobileSAMv2Model

PROMPTS = (16, 64, 320)
WRITERS = (1, 4, 16)
WRITING = 5  # seconds per measurement
SCENES = 200
IDS = 500_000


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| masks per image | stored | document | commands | to the database | from it | files | on disk |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        documents = {}
        for prompts in PROMPTS:
            for on_disk in (False, True):
                documents[prompts, on_disk] = measure_image(folder, prompts, on_disk)
        print("\n| masks per image | stored | " + " | ".join(f"{n} at once" for n in WRITERS) + " |")
        print("|---|---|" + "---|" * len(WRITERS), flush=True)
        for (prompts, on_disk), document in documents.items():
            rates = [write_rate(document, writers) for writers in WRITERS]
            cells = " | ".join(f"{rate:.0f}/s" for rate in rates)
            print(f"| {prompts} | {_where(on_disk)} | {cells} |", flush=True)
        measure_workers(folder)


# An image -------------------------------------------------------------------------------------------------------------


def measure_image(folder: Path, prompts: int, on_disk: bool) -> dict:
    """Prints the cost of one more image: a run of four minus a run of one. Returns the document's labels."""
    files = {key: str(path) for key, path in write_checkpoints(folder).items()}
    parameters = {"device": "cpu", "dtype": "bfloat16", "confidence_thresh": CONFIDENCE, "max_prompts": prompts}
    parameters |= {"masks_on_disk": on_disk, "mask_dir": str(folder / "masks"), **files}
    model = MobileSAMv2Model(MobileSAMv2ModelConfig({"name": "mobilesamv2-tinyvit-torch", **parameters}))
    model.model.decoder.register_forward_hook(PlausibleMasks(object_like_logits()))
    counts = {}
    for images in (1, 4):
        paths = [folder / f"{index}.jpg" for index in range(images)]
        for path in paths:
            shutil.copy(ASSETS / "bus.jpg", path)
        shutil.rmtree(folder / "masks", ignore_errors=True)
        with temporary_dataset(paths) as dataset:
            before = _server()
            segment_everything(dataset, model, progress=False, batch_size=1)
            counts[images] = [after - start for after, start in zip(_server(), before)]
            masks = [path for path in (folder / "masks").rglob("*.png")] if on_disk else []
            counts[images] += [len(masks), sum(path.stat().st_size for path in masks)]
            (labels, *_) = dataset._sample_collection.distinct("segmentations")
    commands, received, sent, masks, size = ((many - one) / 3 for one, many in zip(counts[1], counts[4]))
    print(
        f"| {prompts} | {_where(on_disk)} | {len(BSON.encode(labels)) / 1e3:.0f} KB | {commands:.1f} | "
        f"{received / 1e3:.0f} KB | {sent / 1e3:.1f} KB | {masks:.0f} | {size / 1e3:.0f} KB |",
        flush=True,
    )
    return labels


def _where(on_disk: bool) -> str:
    return "on disk" if on_disk else "in the database"


def _server() -> list[int]:
    """The number of commands that the database has executed, and of bytes received and sent."""
    status = foo.get_db_conn().command("serverStatus")
    return [sum(status["opcounters"].values()), status["network"]["bytesIn"], status["network"]["bytesOut"]]


# The database ---------------------------------------------------------------------------------------------------------


def write_rate(labels: dict, writers: int) -> float:
    """Images per second that this many writers store, as in a run: one update, acknowledged by the journal."""
    # Alternates between two values, because MongoDB doesn't write unchanged values.
    versions = labels, {**labels, "detections": labels["detections"][::-1]}
    with temporary_dataset([]) as dataset:
        dataset.add_samples([fo.Sample(f"{index}.jpg") for index in range(100 * writers)], progress=False)
        ids = [document["_id"] for document in dataset._sample_collection.find({}, {"_id": True})]
        counts, end = [0] * writers, time.perf_counter() + WRITING

        def write(writer: int) -> None:
            collection = with_journaled_writes(dataset._sample_collection)
            mine = ids[writer::writers]
            while time.perf_counter() < end:
                turn, place = divmod(counts[writer], len(mine))
                update = [{"$set": {"segmentations": {"$literal": versions[turn % 2]}}}]
                assert collection.update_one({"_id": mine[place]}, update).modified_count == 1
                counts[writer] += 1

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / WRITING


# Workers --------------------------------------------------------------------------------------------------------------


def measure_workers(folder: Path) -> None:
    """Compares one and two processes on this machine, each with one thread, and measures the cost of an empty shard."""
    paths = [folder / f"scene{index}.png" for index in range(50)]
    for index, path in enumerate(paths):
        cv2.imwrite(str(path), make_scene(TEST_SEED, index).image[:, :, ::-1])
    config = MobileSAMv2ModelConfig({"name": MODEL, "device": "cpu"})
    with temporary_dataset([paths[index % 50] for index in range(SCENES)]) as dataset:
        rates = {}
        for workers in (1, 2):
            with _cluster(workers):
                seconds = {}  # for fewer and for all images: the difference excludes common costs such as the start
                for count in (SCENES // 4, SCENES):
                    field, samples = f"own{workers}_{count}", dataset.limit(count)
                    run = segment_everything(samples, config, field, progress=False, cluster="auto", workers=workers)
                    seconds[count] = run.seconds["total"]
                few, many = seconds
                rates[workers] = (many - few) / (seconds[many] - seconds[few])
        print(f"\n{SCENES} scenes, demo model: {rates[1]:.1f} images/s by one worker, {rates[2]:.1f} by two")
        model, field = MobileSAMv2Model(config), f"own1_{SCENES}"
        for count in (SCENES, IDS):
            more = [{"_id": ObjectId(), "filepath": str(paths[0]), field: {}} for _ in range(count - len(dataset))]
            if more:
                dataset._sample_collection.insert_many(more)
            seconds = []
            for index in range(5):
                start = time.perf_counter()
                segment_everything(dataset, model, field, progress=False, shard=Shard(index, 800, "empty"))
                seconds.append(time.perf_counter() - start)
            print(f"An empty shard of {count:,} samples: {1000 * median(seconds):.0f} ms")


@contextmanager
def _cluster(cores: int) -> Iterator[None]:
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    fo.config.show_progress_bars = False
    sys.exit(main())
