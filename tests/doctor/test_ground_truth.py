"""Known objects: their masks match the drawings, and trivial answers score low."""

import json

import numpy as np
import pytest

from fiftyone_mobilesamv2.doctor import ground_truth
from fiftyone_mobilesamv2.doctor.ground_truth import MAX_FILL, PHOTO_OBJECTS, filled, known_images, photos, scenes
from fiftyone_mobilesamv2.doctor.segmentation_check import _trivial_ious

DRAWN = json.loads(PHOTO_OBJECTS.read_text())["photos"]


def test_photos_of_all_packages_are_available():
    """The test environment contains all the packages with photos."""
    available = photos()
    assert [known.name for known in available] == [photo["path"].rsplit("/")[-1] for photo in DRAWN]
    assert [known.image.shape[:2] for known in available] == [tuple(photo["size"]) for photo in DRAWN]
    assert sum(len(known.objects) for known in available) >= 14


@pytest.mark.parametrize("kind", ["photos", "scenes"])
def test_trivial_answers_score_low(kind):
    images = known_images(kind)
    for known in images:
        assert (known.fills < MAX_FILL).all() and known.masks.any((1, 2)).all()
        assert known.masks.shape == (len(known.objects), *known.image.shape[:2])
    boxes, ellipses = zip(*map(_trivial_ious, images))
    assert np.mean(np.concatenate(boxes)) < 0.5 and np.mean(np.concatenate(ellipses)) < 0.52


def test_iou_of_a_filled_box_is_the_fill_ratio():
    for known in scenes()[:3]:
        boxes, _ = _trivial_ious(known)
        np.testing.assert_allclose(boxes, known.fills)


def test_boxes_are_tight():
    for known in photos():
        for mask, (x0, y0, x1, y1) in zip(known.masks, known.boxes.astype(int)):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert (y0, y1, x0, x1) == (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)


def test_rings_are_filled_by_the_even_odd_rule():
    square, hole = [[2, 2], [12, 2], [12, 12], [2, 12]], [[5, 5], [9, 5], [9, 9], [5, 9]]
    mask = filled([square, hole], (16, 16))
    assert mask[2:13, 2:13].sum() == mask.sum() == 11 * 11 - 3 * 3  # the hole's outline belongs to the mask


def test_photo_of_another_version_is_skipped(tmp_path, monkeypatch):
    content = {"photos": [DRAWN[0] | {"sha256": "0" * 64}, DRAWN[1] | {"package": "no_such_package"}, DRAWN[2]]}
    (tmp_path / "objects.json").write_text(json.dumps(content))
    monkeypatch.setattr(ground_truth, "PHOTO_OBJECTS", tmp_path / "objects.json")
    assert [known.name for known in photos()] == [DRAWN[2]["path"].rsplit("/")[-1]]
