"""Work spread over a Ray cluster of two processes on this machine: the same results as one process has."""

import contextlib
import os
import signal
import sys
import threading
import time

import fiftyone as fo
import numpy as np
import psutil
import pytest
import ray
import torch
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fiftyone_mobilesamv2 import evaluate_proposals, zoo
from fiftyone_mobilesamv2.errors import Cancelled, CheckpointError
from fiftyone_mobilesamv2.labels import mask_files
from fiftyone_mobilesamv2.runs import cluster, pipeline
from fiftyone_mobilesamv2.runs import record as segmentation_runs
from fiftyone_mobilesamv2.runs import retry as database
from fiftyone_mobilesamv2.runs.segment import segment_everything
from fiftyone_mobilesamv2.runs.shards import Shard
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

CONFIG = {"name": "mobilesamv2-demo-torch", "device": "cpu"}
COUNT = 40


def start_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)


@pytest.fixture(scope="module")
def two_processes(mongod):
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture
def no_ray(two_processes):
    """Without a cluster in this process, so that `cluster="local"` starts one."""
    ray.shutdown()
    yield
    start_ray()


@pytest.fixture(scope="module")
def one_thread():
    """As workers have: sums in another order differ in their last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def template(mongod, one_thread, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    template = fo.Dataset("cluster-template")
    for index in range(COUNT):
        path = folder / f"{index}.png"
        Image.fromarray(make_scene(TEST_SEED, index % 8).image).save(path)
        template.add_sample(fo.Sample(str(path)))
    template.compute_metadata(progress=False)
    segment_everything(template, zoo.load_model(**CONFIG), "reference", progress=False)
    yield template
    template.delete()


@pytest.fixture
def scenes(two_processes, template):
    """Scenes, and what one process finds in them, in `reference`."""
    copy = template.clone()
    yield copy
    copy.delete()


def config(**parameters):
    return zoo.MobileSAMv2ModelConfig({**CONFIG, **parameters})


def labels(dataset, field):
    """Without ids, in the order of the samples."""
    found = []
    for detections in dataset.values(f"{field}.detections"):
        found.append([(d.bounding_box, d.confidence, d.predicted_iou, d.get_mask().tobytes()) for d in detections])
    return found


def kill_a_worker(dataset, field):
    """As soon as it has stored something."""
    collection = segmentation_runs.collection()
    while True:
        running = list(collection.find({"label_field": field, "ended": False, "dataset_id": dataset._doc.id}))
        if running and dataset._sample_collection.count_documents({field: {"$ne": None}}) >= 3:
            os.kill(running[0]["owner"]["pid"], signal.SIGKILL)
            return running[0]["run"]["shard"]["index"]
        time.sleep(0.01)


@pytest.mark.slow
def test_worker_that_is_killed_midway(scenes, tmp_path):
    killed = []
    killer = threading.Thread(target=lambda: killed.append(kill_a_worker(scenes, "own")), daemon=True)
    killer.start()
    bars = []
    run = segment_everything(
        scenes,
        config(masks_on_disk=True, mask_dir=str(tmp_path / "masks")),
        "own",
        batch_size=1,
        cluster="auto",
        workers=2,
        progress=lambda bar: bars.append(bar.iteration),
    )
    killer.join()
    assert labels(scenes, "own") == labels(scenes, "reference")
    assert run.failures == [] and not run.cancelled
    # What the killed one did after its last sign of life is not on record.
    assert COUNT - 10 < run.images <= COUNT and run.objects <= scenes.count("own.detections")
    assert bars[-1] == COUNT and bars == sorted(bars)
    # Nothing that the worker had stored was done again, and nothing of what it had not is left behind.
    (recorded,) = segmentation_runs.recorded_runs(scenes, "own")
    assert recorded == run
    (results,) = [scenes.load_run_results(key).runs for key in scenes.list_runs(label_field="own")]
    parts = [each for each in results if each["shard"]["index"] == killed[0]]
    assert [each["cancelled"] for each in parts] == [True, False]
    files = {str(path) for path in (tmp_path / "masks").rglob("*") if path.is_file()}
    assert files == set(scenes.values("own.detections.mask_path", unwind=True))


def kill_the_raylet(dataset, field, killed, noticed):
    """Kills Ray's own process on this machine as soon as something is stored, and appends the time to `killed`.

    Its workers go on, and would be done before a cluster notices it: they get a tenth of the time until it is noticed.
    """
    while dataset._sample_collection.count_documents({field: {"$ne": None}}) < 3:
        time.sleep(0.01)
    (raylet,) = (child for child in psutil.Process().children() if child.name() == "raylet")
    workers = raylet.children()
    raylet.kill()
    killed.append(time.monotonic())
    while not noticed.is_set():
        for action, seconds in ((psutil.Process.suspend, 0.45), (psutil.Process.resume, 0.05)):
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    action(worker)
            time.sleep(seconds)


@pytest.mark.slow
def test_raylet_that_is_killed_midway(no_ray, template, tmp_path):
    scenes = template.clone()
    killed, noticed = [], threading.Event()
    killer = threading.Thread(target=kill_the_raylet, args=(scenes, "own", killed, noticed), daemon=True)
    killer.start()

    def segment():
        parameters = config(masks_on_disk=True, mask_dir=str(tmp_path / "masks"))
        return segment_everything(scenes, parameters, "own", batch_size=1, cluster="local", workers=2, progress=False)

    with pytest.raises(cluster.ClusterError, match=r"raylet, has ended.*Repeat the same call"):
        segment()
    assert time.monotonic() - killed[0] < 60
    noticed.set()
    killer.join()
    stored = scenes.select(scenes.match(fo.ViewField("own") != None).values("id"))  # noqa: E711
    assert 3 <= len(stored) < COUNT
    ids = stored.values("own.detections.id", unwind=True)
    assert segment().images == COUNT - len(stored)
    assert stored.values("own.detections.id", unwind=True) == ids
    assert labels(scenes, "own") == labels(scenes, "reference")
    files = {str(path) for path in (tmp_path / "masks").rglob("*") if path.is_file()}
    assert files == set(scenes.values("own.detections.mask_path", unwind=True))
    scenes.delete()


@pytest.mark.slow
def test_workers_find_trained_models(scenes, model_zoo, make_trained):
    """By their name, in the folder of this process's configuration, which the workers did not inherit."""
    make_trained(model_zoo / "mobilesamv2" / "trained" / "my-cells")
    run = segment_everything(scenes, config(name="my-cells"), "own", cluster="auto", progress=False)
    assert (run.images, run.num_failures) == (COUNT, 0) and run.parameters["name"] == "my-cells"
    confidences = [
        np.max(scenes.values(f"{field}.detections.confidence", unwind=True)) for field in ("own", "reference")
    ]
    assert confidences[0] > confidences[1]


def test_view_and_second_run(scenes):
    view = scenes.match(fo.ViewField("filepath").ends_with("0.png"))
    run = segment_everything(view, config(), "own", cluster="auto", workers=2, progress=False)
    assert run.images == len(view) == 4 and not run.cancelled
    assert [found is not None for found in scenes.values("own")] == [i % 10 == 0 for i in range(COUNT)]
    ids = view.values("own.detections.id", unwind=True)
    run = segment_everything(scenes, config(), "own", cluster="auto", workers=2, progress=False)
    assert run.images == COUNT - 4 and view.values("own.detections.id", unwind=True) == ids
    assert labels(scenes, "own") == labels(scenes, "reference")
    run = segment_everything(scenes, config(), "own", cluster="auto", progress=False)
    assert (run.images, run.cancelled) == (0, False)


@pytest.mark.slow
def test_nothing_to_do_but_to_settle(scenes, tmp_path, monkeypatch):
    """The driver was killed after everything had been stored, and before that was noted."""
    on_disk = config(masks_on_disk=True, mask_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(mask_files.MaskFiles, "confirm", lambda files: None)
        patch.setattr(pipeline, "settle", lambda *args: 0)
        segment_everything(scenes, on_disk, "own", progress=False)
    assert len(list(tmp_path.glob("*/unconfirmed/*"))) == COUNT
    run = segment_everything(scenes, on_disk, "own", cluster="auto", workers=2, progress=False)
    assert (run.images, run.cancelled) == (0, False)
    files = {str(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == set(scenes.values("own.detections.mask_path", unwind=True))
    assert len(segmentation_runs.recorded_runs(scenes, "own")) == 1


@pytest.mark.slow
def test_errors_of_workers_are_raised_here(scenes):
    nowhere = config(encoder_checkpoint="/nowhere/weights.pt")
    with pytest.raises(CheckpointError, match=r"/nowhere/weights\.pt"):
        segment_everything(scenes, nowhere, "own", cluster="auto", workers=2, progress=False)


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "2"])
def test_workers_that_are_no_number(dataset, workers):
    for work in (
        lambda: segment_everything(dataset, config(), "own", cluster="local", workers=workers),
        lambda: evaluate_proposals(dataset, "own", "reference", cluster="local", workers=workers),
    ):
        with pytest.raises(ValueError, match="workers must be a whole number of at least 1, not "):
            work()


def test_workers_of_no_cluster(dataset):
    for work in (
        lambda: segment_everything(dataset, config(), "own", workers=2),
        lambda: evaluate_proposals(dataset, "own", "reference", workers=2),
    ):
        with pytest.raises(ValueError, match="workers requires a cluster, such as cluster='local'"):
            work()


@pytest.mark.slow
def test_cancelled(scenes):
    def cancel(bar):
        if bar.iteration:
            raise Cancelled

    run = segment_everything(scenes, config(), "own", batch_size=1, cluster="auto", workers=2, progress=cancel)
    assert run.cancelled and 0 < run.images < COUNT
    stored = scenes.match(fo.ViewField("own") != None)  # noqa: E711
    assert labels(stored, "own") == labels(stored, "reference")
    segment_everything(scenes, config(), "own", progress=False)
    assert labels(scenes, "own") == labels(scenes, "reference")


@pytest.mark.slow
def test_evaluation_is_the_same(scenes):
    scenes.clone_sample_field("reference", "ground_truth")
    for sample in scenes.iter_samples(autosave=True):
        sample.ground_truth.detections = sample.ground_truth.detections[1:]
        for detection in sample.ground_truth.detections[::2]:
            x, y, w, h = detection.bounding_box
            detection.bounding_box = [x + w / 5, y, w, h]
    broken = scenes.skip(5).first()
    broken.ground_truth.detections[0].bounding_box = [0, 0, 0, 0]
    broken.save()
    kinds = {"use_masks": False, "ks": (1, 5, 100)}
    alone = evaluate_proposals(scenes, "reference", eval_key="alone", progress=False, **kinds)
    spread = evaluate_proposals(
        scenes, "reference", eval_key="spread", progress=False, cluster="auto", workers=2, **kinds
    )
    assert spread.metrics() == alone.metrics() and 0.2 < alone.metrics()["AR@100"] < 0.95
    assert spread.skipped == alone.skipped and [each["id"] for each in alone.skipped] == [broken.id]
    assert (spread.ytrue == alone.ytrue).all() and (spread.ytrue_ids == alone.ytrue_ids).all()
    assert (spread.ypred_ids == alone.ypred_ids).all()
    for name in ("", "_iou", "_rank", "_id"):
        path = "ground_truth.detections.{}" + name
        assert scenes.values(path.format("alone")) == scenes.values(path.format("spread"))


def test_without_ray(dataset, tmp_path, monkeypatch):
    dataset.add_sample(fo.Sample(str(tmp_path / "image.png")))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(cluster.ClusterError, match=r"pip install 'fiftyone-mobilesamv2\[ray\]'"):
        segment_everything(dataset, config(), "own", cluster="auto")


@given(
    st.integers(1, 50),
    st.integers(0, 2**24 - 1),
    st.integers(1, 9),
)
def test_every_sample_belongs_to_one_part(count, first, step):
    """Ids of samples that were added one after the other, with labels between them, are spread evenly."""
    ids = [f"{'0' * 18}{(first + i * step) % 2**24:06x}" for i in range(20 * count)]
    parts = [Shard(index, count, "x") for index in range(count)]
    owners = [[part.index for part in parts if part.has(id)] for id in ids]
    assert all(len(owner) == 1 for owner in owners)
    sizes = [sum(owner == [part.index] for owner in owners) for part in parts]
    assert max(sizes) <= 2 * 20 and min(sizes) >= 5


@pytest.mark.parametrize("most", [database.MAX_IDS, 0])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_the_database_agrees_on_parts(dataset, monkeypatch, count, most):
    monkeypatch.setattr(database, "MAX_IDS", most)
    dataset.add_samples([fo.Sample(f"{i}.png", _id=ObjectId()) for i in range(200)], progress=False)
    for index in range(count):
        part = Shard(index, count, "x")
        assert part.of(dataset).values("id") == [id for id in dataset.values("id") if part.has(id)]


@pytest.mark.parametrize("index, count", [(-1, 2), (2, 2), (0, 0), (0, 10_001)])
def test_parts_that_are_none(index, count):
    with pytest.raises(ValueError, match="at most 10,000 shards, numbered from 0"):
        Shard(index, count, "x")
