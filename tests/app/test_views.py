"""Every form on every kind of view that the App can show."""

import re
import uuid

import cv2
import fiftyone as fo
import fiftyone.brain as fob
import numpy as np
import pytest
from fiftyone import ViewField as F
from playwright.sync_api import expect

from fiftyone_mobilesamv2 import evaluate_proposals
from fiftyone_mobilesamv2.operators import OPERATORS

TITLES = [operator.title for operator in OPERATORS if operator.identifier != "cancel"]
FAULTS = ("Traceback", "Error:", "Exception", "went wrong", "Unsupported")


@pytest.fixture(scope="module")
def images(scenes_template):
    dataset = scenes_template.clone(f"images-{uuid.uuid4().hex[:4]}", persistent=True)
    dataset.set_values("scene", list("aaabbb"))
    dataset.set_values("number", [6, 5, 4, 3, 2, 1])
    dataset.set_values("embedding", list(np.eye(6)))
    evaluate_proposals(dataset, "proposals", eval_key="ar", progress=False)
    dataset.evaluate_detections("proposals", gt_field="ground_truth", eval_key="eval", progress=False)
    fob.compute_similarity(dataset, embeddings="embedding", brain_key="similarity", backend="sklearn")
    similar = dataset.sort_by_similarity(dataset.first().id, brain_key="similarity", k=3)
    views = {
        "dynamic-groups": dataset.group_by("scene"),
        "ordered-groups": dataset.group_by("scene", order_by="number"),
        "view-of-groups": dataset.group_by("scene").limit(1),
        "matched": dataset.match(F("number") > 3),
        "sorted": dataset.sort_by("number"),
        "similar": similar,
        "patches": dataset.to_patches("proposals").limit(4),
        "evaluation-patches": dataset.to_evaluation_patches("eval").limit(4),
    }
    for name, view in views.items():
        dataset.save_view(name, view)
    yield dataset
    dataset.delete()


@pytest.fixture(scope="module")
def groups(images):
    dataset = fo.Dataset(f"groups-{uuid.uuid4().hex[:4]}", persistent=True)
    dataset.add_group_field("group", default="left")
    samples = list(images)
    for pair in zip(samples[::2], samples[1::2]):
        group = fo.Group()
        for sample, name in zip(pair, ("left", "right")):
            copy = fo.Sample(sample.filepath, group=group.element(name), scene=sample.scene)
            for field in ("ground_truth", "proposals"):
                copy[field] = sample[field].copy()
            dataset.add_sample(copy)
    dataset.save_view("one-slice", dataset.select_group_slices("right"))
    dataset.save_view("all-slices", dataset.select_group_slices())
    dataset.save_view("groups-of-slices", dataset.select_group_slices().group_by("scene"))
    yield dataset
    dataset.delete()


@pytest.fixture(scope="module")
def videos(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    path = str(folder / "video.webm")  # Chromium plays VP8
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"VP80"), 5, (320, 256))
    video = fo.Sample(path)
    for number, sample in enumerate(images.limit(3), 1):
        image = cv2.resize(cv2.imread(sample.filepath), (320, 256))
        writer.write(image)
        cv2.imwrite(str(folder / f"{number}.png"), image)
        frame = video.frames[number] = fo.Frame(filepath=str(folder / f"{number}.png"))
        for field in ("ground_truth", "proposals"):
            frame[field] = sample[field].copy()
    writer.release()
    video["events"] = fo.TemporalDetections(detections=[fo.TemporalDetection(label="x", support=[1, 2])])
    dataset = fo.Dataset(f"videos-{uuid.uuid4().hex[:4]}", persistent=True)
    dataset.add_sample(video)
    dataset.compute_metadata()
    dataset.save_view("clips", dataset.to_clips("events"))
    dataset.save_view("frames", dataset.to_frames())
    dataset.save_view("frame-patches", dataset.to_frames().to_patches("proposals").limit(4))
    yield dataset
    dataset.delete()


def open_view(app, dataset, view=None):
    """Opens a saved view of a dataset, or the dataset."""
    app.page.goto(f"{app.server.url}/datasets/{dataset.name}" + (f"?view={view}" if view else ""))
    expect(app.page.locator('[data-cy="entry-counts"]')).to_have_text(
        re.compile(r"\d"),  # such as "2 groups", "4 patches" or "1 clip"
        timeout=60_000,
    )


def check_forms(app):
    """Opens every form. None shows a fault, and each says what is missing or can be executed."""
    for title in TITLES:
        app.operator(title)
        text = app.form_text()
        assert title in text, title
        assert not any(fault in text for fault in FAULTS), f"{title}: {text}"
        app.cancel()


@pytest.mark.slow
@pytest.mark.parametrize(
    "view",
    [
        None,
        "dynamic-groups",
        "ordered-groups",
        "view-of-groups",
        "matched",
        "sorted",
        "similar",
        "patches",
        "evaluation-patches",
    ],
)
def test_forms_on_images(app, images, view):
    open_view(app, images, view)
    check_forms(app)


@pytest.mark.slow
@pytest.mark.parametrize("view", [None, "one-slice", "all-slices", "groups-of-slices"])
def test_forms_on_groups(app, groups, view):
    open_view(app, groups, view)
    check_forms(app)


@pytest.mark.slow
@pytest.mark.parametrize("view", [None, "clips", "frames", "frame-patches"])
def test_forms_on_videos(app, videos, view):
    open_view(app, videos, view)
    check_forms(app)


def check_forms_and_close_sample(app):
    modal = app.page.locator('[data-cy="modal"]')
    modal.locator('canvas[canvas-loaded="true"]').first.wait_for()
    check_forms(app)
    expect(modal).to_be_visible()
    app.page.mouse.click(5, 450)  # beside it, which closes it: the server remembers an open sample from page to page
    expect(modal).to_be_hidden(timeout=60_000)


@pytest.mark.slow
@pytest.mark.parametrize("view", [None, "dynamic-groups"])
def test_forms_beside_an_open_sample(app, images, view):
    open_view(app, images, view)
    app.wait_grid()
    app.page.locator('[data-cy="looker"]').first.click()
    check_forms_and_close_sample(app)


@pytest.mark.slow
def test_forms_on_a_sample_opened_by_its_address(app, images):
    app.page.goto(f"{app.server.url}/datasets/{images.name}?id={images.first().id}")
    check_forms_and_close_sample(app)


@pytest.mark.slow
def test_dynamic_groups_are_measured_flat(app, images):
    open_view(app, images, "dynamic-groups")
    app.operator("Measure image coverage")
    assert "The current view counts as all samples of its groups." in app.form_text()
    app.choose("Labels", "proposals")
    app.execute()
    app.wait_output("6 images measured")
    app.done()
    images.reload()
    assert all(0 < share <= 1 for share in images.values("proposals_coverage"))
