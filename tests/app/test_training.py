"""From corrected labels to a model of one's own, and to its masks, with the mouse."""

import re
import time
import uuid
from pathlib import Path

import pytest

from fiftyone_mobilesamv2 import load_coco, zoo
from fiftyone_mobilesamv2.training.scenes import write_coco

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEMO = "mobilesamv2-demo-torch"
TRAINING = 400_000  # ms for a few epochs, beside other tests


@pytest.fixture
def cells(mongod, tmp_path, monkeypatch):
    """24 scenes of a style that the demo model doesn't know, its `proposals`, and an incomplete `ground_truth`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from other_scenes import make_other_scene

    dataset = load_coco(*write_coco(tmp_path, 24, make_other_scene), name=f"cells-{uuid.uuid4().hex[:4]}")
    dataset.persistent = True
    dataset.apply_model(zoo.load_model(DEMO, device="cpu"), "proposals")
    dataset.delete_labels(ids=[sample.ground_truth.detections[0].id for sample in dataset], fields="ground_truth")
    yield dataset
    dataset.delete()


@pytest.mark.slow
def test_labels_are_corrected_trained_on_and_used(app, cells):
    name = cells.name
    app.open(name)

    # Some labels are missing: accept two of the proposals that have none.
    app.operator("Find unlabeled objects")
    app.execute()
    found = re.search(r"([\d,]+) objects without", app.wait_output("objects without a label"))[1]
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
    app.wait_samples("24 samples")

    app.operator("Train on my labels")
    assert (app.value("Labels"), app.value("Name of the new model")) == ("ground_truth", name)
    app.choose("What to train", "Masks")
    app.choose("Model to start from", DEMO)
    cells.reload()
    objects = cells.count("ground_truth.detections")
    text = f"24 of 24 images have labels in 'ground_truth', {objects:,} objects: about 19 to train on, about 5 for"
    assert text in app.form_text()
    app.screenshot("train-form")
    app.fill("Name of the new model", "../x")
    assert "can't have the name" in app.errors()[0]
    app.fill("Name of the new model", name)
    app.toggle("Advanced settings")
    app.fill("Epochs", 2)
    assert app.errors() == []
    app.screenshot("train-form-advanced")
    app.execute()
    app.wait_output("Epoch 2 of 2, loss ", TRAINING)
    app.screenshot("train-running")
    text = app.wait_output("Trained on 19 images", TRAINING)
    assert f"{name} outlines the objects better than {DEMO}" in text and "AR@1000 of masks" in text
    panel = app.panel("segevery")
    panel.get_by_text("Trained models", exact=True).wait_for(timeout=90_000)
    app.screenshot("train-summary")

    app.output.get_by_role("button", name="Segment the view with it").click()
    app.wait_form()
    app.screenshot("train-segment-form")
    assert app.value("Model") == name
    app.execute()
    app.wait_output("objects in 24 images", TRAINING)
    app.done()
    cells.reload()
    assert cells.count("segmentations.detections") > cells.count("proposals.detections") / 2
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
