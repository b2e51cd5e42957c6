"""Coverage figures on samples, checked against pixel counts of full-image masks."""

import fiftyone as fo
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiftyone_mobilesamv2 import load_coco
from fiftyone_mobilesamv2.curation.coverage import NUMBERS, _measured, image_coverage

PIXELS = 120 * 160


def numbers(samples):
    return {end: samples.values(f"objects_{end}") for end in NUMBERS}


@pytest.fixture
def labelled(dataset, add_image, detection, rectangle):
    def boxes(*sizes):
        return [detection(rectangle(*size)) for size in sizes]

    add_image(objects=boxes((0, 0, 40, 30), (20, 0, 40, 30)))
    # Areas at COCO's size limits: 32x32 and one row more, 96x96 and one column more.
    add_image(objects=boxes((0, 0, 32, 32), (0, 0, 32, 33), (0, 0, 96, 96), (0, 0, 97, 96)))
    add_image(objects=[])
    add_image(objects=None)
    return dataset


def test_by_hand(labelled):
    result = image_coverage(labelled, "objects", progress=False)
    assert numbers(labelled) == {
        "coverage": [60 * 30 / PIXELS, 97 * 96 / PIXELS, 0, None],
        "objects": [2, 4, 0, None],
        "small": [0, 1, 0, None],
        "medium": [2, 2, 0, None],
        "large": [0, 1, 0, None],
        "median_area": [40 * 30 / PIXELS, (32 * 33 + 96 * 96) / 2 / PIXELS, None, None],
    }
    assert (result.images, result.unsegmented, result.skipped) == (3, 1, [])
    assert result.means["objects"] == 2
    assert result.means["coverage"] == pytest.approx((60 * 30 + 97 * 96) / 3 / PIXELS)
    assert result.means["median_area"] == pytest.approx((1200 + (32 * 33 + 96 * 96) / 2) / 2 / PIXELS)
    assert labelled.get_field("objects_coverage").description.startswith("share of the image that the objects in 'obj")
    assert [group.paths for group in labelled.app_config.sidebar_groups if group.name == "coverage"] == [
        [f"objects_{end}" for end in NUMBERS]
    ]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 300))
def test_random_masks(seed, count):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 60, 2)
    whole, labels = [], []
    for _ in range(count):
        x, y = rng.integers(width), rng.integers(height)
        w, h = rng.integers(1, width - x + 1), rng.integers(1, height - y + 1)
        mask = rng.random((h, w)) < rng.random()
        whole.append(np.zeros((height, width), bool))
        whole[-1][y : y + h, x : x + w] = mask
        label = fo.Detection(bounding_box=[x / width, y / height, w / width, h / height], mask=mask)
        labels.append(label.to_dict())
    measured = _measured(labels, (int(height), int(width)), use_masks=True)
    areas = [mask.sum() for mask in whole]
    assert measured["coverage"] == (np.any(whole, 0).mean() if whole else 0)
    assert measured["objects"] == measured["small"] + measured["medium"] + measured["large"] == count
    assert measured["small"] == sum(area <= 32**2 for area in areas)
    assert measured["median_area"] == (pytest.approx(np.median(areas) / height / width) if whole else None)


def test_boxes_without_masks(labelled):
    for each in labelled.iter_samples(autosave=True):
        for label in each.objects.detections if each.objects else []:
            label.mask = None
    with pytest.raises(ValueError, match=r"0\.png: Detection \w+ has no mask.*use_masks=False"):
        image_coverage(labelled, "objects", progress=False)
    assert not labelled.has_field("objects_coverage")
    image_coverage(labelled, "objects", use_masks=False, progress=False)
    assert labelled.values("objects_coverage") == [60 * 30 / PIXELS, 97 * 96 / PIXELS, 0, None]
    assert labelled.values("objects_large") == [0, 1, 0, None]


def test_unusable_label_skips_only_its_image(labelled):
    image_coverage(labelled, "objects", progress=False)
    first = labelled.first()
    first.objects.detections[0].bounding_box = [0.5, 0.5, -1, 0.1]
    first.save()
    result = image_coverage(labelled, "objects", progress=False)
    assert [(image["id"], image["filepath"]) for image in result.skipped] == [(first.id, first.filepath)]
    assert "bounding_box" in result.skipped[0]["cause"]
    assert labelled.values("objects_objects") == [None, 4, 0, None]  # nothing of the previous run remains
    assert result.images == 2 and result.means["objects"] == 2


def test_view_leaves_other_samples_unchanged(labelled):
    view = labelled.limit(1)
    image_coverage(view, "objects", progress=False)
    assert labelled.values("objects_objects") == [2, None, None, None]
    labelled.match(fo.ViewField("filepath").ends_with("2.png")).set_values("objects_objects", [7])
    image_coverage(view, "objects", progress=False)  # fields of an earlier run are replaced
    assert labelled.values("objects_objects") == [2, None, 7, None]


def test_samples_in_memory_are_updated(labelled):
    held = labelled.first()
    image_coverage(labelled, "objects", progress=False)
    assert held.objects_objects == 2


def test_field_of_the_user_is_not_overwritten(labelled):
    labelled.add_sample_field("objects_small", fo.StringField)
    labelled.set_values("objects_small", list("abcd"))
    with pytest.raises(ValueError, match="'objects_small' exists and is not from an earlier measurement"):
        image_coverage(labelled, "objects", progress=False)
    assert labelled.values("objects_small") == list("abcd")
    assert not labelled.has_field("objects_coverage")


def test_read_only_field_is_not_overwritten(labelled):
    image_coverage(labelled, "objects", progress=False)
    field = labelled.get_field("objects_coverage")
    field.read_only = True
    field.save()
    with pytest.raises(ValueError, match="'objects_coverage' of an earlier measurement is read-only"):
        image_coverage(labelled, "objects", progress=False)


def test_empty_view(labelled):
    result = image_coverage(labelled.limit(0), "objects", progress=False)
    assert (result.images, result.unsegmented, result.skipped) == (0, 0, [])
    assert set(result.means.values()) == {None}


def test_invalid_input_is_refused(labelled):
    with pytest.raises(ValueError, match=r"has no field 'nothing' for the objects.*objects"):
        image_coverage(labelled, "nothing", progress=False)
    with pytest.raises(ValueError, match="'filepath' contains"):
        image_coverage(labelled, "filepath", progress=False)
    with pytest.raises(ValueError, match="patches or frames"):
        image_coverage(labelled.to_patches("objects"), "objects", progress=False)


def test_photos(mongod, photos):
    dataset = load_coco(photos / "images", photos / "instances.json", sample=10, gt_field="objects")
    image_coverage(dataset, "objects", progress=False)
    for each in dataset:
        union = np.zeros((each.metadata.height, each.metadata.width), bool)
        areas = []
        for label in each.objects.detections:
            x, y, _, _ = np.round(np.array(label.bounding_box) * [*union.shape[::-1], *union.shape[::-1]]).astype(int)
            h, w = label.mask.shape
            union[y : y + h, x : x + w] |= label.mask
            areas.append(label.mask.sum())
        assert each.objects_coverage == union.mean()
        assert each.objects_objects == len(areas)
        assert each.objects_large == sum(area > 96**2 for area in areas)
    dataset.delete()
