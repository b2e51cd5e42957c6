"""Checks that runs lose nothing when processes are killed, the database fails, disks fill up, and others interfere.

    python benchmarks/faults.py

Prints each kind of fault with how often it was injected, and what was lost. Every time the same run is then started
again until it comes to its end, and the dataset is compared with what a run without faults has stored.
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
from pymongo import MongoClient

MODEL = "mobilesamv2-demo-torch"
BATCH_SIZE = 4
_DIFFERENT_SCENES = 50  # which repeat

# Children are forked from a process that has imported everything: a kill every second, not every ten.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["fiftyone_mobilesamv2.runs.segment"])


@dataclass
class Fault:
    """What a kind of fault has done. All but the first two should be 0.

    Attributes:
        lost: samples that had labels, or should have some, and have none.
        differing: samples whose labels are not those of a run without faults.
        orphans: files of masks that no label refers to.
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
        """The next commands: see MongoDB's failCommand."""
        MongoClient(self.uri).admin.command("configureFailPoint", "failCommand", mode={"times": times}, data=how)


class Faults:
    """A dataset of scenes, what a run without faults stores, and what becomes of it with some.

    Args:
        folder: for everything.
        database: that FiftyOne is connected to.
        scenes: how many.
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
        """Until that share of the samples has labels. A run that has ended by then is none to inject faults into."""
        wanted = share * len(self.reference)
        while self.dataset._sample_collection.count_documents({field: {"$ne": None}}) < wanted:
            if not process.is_alive():
                raise RuntimeError("A run ended before there was a fault: more scenes are needed")
            time.sleep(0.01)

    # What became of it ------------------------------------------------------------------------------------------------

    def labels(self, field: str) -> dict[object, str | None]:
        """Sample id -> a hash of its labels including mask pixels; None if it has none."""
        found = {}
        for document in self.dataset._sample_collection.find({}, {field: True}):
            labels = document.get(field)
            found[document["_id"]] = labels and _digest(labels["detections"])
        return found

    def ids(self, field: str) -> dict[object, object]:
        """Sample id -> id of its first label, for samples with labels."""
        found = self.dataset._sample_collection.find({f"{field}.detections.0": {"$exists": True}}, {field: True})
        return {document["_id"]: document[field]["detections"][0]["_id"] for document in found}

    def compare(self, name: str, injected: int, field: str, deleted: int = 0, folder: str = "*masks*") -> Fault:
        found = self.labels(field)
        gone = len(self.reference) - len(found) - deleted
        lost = gone + sum(labels is None for labels in found.values())
        differing = sum(labels is not None and labels != self.reference[id] for id, labels in found.items())
        return Fault(name, injected, lost, differing, self.orphans(folder))

    def check_partial(self, field: str) -> int:
        """The number of samples whose labels are missing or differ from the expected ones."""
        return sum(labels not in (None, self.reference[id]) for id, labels in self.labels(field).items())

    def orphans(self, folder: str = "*masks*") -> int:
        """Files below the mask folders that no label refers to, including marker files of unfinished masks."""
        files = {str(path) for path in self.folder.glob(f"{folder}/**/*") if path.is_file()}
        self.dataset.reload()  # fields that others have added
        for name in self.dataset.get_field_schema():
            if name.startswith("field_"):
                files -= set(self.dataset._sample_collection.distinct(f"{name}.detections.mask_path"))
        return len(files)


def _run(dataset: str, field: str, on_disk: bool, folder: str, log: Path, cluster: str | None) -> None:
    """A process with one complete run."""
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

    found = hashlib.sha256()
    for label in labels:
        path = label.get("mask_path")
        mask = fou.deserialize_numpy_array(label["mask"]) if path is None else cv2.imread(path, cv2.IMREAD_UNCHANGED)
        if mask is None:
            return f"{path} can't be read"
        values = [label[name] for name in ("label", "bounding_box", "confidence", "predicted_iou", "stability")]
        found.update(repr((values, label["area_px"], mask.shape)).encode() + (mask > 0).tobytes())
    return found.hexdigest()


# Faults ---------------------------------------------------------------------------------------------------------------


def kill_at_random(faults: Faults, kills: int, on_disk: bool) -> Fault:
    """kill -9, again and again, until there were enough; the run is started again each time.

    A sample that was stored before and is done again counts as differing.
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
    """Writes that time out, that are interrupted, and whose response gets lost."""
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
    part = runs.find_one({"label_field": field, "ended": False, "owner.pid": {"$ne": process.pid}})
    os.kill(part["owner"]["pid"], signal.SIGKILL)
    faults.expect_success(process)
    return faults.compare("one of two workers killed", 1, field)


def fill_disk(faults: Faults) -> Fault | None:
    """A small tmpfs; mounting it requires root."""
    field, folder = faults.field(), faults.folder / "small-masks"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        process = faults.start(field, True, folder)
        process.join()
        if not process.exitcode:
            raise RuntimeError("The disk was not full: more scenes are needed")
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
        raise RuntimeError("A second run was let into the field")
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
    shutil.rmtree(folder / str(faults.dataset._doc.id))  # of labels that are deleted; nobody can know of copies
    faults.finish(field, True, folder)
    result = faults.compare("the field deleted by someone else", 1, field, folder=folder.name)
    result.differing += left
    return result


def delete_samples(faults: Faults, times: int = 5) -> Fault:
    """Last, as they are gone then, and with them what refers to their masks of other fields."""
    field, folder = faults.field(), "masks-of-deleted"
    process = faults.start(field, True, faults.folder / folder)
    faults.wait_until_stored(field, 0.2, process)
    # Files of samples that are deleted after their masks were stored would stay: copies may refer to them.
    last = faults.dataset._sample_collection.find({}, {"_id": True}).sort("_id", -1).limit(times)
    ids = [document["_id"] for document in last]
    faults.dataset._sample_collection.delete_many({"_id": {"$in": ids}})
    faults.expect_success(process)
    return faults.compare("samples deleted by someone else", len(ids), field, len(ids), folder)


def inject(scenes: int, kills: int, show: Callable[[Fault], None]) -> list[Fault]:
    """Runs all faults."""
    found = []
    with temporary_faults(scenes) as faults:
        steps: list[Callable[[], Fault | None]] = [
            lambda: kill_at_random(faults, kills // 2, on_disk=False),
            lambda: kill_at_random(faults, kills - kills // 2, on_disk=True),
            lambda: interrupt_twice(faults),
            lambda: restart_database(faults, signal.SIGTERM, "the database stopped, and started 3 s later"),
            lambda: restart_database(faults, signal.SIGKILL, "the database killed, and started 3 s later"),
            lambda: lose_writes(faults),
            lambda: kill_worker(faults),
            lambda: fill_disk(faults),
            lambda: run_twice_at_once(faults),
            lambda: delete_field(faults),
            lambda: delete_samples(faults),
        ]
        for step in steps:
            if (fault := step()) is None:
                print("(A full disk takes root: it needs a small file system.)", file=sys.stderr)
            else:
                show(fault)
                found.append(fault)
    return found


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
    found = inject(
        args.scenes,
        args.kills,
        lambda f: print(f"| {f.name} | {f.injected} | {f.lost} | {f.differing} | {f.orphans} |", flush=True),
    )
    return 0 if all(fault.is_harmless for fault in found) else 1


if __name__ == "__main__":
    sys.exit(main())
