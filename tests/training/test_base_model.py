"""The base of a training: what it finds and no label explains is ignored, and what it labels as a teacher."""

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.training.base_model import Base
from fiftyone_mobilesamv2.training.examples import Example
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

NO_BOXES = np.zeros((0, 4), np.float32)


@pytest.fixture(scope="module")
def base():
    return Base("mobilesamv2-demo-torch", torch.device("cpu"))


@pytest.fixture(scope="module")
def scene():
    return make_scene(TEST_SEED, 1)


def example(scene, boxes=NO_BOXES, ignored=NO_BOXES):
    return Example("id", "name", lambda: scene.image, boxes, None, ignored)


def xywh(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).astype(float)


def test_unexplained_finds_are_ignored(base, scene):
    found = base.model.discover([scene.image])[0].boxes.numpy()
    labels = np.array([found[0], [0, 0, 200, 200]], np.float32)  # one that was found, and one that covers others
    crowd = np.array([[200, 0, 400, 90]], np.float32)
    (result,) = base.with_ignored([example(scene, labels, crowd)], lambda share: None)
    known = xywh(np.concatenate([labels, crowd]))
    ious = mask_utils.iou(xywh(found), known, [0] * len(known))
    covered = mask_utils.iou(xywh(found), known, [1] * len(known))  # pycocotools: the share of the found box
    expected = found[(ious < 0.5).all(1) & (covered < 0.7).all(1)]
    assert 0 < len(expected) < len(found) - 1
    assert np.array_equal(result.ignored, np.concatenate([crowd, expected]))
    assert np.array_equal(result.boxes, labels)


def test_everything_is_unexplained_without_labels(base, scene):
    found = base.model.discover([scene.image])[0].boxes.numpy()
    assert len(found) > 5 and np.array_equal(base.with_ignored([example(scene)], print)[0].ignored, found)


def test_teacher_labels_what_it_finds(base, scene):
    labeled = base.labeled(example(scene))
    assert np.array_equal(labeled.boxes, base.model.discover([scene.image])[0].boxes.numpy()) and labeled.masks is None


def test_files_of_a_new_model_refer_to_the_catalog(base, tmp_path):
    own = tmp_path / "detector.safetensors"
    files = base.files_of_new({"detector_checkpoint": own}, tmp_path)
    assert files["detector_checkpoint"] == own
    assert files["encoder_checkpoint"].filename == files["decoder_checkpoint"].filename == "demo_sam.safetensors"
    assert base.paths["encoder_checkpoint"] == PACKAGED_WEIGHTS / "demo_sam.safetensors"
