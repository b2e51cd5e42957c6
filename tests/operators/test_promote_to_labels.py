import fiftyone as fo
import pytest

NAME = "promote_to_labels"


@pytest.fixture
def proposed(scenes):
    """Scenes whose objects are proposals and whose ground truth contains only the first object of each."""
    scenes.clone_sample_field("ground_truth", "proposals")
    for sample in scenes.iter_samples(autosave=True):
        sample.ground_truth.detections = sample.ground_truth.detections[:1]
        sample.ground_truth.detections[0].label = "dog"
        for label in sample.proposals.detections:
            label.tags = ["unlabeled"]
    return scenes


def selected_labels(samples, count=2):
    """The selection as the App sends it."""
    return [
        {"label_id": label.id, "sample_id": sample.id, "field": "proposals"}
        for sample in samples
        for label in sample.proposals.detections[:count]
    ]


def test_form_says_how_to_select(plugin, proposed):
    for samples in (proposed, proposed.to_patches("proposals")):
        (error,) = plugin.form(NAME, samples).errors
        assert error.startswith("Select the proposals first")
    (error,) = plugin.form(NAME, proposed, selected=proposed.values("id")[:1]).errors  # a sample is not a proposal
    assert error.startswith("Select the proposals first")
    assert "Open a dataset" in plugin.form(NAME, None).errors[0]


def test_form_with_labels_selected(plugin, proposed):
    form = plugin.form(NAME, proposed, {"label": "cat"}, selected_labels=selected_labels(proposed))
    assert form.errors == [] and "8 objects of 'proposals' selected." in form.messages
    assert form.default("gt_field") == "ground_truth" and form.choices("gt_field") == ["ground_truth"]
    assert form.choices("label") == ["dog"]
    assert form.inputs["label"].required and form.default("label") is None


def test_form_suggests_declared_classes(plugin, proposed):
    labels = selected_labels(proposed)
    proposed.default_classes = ["bird", "cow"]
    assert plugin.form(NAME, proposed, selected_labels=labels).choices("label") == ["bird", "cow"]
    proposed.classes = {"ground_truth": ["fish"]}
    assert plugin.form(NAME, proposed, selected_labels=labels).choices("label") == ["fish"]
    proposed.classes, proposed.default_classes = {}, []
    assert plugin.form(NAME, proposed, {"gt_field": "new"}, selected_labels=labels).choices("label") == []


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"gt_field": "no name"}, "'no name' is not a valid field name"),
        ({"gt_field": "filepath"}, "'filepath' contains fiftyone.core.fields.StringField"),
        ({"gt_field": "proposals"}, "the same field, 'proposals'"),
        ({"gt_field": "locked"}, "read-only"),
    ],
)
def test_form_says_what_is_wrong(plugin, proposed, params, error):
    proposed.add_sample_field("locked", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections, read_only=True)
    (message,) = plugin.form(
        NAME, proposed, {"label": "cat", **params}, selected_labels=selected_labels(proposed)
    ).errors
    assert error in message


def test_form_refuses_labels_that_are_not_proposals(plugin, proposed):
    labels = selected_labels(proposed, 1)
    labels[0] = {**labels[0], "field": "ground_truth"}
    assert "several fields: ground_truth, proposals" in plugin.form(NAME, proposed, selected_labels=labels).errors[0]
    gone = [{**label, "field": "gone"} for label in labels]
    assert "no field 'gone'" in plugin.form(NAME, proposed, selected_labels=gone).errors[0]
    kinds = proposed.to_patches("ground_truth")
    form = plugin.form(NAME, kinds, {"gt_field": "proposals"}, selected=kinds.values("id")[:1])
    assert form.inputs["pred_field"].default == "ground_truth"


def test_selected_labels_are_promoted(plugin, proposed):
    labels = selected_labels(proposed)
    text, calls = plugin.run_to_the_end(NAME, proposed, {"label": "cat"}, selected_labels=labels)
    assert "8 objects labeled `cat`" in text and "`ground_truth` of 4 images" in text and "reload_dataset" in calls
    ids = [label["label_id"] for label in labels]
    assert [i for i in proposed.values("ground_truth.detections.promoted_from", unwind=True) if i] == ids
    assert proposed.count_values("ground_truth.detections.label") == {"dog": 4, "cat": 8}
    assert proposed.count_label_tags("proposals")["promoted"] == 8
    text, _ = plugin.run_to_the_end(NAME, proposed, {"label": "cow"}, selected_labels=labels)
    assert "0 objects labeled" in text and "left unchanged: 8" in text


def test_selected_patches_are_promoted(plugin, proposed):
    patches = proposed.match_labels(tags="unlabeled").to_patches("proposals")
    ids = patches.values("id")[:3]
    params = {"label": "bird", "gt_field": "found"}
    form = plugin.form(NAME, patches, params, selected=ids)
    assert form.errors == [] and "3 objects of 'proposals' selected." in form.messages
    result = plugin.call(NAME, patches, selected=ids, **params)
    assert (result["promoted"], result["missing"], result["skipped"]) == (3, [], [])
    assert proposed.values("found.detections.promoted_from", unwind=True) == ids
    assert proposed.select_labels(ids=ids).count_label_tags("proposals") == {"promoted": 3}


def test_labels_selected_in_patches_are_promoted(plugin, proposed):
    patches = proposed.to_patches("proposals")
    labels = [{"label_id": id, "sample_id": id, "field": "proposals"} for id in patches.values("id")[1:3]]
    assert plugin.call(NAME, patches, selected_labels=labels, label="cat")["promoted"] == 2
    assert proposed.count("ground_truth.detections") == 6


def test_deleted_proposals_are_reported(plugin, proposed):
    labels = selected_labels(proposed)
    proposed.delete_labels(ids=[labels[0]["label_id"]], fields="proposals")
    text, _ = plugin.run_to_the_end(NAME, proposed, {"label": "cat"}, selected_labels=labels)
    assert "7 objects labeled" in text and "No longer there: 1" in text


def test_missing_class_is_refused(plugin, proposed):
    labels = selected_labels(proposed)
    for params, error in (({}, "label. Reason: Required property"), ({"label": " "}, "Class: a name was expected")):
        with pytest.raises(Exception, match=error):
            plugin.call(NAME, proposed, selected_labels=labels, **params)
    assert proposed.count("ground_truth.detections") == 4


def test_unusable_proposal_skips_only_its_image(plugin, proposed):
    labels = selected_labels(proposed)
    first = proposed.first()
    first.proposals.detections[0].bounding_box = [0.5, 0.5, -1, 0.1]
    first.save()
    text, calls = plugin.run_to_the_end(NAME, proposed, {"label": "cat"}, selected_labels=labels)
    assert "6 objects labeled" in text and "1 image skipped" in text and "bounding_box" in text
    properties = calls["show_output"]["outputs"]["type"]["properties"]
    (button,) = [each for each in properties.values() if each["view"].get("label") == "Show skipped samples"]
    assert button["view"]["params"] == {"samples": [first.id]}


def test_dismissed_proposals_are_not_suggested_again(plugin, proposed):
    proposed.set_values(
        "proposals.detections.confidence",
        [[0.5] * n for n in proposed.values(fo.ViewField("proposals.detections").length())],
    )
    found = plugin.call("find_unlabeled_objects", proposed)["found"]
    patches = proposed.select_labels(tags="unlabeled", fields="proposals").to_patches("proposals")
    wrong = patches.limit(2).values("id")
    form = plugin.form(NAME, patches, {"verdict": "dismiss"}, selected=wrong)
    assert form.errors == [] and "label" not in form.inputs
    text, calls = plugin.run_to_the_end(NAME, patches, {"verdict": "dismiss"}, selected=wrong)
    assert "2 objects dismissed" in text and {"set_view", "clear_selected_samples"} <= set(calls)
    assert proposed.count_label_tags("proposals")["dismissed"] == 2
    assert plugin.call("find_unlabeled_objects", proposed)["found"] == found - 2
    assert proposed.count_label_tags("proposals")["unlabeled"] == found - 2
