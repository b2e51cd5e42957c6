"""Quality of the packaged weights, on a small part of the unseen scenes that the README reports."""

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.evaluation.average_recall import average_recall
from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

SCENES = 20


@pytest.fixture(scope="module")
def model():
    return MobileSAMv2.from_pretrained("mobilesamv2-demo-torch", device="cpu")


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(TEST_SEED, 1000 + index) for index in range(SCENES)]


def objects_of(scene):
    return [mask_utils.encode(np.asfortranarray(mask)) for mask in scene.masks()]


def test_files_are_small_and_not_pickled():
    files = list(PACKAGED_WEIGHTS.iterdir())
    assert {file.name for file in files} == {"demo_sam.safetensors", "demo_detector.safetensors"}
    assert sum(file.stat().st_size for file in files) < 20e6


@pytest.mark.slow
def test_masks_from_boxes_and_points_are_good(model, scenes):
    from_boxes, from_points = [], []
    for scene in scenes:
        inside = [pixels[len(pixels) // 2][None, ::-1] + 0.5 for pixels in map(np.argwhere, scene.masks())]
        objects = objects_of(scene)
        for ious, segmentation in (
            (from_boxes, model.segment_anything([scene.image], boxes=[scene.boxes()])[0]),
            (from_points, model.segment_anything([scene.image], points=[inside])[0]),
        ):
            ious += [mask_utils.iou([a], [b], [0])[0, 0] for a, b in zip(segmentation.rle(), objects)]
    assert np.mean(from_boxes) >= 0.75
    assert np.mean(from_points) >= 0.60


@pytest.mark.slow
def test_segment_everything_reaches_the_recall(model, scenes):
    segmentations = model.segment_everything([scene.image for scene in scenes])
    recall = average_recall((each.rle(), objects_of(scene)) for each, scene in zip(segmentations, scenes))
    assert recall["AR@1000"] >= 0.5
