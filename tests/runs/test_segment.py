"""Concurrent reading, segmenting and storing: the database is correct whatever happens meanwhile."""

import errno
import os
import stat
import threading
import time
from pathlib import Path

import cv2
import fiftyone as fo
import fiftyone.core.utils as fou
import numpy as np
import pytest
from PIL import Image
from pymongo.errors import ExecutionTimeout, OperationFailure, WriteConcernError

from fiftyone_mobilesamv2 import zoo
from fiftyone_mobilesamv2.errors import Cancelled
from fiftyone_mobilesamv2.labels import mask_files
from fiftyone_mobilesamv2.labels.leftovers import settle
from fiftyone_mobilesamv2.runs import pipeline
from fiftyone_mobilesamv2.runs import retry as database
from fiftyone_mobilesamv2.runs.pipeline import unique_images
from fiftyone_mobilesamv2.runs.record import recorded_runs
from fiftyone_mobilesamv2.runs.segment import segment_anything, segment_everything
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene
from fiftyone_mobilesamv2.zoo import reading

MODEL = "mobilesamv2-demo-torch"
COUNT = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for index in range(COUNT):
        Image.fromarray(make_scene(TEST_SEED, index).image).save(folder / f"{index}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture
def images(dataset, files):
    dataset.add_samples([fo.Sample(path) for path in files])
    return dataset


@pytest.fixture
def model():
    return zoo.load_model(MODEL, device="cpu")


@pytest.fixture(autouse=True)
def threads_end():
    before = set(threading.enumerate())
    yield
    assert {t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")} <= before


def stored(dataset, field, with_ids=False):
    """{file name: a dict of attributes for each label, except `run_id`, in the database, with masks as pixel arrays}"""
    labels_by_name = {}
    for document in dataset._sample_collection.find():
        labels = document.get(field)
        labels_by_name[Path(document["filepath"]).name] = labels and [
            {
                name: readable(name, value)
                for name, value in label.items()
                if name != "run_id" and (with_ids or name != "_id")
            }
            for label in labels["detections"]
        ]
        assert labels is None or labels["_cls"] == "Detections"
    return labels_by_name


def readable(name, value):
    if name == "mask_path":
        value = cv2.imread(value, cv2.IMREAD_UNCHANGED)
    elif name == "mask":
        value = fou.deserialize_numpy_array(value)
    return (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else value


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"masks_on_disk": True}, {"min_area": 300, "max_masks": 5}])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_documents_equal_those_of_apply_model(images, tmp_path, settings, batch_size):
    model = zoo.load_model(MODEL, device="cpu", mask_dir=str(tmp_path), **settings)
    images.apply_model(model, "plain", batch_size=batch_size, num_workers=0)
    run = segment_everything(images, model, "own", batch_size=batch_size)
    plain, own = stored(images, "plain"), stored(images, "own")
    assert own == plain and all(own.values())
    assert run.objects == sum(map(len, own.values())) == images.count("own.detections")
    assert len(set(images.values("own.detections.id", unwind=True))) == run.objects
    assert images.first().own.detections[0].predicted_iou == images.first().plain.detections[0].predicted_iou


def test_documents_from_prompts_equal_those_of_apply_model(images, model):
    boxes = [[0.1, 0.1, 0.4, 0.4], [0.5, 0.4, 0.3, 0.5], [0, 0, 0.001, 0.001]]
    for sample in images:
        sample["boxes"] = fo.Detections(
            detections=[fo.Detection(label="box", bounding_box=box, tags=["x"], mood="good") for box in boxes]
        )
        sample["clicks"] = fo.Keypoints(keypoints=[fo.Keypoint(label="click", points=[(0.3, 0.3)], mood="bad")])
        sample.save()
    for prompts in ("boxes", "clicks"):
        images.apply_model(model, f"plain_{prompts}", prompt_field=prompts, num_workers=0)
        segment_anything(images, model, prompts, f"own_{prompts}", batch_size=4)
        own = stored(images, f"own_{prompts}", with_ids=True)
        assert own == stored(images, f"plain_{prompts}", with_ids=True) and all(own.values())


def test_samples_in_memory_are_updated(images, model):
    sample = images.first()
    created = sample.last_modified_at
    segment_everything(images, model, "own")
    assert sample.own.detections and sample.last_modified_at > created
    segment_everything(images.limit(1), model, "own", replace=True)
    assert sample.own.detections[0].id == images.first().own.detections[0].id


def test_slow_writer_slows_the_model(images, model, monkeypatch):
    """At most two batches are read or segmented but not stored yet, and batches are stored in order."""
    segment_all, write = model.segment_all, model.writer.documents
    read, calls = [], []

    def counted_read(path):
        read.append(path)
        return read_image(path)

    def counted_segment_all(items):
        in_database = images._sample_collection.count_documents({"own": {"$ne": None}})
        calls.append((len(read), in_database))
        return segment_all(items)

    def write_slowly(segmentations, files):
        time.sleep(0.5)
        return write(segmentations, files)

    read_image = reading.read_image
    monkeypatch.setattr(reading, "read_image", counted_read)
    monkeypatch.setattr(model, "segment_all", counted_segment_all)
    monkeypatch.setattr(model.writer, "documents", write_slowly)
    segment_everything(images, model, "own", batch_size=1)
    assert len(calls) == COUNT
    for segmented, (num_read, num_stored) in enumerate(calls):
        assert num_read <= segmented + 2
        assert num_stored >= segmented - 1
    times = images.values("last_modified_at")
    assert times == sorted(times) and len(set(times)) == COUNT


@pytest.mark.parametrize("interrupt", [Cancelled, KeyboardInterrupt])
def test_interrupted_run_is_resumed(images, model, interrupt):
    segment_everything(images, model, "reference")

    def stop(bar):
        if bar.iteration >= 4:
            raise interrupt

    try:
        run = segment_everything(images, model, "own", batch_size=2, progress=stop)
    except KeyboardInterrupt:
        (run,) = recorded_runs(images, "own")
    reference, own = stored(images, "reference"), stored(images, "own")
    assert run.cancelled and run.images == 4  # everything already segmented is stored
    assert [own[name] == reference[name] for name in sorted(own)] == [True] * 4 + [False] * 2
    assert [own[name] for name in sorted(own)][4:] == [None, None]
    assert run.objects == sum(len(labels or []) for labels in own.values())
    first = images.first().own.detections[0].id
    assert segment_everything(images, model, "own", batch_size=2).images == 2
    assert stored(images, "own") == reference and images.first().own.detections[0].id == first


@pytest.fixture
def failing(images):
    """Makes commands on the dataset's samples fail, as when the server restarts or is too slow."""
    admin = fo.core.odm.get_db_conn().client.admin

    def fail(mode, **how):
        name = images._sample_collection.full_name
        data = {"namespace": name, **how}
        admin.command("configureFailPoint", "failCommand", mode=mode, data=data)

    try:
        admin.command("configureFailPoint", "failCommand", mode="off")
    except OperationFailure:
        pytest.skip("needs a mongod with enableTestCommands=1")
    yield fail
    admin.command("configureFailPoint", "failCommand", mode="off")


LOST = {
    "the connection, before a write": {"failCommands": ["update"], "closeConnection": True},
    "the answer to a write": {"failCommands": ["update"], "writeConcernError": {"code": 64, "errmsg": "too slow"}},
    "time": {"failCommands": ["update"], "errorCode": 50},
    "a server that shuts down": {"failCommands": ["update"], "errorCode": 11600},
}
# pymongo searches ten seconds for a server that shuts down before it gives up, so once is enough.
TIMES = {"a server that shuts down": 1}


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("lost", LOST)
def test_run_waits_for_the_database(images, failing, tmp_path, monkeypatch, lost, on_disk):
    model = zoo.load_model(MODEL, device="cpu", masks_on_disk=on_disk, mask_dir=str(tmp_path))
    segment_everything(images, model, "reference")
    at_the_fourth_image(model, lambda: failing({"times": TIMES.get(lost, 3)}, **LOST[lost]), monkeypatch)
    run = segment_everything(images, model, "own", batch_size=2)
    assert (run.images, run.failures, run.cancelled) == (COUNT, [], False)
    assert run.objects == images.count("own.detections")
    assert stored(images, "own") == stored(images, "reference")
    assert mask_files_of(tmp_path) == referred_to(images, "own") | referred_to(images, "reference")


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [False, True])
def test_lasting_database_failure_ends_the_run(images, failing, tmp_path, monkeypatch, on_disk):
    monkeypatch.setattr(database, "MAX_WAIT", 1)
    model = zoo.load_model(MODEL, device="cpu", masks_on_disk=on_disk, mask_dir=str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(WriteConcernError, match="too slow"):
        at_the_fourth_image(model, lambda: failing("alwaysOn", **LOST["the answer to a write"]), patch)
        segment_everything(images, model, "own", batch_size=2)
    failing("off")
    own = stored(images, "own")
    assert [own[name] is not None for name in sorted(own)] == [True] * 5 + [False]
    (run,) = recorded_runs(images, "own")
    assert run.cancelled and run.objects == sum(
        len(own[name]) for name in sorted(own)[:3]
    )  # the objects it knows to be stored
    assert segment_everything(images, model, "own", batch_size=2).images == COUNT - 5
    segment_everything(images, model, "reference")
    assert stored(images, "own") == stored(images, "reference")
    assert mask_files_of(tmp_path) == referred_to(images, "own") | referred_to(images, "reference")


def at_the_fourth_image(model, act, monkeypatch, after=False):
    write, calls = model.writer.documents, []

    def write_and_act(segmentations, files):
        calls.append(segmentations)
        if len(calls) == 4 and not after:
            act()
        documents = write(segmentations, files)
        if len(calls) == 4 and after:
            act()
        return documents

    monkeypatch.setattr(model.writer, "documents", write_and_act)


def mask_files_of(folder):
    """All files in a folder of masks, including notes of unconfirmed ones."""
    return {str(path) for path in folder.rglob("*") if path.is_file()}


def referred_to(dataset, field):
    return {path for path in dataset.values(f"{field}.detections.mask_path", unwind=True) if path}


@pytest.mark.parametrize("on_disk", [False, True])
def test_image_that_the_database_refuses_fails_alone(images, files, tmp_path, on_disk):
    refuse = {"$or": [{"filepath": {"$ne": files[2]}}, {"own": None}]}
    name = images._sample_collection_name
    images._sample_collection.database.command("collMod", name, validator=refuse)
    model = zoo.load_model(MODEL, device="cpu", masks_on_disk=on_disk, mask_dir=str(tmp_path))
    run = segment_everything(images, model, "own", batch_size=4)
    assert [failure.filepath for failure in run.failures] == [files[2]]
    assert run.failures[0].error == "its masks can't be stored: Document failed validation"
    own = stored(images, "own")
    assert [path for path in files if own[Path(path).name] is None] == [files[2]]
    assert run.objects == images.count("own.detections")
    assert len(mask_files_of(tmp_path)) == (run.objects if on_disk else 0)  # no orphans


def test_full_disk_ends_the_run(images, files, tmp_path, monkeypatch):
    model = zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path))
    flush, room = os.fsync, 45

    def flush_while_there_is_room(descriptor):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_while_there_is_room)
    with pytest.raises(OSError, match=r"No space left on device: masks can't be stored in .* Make room there"):
        segment_everything(images, model, "own", batch_size=4)
    monkeypatch.undo()
    done = len(referred_to(images, "own"))
    assert 0 < done < 45
    assert mask_files_of(tmp_path) == referred_to(images, "own")
    (run,) = recorded_runs(images, "own")
    assert run.cancelled and run.failures == [] and run.objects == done
    segment_everything(images, model, "own", batch_size=4)
    segment_everything(images, model, "reference")
    assert stored(images, "own") == stored(images, "reference")


def test_unwritable_mask_folder_is_reported_at_once(images, tmp_path):
    (tmp_path / "masks").write_text("a file")
    model = zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path / "masks"))
    with pytest.raises(OSError, match=r"masks can't be stored in .*/masks\. Make room there, or choose"):
        segment_everything(images, model, "own")
    assert recorded_runs(images, "own") == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux, to see what is flushed")
def test_masks_are_flushed_before_the_database_refers_to_them(images, tmp_path, monkeypatch):
    """After a power failure, files and folders have the contents that were last flushed."""
    flushed, seen, flush, with_journaled_writes = {}, [], os.fsync, pipeline.with_journaled_writes

    def content(path):
        return sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()

    def record_flush(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed[path] = content(path)
        flush(descriptor)

    def would_survive(path):
        names = zip((path, *path.parents), path.parents)
        return flushed.get(path) == content(path) and all(
            each.name in flushed.get(folder, ()) for each, folder in names if tmp_path in each.parents
        )

    class Watched:
        def __init__(self, collection):
            self.collection = with_journaled_writes(collection)

        def update_one(self, query, change):
            for label in change[0]["$set"]["own"]["$literal"]["detections"]:
                seen.append(Path(label["mask_path"]))
                assert would_survive(seen[-1])
            (folder,) = (tmp_path / "new" / "masks").iterdir()
            assert any(map(would_survive, (folder / "unconfirmed").glob(f"{seen[-1].parent.name}-{query['_id']}-own")))
            return self.collection.update_one(query, change)

    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(pipeline, "with_journaled_writes", Watched)
    model = zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path / "new" / "masks"))
    assert segment_everything(images, model, "own", batch_size=4).failures == []
    assert {str(path) for path in seen} == referred_to(images, "own") and len(seen) > 50


def test_leftovers_in_another_folder_are_deleted(images, killed, tmp_path):
    """The mask folder may change between two runs."""
    left = next(tmp_path.rglob("0.png"))
    images._sample_collection.update_many({}, {"$set": {"own": None}})
    moved = zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path / "moved"))
    segment_everything(images, moved, "own")
    assert not left.exists()
    assert mask_files_of(tmp_path) == referred_to(images, "own") and len(referred_to(images, "own")) > 50


def test_unreachable_folder_of_an_earlier_run_is_logged(images, model, tmp_path, caplog, monkeypatch):
    """It may be in another user's home or on another machine."""
    elsewhere = zoo.load_model(MODEL, device="cpu", mask_dir=str(tmp_path / "elsewhere"))
    segment_everything(images.limit(2), elsewhere, "own")
    settle = pipeline.settle

    def settle_reachable(folder, *args):
        if "elsewhere" in folder:
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return settle(folder, *args)

    monkeypatch.setattr(pipeline, "settle", settle_reachable)
    assert segment_everything(images, model, "own").images == COUNT - 2
    assert "elsewhere: [Errno 13] Permission denied" in caplog.text


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.ENOTSUP])
def test_file_systems_that_cannot_flush_folders_are_supported(images, tmp_path, monkeypatch, code):
    flush = os.fsync

    def flush_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_files)
    on_disk = zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path))
    assert segment_everything(images.limit(2), on_disk, "own").failures == []
    assert mask_files_of(tmp_path) == referred_to(images, "own") != set()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "mobilesamv2-demo-torch"}, "model must be loaded with `load_zoo_model`"),
        ({"model": None}, "model must be loaded with"),
        ({"replace": "no"}, "replace must be True or False, not 'no'"),
        ({"replace": 1}, "replace must be True or False"),
        ({"shard": 5}, "shard must be a Shard, not 5"),
        ({"cluster": ""}, "cluster must be 'auto', 'local' or an address, not ''"),
        ({"cluster": True}, "cluster must be 'auto'"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(images, model, arguments, message):
    with pytest.raises(ValueError, match=message):
        segment_everything(images, **{"model": model, "label_field": "own", **arguments})
    assert not images.has_field("own")


@pytest.mark.parametrize("field", [5, None, ["own"]])
def test_invalid_field_names_are_refused(images, model, field):
    for work in (lambda: segment_everything(images, model, field), lambda: segment_anything(images, model, field)):
        with pytest.raises(ValueError, match="_field must be the name of a field, not "):
            work()


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "8", None])
def test_invalid_batch_sizes_are_refused(images, model, size):
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, not "):
        segment_everything(images, model, "own", batch_size=size)
    assert not images.has_field("own")


def test_views_with_too_many_samples_are_refused(images, model, monkeypatch):
    monkeypatch.setattr(database, "MAX_IDS", 2)
    with pytest.raises(ValueError, match=r"The view has 3 samples, .* process the view in slices such as view\[:2\]"):
        segment_everything(images.limit(3), model, "own")
    assert segment_everything(images.limit(2), model, "own").images == 2
    assert segment_everything(images, model, "own").images == COUNT - 2


@pytest.fixture
def killed(images, tmp_path, monkeypatch):
    """The model of a killed run on two images, whose labels are stored but whose files are unconfirmed."""
    model = zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(mask_files.MaskFiles, "confirm", lambda files: None)
        patch.setattr(pipeline, "settle", lambda *args: 0)
        segment_everything(images.limit(2), model, "own")
    assert len(list(tmp_path.glob("*/unconfirmed/*"))) == 2
    return model


@pytest.mark.slow
@pytest.mark.parametrize("way", ["rename", "copy", "clone"])
def test_files_referred_to_by_any_field_are_kept(images, killed, way):
    other = images
    if way == "rename":
        images.rename_sample_field("own", "kept")
    elif way == "copy":
        images.clone_sample_field("own", "kept")
        images.delete_sample_field("own")
    else:
        other = images.clone()
        other.rename_sample_field("own", "kept")
        images.clear_sample_field("own")
    segment_everything(images, killed, "own", replace=True)
    paths = [path for path in other.values("kept.detections.mask_path", unwind=True) if path]
    assert len(paths) > 20 and all(Path(path).is_file() for path in paths)
    if other is not images:
        other.delete()


def test_run_considered_dead_stores_no_labels_without_files(images, tmp_path, monkeypatch):
    """The run only slept; after it wrote its files, another run deleted them as leftovers."""
    model = zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path))
    segment_everything(images, model, "reference")
    folder = str(tmp_path / str(images._doc.id))

    def settle_meanwhile():
        assert settle(folder, lambda *note: True, lambda *note: False) == 1

    at_the_fourth_image(model, settle_meanwhile, monkeypatch, after=True)
    run = segment_everything(images, model, "own", batch_size=2)
    (failure,) = run.failures
    assert "another run considered this one dead" in failure.error
    monkeypatch.undo()
    segment_everything(images, model, "own")
    assert stored(images, "own") == stored(images, "reference")
    assert mask_files_of(tmp_path) == referred_to(images, "own") | referred_to(images, "reference")


def test_unreadable_image_fails_alone(images, model, tmp_path):
    for name in ("bad.png", "gone.png"):
        images.add_sample(fo.Sample(str(tmp_path / name)))
    (tmp_path / "bad.png").write_bytes(b"no image")
    run = segment_everything(images.sort_by("filepath", reverse=True), model, "own", batch_size=3)
    assert {Path(failure.filepath).name for failure in run.failures} == {"bad.png", "gone.png"}
    assert {name for name, labels in stored(images, "own").items() if labels is None} == {"bad.png", "gone.png"}
    assert run.images == COUNT + 2


def interfere_while_segmenting(model, monkeypatch, what):
    """Calls `what` while the model processes its first batch."""
    segment_all = model.segment_all
    pending = [what]

    def segment_and_interfere(items):
        segmentations = segment_all(items)
        while pending:
            pending.pop()()
        return segmentations

    monkeypatch.setattr(model, "segment_all", segment_and_interfere)


def test_concurrent_changes_are_not_overwritten(images, files, tmp_path, monkeypatch):
    model = zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path))
    mine = fo.Detections(detections=[fo.Detection(label="mine", bounding_box=[0, 0, 1, 1])])
    ids = images.values("_id")

    def interfere():
        images._sample_collection.update_one({"_id": ids[0]}, {"$set": {"own": mine.to_dict()}})
        images._sample_collection.delete_one({"_id": ids[1]})

    interfere_while_segmenting(model, monkeypatch, interfere)
    run = segment_everything(images, model, "own", batch_size=4)
    assert run.failures == [] and not run.cancelled
    own = stored(images, "own")
    assert [label["label"] for label in own.pop("0.png")] == ["mine"]
    assert len(own) == COUNT - 2 and all(own.values())
    assert len(mask_files_of(tmp_path)) == run.objects == sum(map(len, own.values()))


def test_field_deleted_meanwhile_is_not_restored(images, model, monkeypatch):
    interfere_while_segmenting(model, monkeypatch, lambda: fo.load_dataset(images.name).delete_sample_field("own"))
    held = list(images)  # samples in memory are reloaded after a write
    with pytest.raises(ValueError, match="'own' was deleted or renamed while masks were being stored in it"):
        segment_everything(images, model, "own", batch_size=2)
    assert not images.has_field("own")
    assert images._sample_collection.count_documents({"own": {"$exists": True}}) == 0
    del held
    images.clear_cache()
    assert len(list(images)) == COUNT  # loading would fail if a document had a value outside the schema


@pytest.mark.slow
def test_masks_of_many_prompts_are_stored_together_or_not_at_all(images, model):
    sample = images.first()
    boxes = [[0.01 * (i % 50), 0.2 * (i // 50), 0.3, 0.2] for i in range(150)]
    sample["boxes"] = fo.Detections(
        detections=[fo.Detection(label=f"{i}", bounding_box=b) for i, b in enumerate(boxes)]
    )
    sample.save()
    with_masks = {"$filter": {"input": "$boxes.detections", "cond": {"$gt": ["$$this.mask", None]}}}
    refuse = {"$expr": {"$lte": [{"$size": with_masks}, 100]}}
    name = images._sample_collection_name
    images._sample_collection.database.command("collMod", name, validator=refuse)
    run = segment_anything(images, model, "boxes")
    assert len(run.failures) == 1 and run.objects == 0
    assert all("mask" not in label for label in stored(images, "boxes")["0.png"])
    images._sample_collection.database.command("collMod", name, validator={})
    run = segment_anything(images, model, "boxes")
    labels = stored(images, "boxes")["0.png"]
    assert run.failures == [] and run.objects == 150
    assert [label["label"] for label in labels] == [f"{i}" for i in range(150)]
    assert all(label["area_px"] == np.sum(label["mask"][1]) for label in labels if label.get("mask"))
    assert sum(bool(label.get("mask")) for label in labels) > 100


def drop_cursor(dataset):
    """Does what the database does with cursors that are idle for ten minutes."""
    database = dataset._sample_collection.database
    idle = {"type": "idleCursor", "ns": dataset._sample_collection.full_name}
    (cursor,) = database.client.admin.aggregate([{"$currentOp": {"idleCursors": True}}, {"$match": idle}])
    killed = database.command("killCursors", dataset._sample_collection_name, cursors=[cursor["cursor"]["cursorId"]])
    assert killed["cursorsKilled"]


@pytest.mark.parametrize("lost", ["cursor", "connection"])
def test_interrupted_reading_continues(images, failing, lost):
    images.add_samples([fo.Sample(f"{i}.png") for i in range(300)])
    ids = []
    for image in unique_images(images, [], threading.Event()):
        ids.append(image.sample_id)
        if len(ids) == 50:
            if lost == "cursor":
                drop_cursor(images)
            else:
                failing({"times": 3}, failCommands=["getMore", "aggregate"], closeConnection=True)
    assert ids == images.values("_id")


def test_reading_that_never_succeeds_raises(images, failing, monkeypatch):
    monkeypatch.setattr(database, "MAX_WAIT", 1)
    failing("alwaysOn", failCommands=["aggregate"], errorCode=50)
    with pytest.raises(ExecutionTimeout):
        list(unique_images(images, [], threading.Event()))
