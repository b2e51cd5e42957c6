"""Masks as stored in the database, and the areas of stored polylines."""

import io
import os
import struct
import zlib

import cv2
import fiftyone as fo
import fiftyone.core.utils as fou
import numpy as np
import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2.errors import LabelError
from fiftyone_mobilesamv2.labels.documents import stored_images, visit_images
from fiftyone_mobilesamv2.labels.masks import boxes_of, masks_of, serialized

SIZE = 60, 80


@given(npst.arrays(bool, npst.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40)), st.booleans())
def test_fiftyone_reads_serialized_masks(mask, transposed):
    mask = mask.T if transposed else mask
    read = fou.deserialize_numpy_array(serialized(mask))
    assert read.dtype == bool and np.array_equal(read, mask)


def polyline(points, closed=True, filled=True):
    """As the database holds it: FiftyOne would refuse some of these points, which other programs may have stored."""
    return fo.Polyline(closed=closed, filled=filled).to_mongo().to_dict() | {"points": points}


def area(label):
    (rle,) = masks_of([label], SIZE)
    return mask_utils.decode(rle).astype(bool)


def circle(x, y, radius, corners=24):
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1) / [SIZE[1], SIZE[0]]
    return points.tolist()


@pytest.mark.parametrize(
    "shapes",
    [
        [circle(40, 30, 25), circle(40, 30, 12)],
        [circle(40, 30, 25), circle(40, 30, 16), circle(40, 30, 6)],
        [circle(30, 30, 18), circle(50, 30, 18)],
        [circle(20, 30, 10), circle(60, 30, 10)],
        [circle(5, 5, 20), circle(5, 5, 10)],
    ],
    ids=["hole", "island in a hole", "overlap", "two parts", "at the border"],
)
def test_shapes_of_a_polyline_are_filled_as_fiftyone_fills_them(shapes):
    mask = area(polyline(shapes))
    # FiftyOne's own rendering, which includes the pixels on the outline.
    drawn = fo.Polyline(points=shapes, closed=True, filled=True).to_segmentation(frame_size=SIZE[::-1])
    expected = np.asarray(drawn.mask) > 0
    outline = np.zeros(SIZE, np.uint8)
    for points in shapes:
        cv2.polylines(outline, [np.int32(np.array(points) * SIZE[::-1])], True, 1, thickness=3)
    np.testing.assert_array_equal(mask[outline == 0], expected[outline == 0])
    assert (outline == 0).mean() > 0.6 and mask.any()


@pytest.mark.parametrize("far", [1e2, 1e6, 1e7])
def test_polyline_far_outside_has_the_pixels_inside_the_image(far):
    mask = area(polyline([[[0.5, 0.5], [far, 0.5], [0.5, far]]]))
    assert mask[31:, 41:].all() and not mask[:29].any() and not mask[:, :39].any()
    (box,) = boxes_of([polyline([[[0.5, 0.5], [far, 0.5], [0.5, far]]])], SIZE)
    np.testing.assert_allclose(box, [40, 30, 120, 90])


@pytest.mark.parametrize(
    "label, message",
    [
        (polyline([circle(40, 30, 9)], closed=False, filled=False), "open line"),
        (polyline([[[0.1, 0.1], [float("nan"), 0.2], [0.3, 0.3]]]), "non-finite coordinates"),
        (polyline([[[0.1, 0.1], [1e300, 0.2], [0.3, 0.3]]]), "coordinate of"),
        (polyline([[["a", 0.1], [0.2, 0.2], [0.3, 0.3]]]), "not pairs of numbers"),
        (polyline([[["0.1", "0.1"], ["0.2", "0.2"], ["0.3", "0.1"]]]), "not pairs of numbers"),
        (polyline([[[0.1, 0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]]), "not pairs of numbers"),
        (polyline([[None, [0.2, 0.2], [0.3, 0.3]]]), "not pairs of numbers"),
        (polyline([[0.1, 0.1, 0.2, 0.2, 0.3, 0.3]]), "not pairs of numbers"),
        (polyline([[[0.1, 0.1], [0.2, 0.2]]]), "at least 3 points"),
        (polyline([]), "at least 3 points"),
        (polyline(5), "not pairs of numbers"),
        (polyline("square"), "not pairs of numbers"),
        (polyline([[[True, 0.1], [0.2, 0.2], [0.3, 0.3]]]), "not pairs of numbers"),
        (polyline([circle(40, 30, 9)]) | {"closed": "false"}, "closed='false': true or false"),
        (polyline([circle(40, 30, 9)]) | {"filled": 0.5}, "filled=0.5: true or false"),
        ({name: value for name, value in polyline([]).items() if name != "points"}, "at least 3 points"),
        (polyline(None), "at least 3 points"),
    ],
)
def test_unusable_polyline_is_named(label, message):
    with pytest.raises(LabelError, match=message) as error:
        masks_of([label], SIZE)
    assert str(label["_id"]) in str(error.value)


def array(values):
    """As NumPy stores an array, compressed."""
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    return content.getvalue()


def detection(**changes):
    """A 12x10 mask in a box of that size."""
    mask = zlib.compress(array(np.ones((10, 12), bool)))
    label = {"_cls": "Detection", "_id": "the label", "bounding_box": [0.25, 0.25, 12 / SIZE[1], 10 / SIZE[0]]}
    return label | {"mask": mask} | changes


def header(shape, descr="'|b1'"):
    """An array whose header claims another shape or type."""
    content = array(np.ones((10, 12), bool))
    return zlib.compress(content.replace(b"(10, 12)", shape).replace(b"'|b1'", descr.encode()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask": zlib.compress(array(np.full((10, 12), "a")))}, "mask of type <U1"),
        ({"mask": zlib.compress(array(np.zeros((10, 12), "datetime64[s]")))}, "mask of type datetime64"),
        ({"mask": zlib.compress(array(np.zeros((10, 12), "V2")))}, r"mask of type \|V2"),
        ({"mask": zlib.compress(array(np.zeros((10, 12), [("a", "u1")])))}, "mask of type"),
        ({"mask": zlib.compress(array(np.zeros((10, 12), complex)))}, "mask of type complex"),
        ({"mask": header(b"(99, 12)")}, r"shape \(99, 12\), but 120 bytes"),
        ({"mask": header(b"(-1, 12)")}, r"shape \(-1, 12\)"),
        ({"mask": header(b"(10,'a')")}, "can't be decoded"),
        ({"mask": header(b"(10, 12)", "'|O' ")}, "contains Python objects"),
        ({"mask": zlib.compress(array(np.ones((10, 12), bool)))[:-9]}, "incomplete"),
        ({"mask": zlib.compress(bytes(2**24))}, "far larger than its image"),
        ({"mask": b"junk"}, "can't be decoded"),
        ({"mask": 5}, "can't be decoded"),
        ({"mask": "text"}, "can't be decoded"),
        ({"mask": [1, 2]}, "can't be decoded"),
        ({"mask": zlib.compress(array(np.ones(5, bool)))}, "two dimensions"),
        ({"mask": None, "mask_path": ["a.png"]}, r"mask_path=\['a.png'\]"),
        ({"mask": None, "mask_path": 5}, "mask_path=5"),
        ({"mask": None, "mask_path": False}, "mask_path=False"),
        ({"mask": None, "mask_path": "a" * 10_000}, "mask_path of 10,000 characters"),
        ({"mask": header(b"(" + b"9" * 5000 + b")")}, "can't be decoded"),
        ({"bounding_box": [True, False, True, True]}, "bounding_box="),
        ({"mask": None, "mask_path": "a\0b"}, "can't be read.*not a valid path"),
        ({"mask": None, "mask_path": "/dev/zero"}, "can't be read.*not a regular file"),
        ({"mask": None, "mask_path": "/"}, "can't be read.*is a folder"),
        ({"mask": None, "mask_path": "missing.png"}, "can't be read.*doesn't exist"),
        ({"mask": None, "mask_path": __file__}, "can't be read.*not an image"),
        ({"bounding_box": 5}, "bounding_box=5: "),
        ({"bounding_box": None}, "bounding_box=None: "),
        ({"bounding_box": "0.1"}, "bounding_box='0.1': "),
        ({"bounding_box": [0.1, 0.1, None, 0.1]}, "bounding_box="),
        ({"bounding_box": [float("nan")] * 4}, "bounding_box="),
    ],
)
def test_unusable_detection_is_named(changes, message):
    with pytest.raises(LabelError, match=message) as error:
        masks_of([detection(**changes)], SIZE)
    assert "the label" in str(error.value) and len(str(error.value)) < 400


def test_mask_file_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "mask.png"
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    lines = zlib.compressobj(1)
    pixels = b"".join(lines.compress(bytes(1 + 3000)) for _ in range(3000)) + lines.flush()
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 3000, 3000, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )
    with pytest.raises(LabelError, match="mask of 3000x3000 pixels, far larger than its image"):
        masks_of([detection(mask=None, mask_path=str(path))], SIZE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs Linux")
def test_pipe_is_not_waited_for(dataset, tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(LabelError, match="not a regular file"):
        masks_of([detection(mask=None, mask_path=str(pipe))], SIZE)
    dataset.add_sample(fo.Sample(str(pipe), ground_truth=fo.Detections()))
    Image.new("RGB", (8, 6)).save(tmp_path / "image.png")
    dataset.add_sample(fo.Sample(str(tmp_path / "image.png"), ground_truth=fo.Detections()))
    skipped = visit_images(dataset, ["ground_truth"], lambda stored: stored.known_size and None, progress=False)
    assert [(each["filepath"], "no metadata" in each["cause"]) for each in skipped] == [(str(pipe), True)]


@pytest.mark.parametrize(
    "labels",
    [
        *(5, 0, False, "text", "", [], [1]),
        *({"detections": labels} for labels in ([None], 5, 0, False, "", {}, [[1]])),
    ],
)
def test_what_is_no_label_costs_its_image(dataset, labels):
    metadata = fo.ImageMetadata(width=8, height=6)
    samples = [fo.Sample(f"/{n}.png", metadata=metadata, ground_truth=fo.Detections()) for n in range(2)]
    ids = dataset.add_samples(samples, progress=False)
    dataset._sample_collection.update_one({"_id": ObjectId(ids[0])}, {"$set": {"ground_truth": labels}})
    seen = []
    skipped = visit_images(dataset, ["ground_truth"], lambda s: seen.append(s.labels("ground_truth")), progress=False)
    assert seen == [[]] and [each["id"] for each in skipped] == [ids[0]]
    assert "something else than labels" in skipped[0]["cause"]


@pytest.mark.parametrize("id", ["text", 5, None, [1], {"a": 1}, float("nan")])
def test_label_without_an_id_of_its_own_costs_its_image(dataset, id):
    metadata = fo.ImageMetadata(width=8, height=6)
    (sample_id,) = dataset.add_samples([fo.Sample("/0.png", metadata=metadata, ground_truth=fo.Detections())])
    dataset.add_sample(fo.Sample("/1.png", metadata=metadata, ground_truth=fo.Detections()))
    labels = {"ground_truth.detections": [{"_cls": "Detection", "_id": id}]}
    dataset._sample_collection.update_one({"_id": ObjectId(sample_id)}, {"$set": labels})
    visit = lambda stored: stored.distinct_labels("ground_truth") and None  # noqa: E731
    (skipped,) = visit_images(dataset, ["ground_truth"], visit, progress=False)
    assert skipped["id"] == sample_id and "a label in 'ground_truth' has the id" in skipped["cause"]


@pytest.mark.parametrize(
    "metadata", [5, "text", {"width": "8", "height": "6"}, {"width": 8.0, "height": 6}, {"width": -8}]
)
def test_metadata_of_another_type_is_that_of_an_unknown_size(dataset, metadata):
    ids = dataset.add_samples([fo.Sample(f"/nowhere/{n}.png", ground_truth=fo.Detections()) for n in range(2)])
    for id, value in zip(ids, (metadata, {"width": 8, "height": 6})):
        dataset._sample_collection.update_one({"_id": ObjectId(id)}, {"$set": {"metadata": value}})
    sizes = [stored.size for stored in stored_images(dataset, ["ground_truth"])]
    assert sizes == [None, (6, 8)]
