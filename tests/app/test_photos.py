"""Photos of one's own, without a network: the first masks take two clicks, on a dataset that has no labels."""

import uuid

import fiftyone as fo
import pytest

from fiftyone_mobilesamv2.installed_photos import installed_photos

from .test_segment_everything import TOOLBAR


@pytest.fixture
def photos():
    dataset = fo.Dataset(f"photos-{uuid.uuid4().hex[:4]}", persistent=True)
    dataset.add_samples([fo.Sample(str(path)) for path in installed_photos()], progress=False)
    yield dataset
    dataset.delete()


def test_photos_are_segmented_with_what_the_form_offers(app, photos):
    app.open(photos.name)
    app.page.locator(TOOLBAR).click()
    app.wait_form()
    assert app.value("Model") == "mobilesamv2-nano-torch"
    assert "will be downloaded" not in app.form_text()
    assert app.errors() == []
    app.execute()
    app.wait_output(f"objects in {len(photos)} images")
    app.done()
    app.page.get_by_text("segmentations", exact=True).first.wait_for()
    app.wait_grid()
    app.screenshot("photos-grid")
    photos.reload()
    assert sum(bool(sample.segmentations.detections) for sample in photos) >= len(photos) - 2
