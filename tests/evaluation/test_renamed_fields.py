"""An evaluation finds its objects and proposals after their fields were renamed, and deletes what it stored on them."""

import fiftyone as fo
import pytest
from fiftyone import ViewField as F

from fiftyone_mobilesamv2 import evaluate_proposals
from fiftyone_mobilesamv2.panels import queries


def evaluate(samples, pred_field="proposals", gt_field="ground_truth", eval_key="ar", **settings):
    return evaluate_proposals(samples, pred_field, gt_field, eval_key, progress=False, **settings)


def missed(results, field, **kwargs):
    return results.missed(**kwargs).values(f"{field}.detections.id", unwind=True)


def attributes(dataset, key="ar"):
    """Everything in the database whose name is the key or begins with it, declared or not."""
    found = set()

    def visit(value):
        if isinstance(value, dict):
            found.update(name for name in value if name == key or name.startswith(f"{key}_"))
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            visit(each)

    for document in dataset._sample_collection.find():
        visit(document)
    declared = dataset.get_field_schema(flat=True)
    return found | {path for path in declared if path.split(".")[-1].split("_")[0] == key}


RENAMES = [
    {"ground_truth": "gt"},
    {"proposals": "masks"},
    {"ground_truth": "gt", "proposals": "masks"},
    {"ground_truth": "proposals", "proposals": "ground_truth"},  # by way of a third name
]


def rename(dataset, names):
    dataset.rename_sample_fields({name: f"{name}_before" for name in names})
    dataset.rename_sample_fields({f"{name}_before": new for name, new in names.items()})


@pytest.mark.parametrize("names", RENAMES[:3], ids=str)
def test_renamed_fields_are_followed(small, names):
    results = evaluate(small)
    objects = [label.id for label in small.first().ground_truth.detections]
    expected = {key: missed(results, "ground_truth", **key_k) for key, key_k in (("all", {}), ("first", {"k": 1}))}
    assert expected["all"] and set(expected["all"]) & set(objects) == {objects[1]}
    confident = evaluate(small.filter_labels("proposals", F("confidence") > 0.95, only_matches=False), eval_key=None)
    gained = results.compare(confident).gained.values("ground_truth.detections.id", unwind=True)
    small.rename_sample_fields(names)
    gt, pred = names.get("ground_truth", "ground_truth"), names.get("proposals", "proposals")

    loaded = small.load_evaluation_results("ar", cache=False)
    for each in (results, loaded):
        assert each.gt_field == gt and each.field_in(small, "pred_field") == pred
        assert missed(each, gt) == expected["all"] and missed(each, gt, k=1) == expected["first"]
        assert each.compare(confident).gained.values(f"{gt}.detections.id", unwind=True) == gained
        assert queries.missed_of_group(each, "small").values(f"{gt}.detections.id", unwind=True) == expected["all"]
    with loaded.use_subset({"type": "attribute", "field": "label", "value": "a"}):
        assert loaded.metrics()["support"] == results.metrics()["support"]
    assert set(small.load_evaluation_view("ar", select_fields=True).get_field_schema()) >= {gt, pred}

    # An evaluation with the same key replaces it, under the new names; other fields are refused as before.
    small.set_values("other", [fo.Detections()] * len(small))
    with pytest.raises(ValueError, match="Cannot overwrite"):
        evaluate(small, pred, "other")
    small.delete_sample_field("other")
    assert missed(evaluate(small, pred, gt), gt) == expected["all"]
    small.rename_evaluation("ar", "renamed")
    assert not attributes(small) and f"{gt}.detections.renamed_rank" in attributes(small, "renamed")
    assert missed(small.load_evaluation_results("renamed"), gt) == expected["all"]


@pytest.mark.parametrize("names", RENAMES, ids=str)
def test_everything_is_deleted_after_renaming(small, names):
    evaluate(small)
    rename(small, names)
    small.rename_evaluation("ar", "other")
    assert not attributes(small)
    small.delete_evaluation("other")
    assert not attributes(small, "other")


def test_new_field_with_the_old_name_is_not_taken_for_the_renamed_one(small):
    """As when an earlier version of the labels is kept under another name."""
    results = evaluate(small)
    expected = missed(results, "ground_truth")
    small.rename_sample_field("ground_truth", "before")
    small.set_values("ground_truth", [fo.Detections(detections=[fo.Detection(label="new")])] * len(small))
    assert results.gt_field == "before" and missed(results, "before") == expected
    unnamed = evaluate(small, gt_field="before", eval_key=None)
    assert missed(unnamed, "before") == expected
    evaluate(small, gt_field="before")
    small.delete_evaluation("ar")
    assert not attributes(small)


def test_copies_of_a_field_belong_to_the_user(small):
    results = evaluate(small)
    expected = missed(results, "ground_truth")
    small.clone_sample_field("ground_truth", "copy")
    assert missed(results, "ground_truth") == expected
    # Of two copies of a field that is gone, none is the renamed one.
    small.rename_sample_field("ground_truth", "gt")
    with pytest.raises(ValueError, match=r"'ground_truth' was renamed or deleted .* gt and copy contain its labels"):
        results.missed()
    assert results.metrics()["support"] == 8
    small.rename_sample_field("gt", "ground_truth")
    small.delete_evaluation("ar")
    assert {path for path in attributes(small) if "." in path} == {
        f"copy.detections.ar{end}" for end in ("", "_id", "_iou", "_rank")
    }
    # Without the copy's original, the attributes are deleted from the copy.
    evaluate(small, eval_key="new")
    small.clone_sample_field("ground_truth", "second")
    small.delete_sample_field("ground_truth")
    small.delete_evaluation("new")
    assert not attributes(small, "new")


def test_deleted_field_is_named(small):
    results, unnamed = evaluate(small), evaluate(small, eval_key=None)
    small.delete_sample_field("ground_truth")
    for each in (results, unnamed, small.load_evaluation_results("ar", cache=False)):
        with pytest.raises(
            ValueError, match=r"'ground_truth' was renamed or deleted .* no other field .*evaluate again"
        ):
            each.missed()
        assert each.metrics()["support"] == 8
    small.delete_evaluation("ar")
    assert not attributes(small)


@pytest.mark.parametrize("name", ["ground_truth", "proposals"])
def test_view_that_needs_a_renamed_field_is_named(small, name):
    """FiftyOne would filter labels that do not exist, and find no missed objects."""
    results = evaluate(small.filter_labels(name, F("label") == "a"))
    small.rename_sample_field(name, "renamed")
    with pytest.raises(ValueError, match=rf"view of evaluation 'ar'.*'{name}'.*Rename the field back, or evaluate"):
        results.missed()
    assert results.metrics()["support"] == 8
    small.rename_sample_field("renamed", name)
    assert len(missed(results, "ground_truth")) == 4
    small.delete_evaluation("ar")
    assert not attributes(small)


def test_patches_of_renamed_fields_are_found(small):
    results = evaluate(small.to_patches("ground_truth", other_fields="proposals"))
    expected = results.metrics()["support"]
    small.rename_sample_fields({"ground_truth": "gt", "proposals": "masks"})
    loaded = small.load_evaluation_results("ar", cache=False)
    assert len(results.missed()) == len(loaded.missed()) == 4 and loaded.metrics()["support"] == expected
    small.delete_evaluation("ar")
    assert not attributes(small)


def test_renamed_frame_fields_are_followed(small):
    labels = small.first()
    video = fo.Sample("/nowhere/0.mp4", metadata=fo.VideoMetadata(frame_width=64, frame_height=48))
    for number in (1, 2):
        video.frames[number] = fo.Frame(ground_truth=labels.ground_truth.copy(), proposals=labels.proposals.copy())
        for field in ("ground_truth", "proposals"):
            for label in video.frames[number][field].detections:
                label.id = fo.Detection().id
    videos = fo.Dataset()
    videos.add_sample(video)
    results = evaluate(videos, "frames.proposals", "frames.ground_truth")
    path = "frames.{}.detections.id"
    expected = results.missed().values(path.format("ground_truth"), unwind=True)
    videos.rename_frame_field("ground_truth", "gt")
    assert results.gt_field == "frames.gt"
    assert results.missed().values(path.format("gt"), unwind=True) == expected and len(expected) == 2
    evaluate(videos, "frames.proposals", "frames.gt")
    videos.rename_frame_field("proposals", "masks")
    videos.delete_evaluation("ar")
    assert not [each for each in videos.get_frame_field_schema(flat=True) if ".ar" in each or each.startswith("ar")]
    videos.delete()
