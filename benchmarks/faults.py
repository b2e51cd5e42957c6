"""Checks that runs lose nothing when processes are killed, the database fails, disks fill up or others interfere.

    python benchmarks/faults.py

Prints how often each kind of fault was injected, and what was lost. After each fault, the same run is repeated until it
completes, and the dataset is compared with the result of a run without faults.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import psutil
from pymongo import MongoClient

MODEL = "mobilesamv2-demo-torch"
BATCH_SIZE = 4
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

    def field(self) -> str:
        self.count += 1
        return f"field_{self.count}"

    # Runs -------------------------------------------------------------------------------------------------------------

    def start(
        self, field: str, on_disk: bool, folder: Path | None = None, cluster: str | None = None
    ) -> multiprocessing.Process:
        folder = folder or self.folder / "masks"
        arguments = self.dataset.name, field, on_disk, str(folder), self.folder / "runs.log", cluster
        process = _PROCESSES.Process(target=_run, args=arguments)
        process.start()
        return process

    def finish(self, field: str, on_disk: bool, folder: Path | None = None) -> None:
        process = self.start(field, on_disk, folder)
        self.expect_success(process)

    def expect_success(self, process: multiprocessing.Process) -> None:
        process.join()
        if process.exitcode:
            log = (self.folder / "runs.log").read_text()
            raise RuntimeError(f"A run ended with {process.exitcode}:\n{log[-2000:]}")

    def wait_until_stored(self, field: str, share: float, process: multiprocessing.Process) -> None:
        """Waits until this share of the samples has labels. Raises RuntimeError if the run has ended by then."""
        wanted = share * len(self.reference)
        while self.dataset._sample_collection.count_documents({field: {"$ne": None}}) < wanted:
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
        """Files below the mask folders that no label refers to, including marker files of unfinished masks."""
        files = {str(path) for path in self.folder.glob(f"{folder}/**/*") if path.is_file()}
        self.dataset.reload()  # for fields that other processes have added
        for name in self.dataset.get_field_schema():
            if name.startswith("field_"):
                files -= set(self.dataset._sample_collection.distinct(f"{name}.detections.mask_path"))
        return len(files)


def _run(dataset: str, field: str, on_disk: bool, folder: str, log: Path, cluster: str | None) -> None:
    """Performs one complete run, in a process of its own."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    import fiftyone as fo
    import torch

    from fiftyone_mobilesamv2 import zoo
    from fiftyone_mobilesamv2.runs.segment import segment_everything

    torch.set_num_threads(1)
    parameters = {"name": MODEL, "device": "cpu", "masks_on_disk": on_disk, "mask_dir": folder}
    workers = None if cluster is None else 2
    segment_everything(
        fo.load_dataset(dataset),
        zoo.MobileSAMv2ModelConfig(parameters),
        field,
        batch_size=BATCH_SIZE,
        progress=False,
        cluster=cluster,
        workers=workers,
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


# Faults ---------------------------------------------------------------------------------------------------------------


def kill_at_random(faults: Faults, kills: int, on_disk: bool) -> Fault:
    """Kills runs with SIGKILL until there were enough kills, and restarts the run each time.

    A sample that was already stored but is segmented again counts as differing.
    """
    injected, results = 0, []
    while injected < kills:
        field, wrong, ids = faults.field(), 0, {}
        while True:
            process = faults.start(field, on_disk)
            process.join(faults.random.uniform(0.1, min(6, faults.seconds / 2)) if injected < kills else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            injected += 1
            wrong += faults.check_partial(field)
            ids |= faults.ids(field)
        faults.expect_success(process)
        result = faults.compare("", 0, field)
        result.differing += wrong + len(ids.items() - faults.ids(field).items())
        results.append(result)
    where = "on disk" if on_disk else "in the database"
    sums = [sum(getattr(each, name) for each in results) for name in ("lost", "differing", "orphans")]
    return Fault(f"kill -9 at random moments, masks {where}", injected, *sums)


def interrupt_twice(faults: Faults, times: int = 3) -> Fault:
    field = faults.field()
    for number in range(times):
        process = faults.start(field, True)
        faults.wait_until_stored(field, (number + 1) / (times + 2), process)
        for _ in range(2):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
            time.sleep(faults.random.uniform(0, 0.2))
        process.join()
    faults.finish(field, True)
    return faults.compare("Ctrl-C twice", times, field)


def restart_database(faults: Faults, how: int, name: str, times: int = 3) -> Fault:
    field = faults.field()
    process = faults.start(field, True)
    for number in range(times):
        faults.wait_until_stored(field, (number + 1) / (times + 2), process)
        faults.database.stop(how)
        time.sleep(3)
        faults.database.start()
    faults.expect_success(process)
    return faults.compare(name, times, field)


def lose_writes(faults: Faults) -> Fault:
    """Makes writes time out, fail, or lose their response."""
    field = faults.field()
    process = faults.start(field, True)
    how = [
        {"errorCode": 50},  # MaxTimeMSExpired
        {"closeConnection": True},
        {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}},
    ]
    injected = 0
    for number, each in enumerate(how):
        faults.wait_until_stored(field, (number + 1) / (len(how) + 2), process)
        faults.database.fail(5, failCommands=["update"], **each)
        injected += 5
    faults.expect_success(process)
    return faults.compare("writes that time out or whose answer is lost", injected, field)


def kill_worker(faults: Faults) -> Fault:
    """Kills one of the two workers of a Ray cluster on this machine."""
    field = faults.field()
    process = faults.start(field, True, cluster="local")
    faults.wait_until_stored(field, 0.3, process)
    runs = MongoClient(faults.database.uri)["faults"]["mobilesamv2.runs"]
    shard = runs.find_one({"label_field": field, "ended": False, "owner.pid": {"$ne": process.pid}})
    os.kill(shard["owner"]["pid"], signal.SIGKILL)
    faults.expect_success(process)
    return faults.compare("one of two workers killed", 1, field)


def kill_raylet(faults: Faults) -> Fault:
    """Kills Ray's own process on this machine. The run must end with an error within a minute."""
    field = faults.field()
    process = faults.start(field, True, cluster="local")
    faults.wait_until_stored(field, 0.3, process)
    (raylet,) = (child for child in psutil.Process(process.pid).children() if child.name() == "raylet")
    raylet.kill()
    process.join(60)
    if not process.exitcode:
        raise RuntimeError("A run does not end when Ray's process is killed")
    wrong = faults.check_partial(field)
    faults.expect_success(faults.start(field, True, cluster="local"))
    result = faults.compare("Ray's process on this machine (raylet) killed", 1, field)
    result.differing += wrong
    return result


def fill_disk(faults: Faults) -> Fault | None:
    """Stores masks on a small tmpfs. Returns None if it can't be mounted, which requires root."""
    field, folder = faults.field(), faults.folder / "small-masks"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        process = faults.start(field, True, folder)
        process.join()
        if not process.exitcode:
            raise RuntimeError("The disk did not fill up: use more scenes")
        wrong, orphans = faults.check_partial(field), faults.orphans()
        subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
        faults.finish(field, True, folder)
        result = faults.compare("a full disk, later enlarged", 1, field)
        result.differing += wrong
        result.orphans += orphans
        return result
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def run_twice_at_once(faults: Faults) -> Fault:
    """The second run must report that the first one is active."""
    field = faults.field()
    first = faults.start(field, True)
    faults.wait_until_stored(field, 0.1, first)
    second = faults.start(field, True)
    second.join()
    if not second.exitcode and first.is_alive():
        raise RuntimeError("A second run was allowed to store masks in the field")
    faults.expect_success(first)
    return faults.compare("two runs into one field at once", 1, field)


def delete_field(faults: Faults) -> Fault:
    field, folder = faults.field(), faults.folder / "masks-of-a-deleted-field"
    process = faults.start(field, True, folder)
    faults.wait_until_stored(field, 0.3, process)
    faults.dataset.reload()
    faults.dataset.delete_sample_field(field)
    process.join()
    left = faults.dataset._sample_collection.count_documents({field: {"$exists": True}})
    shutil.rmtree(folder / str(faults.dataset._doc.id))  # the run keeps them: copies of the deleted labels may exist
    faults.finish(field, True, folder)
    result = faults.compare("the field deleted by someone else", 1, field, folder=folder.name)
    result.differing += left
    return result


def delete_samples(faults: Faults, times: int = 5) -> Fault:
    """Deletes samples during a run. Must be the last fault, since masks of other fields lose their labels, too."""
    field, folder = faults.field(), "masks-of-deleted"
    process = faults.start(field, True, faults.folder / folder)
    faults.wait_until_stored(field, 0.2, process)
    # These samples have no masks yet. Files of stored masks would stay, since copies may refer to them.
    last = faults.dataset._sample_collection.find({}, {"_id": True}).sort("_id", -1).limit(times)
    ids = [document["_id"] for document in last]
    faults.dataset._sample_collection.delete_many({"_id": {"$in": ids}})
    faults.expect_success(process)
    return faults.compare("samples deleted by someone else", len(ids), field, len(ids), folder)


def inject(scenes: int, kills: int, show: Callable[[Fault], None]) -> list[Fault]:
    """Injects all faults."""
    faults_shown = []
    with temporary_faults(scenes) as faults:
        steps: list[Callable[[], Fault | None]] = [
            lambda: kill_at_random(faults, kills // 2, on_disk=False),
            lambda: kill_at_random(faults, kills - kills // 2, on_disk=True),
            lambda: interrupt_twice(faults),
            lambda: restart_database(faults, signal.SIGTERM, "the database stopped, and started 3 s later"),
            lambda: restart_database(faults, signal.SIGKILL, "the database killed, and started 3 s later"),
            lambda: lose_writes(faults),
            lambda: kill_worker(faults),
            lambda: kill_raylet(faults),
            lambda: fill_disk(faults),
            lambda: run_twice_at_once(faults),
            lambda: delete_field(faults),
            lambda: delete_samples(faults),
        ]
        for step in steps:
            if (fault := step()) is None:
                print("(Skipped a full disk: mounting a small file system requires root.)", file=sys.stderr)
            else:
                show(fault)
                faults_shown.append(fault)
    return faults_shown


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    args = parser.parse_args()
    print("| fault | injected | samples lost | samples differing | orphan files |\n|---|---|---|---|---|")
    injected = inject(
        args.scenes,
        args.kills,
        lambda f: print(f"| {f.name} | {f.injected} | {f.lost} | {f.differing} | {f.orphans} |", flush=True),
    )
    return 0 if all(fault.is_harmless for fault in injected) else 1


if __name__ == "__main__":
    sys.exit(main())
