"""Scenes are reproducible, and their masks are exact."""

import contextlib
import io

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from fiftyone_mobilesamv2.training.scenes import (
    MIN_OBJECT_AREA,
    TEST_SEED,
    TRAIN_SEED,
    SceneExamples,
    make_scene,
    write_coco,
)


def test_seed_and_index_determine_the_scene():
    first, again, other = make_scene(TRAIN_SEED, 7), make_scene(TRAIN_SEED, 7), make_scene(TEST_SEED, 7)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert first.image.shape != other.image.shape or (first.image != other.image).any()


def test_masks_and_boxes_cover_the_visible_parts():
    for index in range(20):
        scene = make_scene(TEST_SEED, index)
        height, width = scene.labels.shape
        assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
        assert 256 <= height <= 512 and 256 <= width <= 512 and scene.num_objects >= 1
        masks = scene.masks()
        assert masks.sum(0).max() == 1  # where objects overlap, the pixel belongs to the upper one
        assert (masks.sum((1, 2)) >= MIN_OBJECT_AREA).all()
        for mask, (x0, y0, x1, y1) in zip(masks, scene.boxes().astype(int)):
            rows, columns = np.nonzero(mask)
            assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_objects_are_visible():
    """Most mask outlines are also edges of the image, so the masks belong to the drawn objects."""
    from cv2 import CV_32F, Sobel

    inside, outside = [], []
    for index in range(10):
        scene = make_scene(TEST_SEED, index)
        grey = scene.image.mean(2).astype(np.float32)
        edges = np.hypot(Sobel(grey, CV_32F, 1, 0), Sobel(grey, CV_32F, 0, 1))
        outline = np.zeros(scene.labels.shape, bool)
        outline[:, 1:] |= scene.labels[:, 1:] != scene.labels[:, :-1]
        outline[1:] |= scene.labels[1:] != scene.labels[:-1]
        inside.append(np.median(edges[outline]))
        outside.append(np.median(edges[~outline]))
    assert np.median(inside) > 3 * np.median(outside)


def test_scenes_are_written_in_coco_format(tmp_path):
    images, file = write_coco(tmp_path, 2)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["000.png", "001.png"]
    for index in range(2):
        scene = make_scene(TEST_SEED, index)
        np.testing.assert_array_equal(cv2.imread(str(images / f"{index:03d}.png"))[:, :, ::-1], scene.image)
        annotations = coco.imgToAnns[index]
        assert len(annotations) == scene.num_objects
        for annotation, mask, (x0, y0, x1, y1) in zip(annotations, scene.masks(), scene.boxes()):
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum() and annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]


def test_scenes_are_examples():
    examples = SceneExamples(TEST_SEED, 5)
    assert len(examples) == 5 and len(set(example.id for example in examples)) == 5
    scene, example = make_scene(TEST_SEED, 3), examples[3]
    np.testing.assert_array_equal(example.read(), scene.image)
    np.testing.assert_array_equal(example.boxes, scene.boxes())
    for rle, mask in zip(example.masks, scene.masks(), strict=True):
        np.testing.assert_array_equal(mask_utils.decode(rle), mask)
    assert example.ignored.shape == (0, 4)
    assert [each.id for each in examples[3:]] == [examples[3].id, examples[-1].id]
    with pytest.raises(IndexError):
        examples[5]
