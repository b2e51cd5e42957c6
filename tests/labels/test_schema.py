"""Fields are declared as FiftyOne declares them, and none is lost if processes do so at the same time."""

import subprocess
import sys
import textwrap

import fiftyone as fo
import fiftyone.core.odm as foo
import pytest

from fiftyone_mobilesamv2.labels.schema import NewField, declare_fields, declare_labels, delete_fields

FIELDS = {
    "masks": NewField(fo.EmbeddedDocumentField, fo.Detections),
    "masks.detections.run": NewField(fo.StringField),
    "one.run": NewField(fo.StringField),
    "boxes.detections.rank": NewField(fo.IntField),
    "share": NewField(fo.FloatField, description="a share", info={"of": "boxes"}),
}


def add_samples(dataset, count=1):
    boxes = fo.Detections(detections=[fo.Detection(label="x", bounding_box=[0, 0, 1, 1])])
    samples = [fo.Sample(f"/{i}.png", boxes=boxes.copy(), one=fo.Detection(label="y")) for i in range(count)]
    dataset.add_samples(samples, progress=False)


def schema(dataset):
    """The schema in the database, without times."""

    def without_times(value):
        if isinstance(value, list):
            return [without_times(each) for each in value]
        if isinstance(value, dict):
            return {name: without_times(each) for name, each in value.items() if name != "created_at"}
        return value

    document = foo.get_db_conn().datasets.find_one({"_id": dataset._doc.id})
    return without_times(document["sample_fields"]), without_times(document.get("frame_fields"))


def test_schema_is_the_same_as_fiftyones(dataset):
    other = fo.Dataset()
    try:
        for each in (dataset, other):
            add_samples(each)
        declare_fields(dataset, FIELDS)
        for name, new in FIELDS.items():
            other.add_sample_field(name, new.ftype, new.embedded_doc_type, description=new.description, info=new.info)
        assert schema(dataset) == schema(other)
        declare_fields(dataset, FIELDS)  # nothing is declared twice
        assert schema(dataset) == schema(other)
        sample = dataset.first()
        sample["share"] = 0.5
        sample.masks = fo.Detections(detections=[fo.Detection(label="z", run="a")])
        sample.save()
        assert dataset.match(fo.ViewField("share") > 0.1).values("masks.detections.run") == [["a"]]
        assert dataset.get_field("share").description == "a share"
        assert dataset.get_field("share").created_at is not None
    finally:
        other.delete()


def test_frame_fields(dataset):
    video = fo.Sample("/a.mp4", metadata=fo.VideoMetadata(total_frame_count=1, frame_width=4, frame_height=4))
    video.frames[1] = fo.Frame(boxes=fo.Detections(detections=[fo.Detection(label="x", bounding_box=[0, 0, 1, 1])]))
    dataset.add_sample(video)
    declare_labels(dataset, "frames.masks", {"run": fo.StringField})
    declare_labels(dataset, "frames.boxes", {"run": fo.StringField})
    video.frames[1].boxes.detections[0].run = "a"
    video.frames[1].masks = fo.Detections()
    video.save()
    dataset.reload()
    assert dataset.values("frames.boxes.detections.run", unwind=True) == ["a"]
    delete_fields(dataset, ["frames.masks", "frames.boxes.detections.run"])
    assert not dataset.has_field("frames.masks") and not dataset.has_field("frames.boxes.detections.run")
    (frame,) = dataset._frame_collection.find()
    assert "masks" not in frame and "run" not in frame["boxes"]["detections"][0]


def test_fields_of_another_type_are_refused(dataset):
    add_samples(dataset)
    for name, new in (("one", NewField(fo.StringField)), ("boxes", NewField(fo.EmbeddedDocumentField, fo.Polylines))):
        with pytest.raises(ValueError, match=rf"Field '{name}' of .* was expected: rename or delete it"):
            declare_fields(dataset, {name: new})


def test_samples_in_memory_get_the_fields(dataset):
    """Even if one of them has a value that FiftyOne can't load."""
    add_samples(dataset, 2)
    held, bad = list(dataset)
    dataset._sample_collection.update_one({"_id": bad._id}, {"$set": {"boxes.detections.0.tags": 5, "stray": 1}})
    other = fo.load_dataset(dataset.name)
    declare_fields(dataset, FIELDS)
    assert held.share is None and held.masks is None and other.has_field("share")
    held["share"] = 0.5
    held.boxes.detections[0].rank = 3
    held.save()
    assert dataset.values("share") == [0.5, None]
    assert dataset.match_labels(filter=fo.ViewField("rank") > 2, fields="boxes").values("id") == [held.id]
    del bad  # FiftyOne loads the samples in memory when it deletes fields
    dataset._sample_collection.update_many({"stray": 1}, {"$unset": {"stray": ""}, "$set": {"boxes": None}})
    delete_fields(dataset, ["share", "boxes.detections.rank"])
    assert not dataset.has_field("share") and not held.has_field("share")


def test_values_of_undeclared_fields_are_deleted(dataset):
    """FiftyOne has lost the field, so it can't delete its values."""
    add_samples(dataset, 2)
    declare_fields(dataset, FIELDS)
    stray = {"stray": 3, "share": 0.5, "one.stray": "a", "boxes.detections.0.stray": 4, "boxes.detections.0.rank": 1}
    dataset._sample_collection.update_many({}, {"$set": stray})
    dataset._sample_collection.update_one({}, {"$set": {"boxes": None}})
    names = ["stray", "share", "one.stray", "boxes.detections.stray", "boxes.detections.rank", "masks.detections.none"]
    delete_fields(dataset, names)
    for document in dataset._sample_collection.find():
        assert not {"stray", "share"} & document.keys() and "stray" not in document["one"]
        for label in (document["boxes"] or {"detections": []})["detections"]:
            assert not {"stray", "rank"} & label.keys() and label["label"] == "x"
    assert len(list(dataset)) == 2


SCRIPT = """
    import sys
    import fiftyone as fo
    from fiftyone_mobilesamv2.labels.schema import NewField, declare_fields
    dataset, number = fo.load_dataset(sys.argv[1]), sys.argv[2]
    print("ready", flush=True)
    input()
    for index in range(20):
        name = f"field_{number}_{index}"
        declare_fields(dataset, {name: NewField(fo.IntField), f"boxes.detections.{name}": NewField(fo.IntField)})
        dataset._sample_collection.update_many({}, {"$set": {name: index}})
"""


@pytest.mark.slow
def test_processes_that_add_fields_at_the_same_time_lose_none(dataset):
    add_samples(dataset, 3)
    dataset.persistent = True
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), dataset.name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(number)], **pipes) for number in range(4)]
    for process in processes:
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(120) for process in processes] == [0] * 4
    dataset.reload()
    names = [f"field_{number}_{index}" for number in range(4) for index in range(20)]
    assert [name for name in names if not dataset.has_field(name)] == []
    assert [name for name in names if not dataset.has_field(f"boxes.detections.{name}")] == []
    assert all(sample["field_3_19"] == 19 for sample in dataset)
