import fiftyone as fo
import pytest
from fiftyone.core.view import DatasetView

NAME = "find_unlabeled_objects"


@pytest.fixture
def curated(scenes):
    """Each scene's objects except the last are proposals, and its first two objects have no labels.

    Confidence decreases in the order of the list.
    """
    for sample in scenes:
        objects = sample.ground_truth.detections
        proposals = [label.copy() for label in objects[:-1]]
        for place, proposal in enumerate(proposals):
            proposal.confidence = 1 - place / 10
        sample["segmentations"] = fo.Detections(detections=proposals)
        sample.ground_truth.detections = objects[2:]
        sample.save()
    return scenes


def ids(samples, field):
    return [[label.id for label in sample[field].detections] for sample in samples]


def test_form_has_defaults(plugin, curated):
    form = plugin.form(NAME, curated)
    assert form.errors == [] and form.messages == []
    names = ("look_for", "pred_field", "gt_field", "iou", "max_inside", "rank_by", "min_score", "min_area", "use_masks")
    values = ["objects", "segmentations", "ground_truth", 0.5, 0.7, "confidence", 0, 0, True]
    assert [form.default(name) for name in names] == values


def test_form_for_labels_has_fewer_inputs(plugin, curated):
    form = plugin.form(NAME, curated, {"look_for": "labels"})
    assert form.errors == [] and not {"max_inside", "rank_by", "min_score", "min_area"} & set(form.inputs)


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"iou": 0}, "IoU: a number from 0.01 to 1 was expected, not 0"),
        ({"max_inside": 70}, "Share inside labels: a number from 0.01 to 1 was expected, not 70"),
        ({"min_score": -1}, "Minimum score: a number of at least 0"),
        ({"min_area": 1.5}, "Minimum mask area (pixels): a whole number"),
        ({"rank_by": "size"}, "Score: 'size' is no longer available"),
        ({"pred_field": "gone"}, "Proposals: 'gone' is no longer available"),
        ({"gt_field": "segmentations"}, "Ground truth: 'segmentations' is no longer available"),
        ({"look_for": "luck"}, "What to look for: 'luck' is no longer available"),
    ],
)
def test_form_says_what_is_wrong(plugin, curated, params, error):
    (message,) = plugin.form(NAME, curated, params).errors
    assert error in message


def test_form_names_missing_data(plugin, scenes, dataset):
    assert "no samples" in plugin.form(NAME, dataset).errors[0]
    assert "view has no samples" in plugin.form(NAME, scenes.limit(0)).errors[0]
    assert "Open a dataset" in plugin.form(NAME, None).errors[0]
    assert "Run 'Segment everything' first" in plugin.form(NAME, scenes).errors[0]  # only ground_truth
    scenes.rename_sample_field("ground_truth", "segmentations")
    assert "no field of Detections or Polylines other than 'segmentations'" in plugin.form(NAME, scenes).errors[0]
    dataset.add_sample(fo.Sample("/nowhere/0.png"))
    dataset.add_sample_field("classes", fo.EmbeddedDocumentField, embedded_doc_type=fo.Classification)
    assert "no field of proposals" in plugin.form(NAME, dataset).errors[0]


def test_form_refuses_read_only_fields(plugin, curated):
    patches = curated.to_patches("segmentations")
    assert "works on the whole dataset" in plugin.form(NAME, patches).messages[0]
    field = curated.get_field("segmentations")
    field.read_only = True
    field.save()
    assert "'segmentations' is read-only" in plugin.form(NAME, curated).errors[0]
    assert plugin.form(NAME, curated, {"look_for": "labels"}).errors == []  # tags are written to the other field


def test_boxes_are_compared_without_masks(plugin, curated):
    for sample in curated:
        for label in sample.ground_truth.detections:
            label.mask = None
        sample.save()
    form = plugin.form(NAME, curated)
    assert form.errors == [] and form.default("use_masks") is False
    assert any("'ground_truth' have no masks: boxes are compared" in message for message in form.messages)
    assert "compare boxes" in plugin.form(NAME, curated, {"use_masks": True}).errors[0]
    assert plugin.call(NAME, curated, max_inside=1.0)["found"] == 8


def test_objects_without_labels_are_found(plugin, curated):
    label_ids = ids(curated, "segmentations")
    text, calls = plugin.run_to_the_end(NAME, curated)
    assert text.startswith("**8 objects without a label**\n\nIn 4 of 4 images, tagged `unlabeled` in `segmentations`")
    view = DatasetView._build(curated, calls["set_view"]["view"])
    assert view.values("id") == [labels[0] for labels in label_ids] + [labels[1] for labels in label_ids]
    assert curated.count_label_tags("segmentations") == {"unlabeled": 8}


def test_labels_without_objects_are_found(plugin, curated):
    label_ids = ids(curated, "ground_truth")
    result = plugin.call(NAME, curated, look_for="labels")
    assert (result["found"], result["samples"], result["tag"], result["field"]) == (4, 4, "unsupported", "ground_truth")
    tagged = curated.select_labels(tags="unsupported", fields="ground_truth")
    assert ids(tagged, "ground_truth") == [labels[-1:] for labels in label_ids]

    curated.set_values("segmentations", [None, *curated.values("segmentations")[1:]])
    text, _ = plugin.run_to_the_end(NAME, curated, {"look_for": "labels"})
    assert "**3 labels without an object**" in text and "1 image left out" in text


def test_no_objects_found(plugin, curated):
    text, calls = plugin.run_to_the_end(NAME, curated, {"min_score": 2})
    assert text == "**0 objects without a label**"
    assert "set_view" not in calls


def test_skipped_images_are_reported(plugin, curated):
    sample = curated.first()
    sample.segmentations.detections[0].bounding_box = [0, 0, 0, 0]
    sample.save()
    text, calls = plugin.run_to_the_end(NAME, curated)
    assert "**6 objects" in text and f"**1 image skipped.** The first: `{sample.filepath}: " in text
    button = calls["show_output"]["outputs"]["type"]["properties"]["button_0"]["view"]
    assert button["params"] == {"samples": [sample.id]}


def test_only_the_view_or_selection_is_searched(plugin, curated):
    assert plugin.call(NAME, curated.limit(1))["found"] == 2
    selected = curated.values("id")[1:3]
    result = plugin.call(NAME, curated, selected=selected, view_target="SELECTED_SAMPLES")
    assert result["found"] == 4
    assert [sum(map(len, tags)) for tags in curated.values("segmentations.detections.tags")] == [2, 2, 2, 0]
