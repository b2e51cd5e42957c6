"""`load_lvis` on small files in the format of lvis_v1_val.json."""

import json
import random

import fiftyone as fo
import numpy as np
import pytest
from PIL import Image

from fiftyone_mobilesamv2.evaluation.lvis import load_lvis

WIDTH, HEIGHT = 12, 10
COUNT = 30
FREQUENCIES = {1: "r", 2: "c", 3: "f"}


@pytest.fixture
def content():
    """Image k lies in train2017 if k is even, else in val2017; it has one object of each category from 1 to k % 3."""
    images, annotations = [], []
    for key in range(1, COUNT + 1):
        url = f"http://images.cocodataset.org/{'val' if key % 2 else 'train'}2017/{key:012d}.png"
        images.append({"id": key, "coco_url": url, "width": WIDTH, "height": HEIGHT})
        images[-1] |= {"neg_category_ids": [3], "not_exhaustive_category_ids": []}
        for category in range(1, key % 3 + 1):
            entry = {"id": len(annotations) + 1, "image_id": key, "category_id": category, "area": 6.0}
            entry |= {"bbox": [1, 1, 3, 2], "segmentation": [[1, 1, 4, 1, 4, 3, 1, 3]]}
            annotations.append(entry)
    categories = [{"id": key, "name": f"thing {key}", "frequency": value} for key, value in FREQUENCIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def load(mongod, tmp_path, content):
    """Writes the images, into a folder per split or a single one, and loads them."""
    loaded = []

    def load(folders=True, keys=range(1, COUNT + 1), **arguments):
        images = tmp_path / ("split" if folders else "flat")
        for entry in content["images"]:
            if entry["id"] in keys:
                path = images / ("/".join(entry["coco_url"].split("/")[-2 if folders else -1 :]))
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (WIDTH, HEIGHT)).save(path)
        file = tmp_path / "lvis.json"
        file.write_text(json.dumps(content))
        loaded.append(load_lvis(images, file, **arguments))
        return loaded[-1]

    yield load
    for dataset in loaded:
        dataset.delete()


def image_ids(dataset):
    return [int(path[-16:-4]) for path in dataset.values("filepath")]


@pytest.mark.parametrize("folders", [True, False])
def test_all_images_and_objects_are_loaded(load, folders):
    dataset = load(folders)
    assert image_ids(dataset) == list(range(1, COUNT + 1))
    for key, sample in enumerate(dataset, 1):
        detections = sample.ground_truth.detections
        assert [d.label for d in detections] == [f"thing {c}" for c in range(1, key % 3 + 1)]
        assert [d.frequency for d in detections] == ["r", "c"][: key % 3]
        for detection in detections:
            assert detection.iscrowd is False and detection.area == 6
            np.testing.assert_allclose(detection.bounding_box, [1 / WIDTH, 1 / HEIGHT, 3 / WIDTH, 2 / HEIGHT])
            assert detection.mask.shape == (2, 3) and detection.mask.all()
    rare = dataset.filter_labels("ground_truth", fo.ViewField("frequency") == "r")
    assert rare.count("ground_truth.detections") == 20
    assert isinstance(dataset.get_field("ground_truth.detections.frequency"), fo.StringField)


def test_drawn_images_do_not_depend_on_the_order_of_the_file(load, content):
    first = image_ids(load(sample=8))
    assert len(set(first)) == 8
    random.Random(1).shuffle(content["images"])
    random.Random(2).shuffle(content["annotations"])
    assert image_ids(load(sample=8)) == first
    assert image_ids(load(sample=8, seed=1)) != first


def test_images_are_drawn_from_all_existing_ones(load):
    existing = set(range(1, 16))
    dataset = load(keys=existing, sample=15)
    assert set(image_ids(dataset)) == existing
    assert 0 in dataset.values(fo.ViewField("ground_truth.detections").length())  # including images without objects
    with pytest.raises(
        FileNotFoundError, match=r"^15 of the 30 images .*lvis\.json don't exist: .* draw fewer than 16"
    ):
        load(keys=existing, sample=16)


def test_without_sampling_every_image_must_exist(load):
    with pytest.raises(FileNotFoundError, match=r"^2 of the 30 images in .*lvis\.json .*train2017/000000000030\.png"):
        load(keys=range(1, 29))


def test_unknown_category_is_reported(load, content):
    content["annotations"][0]["category_id"] = 4
    with pytest.raises(ValueError, match=r"lvis\.json: annotation 1 refers to image 1 and category 4"):
        load(sample=1)


def test_invalid_url_is_refused(load, content):
    content["images"][0]["coco_url"] = "http://[images/1.png"
    with pytest.raises(
        ValueError, match=r"lvis\.json: image 1 has coco_url='http://\[images/1\.png': Invalid IPv6 URL"
    ):
        load(keys=())


def test_coco_file_is_refused(load, content):
    content["images"][0] = {"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT, "coco_url": ""}
    del content["images"][0]["coco_url"]
    with pytest.raises(ValueError, match=r"lvis\.json: image 1 has no 'coco_url'"):
        load(keys=())


def test_named_dataset_persists_and_is_never_overwritten(load):
    dataset = load(name="lvis-test", sample=2)
    assert dataset.persistent
    with pytest.raises(ValueError, match="dataset named 'lvis-test' exists"):
        load(name="lvis-test", sample=3)
    assert len(fo.load_dataset("lvis-test")) == 2
