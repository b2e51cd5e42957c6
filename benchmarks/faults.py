"""Checks that runs lose nothing when processes are killed, the database fails, disks fill up or others interfere.

    python benchmarks/faults.py

Prints how often each kind of fault was injected, and what was lost. After each fault, the same run is repeated until it
completes, and the dataset is compared with the result of a run without faults.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from fault_setting import Fault, Faults, Setting, temporary_faults, train_once
from mongoengine.errors import FieldDoesNotExist
from pymongo import MongoClient
from safetensors.torch import load_file

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
    process = faults.start(field, True, cluster="local", workers=2)
    faults.wait_until_stored(field, 0.3, process)
    runs = MongoClient(faults.database.uri)["faults"]["mobilesamv2.runs"]
    shard = runs.find_one({"label_field": field, "ended": False, "owner.pid": {"$ne": process.pid}})
    os.kill(shard["owner"]["pid"], signal.SIGKILL)
    faults.expect_success(process)
    return faults.compare("one of two workers killed", 1, field)


def kill_raylet(faults: Faults) -> Fault:
    """Kills Ray's own process on this machine. The run must end with an error within a minute."""
    field = faults.field()
    process = faults.start(field, True, cluster="local", workers=2)
    faults.wait_until_stored(field, 0.3, process)
    (raylet,) = (child for child in psutil.Process(process.pid).children() if child.name() == "raylet")
    raylet.kill()
    process.join(60)
    if not process.exitcode:
        raise RuntimeError("A run does not end when Ray's process is killed")
    wrong = faults.check_partial(field)
    faults.expect_success(faults.start(field, True, cluster="local", workers=2))
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


def kill_training(faults: Faults, part: str, kills: int = 5) -> Fault:
    """Kills trainings at random moments and repeats them until they complete; compares tensors instead of samples."""
    folder = faults.folder / "trained"
    start = time.perf_counter()
    faults.expect_success(faults.start_process(train_once, part, str(folder / f"{part}-whole")))
    seconds = time.perf_counter() - start
    wanted = trained_tensors(folder / f"{part}-whole")
    injected = lost = differing = orphans = number = 0
    while injected < kills:
        number += 1
        target = folder / f"{part}-{number}"
        while True:
            process = faults.start_process(train_once, part, str(target))
            process.join(faults.random.uniform(seconds / 4, seconds) if injected < kills else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            injected += 1
        if not (target / "config.json").exists() or process.exitcode == 0:
            faults.expect_success(process)
        found = trained_tensors(target)
        lost += len(wanted.keys() - found.keys())
        differing += sum(name in found and found[name] != content for name, content in wanted.items())
        names = {path.name for path in (folder / f"{part}-whole").iterdir()}
        orphans += len({path.name for path in target.iterdir()} - names)
    return Fault(f"kill -9 at random moments of a training ({part}); tensors", injected, lost, differing, orphans)


def trained_tensors(folder: Path) -> dict[str, bytes]:
    """File and name -> content of each tensor of a trained model."""
    return {
        f"{path.name} {name}": tensor.numpy().tobytes()
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


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


def suspend(faults: Faults, replace: bool, times: int = 3) -> Fault:
    """Suspends runs until another one considers them dead and completes the work, and then continues them."""
    field, setting = faults.field(), Setting(max_silence=4)
    for number in range(times):
        if replace and not number:
            faults.finish(field, True)
        elif not replace:
            field = faults.field()
        faults.replaced.update(faults.mask_paths(field))
        old = faults.marks(field)
        suspended = faults.start(field, True, setting=setting, replace=replace)
        faults.wait_until_stored(field, (number + 1) / (times + 2), suspended, old)
        time.sleep(faults.random.uniform(0, 0.3))  # so that it is suspended at different places
        os.kill(suspended.pid, signal.SIGSTOP)
        faults.replaced.update(faults.mask_paths(field))
        time.sleep(setting.max_silence + 1)
        other = faults.start(field, True, setting=setting, replace=replace)
        other.join()
        stored = faults.ids(field)
        os.kill(suspended.pid, signal.SIGCONT)
        suspended.join()
        faults.expect_success(other)
        if not suspended.exitcode:
            raise RuntimeError("A run that another one has taken over did not end with an error")
        if stored != faults.ids(field):
            raise RuntimeError("A run that another one has taken over replaced its labels")
    name = "suspended, taken over by another run, and continued" + (", while replacing labels" if replace else "")
    return faults.compare(name, times, field)


def unequal_clocks(faults: Faults) -> Fault:
    """Replaces labels on one machine, is killed, and goes on on another machine, whose clock is two hours behind."""
    field = faults.field()
    faults.finish(field, False)
    old = faults.ids(field)
    process = faults.start(field, False, setting=Setting(clock=3600), replace=True)
    faults.wait_until_stored(field, 0.4, process, faults.marks(field))
    process.kill()
    process.join()
    half = {id: label for id, label in faults.ids(field).items() if old.get(id) != label}
    faults.finish(field, False, setting=Setting(clock=-3600), replace=True)
    new = faults.ids(field)
    result = faults.compare("killed while replacing labels, continued with another clock", 1, field)
    result.differing += len(old.items() & new.items()) + len(half.items() - new.items())
    return result


def leave_zombie(faults: Faults) -> Fault:
    """Kills a run whose parent does not ask for its exit status."""
    field = faults.field()
    script = f"import fault_setting as f; f.run_once({faults.dataset.name!r}, {field!r}, True, "
    script += f"{str(faults.folder / 'masks')!r}, f.Setting(), {{}})"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=os.path.dirname(__file__), stderr=subprocess.DEVNULL)
    while faults.dataset._sample_collection.count_documents({field: {"$ne": None}}) < 0.3 * len(faults.reference):
        if process.poll() is not None:
            raise RuntimeError("A run ended before a fault could be injected")
        time.sleep(0.01)
    process.kill()
    faults.finish(field, True)
    if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        raise RuntimeError("The killed process is no zombie")
    process.wait()
    return faults.compare("killed, and left as a zombie", 1, field)


def kill_scheduled_worker(faults: Faults) -> Fault:
    """Kills one of two processes that work on the shards of one run, and repeats its shard, as `delegated rerun`."""
    from fiftyone_mobilesamv2.runs.record import recorded_runs
    from fiftyone_mobilesamv2.runs.shards import Shard

    field = faults.field()
    shards = [Shard(index, 2, f"group of {field}") for index in range(2)]
    first, second = (faults.start(field, True, shard=shard) for shard in shards)
    faults.wait_until_stored(field, 0.3, first)
    first.kill()
    first.join()
    faults.expect_success(second)
    faults.finish(field, True, shard=shards[0])
    result = faults.compare("the worker of a scheduled part killed, the part repeated", 1, field)
    faults.dataset.reload()
    (run,) = recorded_runs(faults.dataset, field)
    result.differing += abs(run.images - len(faults.reference)) + run.cancelled
    return result


def change_schema_at_once(faults: Faults, times: int = 5) -> Fault:
    """Runs, evaluations and measurements add their fields at the same time; all samples must load afterwards."""
    faults.dataset.clone_sample_field("reference", "objects")
    lost = 0
    for number in range(times):
        copy, keys = f"copy_{number}", [f"key_{number}_{each}" for each in range(2)]
        faults.dataset.clone_sample_field("reference", copy)
        field = faults.field()
        processes = [faults.start(field, False), faults.start_process(_measure_coverage, copy)]
        processes += [faults.start_process(_evaluate, key) for key in keys]
        for process in processes:
            faults.expect_success(process)
        faults.dataset.reload()
        for id in faults.reference:
            try:
                sample = faults.dataset[id]
                lost += any(sample[name] is None for name in (f"{copy}_objects", *(f"{key}_tp" for key in keys)))
            except (AttributeError, KeyError, FieldDoesNotExist):
                lost += 1
    result = faults.compare("a run, two evaluations and a measurement at once", times, field)
    result.lost += lost
    return result


def _evaluate(dataset: str, key: str) -> None:
    import fiftyone as fo

    from fiftyone_mobilesamv2.evaluation.proposals import evaluate_proposals

    evaluate_proposals(fo.load_dataset(dataset), "reference", "objects", key, progress=False)


def _measure_coverage(dataset: str, field: str) -> None:
    import fiftyone as fo

    from fiftyone_mobilesamv2.curation.coverage import image_coverage

    image_coverage(fo.load_dataset(dataset), field, progress=False)


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
            lambda: suspend(faults, replace=False),
            lambda: suspend(faults, replace=True),
            lambda: unequal_clocks(faults),
            lambda: leave_zombie(faults),
            lambda: kill_scheduled_worker(faults),
            lambda: change_schema_at_once(faults),
            lambda: delete_field(faults),
            lambda: delete_samples(faults),
            lambda: kill_training(faults, "discovery"),
            lambda: kill_training(faults, "masks"),
        ]
        for step in steps:
            if (fault := step()) is None:
                print("(Skipped a full disk: mounting a small file system requires root.)", file=sys.stderr)
            else:
                show(fault)
                faults_shown.append(fault)
    return faults_shown


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
