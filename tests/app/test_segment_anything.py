"""Turning boxes into masks with the mouse: selected boxes, and those of a whole dataset."""

import fiftyone as fo
import pytest

DEMO = "mobilesamv2-demo-torch"


@pytest.fixture
def boxed(scenes):
    """Scenes with only the boxes of some objects, in `boxes`."""
    for sample in scenes:
        boxes = [detection.bounding_box for detection in sample.ground_truth.detections[:3]]
        sample["boxes"] = fo.Detections(detections=[fo.Detection(label="thing", bounding_box=box) for box in boxes])
        sample.save()
    scenes.delete_sample_fields(["ground_truth", "proposals"])
    return scenes


@pytest.mark.slow
def test_masks_for_all_boxes(app, boxed):
    app.open(boxed.name)
    app.operator("Segment from prompts")
    assert app.value("Field of prompts") == "boxes"
    app.choose("Model", DEMO)
    assert app.errors() == []
    app.screenshot("segment-anything-form")
    app.execute()
    text = app.wait_output("objects in 6 images")
    app.done()
    app.wait_grid()
    app.screenshot("segment-anything-grid")
    boxed.reload()
    detections = [detection for sample in boxed for detection in sample.boxes.detections]
    assert f"{len(detections)} objects in 6 images" in text
    assert all(detection.mask is not None and detection.label == "thing" for detection in detections)
    app.operator("Segment from prompts")
    assert f"'boxes' has {len(detections)} labels here, all with masks" in app.form_text()
    app.cancel()


@pytest.mark.slow
def test_masks_for_selected_boxes(app, boxed):
    app.open(boxed.name)
    sample = boxed.last()
    app.page.locator('[data-cy="looker"]').nth(5).click()
    canvas = app.page.locator('[data-cy="modal"] canvas[canvas-loaded="true"]').first
    canvas.wait_for()
    app.page.wait_for_timeout(1500)  # for the opening animation
    app.click_label(sample, sample.boxes.detections[0])
    app.screenshot("segment-anything-selected")
    app.operator("Segment from prompts")
    assert "Selected: 1 label of 'boxes'" in app.form_text()
    app.choose("Model", DEMO)
    app.execute()
    assert "reload the page" in app.wait_output("1 object in 1 image")
    app.done()
    app.wait_grid()  # the sample modal is closed
    app.screenshot("segment-anything-selected-grid")
    boxed.reload()
    assert [d.mask is not None for d in boxed.last().boxes.detections] == [True, False, False]
