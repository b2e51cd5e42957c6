"""`load_coco` compared with pycocotools on photos, and with known pixels on hand-made annotations."""

import json
import logging

import fiftyone as fo
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from fiftyone_mobilesamv2.evaluation.coco import load_coco

WIDTH, HEIGHT = 12, 10


def pasted(detection, metadata):
    """Full-image bool mask [H, W] of a detection whose box must lie on whole pixels."""
    box = np.array(detection.bounding_box) * ([metadata.width, metadata.height] * 2)
    x, y, w, h = np.round(box).astype(int)
    np.testing.assert_allclose(box, [x, y, w, h], atol=1e-9)
    assert detection.mask.dtype == bool and detection.mask.shape == (h, w)
    full = np.zeros((metadata.height, metadata.width), bool)
    full[y : y + h, x : x + w] = detection.mask
    return full


def rectangle(x0, y0, x1, y1):
    """Mask of the pixels x0 <= x < x1, y0 <= y < y1 of a small image."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def polygon(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def uncompressed(mask):
    """COCO's uncompressed RLE: column-major runs, starting with background."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(edges, prepend=0).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": [*counts, mask.size - sum(counts)]}


def compressed(mask):
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


class Files:
    """A folder of small images and their annotation file."""

    def __init__(self, folder):
        self.images, self.file = folder / "images", folder / "instances.json"
        self.images.mkdir()
        self.content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "cat"}]}

    def image(self, key, exists=True):
        name = f"{key:03d}.png"
        self.content["images"].append({"id": key, "file_name": name, "width": WIDTH, "height": HEIGHT})
        if exists:
            Image.new("RGB", (WIDTH, HEIGHT)).save(self.images / name)

    def object(self, segmentation, **changes):
        entry = {"id": len(self.content["annotations"]) + 1, "image_id": 1, "category_id": 3, "area": 1.5}
        entry |= {"bbox": [2.3, 1.2, 4.1, 3.3], "iscrowd": 0, "segmentation": segmentation}
        self.content["annotations"].append(entry | changes)

    def load(self, **arguments):
        self.file.write_text(json.dumps(self.content))
        dataset = load_coco(self.images, self.file, **arguments)
        self.loaded.append(dataset)
        return dataset


@pytest.fixture
def files(mongod, tmp_path):
    files = Files(tmp_path)
    files.image(1)
    files.loaded = []
    yield files
    for dataset in files.loaded:
        dataset.delete()


def test_photos_equal_those_of_pycocotools(mongod, photos):
    truth = COCO(photos / "instances.json")
    dataset = load_coco(photos / "images", photos / "instances.json")
    assert len(dataset) == len(truth.imgs) == 128
    assert not dataset.persistent
    seen = crowds = 0
    for sample, (key, image) in zip(dataset, truth.imgs.items()):
        assert sample.filename == image["file_name"]
        assert (sample.metadata.width, sample.metadata.height) == (image["width"], image["height"])
        detections = sample.ground_truth.detections
        assert len(detections) == len(truth.imgToAnns[key])
        for detection, annotation in zip(detections, truth.imgToAnns[key]):
            mask = truth.annToMask(annotation).astype(bool)
            np.testing.assert_array_equal(pasted(detection, sample.metadata), mask)
            assert detection.mask.any(0)[[0, -1]].all() and detection.mask.any(1)[[0, -1]].all()  # the box is tight
            assert detection.label == truth.cats[annotation["category_id"]]["name"]
            assert detection.area == annotation["area"]
            assert detection.iscrowd is bool(annotation["iscrowd"])
            seen, crowds = seen + 1, crowds + detection.iscrowd
    assert (seen, crowds) == (900, 13)
    dataset.delete()


TWO_PARTS = rectangle(1, 1, 4, 3) | rectangle(6, 5, 11, 9)
WITH_HOLE = rectangle(0, 0, WIDTH, HEIGHT) & ~rectangle(3, 3, 5, 6)


@pytest.mark.parametrize(
    "segmentation, expected",
    [
        ([polygon(1, 1, 4, 3)], rectangle(1, 1, 4, 3)),
        ([polygon(1, 1, 4, 3), polygon(6, 5, 11, 9)], TWO_PARTS),
        ([polygon(1, 1, 4, 3), polygon(2, 1, 6, 3)], rectangle(1, 1, 6, 3)),  # a union: overlaps don't cancel
        ([[1, 1], polygon(1, 1, 4, 3), [5, 5, 6, 6]], rectangle(1, 1, 4, 3)),
        ([[[1, 1], [4, 1], [4, 3], [1, 3]]], rectangle(1, 1, 4, 3)),  # pairs
        ([polygon(8, 7, 1e8, 1e8)], rectangle(8, 7, WIDTH, HEIGHT)),
        ([[8, 7, 1e6, 7, 1e6, 1e6, 8, 1e6]], rectangle(8, 7, WIDTH, HEIGHT)),
        ([[5, 5, 6, 6], polygon(1, 1, 4, 3)], rectangle(1, 1, 4, 3)),  # pycocotools would read [5, 5, 6, 6] as a box
        ([polygon(8, 7, 40, 40)], rectangle(8, 7, WIDTH, HEIGHT)),
        (uncompressed(TWO_PARTS), TWO_PARTS),
        (uncompressed(WITH_HOLE), WITH_HOLE),
        (compressed(TWO_PARTS), TWO_PARTS),
        (compressed(WITH_HOLE), WITH_HOLE),
        # An empty run at the start of the image, where pycocotools' own box would begin.
        ({"size": [HEIGHT, WIDTH], "counts": [0, 0, 55, 3, 62]}, rectangle(5, 5, 6, 8)),
    ],
)
def test_segmentation_formats_give_the_known_pixels(files, segmentation, expected):
    files.object(segmentation)
    sample = files.load().first()
    (detection,) = sample.ground_truth.detections
    np.testing.assert_array_equal(pasted(detection, sample.metadata), expected)
    rows, columns = np.flatnonzero(expected.any(1)), np.flatnonzero(expected.any(0))
    assert detection.mask.shape == (rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0])


def test_images_without_objects_are_kept(files):
    files.image(2)
    files.object([polygon(1, 1, 4, 3)])
    assert [len(sample.ground_truth.detections) for sample in files.load()] == [1, 0]


@pytest.mark.parametrize(
    "segmentation, bbox, pixels",
    [
        ([], [2.3, 1.2, 4.1, 3.3], [2, 1, 5, 4]),
        (None, [5, 5, 0, 0], [5, 5, 1, 1]),
        ([[]], [WIDTH, HEIGHT, 0, 0], [WIDTH - 1, HEIGHT - 1, 1, 1]),
        ([[1, 1, 4, 4]], [-3, -3, 99, 99], [0, 0, WIDTH, HEIGHT]),
        ([[2, 2, 2, 2, 2, 2]], [2, 2, 0, 0], [2, 2, 1, 1]),
        (uncompressed(rectangle(0, 0, 0, 0)), [0, 0, 0, 0], [0, 0, 1, 1]),
    ],
)
def test_object_without_pixels_is_kept_and_logged(files, caplog, segmentation, bbox, pixels):
    files.object([polygon(1, 1, 4, 3)])
    files.object(segmentation, bbox=bbox, id=4711)
    with caplog.at_level(logging.WARNING):
        sample = files.load().first()
    whole, empty = sample.ground_truth.detections
    assert not pasted(empty, sample.metadata).any()
    np.testing.assert_allclose(np.array(empty.bounding_box) * [WIDTH, HEIGHT, WIDTH, HEIGHT], pixels)
    assert empty.label == "cat" and whole.mask.all()
    assert "kept with empty masks: 1; ids: 4711" in caplog.text


def test_iscrowd_is_optional_and_attributes_can_be_filtered(files):
    files.object([polygon(1, 1, 4, 3)], iscrowd=1)
    files.object([polygon(1, 1, 4, 3)])
    del files.content["annotations"][1]["iscrowd"]
    dataset = files.load(gt_field="objects")
    assert dataset.values("objects.detections.iscrowd") == [[True, False]]
    assert dataset.filter_labels("objects", fo.ViewField("iscrowd")).count("objects.detections") == 1
    schema = dataset.get_field_schema(flat=True)
    assert isinstance(schema["objects.detections.iscrowd"], fo.BooleanField)
    assert isinstance(schema["objects.detections.area"], fo.FloatField)
    assert "objects.detections.frequency" not in schema


def test_named_dataset_persists_and_is_never_overwritten(files):
    dataset = files.load(name="coco-test")
    assert dataset.persistent and dataset.name == "coco-test"
    files.image(2)
    with pytest.raises(ValueError, match="dataset named 'coco-test' exists"):
        files.load(name="coco-test")
    assert len(fo.load_dataset("coco-test")) == 1


def test_area_that_the_file_lacks_is_that_of_the_mask(files):
    files.object([polygon(1, 1, 4, 3)], area=None)
    files.object([polygon(1, 1, 6, 3)])
    del files.content["annotations"][1]["area"]
    assert files.load().values("ground_truth.detections.area") == [[6.0, 10.0]]


@pytest.mark.parametrize("sample", [0, -1, 1.5, True, "3"])
def test_invalid_number_of_images_is_refused(files, sample):
    with pytest.raises(ValueError, match="sample must be a number of images"):
        files.load(sample=sample)


def test_json_nested_without_end_is_refused(files):
    files.file.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"instances\.json can't be read as JSON"):
        load_coco(files.images, files.file)


def test_missing_images_are_reported(files):
    for key in range(2, 9):
        files.image(key, exists=False)
    with pytest.raises(
        FileNotFoundError, match=r"^7 of the 8 images in .*instances\.json.*002\.png.*004\.png', \.\.\."
    ):
        files.load()


def test_sample_is_drawn_from_existing_images(files):
    for key in range(2, 9):
        files.image(key, exists=key > 4)
    for seed in range(3):
        drawn = files.load(sample=4, seed=seed).values("filepath")
        assert len(set(drawn)) == 4 and drawn == files.load(sample=4, seed=seed).values("filepath")
    assert len(files.load(sample=5)) == 5
    with pytest.raises(FileNotFoundError, match=r"002\.png.*draw fewer than 6"):
        files.load(sample=6)


def changed(key, **changes):
    """Changes the first entry of a list in the file."""
    return lambda content: content[key][0].update(changes)


def added(key):
    """Repeats the first entry of a list, with another file name or name."""
    return lambda content: content[key].append(content[key][0] | {"file_name": "002.png", "name": "dog"})


SEGMENTATION = "segmentation of annotation 1 is unusable"
NAN = float("nan")


@pytest.mark.parametrize(
    "damage, message",
    [
        (changed("annotations", category_id=9), "annotation 1 refers to image 1 and category 9"),
        (changed("annotations", image_id="1"), "annotation 1 refers to image '1' and category 3"),
        (lambda c: c["annotations"][0].pop("image_id"), "isn't in COCO format.*annotation 1 has image_id=None"),
        (changed("annotations", image_id=[1]), r"annotation 1 has image_id=\[1\]"),
        (changed("annotations", area="7"), "annotation 1 has area='7': a number"),
        (changed("annotations", area=NAN), "annotation 1 has area=nan"),
        (changed("annotations", area=-1), "annotation 1 has area=-1"),
        (changed("annotations", iscrowd="0"), "annotation 1 has iscrowd='0': 0 or 1 was expected"),
        (changed("annotations", iscrowd="false"), "annotation 1 has iscrowd='false'"),
        (changed("annotations", iscrowd=[0]), r"annotation 1 has iscrowd=\[0\]"),
        (changed("annotations", iscrowd=None), "annotation 1 has iscrowd=None"),
        (changed("annotations", iscrowd=2), "annotation 1 has iscrowd=2"),
        (changed("annotations", segmentation=[], bbox=None), "annotation 1 has bbox=None"),
        (changed("annotations", segmentation=[], bbox=[]), r"annotation 1 has bbox=\[\]"),
        (changed("annotations", segmentation=[], bbox="0 0 1 1"), "annotation 1 has bbox='0 0 1 1'"),
        (changed("annotations", segmentation=[], bbox=[0, 0, NAN, 1]), "annotation 1 has bbox="),
        (changed("annotations", segmentation=[1, 1, 4, 1, 4, 3]), f"{SEGMENTATION}.*polygon is int"),
        (changed("annotations", segmentation=["1 1 4 1 4 3"]), f"{SEGMENTATION}.*polygon is str"),
        (changed("annotations", segmentation=[{"x": 1}]), f"{SEGMENTATION}.*polygon is dict"),
        (changed("annotations", segmentation="abc"), f"{SEGMENTATION}.*it is str"),
        (changed("annotations", segmentation=[[5, 5, None, 5, 25, 25]]), f"{SEGMENTATION}.*contains None"),
        (changed("annotations", segmentation=[["5", "5", "9", "5", "9", "9"]]), f"{SEGMENTATION}.*contains '5'"),
        (changed("annotations", segmentation=[[5, 5, NAN, 5, 25, 25]]), f"{SEGMENTATION}.*coordinate nan"),
        (changed("annotations", segmentation=[[5, 5, 1e999, 5, 25, 25]]), f"{SEGMENTATION}.*coordinate inf"),
        (changed("annotations", segmentation=[[5, 5, 2e9, 5, 25, 25]]), f"{SEGMENTATION}.*coordinate 2000000000.0"),
        (changed("annotations", segmentation=[[5, 5, 10**400, 5, 25, 25]]), f"{SEGMENTATION}.*coordinate 1000+"),
        (changed("annotations", segmentation=[[5, 5, 9, 5, 9, 9, 5]]), f"{SEGMENTATION}.*odd number of coordinates, 7"),
        (changed("annotations", segmentation=[[5, 5, 9]]), f"{SEGMENTATION}.*odd number of coordinates, 3"),
        (changed("annotations", segmentation=[[5, 5], [9, 5], [9, 9]]), f"{SEGMENTATION}.*a list of points"),
        (changed("annotations", segmentation=[[[5, 5], [9, 5], [9]]]), f"{SEGMENTATION}.*contains \\[5, 5\\]"),
        (lambda c: c["annotations"][0]["segmentation"].update(size=[HEIGHT, 2]), f"{SEGMENTATION}.*its size"),
        (lambda c: c["annotations"][0]["segmentation"].update(counts=[5, 5]), f"{SEGMENTATION}.*add up to 10"),
        (lambda c: c["annotations"][0]["segmentation"].update(counts=""), f"{SEGMENTATION}.*add up to 0"),
        (lambda c: c["annotations"][0]["segmentation"].update(counts="abc"), SEGMENTATION),
        (lambda c: c["images"][0].pop("file_name"), "image 1 has no 'file_name'"),
        (changed("images", file_name=None), "image 1 has file_name=None: text"),
        (changed("images", width=13), r"001\.png has 12x10 pixels.*13x10"),
        (changed("images", width="12"), "image 1 has width='12' and height=10: whole numbers"),
        (changed("images", id=None), "image number 0 has id=None"),
        (lambda c: c["annotations"][0].pop("id"), "annotation number 0 has id=None"),
        (changed("annotations", id=[1]), r"annotation number 0 has id=\[1\]"),
        (changed("annotations", id="two\nlines", area="7"), r"annotation 'two\\nlines' has area='7'"),
        (changed("categories", name="half \ud83d"), r"category 3 has name='half \\ud83d': text"),
        (
            lambda c: c["categories"][0].update({"two\nlines": c["categories"][0].pop("name")}),
            r"has no 'name'; it has ",
        ),
        (lambda c: c["annotations"][0]["segmentation"].update(size="two\nlines"), f"{SEGMENTATION}.*its size is 'two"),
        (lambda c: c["categories"][0].pop("name"), "category 3 has no 'name'"),
        (changed("categories", name=7), "category 3 has name=7: text"),
        (lambda c: c.pop("categories"), "isn't in COCO format.*categories"),
        (lambda c: c.update(images={"1": {}}), "isn't in COCO format.*images"),
        (lambda c: c.update(annotations=[None]), "isn't in COCO format.*annotations"),
        (added("images"), "1 ids occur more than once in 'images': 1"),
        (added("categories"), "1 ids occur more than once in 'categories': 3"),
        (added("annotations"), "1 ids occur more than once in 'annotations': 1"),
        (lambda c: c["images"].append({"id": "1"}), "ids in 'images' are partly text"),
    ],
)
def test_errors_name_the_file_and_leave_no_dataset(files, damage, message):
    files.object(uncompressed(TWO_PARTS))
    damage(files.content)
    before = fo.list_datasets()
    with pytest.raises(ValueError, match=message) as error:
        files.load(name="coco-broken")
    assert str(files.file) in str(error.value) and str(error.value).isprintable()
    assert fo.list_datasets() == before


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "nul\0.png", "two\nlines.png", "half \ud83d.png"])
def test_file_name_that_no_file_can_have(files, name):
    files.content["images"][0]["file_name"] = name
    message = r"instances\.json: image 1 has file_name=" if "\ud83d" in name else "1 of the 1 images in .* don't exist"
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        files.load()
    assert str(error.value).isprintable() and len(str(error.value)) < 700


def test_invalid_annotation_file_is_refused(files):
    files.file.write_text("images: 3")
    with pytest.raises(ValueError, match=r"instances\.json can't be read as JSON: Expecting value"):
        load_coco(files.images, files.file)
    files.file.write_text("[1, 2]")
    with pytest.raises(ValueError, match="isn't in COCO format"):
        load_coco(files.images, files.file)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_coco(files.images, files.images / "none.json")
