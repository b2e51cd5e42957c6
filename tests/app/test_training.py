"""From corrected labels to a model of one's own, and to its masks, with the mouse."""

import re
import time
from pathlib import Path

import pytest

DEMO = "mobilesamv2-demo-torch"
TRAINING = 240_000  # ms for two epochs of a few scenes, beside other tests


@pytest.mark.slow
def test_labels_are_corrected_trained_on_and_used(app, scenes):
    removed = [sample.ground_truth.detections[0].id for sample in scenes]
    scenes.delete_labels(ids=removed, fields="ground_truth")
    name = re.sub("[^a-z0-9-]", "", scenes.name)
    app.open(scenes.name)

    # Some labels are missing: accept two of the proposals that have none.
    app.operator("Find unlabeled objects")
    app.execute()
    found = int(re.search(r"(\d+) objects without", app.wait_output("objects without a label"))[1])
    app.done()
    app.wait_samples(f"{found} patches")
    app.wait_grid()
    app.select_samples(2)
    app.operator("Promote to labels")
    app.fill("Class", "found")
    app.execute()
    app.wait_output("2 objects labeled found")
    app.done()
    app.page.locator('[data-cy="btn-clear-view-bar"]').click()
    app.wait_samples("6 samples")

    app.operator("Train on my labels")
    assert (app.value("Labels"), app.value("Name of the new model")) == ("ground_truth", name)
    app.choose("Model to start from", DEMO)
    scenes.reload()
    objects = scenes.count("ground_truth.detections")
    text = (
        f"6 of 6 images have labels in 'ground_truth', {objects} objects: about 5 to train on, about 1 for validation."
    )
    assert text in app.form_text()
    app.screenshot("train-form")
    app.fill("Name of the new model", "../x")
    assert "can't have the name" in app.errors()[0]
    app.fill("Name of the new model", name)
    app.toggle("Advanced settings")
    app.fill("Epochs", 2)
    app.toggle("Keep the model even if it is not better")
    assert app.errors() == []
    app.screenshot("train-form-advanced")
    app.execute()
    app.wait_output("Epoch 2 of 2, loss ", TRAINING)
    app.screenshot("train-running")
    text = app.wait_output("Trained on 5 images", TRAINING)
    assert "AR@1000 of masks" in text and name in text
    panel = app.panel("segevery")
    panel.get_by_text("Trained models", exact=True).wait_for(timeout=90_000)
    app.screenshot("train-summary")

    app.output.get_by_role("button", name="Segment the view with it").click()
    app.wait_form()
    app.screenshot("train-segment-form")
    assert app.value("Model") == name
    app.execute()
    app.wait_output("objects in 6 images")
    app.done()
    scenes.reload()
    assert scenes.count("segmentations.detections") > 0
    app.screenshot("train-panel")

    panel.get_by_role("button", name="Segment everything with it").click()
    app.wait_form()
    assert app.value("Model") == name
    app.cancel()


@pytest.mark.slow
def test_training_can_be_scheduled(app, scenes, worker, server):
    app.open(scenes.name)
    app.operator("Train on my labels")
    app.choose("Model to start from", DEMO)
    name = app.value("Name of the new model")
    app.toggle("Advanced settings")
    app.fill("Epochs", 1)
    app.toggle("Keep the model even if it is not better")
    app.schedule()
    app.page.get_by_text("Operation successfully scheduled").wait_for()
    trained = Path(server.environment["FIFTYONE_MODEL_ZOO_DIR"], "mobilesamv2", "trained", name, "config.json")
    deadline = time.monotonic() + TRAINING / 1000
    while not trained.exists():
        assert time.monotonic() < deadline, worker.read_text()
        time.sleep(1)
    app.page.reload()
    panel = app.open_panel("segevery")
    panel.get_by_text("Trained models", exact=True).wait_for(timeout=90_000)
    panel.get_by_text(name).first.wait_for()
    app.screenshot("train-scheduled-panel")
