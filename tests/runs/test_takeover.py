"""Runs that another one considers dead although they go on, and labels that tell which run made them."""

from datetime import datetime, timedelta, timezone
from pathlib import Path

import fiftyone as fo
import fiftyone.core.odm as foo
import pytest
from bson import ObjectId
from PIL import Image

from fiftyone_mobilesamv2 import zoo
from fiftyone_mobilesamv2.errors import Cancelled, FieldBusyError
from fiftyone_mobilesamv2.runs import claims, pipeline
from fiftyone_mobilesamv2.runs.claims import mark_abandoned, on_record
from fiftyone_mobilesamv2.runs.record import (
    SegmentationRun,
    collection,
    failed_samples,
    recorded_runs,
    segmented_fields,
)
from fiftyone_mobilesamv2.runs.segment import segment_everything
from fiftyone_mobilesamv2.runs.shards import Shard
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

MODEL = "mobilesamv2-demo-torch"
COUNT = 5


@pytest.fixture
def images(dataset, tmp_path):
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{index}.png" for index in range(COUNT)]
    for index, path in enumerate(paths):
        Image.fromarray(make_scene(TEST_SEED, index).image).save(path)
    dataset.add_samples([fo.Sample(str(path)) for path in paths], progress=False)
    return dataset


@pytest.fixture(scope="module")
def model():
    return zoo.load_model(MODEL, device="cpu")


@pytest.fixture
def on_disk(tmp_path):
    return zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path / "masks"))


def files_in(tmp_path):
    return {str(path) for path in (tmp_path / "masks").rglob("*") if path.is_file()}


def referred_to(dataset, field="own"):
    return {path for path in dataset.values(f"{field}.detections.mask_path", unwind=True) if path}


def marks(dataset, field="own"):
    documents = dataset._sample_collection.find({}, {f"{field}.run_id": True, "filepath": True})
    return {Path(document["filepath"]).stem: (document.get(field) or {}).get("run_id") for document in documents}


def stop_after(number):
    def stop(bar):
        if bar.iteration >= number:
            raise Cancelled

    return stop


def consider_dead(dataset):
    """Makes the active run look like one of another machine that has been silent for an hour."""
    changed = {"owner.machine": "elsewhere", "seen": datetime.now(timezone.utc) - timedelta(hours=1)}
    query = {"dataset_id": dataset._doc.id, "ended": False}
    assert collection().update_many(query, {"$set": changed}).modified_count == 1


def suspend_before_the_fourth_update(monkeypatch, meanwhile):
    """Calls `meanwhile` after the files of the fourth image were written, just before the database refers to them."""
    monkeypatch.setattr(claims, "_HEARTBEAT", 3600)  # a suspended run sends none
    update, calls = pipeline._update_sample, []

    def suspended_update(dataset, sample_id, *args):
        calls.append(sample_id)
        if len(calls) == 4:
            consider_dead(dataset)
            meanwhile(sample_id)
        return update(dataset, sample_id, *args)

    monkeypatch.setattr(pipeline, "_update_sample", suspended_update)


@pytest.mark.parametrize("includes_it", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_suspended_run_stores_no_labels_without_files(images, on_disk, tmp_path, monkeypatch, includes_it):
    """Another run deletes its files, and segments the image itself, or does not."""
    suspended = []

    def take_over(sample_id):
        suspended.append(sample_id)
        others = images if includes_it else images.exclude(sample_id)
        assert not segment_everything(others, on_disk, "own", batch_size=2).cancelled

    suspend_before_the_fourth_update(monkeypatch, take_over)
    with pytest.raises(FieldBusyError, match="another run has taken over since"):
        segment_everything(images, on_disk, "own", batch_size=1)
    (sample_id,) = suspended[:1]
    assert (images[sample_id].own is not None) == includes_it
    assert files_in(tmp_path) == referred_to(images) != set()
    monkeypatch.undo()
    assert segment_everything(images, on_disk, "own").images == (0 if includes_it else 1)
    assert all(images.values("own")) and files_in(tmp_path) == referred_to(images)


@pytest.mark.slow
def test_suspended_run_does_not_replace_labels_of_a_later_run(images, on_disk, tmp_path, monkeypatch):
    segment_everything(images, on_disk, "own")
    known, later = referred_to(images), []

    def take_over(sample_id):
        known.update(referred_to(images))
        later.append(segment_everything(images, on_disk, "own", replace=True, batch_size=2))
        later.append(images.values("own.detections.id"))

    suspend_before_the_fourth_update(monkeypatch, take_over)
    with pytest.raises(FieldBusyError):
        segment_everything(images, on_disk, "own", replace=True, batch_size=1)
    run, ids = later
    assert images.values("own.detections.id") == ids
    assert list(marks(images).values()).count(run.mark) == COUNT - 3  # it continued the suspended run
    # Files of replaced labels are kept, but no others.
    assert files_in(tmp_path) == known | referred_to(images)


def test_labels_that_a_suspended_run_stores_after_a_later_one_started_are_replaced(images, model, monkeypatch):
    earlier = segment_everything(images.limit(1), model, "own")
    others = images.skip(1)
    labels = images._sample_collection.find_one({"own": {"$ne": None}})["own"]
    update = pipeline._update_sample

    def update_after_the_earlier(dataset, sample_id, *args):
        images._sample_collection.update_one({"_id": ObjectId(sample_id)}, {"$set": {"own": labels}})
        return update(dataset, sample_id, *args)

    monkeypatch.setattr(pipeline, "_update_sample", update_after_the_earlier)
    run = segment_everything(others, model, "own")
    assert run.images == COUNT - 1
    assert list(marks(images).values()) == [earlier.mark] + [run.mark] * (COUNT - 1)


def test_replacement_is_continued_whatever_the_clocks_say(images, model):
    """Ids contain the time of the machine that made them."""
    tomorrow = ObjectId.from_datetime(datetime.now(timezone.utc) + timedelta(days=1))
    old = {"_cls": "Detections", "detections": [fo.Detection(label="old", bounding_box=[0, 0, 1, 1]).to_dict()]}
    old["detections"][0]["_id"] = tomorrow
    images.add_sample_field("own", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections)
    images._sample_collection.update_many({}, {"$set": {"own": old}})
    images.reload()
    stopped = segment_everything(images, model, "own", replace=True, batch_size=1, progress=stop_after(2))
    assert stopped.images == 2
    # A label that a user adds meanwhile does not make an image look replaced, nor lose its masks.
    for sample in (images.first(), images.last()):
        sample.own.detections.append(fo.Detection(label="mine", bounding_box=[0, 0, 1, 1]))
        sample.save()
    run = segment_everything(images, model, "own", replace=True, batch_size=1)
    assert (run.images, run.cancelled) == (COUNT - 2, False)
    assert list(marks(images).values()) == [stopped.mark] * 2 + [run.mark] * (COUNT - 2)
    labels = images.values("own.detections.label")
    assert "mine" in labels[0] and not any("old" in names for names in labels) and "mine" not in labels[-1]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("rename", marks=pytest.mark.slow),
        pytest.param("copy", marks=pytest.mark.slow),
        pytest.param("clone", marks=pytest.mark.slow),
        "killed clone",
    ],
)
def test_labels_tell_with_which_parameters_they_were_made(images, model, way):
    run = segment_everything(images, model, "own", batch_size=1, progress=stop_after(2))
    dataset, field = images, "own"
    if way == "rename":
        images.rename_sample_field("own", "renamed")
        field = "renamed"
    elif way == "copy":
        images.clone_sample_field("own", "copied")
        field = "copied"
    else:
        if way == "killed clone":  # without FiftyOne's copy of the record
            images.delete_runs()
        dataset = images.clone()
    try:
        (found,) = recorded_runs(dataset, field)
        assert (found.run_id, found.images, found.parameters) == (run.run_id, run.images, run.parameters)
        assert field in segmented_fields(dataset)
        other = zoo.load_model(MODEL, device="cpu", max_masks=3)
        with pytest.raises(ValueError, match=r"made with other parameters \(max_masks None then, 3 now"):
            segment_everything(dataset, other, field)
        again = segment_everything(dataset, model, field)
        assert [each.run_id for each in recorded_runs(dataset, field)] == [run.run_id, again.run_id]
        assert again.images == COUNT - 2 and set(marks(dataset, field).values()) == {run.mark, again.mark}
    finally:
        if dataset is not images:
            dataset.delete()


def test_masks_of_unknown_runs_are_reported(images, model, caplog):
    segment_everything(images.limit(1), model, "own")
    images.delete_runs()
    collection().delete_many({"dataset_id": images._doc.id})
    segment_everything(images, model, "own")
    (mark,) = set(marks(images).values()) - {recorded_runs(images, "own")[-1].mark}
    assert f"'own' has masks of unknown runs ({mark})" in caplog.text


@pytest.mark.slow
def test_parameters_of_replaced_labels_do_not_matter(images, model):
    other = zoo.load_model(MODEL, device="cpu", max_masks=3)
    segment_everything(images.limit(2), other, "own")
    images.delete_sample_field("own")
    segment_everything(images, model, "own", batch_size=1, progress=stop_after(2))
    assert segment_everything(images, model, "own").images == COUNT - 2


def test_counts_of_a_killed_run_are_those_of_its_labels(images, model):
    """A killed process has not recorded what it stored since the last heartbeat."""
    shard = Shard(0, 1, "group")
    killed = segment_everything(images, model, "own", batch_size=1, progress=stop_after(2), shard=shard)
    forgotten = {"run.images": 0, "run.objects": 0, "ended": False, "owner.pid": 2**22 + 1}
    query = {"dataset_id": images._doc.id, "run.run_id": killed.run_id}
    collection().update_one(query, {"$set": forgotten})
    (found,) = recorded_runs(images, "own")
    assert (found.images, found.objects) == (2, images.count("own.detections"))
    mark_abandoned(images, "group", 0)
    rest = segment_everything(images, model, "own", shard=shard)
    (found,) = recorded_runs(images, "own")
    assert (found.images, found.objects, found.cancelled) == (COUNT, images.count("own.detections"), False)
    assert found.objects == killed.objects + rest.objects


@pytest.mark.slow
def test_files_of_a_killed_run_are_deleted_after_its_field_was_renamed(images, on_disk, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "settle", lambda *args: 0)
        patch.setattr(pipeline, "_check_field", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            segment_everything(images.limit(1), on_disk, "own")
    assert len(files_in(tmp_path)) > len(referred_to(images))
    images._sample_collection.update_many({}, {"$set": {"own": None}})  # as if it had been killed before the update
    images.rename_sample_field("own", "renamed")
    segment_everything(images, on_disk, "renamed")
    assert files_in(tmp_path) == referred_to(images, "renamed") != set()


@pytest.mark.slow
def test_field_renamed_during_a_run_keeps_no_files_without_labels(images, on_disk, tmp_path, monkeypatch):
    def rename(sample_id):
        fo.load_dataset(images.name).rename_sample_field("own", "renamed")

    suspend = pipeline._update_sample
    calls = []

    def rename_before_the_fourth(dataset, sample_id, *args):
        calls.append(sample_id)
        if len(calls) == 4:
            rename(sample_id)
        return suspend(dataset, sample_id, *args)

    monkeypatch.setattr(pipeline, "_update_sample", rename_before_the_fourth)
    with pytest.raises(ValueError, match="'own' was deleted or renamed while masks were being stored in it"):
        segment_everything(images, on_disk, "own", batch_size=1)
    images.reload()
    assert files_in(tmp_path) == referred_to(images, "renamed") and len(images.exists("renamed")) == 3


def test_field_that_fiftyone_loses_is_declared_again(images, model, monkeypatch):
    """Another process that adds a field at the same time may overwrite the schema."""
    update, calls = pipeline._update_sample, []

    def lose_the_field(dataset, sample_id, *args):
        calls.append(sample_id)
        if len(calls) in (1, 4):
            change = {"$pull": {"sample_fields": {"name": "own"}}}
            assert foo.get_db_conn().datasets.update_one({"_id": images._doc.id}, change).modified_count
        return update(dataset, sample_id, *args)

    monkeypatch.setattr(pipeline, "_update_sample", lose_the_field)
    assert segment_everything(images, model, "own", batch_size=1).images == COUNT
    images.reload()
    assert all(sample.own.detections for sample in images)
    assert images.has_field("own.detections.predicted_iou") and images.has_field("own.run_id")


HOSTILE = [
    {"unknown": 1},
    {"failures": None},
    {"failures": [None, {"sample_id": "x"}]},
    {"failures": "text"},
    {"parameters": None},
    {"parameters": {}},
    {"parameters": {"prompting": 5}},
    {"shard": {"index": 5, "count": 2, "group": "x"}},
    {"shard": {"unknown": 1}},
    {"shard": "text"},
    {"started": None},
    {"started": "yesterday"},
    {"started": 5},
    {"images": None},
    {"images": "6"},
    {"seconds": None},
    {"seconds": {"total": "x", "encode": 1.0}},
    {"mask_dir": 5},
    {"run_id": None},
    {"label_field": None},
    {"cancelled": "no"},
    {"replace": None},
    {"num_failures": None},
]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["record", "copy"])
def test_records_of_other_versions_are_read(images, model, place):
    """By a newer version of this package, or of a stranger's dataset."""
    segment_everything(images.limit(1), model, "own")
    query = {"dataset_id": images._doc.id}
    document = collection().find_one(query)
    for changes in HOSTILE:
        stored = document["run"] | changes
        for name in [name for name, value in changes.items() if value is None]:
            del stored[name]
        for run in (stored, document["run"] | changes):
            if place == "record":
                collection().update_one(query, {"$set": {"run": run}})
            else:
                collection().delete_many(query)
                results = images.init_run_results("mobilesamv2_own", runs=[run, None, "text"])
                images.save_run_results("mobilesamv2_own", results, overwrite=True)
            found = recorded_runs(images, "own")
            assert len(found) <= 1, changes
            assert all(each.images_per_second >= 0 and isinstance(each.failures, list) for each in found)
            assert segmented_fields(images) == (["own"] if found else []), changes
            assert len(failed_samples(images, "own")) == 0
            with on_record(images, SegmentationRun("own", {})):
                pass
            collection().delete_many({**query, "run.run_id": {"$ne": document["run"]["run_id"]}})
    assert len(images.exists("own")) == 1
