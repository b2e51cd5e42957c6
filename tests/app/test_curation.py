"""Curation with the mouse: missing labels, duplicates, coverage and export."""

import json

import pytest
from fiftyone import ViewField as F


@pytest.mark.slow
def test_unlabeled_objects_become_labels(app, scenes):
    removed = [label.id for sample in scenes for label in sample.ground_truth.detections[::2]]
    scenes.delete_labels(ids=removed, fields="ground_truth")
    before = scenes.count("ground_truth.detections")
    app.open(scenes.name)
    app.operator("Find unlabeled objects")
    assert app.value("Ground truth") == "ground_truth"
    assert app.errors() == []
    app.screenshot("find-unlabeled-form")
    app.execute()
    text = app.wait_output("objects without a label")
    app.done()
    scenes.reload()
    tagged = scenes.filter_labels("proposals", F("tags").contains("unlabeled"))
    tagged_ids = tagged.values("proposals.detections.id", unwind=True)
    num_found = len(tagged_ids)
    assert f"{num_found} objects without a label" in text and 0 < num_found <= scenes.count("proposals.detections")
    app.wait_samples(f"{num_found} patches")
    app.wait_grid()
    app.screenshot("find-unlabeled-patches")

    app.select_samples(2)
    app.operator("Promote to labels")
    assert "2 objects of 'proposals' selected" in app.form_text()
    assert app.errors() != []  # a class is required
    app.fill("Class", "found")
    assert app.errors() == []
    app.screenshot("promote-form")
    app.execute()
    app.wait_output("2 objects labeled found")
    app.done()
    app.wait_samples(f"{num_found - 2} patches")

    app.page.reload()
    app.wait_grid()
    app.select_samples(1)
    app.operator("Promote to labels")
    app.choose("Verdict", "Wrong")
    app.execute()
    app.wait_output("1 object dismissed")
    app.done()
    app.wait_samples(f"{num_found - 3} patches")
    scenes.reload()
    assert scenes.count("ground_truth.detections") == before + 2
    labels = scenes.filter_labels("ground_truth", F("label") == "found").values("ground_truth.detections", unwind=True)
    assert {label.promoted_from for label in labels} < set(tagged_ids)
    promoted = scenes.filter_labels("proposals", F("tags").contains("promoted"))
    assert promoted.count("proposals.detections") == 2


@pytest.mark.slow
def test_labels_without_objects_are_tagged(app, scenes):
    sample = scenes.first()
    wrong = sample.ground_truth.detections[0]
    wrong.bounding_box, wrong.mask = [0.001, 0.001, 0.01, 0.01], None
    sample.save()
    app.open(scenes.name)
    app.operator("Find unlabeled objects")
    app.choose("What to look for", "Labels without an object")
    app.execute()
    app.wait_output("labels without an object")
    app.done()
    scenes.reload()
    assert "unsupported" in scenes.first().ground_truth.detections[0].tags


@pytest.mark.slow
def test_duplicates_are_tagged_and_shown(app, scenes):
    sample = scenes.first()
    copy = sample.proposals.detections[0].copy()
    copy.confidence = 0.01
    sample.proposals.detections.append(copy)
    sample.save()
    app.open(scenes.name)
    app.operator("Find duplicates and parts")
    app.choose("Labels", "proposals")
    app.execute()
    app.wait_output("duplicate")
    app.screenshot("find-duplicates-summary")
    app.done()
    scenes.reload()
    duplicates = scenes.filter_labels("proposals", F("tags").contains("duplicate"))
    assert copy.id in duplicates.values("proposals.detections.id", unwind=True)
    app.wait_samples(f"{duplicates.count('proposals.detections')} patches")


@pytest.mark.slow
def test_coverage_is_measured_and_masks_exported(app, scenes, tmp_path):
    app.open(scenes.name)
    app.operator("Measure image coverage")
    app.choose("Labels", "proposals")
    app.execute()
    app.wait_output("6 images measured")
    app.done()
    app.page.get_by_text("proposals_coverage").first.wait_for()
    scenes.reload()
    assert all(0 < share <= 1 for share in scenes.values("proposals_coverage"))
    app.screenshot("image-coverage")

    app.operator("Export masks as COCO")
    app.choose("Masks", "proposals")
    path = tmp_path / "masks.json"
    app.fill("File", path)
    assert app.errors() == []
    app.execute()
    count = scenes.count("proposals.detections")
    app.wait_output(f"{count} masks of 6 images")
    app.screenshot("export-summary")
    app.done()
    assert len(json.loads(path.read_text())["annotations"]) == count
