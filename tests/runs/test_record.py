"""The record of runs, and how it keeps concurrent runs apart."""

import hashlib
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import fiftyone as fo
import fiftyone.core.odm as foo
import psutil
import pytest
from gridfs import GridFS
from PIL import Image

from fiftyone_mobilesamv2 import zoo
from fiftyone_mobilesamv2.errors import Cancelled, Failure, FieldBusyError
from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.runs import claims, liveness, plan
from fiftyone_mobilesamv2.runs import record as segmentation_runs
from fiftyone_mobilesamv2.runs.claims import on_record
from fiftyone_mobilesamv2.runs.record import SegmentationRun, failed_samples, recorded_runs
from fiftyone_mobilesamv2.runs.segment import segment_everything
from fiftyone_mobilesamv2.runs.shards import Shard
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

PARAMETERS = {"name": "x", "prompting": "object_aware"}


@pytest.fixture
def labeled(dataset):
    dataset.add_sample(fo.Sample("image.png", own=fo.Detections()))
    return dataset


@pytest.fixture
def images(dataset, tmp_path):
    for index in range(3):
        Image.fromarray(make_scene(TEST_SEED, index).image).save(tmp_path / f"{index}.png")
        dataset.add_sample(fo.Sample(str(tmp_path / f"{index}.png")))
    return dataset


@pytest.fixture
def model():
    return zoo.load_model("mobilesamv2-demo-torch", device="cpu")


def run(**values):
    return SegmentationRun("own", PARAMETERS, images=1, **values)


def shard_run(index, count=3, group="g"):
    return run(shard=Shard(index, count, group))


def owned_by(dataset, other, **owner):
    """Records `other` as a run in progress in another process, by default on this machine."""
    claims._claim(dataset, other)
    change = {f"owner.{name}": value for name, value in owner.items()}
    segmentation_runs.collection().update_one({"run.run_id": other.run_id}, {"$set": change})


@pytest.fixture
def living():
    """A process that idles until the test ends."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield {"pid": process.pid, "started": liveness._started(process.pid)}
        process.kill()


def start(dataset, started):
    with on_record(dataset, started):
        return recorded_runs(dataset, "own")


def test_end_is_recorded_after_the_heartbeat_stopped(labeled, monkeypatch):
    # The heartbeat may stop between the end of the run and the check whether it is still beating.
    monkeypatch.setattr(claims, "_heartbeat", lambda *_: None)
    start(labeled, run())
    (ended,) = recorded_runs(labeled, "own")
    assert not ended.cancelled and ended.seconds["total"] > 0


def test_second_run_into_the_same_field_is_refused(labeled, living):
    first = run()
    owned_by(labeled, first, **living)
    with pytest.raises(FieldBusyError, match=f"storing masks in 'own'.* by process {living['pid']} on") as caught:
        start(labeled, run())
    assert first.started in str(caught.value)
    assert [each.run_id for each in recorded_runs(labeled, "own")] == [first.run_id]
    other_field = SegmentationRun("other", PARAMETERS)
    with on_record(labeled, other_field):
        pass


def test_run_of_a_dead_process_does_not_block_the_field(labeled, living):
    first, second = run(), run()
    # Another process may have the same ID by now.
    owned_by(labeled, first, **living | {"started": "1"})
    assert [each.run_id for each in start(labeled, second)] == [first.run_id, second.run_id]
    assert [each.cancelled for each in recorded_runs(labeled, "own")] == [True, False]


def test_silent_run_of_a_living_process_does_not_block_the_field(labeled, living):
    """Its process, an App or a notebook, goes on, but the database was away when it ended."""
    silent = run()
    owned_by(labeled, silent, **living)
    silence = timedelta(seconds=361)
    now = liveness.server_time()
    for seen, is_busy in ((now - silence + timedelta(seconds=20), True), (now - silence, False)):
        segmentation_runs.collection().update_one({"run.run_id": silent.run_id}, {"$set": {"seen": seen}})
        if is_busy:
            with pytest.raises(FieldBusyError):
                start(labeled, run())
        else:
            start(labeled, run())
    # It was only suspended: it learns that it must stop.
    with pytest.raises(FieldBusyError, match="another run has taken over"):
        claims.check_claim(labeled, silent)


def test_zombie_does_not_block_the_field(labeled):
    """A worker that was killed, whose parent has not asked for its exit status."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owned_by(labeled, run(), pid=process.pid, started=liveness._started(process.pid))
        with pytest.raises(FieldBusyError):
            start(labeled, run())
        process.kill()
        while (state := Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z":
            assert state in "RSD"
        start(labeled, run())


def test_clock_changes_do_not_let_a_second_run_in(labeled, living, monkeypatch):
    """psutil computes start times from the time of the last boot, which changes when the clock is set."""
    owned_by(labeled, run(), **living)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 0.0)
    with pytest.raises(FieldBusyError):
        start(labeled, run())


@pytest.mark.parametrize("place", ["_claim", "_heartbeat", "write"])
def test_interrupted_run_does_not_block_the_field(labeled, monkeypatch, place):
    """In a notebook, the process continues after Ctrl-C, so its field must become free."""
    before = threading.active_count()
    original = getattr(claims, place)

    def interrupt(*args):
        if place != "_heartbeat":
            original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(claims, place, interrupt)
        patch.setattr(threading, "excepthook", lambda args: None)
        if place == "_heartbeat":
            start(labeled, run())
        else:
            with pytest.raises(KeyboardInterrupt):
                start(labeled, run())
    start(labeled, run())
    assert threading.active_count() == before


def test_run_on_another_machine_is_dead_without_heartbeats(labeled):
    owned_by(labeled, run(), host="elsewhere", machine="elsewhere")
    with pytest.raises(FieldBusyError, match="on elsewhere"):
        start(labeled, run())
    (document,) = segmentation_runs.collection().find({"owner.host": "elsewhere"})
    seen = document["seen"] - timedelta(seconds=361)
    segmentation_runs.collection().update_one({"_id": document["_id"]}, {"$set": {"seen": seen}})
    assert len(start(labeled, run())) == 2


def test_shards_of_one_run_may_run_at_the_same_time(labeled, living):
    owned_by(labeled, shard_run(0), **living)
    start(labeled, shard_run(1))
    with pytest.raises(FieldBusyError):
        start(labeled, shard_run(0))
    with pytest.raises(FieldBusyError):
        start(labeled, shard_run(1, group="another"))
    with pytest.raises(FieldBusyError):
        start(labeled, run())


def test_only_one_of_many_simultaneous_runs_starts(labeled):
    barrier, ready, outcomes = threading.Barrier(8), threading.Event(), []

    def begin():
        barrier.wait()
        try:
            with on_record(labeled, run()):
                outcomes.append("in")
                ready.wait(60)
        except FieldBusyError:
            outcomes.append("out")
        if len(outcomes) == 8:
            ready.set()

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in"] + ["out"] * 7


def test_shards_are_reported_as_one_run(labeled):
    failures = [Failure("a" * 24, "a.png", "why")]
    parts = [shard_run(0), shard_run(1), shard_run(1), shard_run(2)]
    parts[1].failures, parts[1].num_failures = failures, 1
    parts[3].images = 0  # no sample belongs to this shard
    for each, started in zip(parts, ("10:00:00", "10:00:05", "10:00:20", "10:00:30")):
        each.started = f"2026-01-01T{started}+00:00"
        each.seconds = {"encode": 2.0}
        each.objects = 5
        with on_record(labeled, each):
            each.cancelled = False
        each.cancelled = each is parts[1]  # this run was cancelled
        each.seconds["total"] = 7.0
        segmentation_runs.write(labeled, "own", each, {})
        (merged,) = recorded_runs(labeled, "own")
        assert merged.failures == (failures if each is parts[1] else [])  # the next run processed the image again
        assert merged.cancelled == (each is not parts[3])
    assert (merged.images, merged.objects, merged.failures, merged.num_failures) == (2, 20, [], 0)
    assert merged.seconds == {"encode": 8.0, "total": 37.0}
    assert merged.started == parts[0].started and merged.run_id == "g" and merged.shard is None


def test_record_contains_model_parameters_and_weights(images, model):
    segment_everything(images, model, "own")
    (found,) = recorded_runs(images, "own")
    sha256 = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(PACKAGED_WEIGHTS).iterdir()}
    assert found.parameters["weights"] == {
        "encoder_checkpoint": sha256["demo_sam.safetensors"],
        "decoder_checkpoint": sha256["demo_sam.safetensors"],
        "detector_checkpoint": sha256["demo_detector.safetensors"],
    }
    assert found.parameters["name"] == "mobilesamv2-demo-torch" and found.parameters["max_prompts"] == 320
    assert (found.images, found.objects) == (3, images.count("own.detections")) and not found.cancelled
    # FiftyOne's own API gives the same record.
    (copy,) = images.load_run_results("mobilesamv2_own").runs
    assert copy["run_id"] == found.run_id and copy["parameters"] == found.parameters


def test_other_weights_are_refused(images, model, tmp_path):
    segment_everything(images.limit(1), model, "own")
    from safetensors.torch import load_file, save_file

    path = Path(PACKAGED_WEIGHTS) / "demo_sam.safetensors"
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    same.write_bytes(path.read_bytes())
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] += 1
    save_file(tensors, other)
    with pytest.raises(ValueError, match=r"other parameters \(weights "):
        segment_everything(
            images, zoo.load_model(model.config.name, device="cpu", encoder_checkpoint=str(other)), "own"
        )
    moved = zoo.load_model(model.config.name, device="cpu", encoder_checkpoint=str(same))
    assert segment_everything(images, moved, "own").images == 2


def test_failed_samples_can_be_retried(images, model, tmp_path):
    for name in ("first.png", "second.png"):
        images.add_sample(fo.Sample(str(tmp_path / name)))
    assert len(failed_samples(images, "own")) == 0
    found = segment_everything(images, model, "own")
    assert found.num_failures == len(found.failures) == 2
    failed = failed_samples(images, "own")
    first, second = (str(tmp_path / name) for name in ("first.png", "second.png"))
    assert failed.values("filepath") == [first, second]
    Image.fromarray(make_scene(TEST_SEED, 0).image).save(first)
    again = segment_everything(failed, model, "own")
    assert (again.images, again.num_failures) == (2, 1)
    assert failed_samples(images, "own").values("filepath") == [second]
    assert images[first].own.detections


def test_record_limits_the_number_of_failures(labeled, monkeypatch):
    monkeypatch.setattr(segmentation_runs, "_MAX_FAILURES", 3)
    many = [Failure(f"{i:024x}", f"{i}.png", "why") for i in range(5)]
    (found,) = start(labeled, run(failures=many, num_failures=5))
    assert found.failures == many[:3] and found.num_failures == 5


def test_clone_keeps_the_record_and_adds_to_it(labeled):
    first, second, third = run(), run(), run()
    start(labeled, first)
    clone = labeled.clone()
    try:
        assert [each.run_id for each in recorded_runs(clone, "own")] == [first.run_id]
        start(clone, second)
        start(labeled, third)
        assert [each.run_id for each in recorded_runs(clone, "own")] == [first.run_id, second.run_id]
        assert [each.run_id for each in recorded_runs(labeled, "own")] == [first.run_id, third.run_id]
        (copy,) = [clone.load_run_results(key, cache=False).runs for key in clone.list_runs()]
        assert [each["run_id"] for each in copy] == [first.run_id, second.run_id]
    finally:
        clone.delete()


def test_kill_while_fiftyone_saves_its_copy(labeled):
    start(labeled, run())
    document = foo.get_db_conn().runs.find_one({"_id": labeled._doc.runs["mobilesamv2_own"].id})
    GridFS(foo.get_db_conn()).delete(document["results"])
    labeled.reload()
    assert len(recorded_runs(labeled, "own")) == 1
    assert segmentation_runs._copied(labeled) == []  # a clone would have only this copy
    start(labeled, run())
    assert len(labeled.load_run_results("mobilesamv2_own", cache=False).runs) == 2


def test_cancelled_replacement_can_be_continued(images, model):
    images.add_samples([fo.Sample(path) for path in images.values("filepath")], progress=False)
    segment_everything(images, model, "own")
    old = images.values("own.detections.id")
    time.sleep(1.1)  # IDs contain the time in seconds
    other = zoo.load_model("mobilesamv2-demo-torch", device="cpu", max_masks=3)

    def stop(bar):
        if bar.iteration >= 2:
            raise Cancelled

    stopped = segment_everything(images, other, "own", replace=True, batch_size=1, progress=stop)
    assert (stopped.cancelled, stopped.images) == (True, 2)
    half = images.values("own.detections.id")
    assert half[2:] == old[2:] and all(len(ids) == 3 for ids in half[:2])
    # Neither model may continue in a field that mixes both.
    for each in (model, other):
        with pytest.raises(ValueError, match="made with other parameters"):
            segment_everything(images, each, "own")
    again = segment_everything(images, other, "own", replace=True, batch_size=1)
    assert (again.cancelled, again.images) == (False, 4)
    whole = images.values("own.detections.id")
    assert whole[:2] == half[:2] and all(len(ids) == 3 for ids in whole)
    assert segment_everything(images, other, "own", replace=True).images == 6  # the previous replacement is complete


def test_records_of_deleted_datasets_are_removed(labeled):
    other = fo.Dataset()
    other.add_sample(fo.Sample("image.png", own=fo.Detections()))
    start(other, run())
    other_id = other._doc.id
    other.delete()
    start(labeled, run())
    assert segmentation_runs.collection().count_documents({"dataset_id": other_id}) == 0


def test_run_of_this_process_counts_as_alive(labeled):
    with on_record(labeled, run()):
        (document,) = segmentation_runs.collection().find({"dataset_id": labeled._doc.id})
        assert document["owner"]["host"] == socket.gethostname()
        assert liveness.is_alive(document, document["seen"])


def test_parameter_unknown_to_an_earlier_run_counts_as_its_default():
    now = {"iou": 0.9, "max_masks": None, "weights": {"encoder": "a"}}
    assert plan._changed({"weights": {"encoder": "a"}}, now) == []
    assert plan._changed({"iou": 0.8, "weights": {"encoder": "b"}}, now) == [
        "iou 0.8 then, 0.9 now",
        "weights {'encoder': 'b'} then, {'encoder': 'a'} now",
    ]
