"""Each private name of FiftyOne that the package uses behaves as expected; a new FiftyOne may change it."""

import re
from pathlib import Path

import fiftyone as fo
import pytest
from bson import ObjectId
from fiftyone import ViewField as F
from fiftyone.core.runs import Run
from pymongo import UpdateOne

from fiftyone_mobilesamv2 import fiftyone_internals as internals

PACKAGE = Path(internals.__file__).parent
PRIVATE = re.compile(r"\b(?:samples|dataset|view|shown|dataset_|form\.samples|form\.dataset)\._[a-z]\w*")


@pytest.fixture
def labelled(dataset):
    """Two samples; only the first has a box."""
    box = fo.Detection(label="cat", bounding_box=[0.1, 0.1, 0.5, 0.5])
    dataset.add_samples(
        [
            fo.Sample("/a.png", boxes=fo.Detections(detections=[box]), one=fo.Classification(label="x")),
            fo.Sample("/b.png"),
        ]
    )
    return dataset


def test_no_other_module_uses_private_names():
    uses = []
    for path in PACKAGE.rglob("*.py"):
        if path.name != "fiftyone_internals.py":
            uses += [f"{path}: {name}" for name in PRIVATE.findall(path.read_text())]
    assert uses == []


def test_datasets_of_views(labelled):
    patches = labelled.to_patches("boxes")
    view = labelled.limit(1)
    assert (
        internals.root_dataset(labelled) is internals.root_dataset(view) is internals.root_dataset(patches) is labelled
    )
    assert internals.source_dataset(view) is labelled
    source = internals.source_dataset(patches)
    assert source is not labelled and len(source) == 1
    for samples, expected in ((labelled, False), (view, False), (patches, True)):
        assert internals.is_patches_view(samples) == internals.is_generated(samples) == expected
        assert not internals.is_frames_view(samples) and not internals.is_clips_view(samples)
        assert not internals.contains_videos(samples)
    assert internals.is_patches_view(source)


def test_videos(dataset):
    sample = fo.Sample("/a.mp4", metadata=fo.VideoMetadata(total_frame_count=1, frame_width=4, frame_height=4))
    sample.frames[1] = fo.Frame(boxes=fo.Detections())
    sample["events"] = fo.TemporalDetections(detections=[fo.TemporalDetection(label="x", support=[1, 1])])
    dataset.add_sample(sample)
    assert internals.contains_videos(dataset)
    assert internals.is_clips_view(dataset.to_clips("events")) and not internals.is_clips_view(dataset)
    assert internals.is_frame_field(dataset, "frames.boxes") and not internals.is_frame_field(dataset, "events")
    assert internals.split_frame_field(dataset, "frames.boxes") == ("boxes", True)
    assert internals.split_frame_field(dataset, "events") == ("events", False)
    assert internals.frame_collection(dataset).count_documents({}) == 1
    (frame,) = internals.aggregate(dataset, frames_only=True, post_pipeline=[{"$project": {"frame_number": True}}])
    assert frame["frame_number"] == 1
    assert dataset.get_field(f"{internals.FRAMES_PREFIX}boxes") is not None


def test_groups(dataset):
    dataset.add_group_field("group", default="left")
    group = fo.Group()
    dataset.add_samples(
        [fo.Sample("/a.png", group=group.element("left")), fo.Sample("/b.mp4", group=group.element("x"))]
    )
    assert len(dataset) == 1 and len(internals.select_all_slices(dataset)) == 2


@pytest.mark.parametrize("kept", ["all", "later stages leave groups out"])
def test_samples_of_dynamic_groups(dataset, kept):
    dataset.add_samples([fo.Sample(f"/{number}.png", scene=number // 2) for number in range(4)])
    groups = dataset.group_by("scene")
    assert internals.is_dynamic_groups(groups) and not internals.is_dynamic_groups(dataset)
    view = groups if kept == "all" else groups.match(F("scene") == 1)
    samples = internals.samples_of_dynamic_groups(view)
    assert not internals.is_dynamic_groups(samples) and samples.media_type == "image"
    assert samples.values("filepath") == [f"/{number}.png" for number in range(0 if kept == "all" else 2, 4)]
    assert len(samples.select(samples.first().id)) == 1


def test_variables_of_apply_model(labelled):
    class Model(fo.core.models.Model):
        def __enter__(self):
            self.seen = internals.apply_model_variables()
            raise NotImplementedError

        media_type = "image"

    model = Model()
    with pytest.raises(NotImplementedError):
        labelled.apply_model(model, "x", num_workers=3)
    assert model.seen["samples"] is labelled and model.seen["label_field"] == "x" and model.seen["num_workers"] == 3
    assert model.seen["model"] is model and internals.apply_model_variables() is None


def test_stages_of_views(labelled):
    assert internals.view_stages(labelled) == [] and len(internals.view_stages(labelled.limit(1))) == 1
    patches = labelled.limit(1).to_patches("boxes").limit(1)
    assert len(internals.view_stages(patches)) < len(internals.all_view_stages(patches))
    view = labelled.match(F("filepath") == "/b.png")
    assert internals.restored_view(labelled, internals.serialized_view(view)).values("filepath") == ["/b.png"]


def test_fields_of_labels(labelled):
    assert internals.label_root(labelled, "boxes") == ("boxes.detections", True)
    assert internals.label_root(labelled, "one") == ("one", False)
    assert internals.label_path(labelled, "boxes", "id") == "boxes.detections.id"
    assert internals.label_path(labelled, "boxes") == "boxes.detections"
    assert internals.label_type(labelled, "boxes") is fo.Detections


def test_documents(labelled):
    assert isinstance(internals.dataset_id(labelled), ObjectId)
    collection = internals.sample_collection(labelled)
    assert collection.count_documents({}) == 2 and internals.frame_collection(labelled) is None
    assert [each["filepath"] for each in internals.aggregate(labelled, pipeline=[])] == ["/a.png", "/b.png"]
    sample = labelled.first()
    change = UpdateOne({"_id": ObjectId(sample.id)}, {"$set": {"one.label": "y"}})
    internals.bulk_write(labelled, [change], ids=[ObjectId(sample.id)])
    assert sample.one.label == "y"
    collection.update_one({"_id": ObjectId(sample.id)}, {"$set": {"one.label": "z"}})
    internals.reload_samples(labelled, [sample.id])
    assert sample.one.label == "z"


def test_results_are_replaced_by_one_update(labelled):
    files = fo.core.odm.get_db_conn().fs.files
    labelled.register_run("mine", labelled.init_run(method="test"))
    first = labelled.init_run_results("mine", numbers=[1])
    internals.replace_run_results(Run, labelled, "mine", first)
    assert labelled.load_run_results("mine") is first
    count = files.count_documents({})
    internals.replace_run_results(
        Run, labelled, "mine", labelled.init_run_results("mine", numbers=[2]), cache=False, version="9.9"
    )
    assert labelled.load_run_results("mine").numbers == [2] and first.key is None
    assert labelled.get_run_info("mine").version == "9.9" and files.count_documents({}) == count
    labelled.reload()
    assert labelled.load_run_results("mine", cache=False).numbers == [2]
    fo.core.odm.get_db_conn().runs.delete_many({"_dataset_id": labelled._doc.id})
    with pytest.raises(ValueError, match=rf"'mine' of {labelled.name} was deleted"):
        internals.replace_run_results(Run, labelled, "mine", labelled.init_run_results("mine", numbers=[3]))
    assert files.count_documents({}) == count


def test_evaluations(labelled):
    labelled.add_sample_field("found", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections)
    view = labelled.limit(1)
    view.evaluate_detections("found", "boxes", eval_key="done", use_boxes=True, progress=False)
    assert internals.has_results(labelled, "done")
    assert internals.run_view(labelled) is None
    assert internals.run_view(view) == labelled._doc.evaluations["done"].view_stages
    labelled._doc.evaluations["done"].results = None
    assert not internals.has_results(labelled, "done")


def test_runs_and_sidebar(labelled):
    labelled.register_run("mine", labelled.init_run(method="test"))
    internals.reload_list_of_runs(labelled)
    assert labelled.list_runs() == ["mine"]
    groups = fo.DatasetAppConfig.default_sidebar_groups(labelled)
    labelled.app_config.sidebar_groups = [*groups, fo.SidebarGroupDocument(name="old")]
    labelled.save()
    internals.add_to_sidebar_group(labelled, ["boxes"], "added")
    assert [group.paths for group in labelled.app_config.sidebar_groups if group.name == "added"] == [["boxes"]]
    internals.rename_sidebar_group(labelled, "old", "new")
    assert "new" in [group.name for group in labelled.app_config.sidebar_groups]
    internals.delete_empty_sidebar_group(labelled, "new")
    assert "new" not in [group.name for group in labelled.app_config.sidebar_groups]


def test_zoo_models_are_forgotten(model_zoo, make_trained, monkeypatch):
    """FiftyOne may cache its list of models, and keeps loaded ones while they are in use."""
    import fiftyone.zoo as foz

    monkeypatch.setattr(fo.config, "model_zoo_manifest_cache_enabled", True)
    internals.forget_zoo_models()
    assert "my-cells" not in foz.list_zoo_models()
    folder = model_zoo / "mobilesamv2" / "trained" / "my-cells"
    make_trained(folder)
    assert "my-cells" not in foz.list_zoo_models()
    internals.forget_zoo_models()
    assert "my-cells" in foz.list_zoo_models()
    model = foz.load_zoo_model("my-cells", device="cpu")
    assert foz.load_zoo_model("my-cells", device="cpu") is model
    internals.forget_zoo_models()
    assert foz.load_zoo_model("my-cells", device="cpu") is not model
    internals.forget_zoo_models()
