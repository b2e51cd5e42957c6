import fiftyone as fo
import numpy as np
import pytest

NAME = "image_coverage"


def test_form_has_defaults(plugin, scenes):
    form = plugin.form(NAME, scenes)
    assert form.errors == []
    assert form.default("field") == "ground_truth" and form.default("use_masks") is True
    assert any("ground_truth_coverage, ground_truth_objects" in message for message in form.messages)
    scenes.clone_sample_field("ground_truth", "segmentations")
    form = plugin.form(NAME, scenes)
    assert form.default("field") == "segmentations"
    assert set(form.choices("field")) == {"segmentations", "ground_truth"}


def test_form_says_what_is_wrong(plugin, scenes, dataset):
    assert "Open a dataset" in plugin.form(NAME, None).errors[0]
    assert "has no samples" in plugin.form(NAME, dataset).errors[0]
    assert "view has no samples" in plugin.form(NAME, scenes.limit(0)).errors[0]
    assert "works on the whole dataset" in plugin.form(NAME, scenes.to_patches("ground_truth")).messages[0]
    assert "'filepath' is no longer available" in plugin.form(NAME, scenes, {"field": "filepath"}).errors[0]
    scenes.add_sample_field("ground_truth_small", fo.StringField)
    assert "'ground_truth_small' exists" in plugin.form(NAME, scenes).errors[0]
    dataset.add_sample(fo.Sample("/none/x.png"))
    assert "has no field of Detections or Polylines" in plugin.form(NAME, dataset).errors[0]


def test_form_suggests_boxes_without_masks(plugin, scenes):
    for sample in scenes.iter_samples(autosave=True):
        for label in sample.ground_truth.detections:
            label.mask = None
    form = plugin.form(NAME, scenes)
    assert form.errors == [] and form.default("use_masks") is False
    (error,) = plugin.form(NAME, scenes, {"use_masks": True}).errors
    assert error == "Labels in 'ground_truth' have no masks: measure boxes."
    assert plugin.call(NAME, scenes)["images"] == 4


def test_figures_are_stored_and_summarized(plugin, scenes):
    scenes.add_sample(fo.Sample("/none/x.png", metadata=fo.ImageMetadata(height=10, width=10)))
    text, calls = plugin.run_to_the_end(NAME, scenes)
    covered, objects = [], []
    for sample in scenes.limit(4):
        union = np.zeros((sample.metadata.height, sample.metadata.width), bool)
        for label in sample.ground_truth.detections:
            x, y = np.round(np.array(label.bounding_box[:2]) * union.shape[::-1]).astype(int)
            h, w = label.mask.shape
            union[y : y + h, x : x + w] |= label.mask
        covered.append(union.mean())
        objects.append(len(sample.ground_truth.detections))
    assert scenes.values("ground_truth_coverage") == [*covered, None]
    assert scenes.values("ground_truth_objects") == [*objects, None]
    assert "4 images measured" in text and "reload_dataset" in calls
    assert f"{np.mean(objects):.1f} objects cover {np.mean(covered):.1%}" in text
    assert "Not measured: 1 without a value in `ground_truth`" in text


def test_only_the_view_is_measured(plugin, scenes):
    plugin.call(NAME, scenes.limit(1))
    assert [value is None for value in scenes.values("ground_truth_objects")] == [False, True, True, True]


def test_skipped_images_are_reported(plugin, scenes):
    first = scenes.first()
    first.ground_truth.detections[0].bounding_box = [0.5, 0.5, -1, 0.1]
    first.save()
    text, calls = plugin.run_to_the_end(NAME, scenes)
    assert "3 images measured" in text and "1 image skipped" in text and "bounding_box" in text
    properties = calls["show_output"]["outputs"]["type"]["properties"]
    (button,) = [each for each in properties.values() if each["view"].get("label") == "Show skipped samples"]
    assert button["view"]["params"] == {"samples": [first.id]}


def test_error_if_no_image_is_usable(plugin, scenes):
    for sample in scenes.iter_samples(autosave=True):
        sample.ground_truth.detections[0].bounding_box = [0.5, 0.5, -1, 0.1]
    with pytest.raises(Exception, match="No image could be used"):
        plugin.call(NAME, scenes)
