import fiftyone as fo
import numpy as np
import pytest
from fiftyone.core.view import DatasetView

NAME = "find_duplicates"


@pytest.fixture
def doubled(scenes):
    """Each scene's first object twice, the first time with lower confidence, and its left half as a part."""
    for sample in scenes:
        first = sample.ground_truth.detections[0]
        x, y, w, h = first.bounding_box
        columns = first.mask.shape[1] // 2
        half = first.mask[:, :columns]
        box = [x, y, w * columns / first.mask.shape[1], h]
        assert 0 < half.sum() < 0.8 * first.mask.sum()
        labels = [
            fo.Detection(label="again", bounding_box=first.bounding_box, mask=first.mask, confidence=0.8),
            fo.Detection(label="object", bounding_box=first.bounding_box, mask=first.mask, confidence=0.9),
            fo.Detection(label="half", bounding_box=box, mask=np.ascontiguousarray(half), confidence=0.7),
        ]
        sample["segmentations"] = fo.Detections(detections=labels)
        sample.save()
    return scenes


def test_form_has_defaults(plugin, doubled):
    form = plugin.form(NAME, doubled)
    assert form.errors == [] and form.messages == []
    names = ("field", "iou", "containment", "rank_by", "use_masks", "show")
    assert [form.default(name) for name in names] == ["segmentations", 0.8, 0.9, "confidence", True, "duplicate"]


def test_only_field_is_the_default(plugin, scenes):
    form = plugin.form(NAME, scenes)
    assert form.errors == [] and form.default("field") == "ground_truth"


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"iou": 1.5}, "IoU: a number from 0.01 to 1 was expected, not 1.5"),
        ({"containment": 0}, "Share inside: a number from 0.01 to 1 was expected, not 0"),
        ({"rank_by": "size"}, "Score: 'size' is no longer available"),
        ({"field": "filepath"}, "Labels: 'filepath' is no longer available"),
        ({"show": "all"}, "Show afterwards: 'all' is no longer available"),
    ],
)
def test_form_says_what_is_wrong(plugin, doubled, params, error):
    (message,) = plugin.form(NAME, doubled, params).errors
    assert error in message


def test_form_refuses_unusable_data(plugin, doubled, dataset):
    assert "Open a dataset" in plugin.form(NAME, None).errors[0]
    assert "view has no samples" in plugin.form(NAME, doubled.limit(0)).errors[0]
    assert "works on the whole dataset" in plugin.form(NAME, doubled.to_patches("segmentations")).messages[0]
    dataset.add_sample(fo.Sample("/nowhere/0.png"))
    assert "no field of Detections or Polylines" in plugin.form(NAME, dataset).errors[0]
    field = doubled.get_field("segmentations.detections.tags")
    field.read_only = True
    field.save()
    assert "'segmentations.detections.tags' is read-only" in plugin.form(NAME, doubled).errors[0]
    assert plugin.form(NAME, doubled, {"field": "ground_truth"}).errors == []


def test_boxes_are_compared_without_masks(plugin, doubled):
    doubled.set_values("segmentations.detections.mask", [[None] * 3] * 4)
    form = plugin.form(NAME, doubled)
    assert form.errors == [] and form.default("use_masks") is False
    assert plugin.call(NAME, doubled)["counts"] == {"duplicate": 4, "part": 4, "whole": 4}
    assert "compare boxes" in plugin.form(NAME, doubled, {"use_masks": True}).errors[0]


@pytest.mark.parametrize(("show", "label"), [("duplicate", "again"), ("part", "half"), ("whole", "object")])
def test_each_relation_can_be_shown(plugin, doubled, show, label):
    text, calls = plugin.run_to_the_end(NAME, doubled, {"show": show})
    assert text.startswith("**4 duplicates, 4 parts of 4 labels**\n\nTagged in `segmentations`")
    view = DatasetView._build(doubled, calls["set_view"]["view"])
    assert view.values("segmentations.label") == [label] * 4
    for sample in doubled:
        again, kept, half = sample.segmentations.detections
        assert again.duplicate_of == half.part_of == kept.id
        assert (again.tags, kept.tags, half.tags) == (["duplicate"], ["whole"], ["part"])


def test_no_duplicates_found(plugin, doubled):
    view = doubled.filter_labels("segmentations", fo.ViewField("label") == "half")
    text, calls = plugin.run_to_the_end(NAME, view)
    assert "**0 duplicates, 0 parts of 0 labels**" in text and "set_view" not in calls


def test_skipped_images_are_reported(plugin, doubled):
    sample = doubled.first()
    sample.segmentations.detections[0].bounding_box = [0, 0, 0, 0]
    sample.save()
    result = plugin.call(NAME, doubled)
    assert result["counts"]["duplicate"] == 3
    assert [each["id"] for each in result["skipped"]] == [sample.id]
