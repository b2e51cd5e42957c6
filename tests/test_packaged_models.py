"""Quality of the packaged weights: on a small part of the unseen scenes and photos that docs/quality reports."""

import json
import shutil

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.errors import CheckpointError
from fiftyone_mobilesamv2.evaluation.average_recall import average_recall
from fiftyone_mobilesamv2.images import read_image
from fiftyone_mobilesamv2.modeling.checkpoints import files
from fiftyone_mobilesamv2.modeling.checkpoints.catalog import DEMO_MODEL, PHOTO_MODEL
from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS, included_model, megabytes_to_download
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

SCENES = PHOTOS = 20


@pytest.fixture(scope="module", params=[DEMO_MODEL, PHOTO_MODEL])
def model(request):
    return MobileSAMv2.from_pretrained(request.param, device="cpu"), request.param


@pytest.fixture(scope="module")
def scenes():
    made = [make_scene(TEST_SEED, 1000 + index) for index in range(SCENES)]
    return [(scene.image, [mask_utils.encode(np.asfortranarray(mask)) for mask in scene.masks()]) for scene in made]


@pytest.fixture(scope="module")
def labeled_photos(photos):
    coco = json.loads((photos / "instances.json").read_text())
    labeled = []
    for entry in coco["images"][:PHOTOS]:
        size = entry["height"], entry["width"]
        objects = [a for a in coco["annotations"] if a["image_id"] == entry["id"] and not a.get("iscrowd")]
        rles = [mask_utils.merge(mask_utils.frPyObjects(a["segmentation"], *size)) for a in objects]
        labeled.append((read_image(photos / "images" / entry["file_name"]), rles))
    return labeled


def prompted(model, images):
    """Mean IoU of the masks from the objects' boxes, and from a point inside each."""
    from_boxes, from_points = [], []
    for image, objects in images:
        boxes = mask_utils.toBbox(objects)
        boxes[:, 2:] += boxes[:, :2]
        pixels = [np.argwhere(mask_utils.decode(rle)) for rle in objects]
        inside = [each[len(each) // 2][None, ::-1] + 0.5 for each in pixels]
        for ious, segmentation in (
            (from_boxes, model.segment_anything([image], boxes=[boxes])[0]),
            (from_points, model.segment_anything([image], points=[inside])[0]),
        ):
            ious += [mask_utils.iou([a], [b], [0])[0, 0] for a, b in zip(segmentation.rle(), objects)]
    return np.mean(from_boxes), np.mean(from_points)


def recall(model, images):
    segmentations = model.segment_everything([image for image, _ in images])
    return average_recall((each.rle(), objects) for each, (_, objects) in zip(segmentations, images))["AR@1000"]


def test_files_are_small_and_not_pickled():
    sizes = {file.name: file.stat().st_size for file in PACKAGED_WEIGHTS.iterdir()}
    weights = {f"{name}_{part}.safetensors" for name in ("demo", "nano") for part in ("sam", "detector")}
    assert set(sizes) == weights | {"nano_LICENSE.md"}
    for model in ("demo", "nano"):
        assert sum(size for name, size in sizes.items() if name.startswith(model)) < 20e6


def test_package_works_without_the_weights_for_photos(tmp_path, monkeypatch):
    """Their licence is narrower than the code's, so distributors may leave them out."""
    assert included_model() == PHOTO_MODEL
    for path in PACKAGED_WEIGHTS.glob("demo_*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(files, "PACKAGED_WEIGHTS", tmp_path)
    assert included_model() == DEMO_MODEL and megabytes_to_download(PHOTO_MODEL) == 0
    with pytest.raises(CheckpointError, match=r"nano_sam.safetensors is part of the package and is missing: reinstall"):
        MobileSAMv2.from_pretrained(PHOTO_MODEL, device="cpu")
    MobileSAMv2.from_pretrained(included_model(), device="cpu")


@pytest.mark.slow
def test_masks_of_scenes(model, scenes):
    loaded, name = model
    from_boxes, from_points = prompted(loaded, scenes)
    assert from_boxes >= {DEMO_MODEL: 0.75, PHOTO_MODEL: 0.72}[name]
    assert from_points >= {DEMO_MODEL: 0.60, PHOTO_MODEL: 0.50}[name]
    assert recall(loaded, scenes) >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("model", [PHOTO_MODEL], indirect=True)
def test_masks_of_photos(model, labeled_photos):
    loaded, _ = model
    from_boxes, from_points = prompted(loaded, labeled_photos)
    assert from_boxes >= 0.43 and from_points >= 0.26
    assert recall(loaded, labeled_photos) >= 0.12
