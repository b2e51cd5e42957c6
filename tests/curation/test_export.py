"""COCO files of exported masks, read back by pycocotools and compared with FiftyOne's own masks."""

import json
import zlib

import fiftyone as fo
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from fiftyone_mobilesamv2 import load_coco
from fiftyone_mobilesamv2.curation.export import check_export, export_masks

HEIGHT, WIDTH = 60, 80


def detection(x, y, mask, **attributes):
    h, w = mask.shape
    box = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]
    return fo.Detection(bounding_box=box, mask=mask, **{"label": "cat", **attributes})


def whole_mask(label, height=HEIGHT, width=WIDTH):
    """bool [height, width], computed from FiftyOne's label alone."""
    x, y = round(label.bounding_box[0] * width), round(label.bounding_box[1] * height)
    h, w = label.mask.shape
    mask = np.zeros((height, width), bool)
    mask[y : y + h, x : x + w] = label.mask
    return mask


@pytest.fixture
def labelled(dataset):
    triangle = np.tri(10, dtype=bool)
    square = np.ones((4, 5), bool)
    scores = {"confidence": 0.75, "predicted_iou": 0.5, "stability": 0.25}
    images = {
        "a/one": [detection(3, 4, triangle, **scores), detection(70, 50, square, label="dog", iscrowd=True)],
        "a/b/none": [],
        "c/two": [detection(0, 0, square), detection(1, 1, square, label=None)],
        "c/never": None,
    }
    for name, labels in images.items():
        sample = fo.Sample(f"/images/{name}.png", metadata=fo.ImageMetadata(height=HEIGHT, width=WIDTH))
        sample["masks"] = None if labels is None else fo.Detections(detections=labels)
        dataset.add_sample(sample)
    return dataset


def test_by_hand(labelled, tmp_path):
    path = tmp_path / "new" / "masks.json"
    export = export_masks(labelled, "masks", path, progress=False)
    content = json.loads(path.read_text())
    names = ["a/one.png", "a/b/none.png", "c/two.png", "c/never.png"]
    assert content["images"] == [
        {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH} for number, name in enumerate(names, 1)
    ]
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "object"}]
    first, second, third, fourth = content["annotations"]
    counts = first.pop("segmentation")
    assert first == {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "area": 55,
        "bbox": [3, 4, 10, 10],
        "iscrowd": 0,
        "score": 0.75,
        "predicted_iou": 0.5,
        "stability": 0.25,
    }
    triangle = np.zeros((HEIGHT, WIDTH), bool)
    triangle[4:14, 3:13] = np.tri(10, dtype=bool)
    assert counts["size"] == [HEIGHT, WIDTH] and np.array_equal(mask_utils.decode(counts), triangle)
    assert (second["category_id"], second["iscrowd"], second["bbox"]) == (2, 1, [70, 50, 5, 4])
    assert [(each["image_id"], each["category_id"], each["area"]) for each in (third, fourth)] == [
        (3, 1, 20),
        (3, 3, 20),
    ]
    assert not {"score", "predicted_iou", "stability"} & {*second, *third, *fourth}
    assert (export.images, export.annotations, export.skipped) == (4, 4, [])
    assert export.bytes == path.stat().st_size and export.path == path and str(export.root) == "/images"
    assert [each.name for each in path.parent.iterdir()] == ["masks.json"]


def test_photos(mongod, photos, tmp_path):
    dataset = load_coco(photos / "images", photos / "instances.json", sample=12)
    path = tmp_path / "masks.json"
    export = export_masks(dataset, "ground_truth", path, progress=False)
    coco = COCO(str(path))
    assert len(coco.imgs) == export.images == 12
    assert len(coco.anns) == export.annotations == dataset.count("ground_truth.detections")
    for image, sample in zip(coco.dataset["images"], dataset):
        assert str(export.root / image["file_name"]) == sample.filepath
        annotations = coco.imgToAnns[image["id"]]
        for annotation, label in zip(annotations, sample.ground_truth.detections):
            mask = whole_mask(label, image["height"], image["width"])
            assert np.array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum()
            assert annotation["iscrowd"] == label.iscrowd
            assert coco.cats[annotation["category_id"]]["name"] == label.label
    again = load_coco(export.root, path)
    assert again.count("ground_truth.detections") == export.annotations
    for one, other in zip(dataset, again):
        for label, same in zip(one.ground_truth.detections, other.ground_truth.detections):
            assert np.array_equal(label.mask, same.mask)
            assert label.bounding_box == pytest.approx(same.bounding_box)
    dataset.delete()
    again.delete()


def test_polylines(labelled, tmp_path):
    square = fo.Polyline(label="cat", points=[[(0.25, 0.5), (0.5, 0.5), (0.5, 0.75), (0.25, 0.75)]], filled=True)
    first = labelled.first()
    first["outlines"] = fo.Polylines(polylines=[square])
    first.save()
    export_masks(labelled, "outlines", tmp_path / "x.json", progress=False)
    (annotation,) = json.loads((tmp_path / "x.json").read_text())["annotations"]
    assert (annotation["area"], annotation["bbox"]) == (20 * 15, [20, 30, 20, 15])


def test_export_of_a_view_contains_what_it_shows(labelled, tmp_path):
    view = labelled.filter_labels("masks", fo.ViewField("label") == "cat").sort_by("filepath", reverse=True)
    export = export_masks(view, "masks", tmp_path / "x.json", progress=False)
    content = json.loads((tmp_path / "x.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["c/two.png", "a/one.png"]
    assert content["categories"] == [{"id": 1, "name": "cat"}]
    assert (export.images, export.annotations) == (2, 2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda label: label.set_field("bounding_box", [0.5, 0.5, -0.1, 0.1]),
        lambda label: label.set_field("confidence", float("nan")),
        lambda label: label.set_field("iscrowd", 3),
    ],
)
def test_unusable_label_skips_only_its_image(labelled, tmp_path, spoil):
    first = labelled.first()
    spoil(first.masks.detections[0])
    first.save()
    export = export_masks(labelled, "masks", tmp_path / "x.json", progress=False)
    assert [image["id"] for image in export.skipped] == [first.id]
    content = json.loads((tmp_path / "x.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a/b/none.png", "c/two.png", "c/never.png"]
    assert [annotation["image_id"] for annotation in content["annotations"]] == [2, 2]


def test_existing_file_is_replaced_only_with_overwrite(labelled, tmp_path):
    path = tmp_path / "masks.json"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"masks\.json exists"):
        export_masks(labelled, "masks", path, progress=False)
    assert path.read_text() == "mine"
    export_masks(labelled, "masks", path, overwrite=True, progress=False)
    assert len(json.loads(path.read_text())["annotations"]) == 4


@pytest.mark.parametrize("stop_at", [1, 5])  # while writing, while checking
def test_interrupted_export_leaves_the_existing_file(labelled, tmp_path, stop_at):
    class Stop(Exception):
        pass

    calls = 0

    def progress(bar):
        nonlocal calls
        calls += 1
        if calls >= stop_at:
            raise Stop

    path = tmp_path / "masks.json"
    path.write_text("mine")
    with pytest.raises(Stop):
        export_masks(labelled, "masks", path, overwrite=True, progress=progress)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("masks.json", "mine")]


def change_mask(content):
    other = np.asfortranarray(np.ones((HEIGHT, WIDTH), np.uint8))
    content["annotations"][0]["segmentation"]["counts"] = mask_utils.encode(other)["counts"].decode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_mask, r"annotation 1 of /images/a/one\.png.*segmentation, area of the mask"),
        (
            lambda content: content["annotations"][1].update(category_id=1),
            r"annotation 2 .*differs from the stored label in category",
        ),
        (
            lambda content: content["annotations"][0].update(score=0.5),
            r"annotation 1 .*differs from the stored label in score",
        ),
        (lambda content: content["annotations"].pop(), r"1 annotations of /images/c/two\.png; 2 were expected"),
        (
            lambda content: content["images"][2].update(file_name="c/three.png"),
            r"three.*/images/c/two\.png was expected",
        ),
        (lambda content: content["images"][1].update(height=61), r"61.*of /images/a/b/none\.png is \(60, 80\)"),
        (lambda content: content["images"].pop(), r"None; /images/c/never\.png was expected"),
        (lambda content: content["images"].append({**content["images"][0], "id": 9}), r"is not among the samples"),
    ],
)
def test_check_finds_any_difference(labelled, tmp_path, damage, message):
    path = tmp_path / "masks.json"
    export_masks(labelled, "masks", path, progress=False)
    check_export(path, labelled, "masks", progress=False)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        check_export(path, labelled, "masks", progress=False)


def test_invalid_input_is_refused(labelled, tmp_path):
    def refused(samples, field, name, match):
        with pytest.raises(ValueError, match=match):
            export_masks(samples, field, tmp_path / name, progress=False)
        assert not list(tmp_path.iterdir())

    refused(labelled, "masks", "masks.txt", "must end with .json")
    refused(labelled, "nothing", "x.json", r"has no field 'nothing' for the masks.*masks")
    refused(labelled, "filepath", "x.json", "'filepath' contains")
    refused(labelled.limit(0), "masks", "new/x.json", "no samples")
    refused(labelled.to_patches("masks"), "masks", "x.json", "patches or frames")
    labelled._sample_collection.update_many({}, {"$set": {"masks.detections.0.mask": zlib.compress(b"no array")}})
    refused(labelled.limit(1), "masks", "x.json", "can't be decoded")
    labelled._sample_collection.update_many({}, {"$unset": {"masks.detections.0.mask": True}})
    refused(labelled.limit(1), "masks", "x.json", r"one\.png: Detection \w+ has no mask")


def test_home_folder_and_extensions_in_capitals(labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    export = export_masks(labelled, "masks", "~/masks.JSON", progress=False)
    assert export.path == tmp_path / "home" / "masks.JSON" and export.path.is_file()


def test_older_readers_can_read_the_file(labelled, tmp_path):
    """pycocotools up to 2.0.10 copies "info" and "licenses" in `loadRes`, whether they are there or not."""
    export_masks(labelled, "masks", tmp_path / "x.json", progress=False)
    content = json.loads((tmp_path / "x.json").read_text())
    assert "masks" in content["info"]["description"] and content["licenses"] == []
    results = COCO(tmp_path / "x.json").loadRes([content["annotations"][0]])
    assert len(results.anns) == 1
