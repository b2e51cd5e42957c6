"""Segmenting a dataset with the mouse, from the toolbar button to the masks in the grid."""

import shutil
import time

import fiftyone as fo
import pytest

from fiftyone_mobilesamv2.runs.record import recorded_runs

DEMO = "mobilesamv2-demo-torch"
TOOLBAR = '[data-item-id="@mobilesamv2/fiftyone_mobilesamv2/segment_everything"]'


@pytest.fixture
def bare(scenes):
    """Scenes that have not been segmented."""
    scenes.delete_sample_field("proposals")
    return scenes


def open_form(app):
    app.page.locator(TOOLBAR).click()
    app.wait_form()
    app.choose("Model", DEMO)


def test_dataset_is_segmented_from_the_toolbar(app, bare, scenes_template):
    app.open(bare.name)
    assert app.page.locator(f"{TOOLBAR} img").evaluate("image => image.naturalWidth") > 0  # the icon was loaded
    open_form(app)
    assert app.value("Label field") == "segmentations"
    assert "The demo model was trained only on synthetic scenes" in app.form_text()
    app.fill("Maximum prompts", 0)
    assert app.errors() == ["max_prompts: Maximum prompts: a whole number from 1 to 30000 was expected, not 0."]
    app.screenshot("segment-everything-invalid")
    app.fill("Maximum prompts", 320)
    assert app.errors() == []
    app.screenshot("segment-everything-form")
    app.execute()
    objects = scenes_template.count("proposals.detections")
    text = app.wait_output("objects in 6 images")
    app.screenshot("segment-everything-summary")
    assert f"{objects} objects in 6 images" in text and "images per second" in text
    app.done()
    app.page.get_by_text("segmentations", exact=True).first.wait_for()
    app.wait_grid()
    app.screenshot("segment-everything-grid")
    bare.reload()
    assert bare.count("segmentations.detections") == objects


@pytest.mark.slow
def test_form_offers_to_replace_existing_masks(app, scenes):
    app.open(scenes.name)
    objects = scenes.count("proposals.detections")
    open_form(app)
    app.fill("Label field", "proposals")
    assert "All 6 samples are already done" in app.form_text()
    assert app.errors() != []
    app.choose("'proposals' exists", "Replace existing masks")
    assert f"{objects} labels of 6 samples in 'proposals' will be deleted and replaced" in app.form_text()
    app.screenshot("segment-everything-replace")
    app.cancel()


@pytest.mark.slow
def test_only_selected_samples_are_segmented(app, bare):
    app.open(bare.name)
    app.select_samples(2)
    open_form(app)
    assert "Selected samples" in app.form_text()
    app.execute()
    app.wait_output("objects in 2 images")
    app.done()
    bare.reload()
    assert len(bare.exists("segmentations")) == 2


@pytest.mark.slow
def test_cancelled_run_keeps_stored_masks(app, bare):
    app.open(bare.name)
    open_form(app)
    app.choose("Prompting", "Grid")  # slow enough to be cancelled
    app.fill("Points per side", 16)
    app.fill("Batch size", 1)
    app.execute()
    app.wait_output("1 of 6 images")
    app.screenshot("segment-everything-running")
    app.output.get_by_role("button", name="Cancel").click()
    text = app.wait_output("Cancelled before the end")
    app.screenshot("segment-everything-cancelled")
    assert "Everything stored so far is kept" in text
    app.done()
    bare.reload()
    done = len(bare.exists("segmentations"))
    assert 1 <= done < 6
    (run,) = recorded_runs(bare, "segmentations")
    assert run.cancelled and run.images == done
    open_form(app)
    assert f"{done} of 6 samples are already done; {6 - done} sample" in app.form_text()
    app.cancel()


@pytest.mark.slow
def test_failures_are_shown(app, bare, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    bare.add_sample(fo.Sample(str(broken)))
    app.open(bare.name)
    open_form(app)
    app.execute()
    text = app.wait_output("1 image failed")
    assert "broken.png" in text
    app.screenshot("segment-everything-failures")
    app.output.get_by_role("button", name="Show failed samples").click()
    app.done()
    app.wait_samples("1 sample")
    app.page.locator('[data-cy="btn-clear-view-bar"]').click()
    app.wait_samples("7 samples")
    shutil.copy(bare.first().filepath, broken)
    app.page.locator(TOOLBAR).click()
    app.wait_form()
    assert "The last run into 'segmentations' failed for 1 sample. To retry only these" in app.form_text()
    app.screenshot("segment-everything-failed-before")
    app.form.get_by_role("button", name="Show failed samples").click()
    app.wait_samples("1 sample")
    app.cancel()
    open_form(app)
    app.execute()
    app.wait_output("objects in 1 image")
    app.done()
    bare.reload()
    labels = bare.values("segmentations.detections.bounding_box")
    assert len(labels) == 7 and labels[6] == labels[0] != []
    # The App itself reports that it can't show this image.
    app.problems[:] = [problem for problem in app.problems if "broken.png" not in problem]


def wait_for_worker(dataset, worker):
    deadline = time.monotonic() + 90
    while not any(not run.cancelled for run in recorded_runs(dataset, "segmentations")):
        assert time.monotonic() < deadline, worker.read_text()
        time.sleep(1)
        dataset.reload()


@pytest.mark.slow
def test_run_can_be_delegated(app, bare, worker, scenes_template):
    app.open(bare.name)
    open_form(app)
    app.schedule()
    app.page.get_by_text("Operation successfully scheduled").wait_for()
    app.screenshot("segment-everything-scheduled")
    wait_for_worker(bare, worker)
    assert bare.count("segmentations.detections") == scenes_template.count("proposals.detections")
    app.page.reload()
    app.page.get_by_text("segmentations", exact=True).first.wait_for()


@pytest.mark.slow
def test_scheduled_shards_use_the_chosen_precision(app, bare, worker):
    app.open(bare.name)
    open_form(app)
    app.choose("Precision", "bfloat16")
    app.fill("Jobs", 2)
    app.screenshot("segment-everything-parts")
    app.execute()
    app.wait_output("Scheduled as 2 operations")
    app.screenshot("segment-everything-parts-scheduled")
    app.done()
    wait_for_worker(bare, worker)
    (run,) = recorded_runs(bare, "segmentations")
    assert run.parameters["dtype"] == "bfloat16" and run.images == 6
    assert None not in bare.values("segmentations") and bare.count("segmentations.detections") > 50
