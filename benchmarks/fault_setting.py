"""A dataset, and a database that can be made to fail, to inject faults into runs and to see what is lost."""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import cv2
from pymongo import MongoClient

MODEL = "mobilesamv2-demo-torch"
BATCH_SIZE = 4
TRAINING_IMAGES = 8
_DIFFERENT_SCENES = 50  # repeated to fill the dataset

# Children are forked from a process that has imported everything, so a kill takes one second instead of ten.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["fiftyone_mobilesamv2.runs.segment"])


@dataclass
class Fault:
    """The effects of a kind of fault; the last three numbers should be 0.

    Attributes:
        lost: number of samples without labels that had labels or should have some.
        differing: number of samples whose labels differ from those of a run without faults.
        orphans: number of mask files that no label refers to.
    """

    name: str
    injected: int
    lost: int
    differing: int
    orphans: int

    @property
    def is_harmless(self) -> bool:
        return not (self.lost or self.differing or self.orphans)


@dataclass(frozen=True)
class Setting:
    """The setting of a process.

    Attributes:
        max_silence: seconds without a heartbeat after which a run is considered dead; None: the package's.
        clock: how many seconds its clock is ahead.
    """

    max_silence: float | None = None
    clock: float = 0


class Database:
    """A separate mongod that can be stopped, killed, and made to fail."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"mongodb://127.0.0.1:{self._port}/?serverSelectionTimeoutMS=2000"
        self._folder = folder
        self._folder.mkdir()
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        binary = Path(importlib.util.find_spec("fiftyone").submodule_search_locations[0]) / "db" / "bin" / "mongod"
        options = ["--port", str(self._port), "--bind_ip", "127.0.0.1", "--nounixsocket"]
        options += ["--dbpath", self._folder, "--setParameter", "enableTestCommands=1"]
        self._process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
        MongoClient(self.uri, serverSelectionTimeoutMS=60_000).admin.command("ping")

    def stop(self, how: int = signal.SIGTERM) -> None:
        self._process.send_signal(how)
        self._process.wait()

    def fail(self, times: int, **how: object) -> None:
        """Makes the next commands fail; see MongoDB's failCommand."""
        MongoClient(self.uri).admin.command("configureFailPoint", "failCommand", mode={"times": times}, data=how)


class Faults:
    """A dataset of scenes, the labels that a run without faults stores, and comparisons with runs with faults.

    Args:
        folder: the folder for all files.
        database: the database that FiftyOne is connected to.
        scenes: number of scenes.
    """

    def __init__(self, folder: Path, database: Database, scenes: int) -> None:
        import fiftyone as fo

        from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

        self.folder, self.database, self.random = folder, database, random.Random(0)
        paths = [folder / f"{index}.png" for index in range(min(scenes, _DIFFERENT_SCENES))]
        for index, path in enumerate(paths):
            cv2.imwrite(str(path), make_scene(TEST_SEED, index).image[:, :, ::-1])
        self.dataset = fo.Dataset("faults", overwrite=True)
        self.dataset.persistent = True
        samples = [fo.Sample(str(paths[i % len(paths)])) for i in range(scenes)]
        self.dataset.add_samples(samples, progress=False)
        start = time.perf_counter()
        self.finish("reference", on_disk=False)
        self.seconds = time.perf_counter() - start
        self.reference = self.labels("reference")
        self.count = 0
        self.replaced: set[str] = set()

    def field(self) -> str:
        self.count += 1
        return f"field_{self.count}"

    # Runs -------------------------------------------------------------------------------------------------------------

    def start(
        self, field: str, on_disk: bool, folder: Path | None = None, setting: Setting | None = None, **options: object
    ) -> multiprocessing.Process:
        """Starts a run in a process of its own; `options` are arguments of `segment_everything`."""
        folder = folder or self.folder / "masks"
        return self.start_process(run_once, field, on_disk, str(folder), setting or Setting(), options)

    def start_process(self, work: Callable[..., None], *arguments: object) -> multiprocessing.Process:
        """Starts `work(dataset name, *arguments)` in a process of its own."""
        process = _PROCESSES.Process(
            target=_logged, args=(self.folder / "runs.log", work, self.dataset.name, *arguments)
        )
        process.start()
        return process

    def finish(self, field: str, on_disk: bool, folder: Path | None = None, **options: object) -> None:
        self.expect_success(self.start(field, on_disk, folder, **options))

    def expect_success(self, process: multiprocessing.Process) -> None:
        process.join()
        if process.exitcode:
            log = (self.folder / "runs.log").read_text()
            raise RuntimeError(f"A run ended with {process.exitcode}:\n{log[-2000:]}")

    def wait_until_stored(
        self, field: str, share: float, process: multiprocessing.Process, replaced: Collection[str] = ()
    ) -> None:
        """Waits until this share of the samples has labels. Raises RuntimeError if the run has ended by then.

        Args:
            replaced: the marks of the labels that are to be replaced; they do not count.
        """
        wanted, query = share * len(self.reference), {f"{field}.run_id": {"$nin": [None, *replaced]}}
        while self.dataset._sample_collection.count_documents(query) < wanted:
            if not process.is_alive():
                raise RuntimeError("A run ended before a fault could be injected: use more scenes")
            time.sleep(0.01)

    # Comparisons ------------------------------------------------------------------------------------------------------

    def labels(self, field: str) -> dict[object, str | None]:
        """Sample id -> a hash of its labels including mask pixels; None if it has none."""
        digests = {}
        for document in self.dataset._sample_collection.find({}, {field: True}):
            labels = document.get(field)
            digests[document["_id"]] = labels and _digest(labels["detections"])
        return digests

    def ids(self, field: str) -> dict[object, object]:
        """Sample id -> id of its first label, for samples with labels."""
        documents = self.dataset._sample_collection.find({f"{field}.detections.0": {"$exists": True}}, {field: True})
        return {document["_id"]: document[field]["detections"][0]["_id"] for document in documents}

    def compare(self, name: str, injected: int, field: str, deleted: int = 0, folder: str = "*masks*") -> Fault:
        stored = self.labels(field)
        gone = len(self.reference) - len(stored) - deleted
        lost = gone + sum(labels is None for labels in stored.values())
        differing = sum(labels is not None and labels != self.reference[id] for id, labels in stored.items())
        return Fault(name, injected, lost, differing, self.orphans(folder))

    def check_partial(self, field: str) -> int:
        """The number of samples whose labels differ from the expected ones; samples without labels do not count."""
        return sum(labels not in (None, self.reference[id]) for id, labels in self.labels(field).items())

    def orphans(self, folder: str = "*masks*") -> int:
        """Files below the mask folders that no label refers to, including marker files of unfinished masks.

        Files of labels that were replaced (`replaced`) are kept on purpose and don't count.
        """
        files = {str(path) for path in self.folder.glob(f"{folder}/**/*") if path.is_file()}
        self.dataset.reload()  # for fields that other processes have added
        for name in self.dataset.get_field_schema():
            if name.startswith("field_"):
                files -= set(self.mask_paths(name))
        return len(files - self.replaced)

    def marks(self, field: str) -> list[str]:
        """The marks of the runs that made the labels of a field."""
        return self.dataset._sample_collection.distinct(f"{field}.run_id")

    def mask_paths(self, field: str) -> list[str]:
        """The files that the labels of a field refer to."""
        return self.dataset._sample_collection.distinct(f"{field}.detections.mask_path")


def _logged(log: Path, work: Callable[..., None], *arguments: object) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    work(*arguments)


def train_once(dataset: str, part: str, folder: str) -> None:
    """Performs one complete training on labels of the reference."""
    import fiftyone as fo
    import torch

    from fiftyone_mobilesamv2 import train

    torch.set_num_threads(1)  # sums in another order differ in their last digits
    fo.config.model_zoo_dir = str(Path(folder).parent / "zoo")
    parameters = {"base": MODEL, "epochs": 4, "batch_size": 2, "device": "cpu", "keep_worse": True, "progress": False}
    images = fo.load_dataset(dataset).limit(TRAINING_IMAGES)
    train(images, "reference", name=Path(folder).name, part=part, output=folder, **parameters)


def run_once(
    dataset: str, field: str, on_disk: bool, folder: str, setting: Setting, options: dict[str, object]
) -> None:
    """Performs one complete run."""
    import fiftyone as fo
    import torch

    from fiftyone_mobilesamv2 import zoo
    from fiftyone_mobilesamv2.runs import claims, liveness
    from fiftyone_mobilesamv2.runs.segment import segment_everything

    torch.set_num_threads(1)
    if setting.max_silence is not None:
        liveness.MAX_SILENCE, claims._HEARTBEAT = timedelta(seconds=setting.max_silence), setting.max_silence / 8
    clock = time.time  # of which ids are made
    time.time = lambda: clock() + setting.clock
    parameters = {"name": MODEL, "device": "cpu", "masks_on_disk": on_disk, "mask_dir": folder}
    segment_everything(
        fo.load_dataset(dataset),
        zoo.MobileSAMv2ModelConfig(parameters),
        field,
        batch_size=BATCH_SIZE,
        progress=False,
        **options,
    )


def _digest(labels: list[dict]) -> str:
    import fiftyone.core.utils as fou

    digest = hashlib.sha256()
    for label in labels:
        path = label.get("mask_path")
        mask = fou.deserialize_numpy_array(label["mask"]) if path is None else cv2.imread(path, cv2.IMREAD_UNCHANGED)
        if mask is None:
            return f"{path} can't be read"
        values = [label[name] for name in ("label", "bounding_box", "confidence", "predicted_iou", "stability")]
        digest.update(repr((values, label["area_px"], mask.shape)).encode() + (mask > 0).tobytes())
    return digest.hexdigest()


@contextmanager
def temporary_faults(scenes: int) -> Iterator[Faults]:
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        database = Database(Path(name) / "database")
        database.start()
        os.environ |= {
            "FIFTYONE_DATABASE_URI": database.uri,
            "FIFTYONE_DATABASE_NAME": "faults",
            "FIFTYONE_DATABASE_VALIDATION": "false",
            "FIFTYONE_DO_NOT_TRACK": "true",
            "YOLO_AUTOINSTALL": "false",
        }
        try:
            yield Faults(Path(name), database, scenes)
        finally:
            database.stop(signal.SIGKILL)
