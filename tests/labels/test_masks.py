"""Masks as stored in the database, and the areas of stored polylines."""

import cv2
import fiftyone as fo
import fiftyone.core.utils as fou
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2.errors import LabelError
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
    ],
)
def test_unusable_polyline_is_named(label, message):
    with pytest.raises(LabelError, match=message) as error:
        masks_of([label], SIZE)
    assert str(label["_id"]) in str(error.value)
