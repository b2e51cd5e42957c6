"""Masks and numbers of images with an EXIF orientation, whatever their metadata says, as for the image as shown."""

import json

import fiftyone as fo
import numpy as np
import pytest
from PIL import ExifTags, Image, features
from pycocotools.coco import COCO

from fiftyone_mobilesamv2 import evaluate_proposals, load_coco, zoo
from fiftyone_mobilesamv2.curation.coverage import image_coverage
from fiftyone_mobilesamv2.curation.export import export_masks
from fiftyone_mobilesamv2.runs.segment import segment_everything
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

FIELD = "segmentations"
SUFFIXES = ["jpg", "png", "tiff", "webp", *(["avif"] if features.check("avif") else [])]
SHOWN_SIDEWAYS = 5, 6, 7, 8  # of the orientations; except in WEBP, where none is applied


def save(image, path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))


@pytest.fixture(scope="module")
def segmented(mongod, tmp_path_factory):
    """A scene in each format and orientation, segmented."""
    folder = tmp_path_factory.mktemp("turned")
    image = Image.fromarray(make_scene(TEST_SEED, 0).image).resize((120, 80))
    dataset = fo.Dataset()
    for suffix in SUFFIXES:
        for orientation in range(1, 9):
            path = folder / f"{orientation}.{suffix}"
            save(image, path, orientation)
            dataset.add_sample(fo.Sample(str(path), tags=[suffix, str(orientation)]))
    segment_everything(dataset, zoo.load_model("mobilesamv2-demo-torch", device="cpu"), FIELD, progress=False)
    yield dataset
    dataset.delete()


@pytest.fixture
def turned(segmented):
    copy = segmented.clone()
    yield copy
    copy.delete()


def shown(sample):
    """(height, width) of the image as shown."""
    is_sideways = "webp" not in sample.tags and int(sample.tags[1]) in SHOWN_SIDEWAYS
    return (120, 80) if is_sideways else (80, 120)


def full_masks(sample):
    """bool [N, height, width] of the stored masks in the image as shown."""
    height, width = shown(sample)
    masks = []
    for detection in sample[FIELD].detections:
        x, y, w, h = np.round(np.array(detection.bounding_box) * [width, height, width, height]).astype(int)
        masks.append(np.zeros((height, width), bool))
        masks[-1][y : y + h, x : x + w] = detection.mask
    return np.array(masks)


@pytest.mark.slow
@pytest.mark.parametrize("metadata", ["missing", "FiftyOne's", "as stored in the file"])
def test_masks_are_used_as_they_were_made(turned, tmp_path, metadata):
    if metadata == "FiftyOne's":
        turned.compute_metadata(progress=False)
    elif metadata == "as stored in the file":
        turned.set_values("metadata", [fo.ImageMetadata(width=120, height=80)] * len(turned))
    masks = [full_masks(sample) for sample in turned]
    assert min(map(len, masks)) > 3

    turned.clone_sample_field(FIELD, "ground_truth")
    results = evaluate_proposals(turned, FIELD, gt_field="ground_truth", eval_key="ar", progress=False)
    assert results.skipped == [] and results.metrics()["AR@1000"] == 1
    assert image_coverage(turned, FIELD, progress=False).skipped == []
    assert turned.values(f"{FIELD}_coverage") == pytest.approx([each.any(0).mean() for each in masks])
    export = export_masks(turned, FIELD, tmp_path / "masks.json", progress=False)
    assert export.skipped == []
    coco = COCO(export.path)
    for image, expected in zip(coco.dataset["images"], masks):
        annotations = coco.imgToAnns[image["id"]]
        np.testing.assert_array_equal([coco.annToMask(each) for each in annotations], expected)
    if metadata == "missing":
        sizes = [(sample.metadata.height, sample.metadata.width) for sample in turned]
        assert sizes == [shown(sample) for sample in turned]


@pytest.mark.slow
def test_mask_of_the_image_as_stored_has_its_cause_in_the_message(turned):
    """A label that was placed on the image before its orientation is applied can't be used."""
    sideways = turned.match_tags("png").match_tags("6")
    mask = np.ones((20, 60), bool)
    sideways.set_values(FIELD, [fo.Detections(detections=[fo.Detection(bounding_box=[0, 0, 0.5, 0.25], mask=mask)])])
    with pytest.raises(ValueError, match=r"6\.png.* it fits an image of 120x80 .* EXIF orientation"):
        image_coverage(sideways, FIELD, progress=False)


def annotations_of(path, width, height):
    """A COCO file of one image with one object, of 20 x 10 pixels at (30, 5)."""
    file = path.with_suffix(".json")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [30, 5, 20, 10], "iscrowd": 0}
    annotation["segmentation"] = [[30, 5, 50, 5, 50, 15, 30, 15]]
    image = {"id": 1, "file_name": path.name, "width": width, "height": height}
    file.write_text(
        json.dumps({"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "cat"}]})
    )
    return file


@pytest.mark.parametrize("name", ["6.jpg", "8.png", "5.webp", "3.png"])
def test_coco_file_of_the_image_as_shown(mongod, tmp_path, name):
    path = tmp_path / name
    save(Image.new("RGB", (120, 80)), path, int(path.stem))
    height, width = (120, 80) if name in ("6.jpg", "8.png") else (80, 120)
    dataset = load_coco(tmp_path, annotations_of(path, width, height))
    (sample,) = dataset
    assert (sample.metadata.width, sample.metadata.height) == (width, height)
    (detection,) = sample.ground_truth.detections
    assert detection.bounding_box == pytest.approx([30 / width, 5 / height, 20 / width, 10 / height])
    assert detection.mask.shape == (10, 20) and detection.mask.all()
    dataset.delete()


@pytest.mark.parametrize("name", ["6.jpg", "8.png"])
def test_coco_file_of_the_image_as_stored_is_refused(mongod, tmp_path, name):
    path = tmp_path / name
    save(Image.new("RGB", (120, 80)), path, int(path.stem))
    existing = fo.list_datasets()
    with pytest.raises(ValueError, match=rf"{name} is shown with 80x120 pixels, .* says 120x80: its EXIF orientation"):
        load_coco(tmp_path, annotations_of(path, 120, 80))
    assert fo.list_datasets() == existing
