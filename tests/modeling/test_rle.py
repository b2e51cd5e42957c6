"""RLE and polygons compared with pycocotools, which draws and stores masks, and with plain geometry."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib.path import Path as Outline
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2.modeling.rle import checked_rle, rle_from_polygons, run_lengths

masks = arrays.arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24)))


def decoded(rle):
    return mask_utils.decode(rle).astype(bool)


def runs_of(mask):
    pixels = mask.ravel(order="F")
    return [len(list(group)) for _, group in itertools.groupby([False, *pixels])]


def square(x0, y0, x1, y1):
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def ring(centre, radius, corners):
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radius + centre


@given(masks)
def test_runs_of_compressed_rle(mask):
    runs = runs_of(mask)
    runs[0] -= 1
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert run_lengths(rle["counts"]).tolist() == runs
    np.testing.assert_array_equal(decoded(checked_rle(rle, mask.shape)), mask)
    as_text = {"size": list(mask.shape), "counts": rle["counts"].decode()}
    np.testing.assert_array_equal(decoded(checked_rle(as_text, mask.shape)), mask)
    as_list = {"size": list(mask.shape), "counts": runs}
    np.testing.assert_array_equal(decoded(checked_rle(as_list, mask.shape)), mask)


def test_runs_of_a_large_mask():
    mask = np.zeros((5000, 7000), bool)
    mask[10:4000, 3000:6000] = True
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs = run_lengths(rle["counts"])
    assert runs.sum() == mask.size and runs[0] == 3000 * 5000 + 10 and (runs[1:-1:2] == 3990).all()


@given(masks, st.data())
def test_text_that_does_not_fill_the_image_is_refused(mask, data):
    text = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    size = list(mask.shape)
    position = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(max_codepoint=300))
    for changed in (text[:position], text[:position] + letter + text[position + 1 :], text + letter):
        try:
            rle = checked_rle({"size": size, "counts": changed}, mask.shape)
        except ValueError:
            continue
        runs = run_lengths(changed)  # still a mask: as many pixels, none of them left to chance
        assert (runs >= 0).all() and runs.sum() == mask.size
        assert mask_utils.area(rle) == runs[1::2].sum() == decoded(rle).sum()


@pytest.mark.parametrize(
    "counts, cause",
    [
        ("", "add up to 0 pixels, not 48"),
        ([], "add up to 0 pixels"),
        ([47], "add up to 47"),
        ([20, 29], "add up to 49"),
        ([-1, 49], "negative"),
        ([2**40, 48 - 2**40], "longer than the image"),
        ("P", "in the middle"),
        ("oooooooo0", "longer than any image"),
        ("\u00e9", "characters"),
        ("\x7f", "characters"),
        ([20.0, 28.0], "neither whole numbers nor text"),
        ([True, 47], "neither whole numbers nor text"),
        (None, "neither whole numbers nor text"),
        ({"a": 1}, "neither whole numbers nor text"),
    ],
)
def test_runs_that_are_not_those_of_an_image_are_refused(counts, cause):
    with pytest.raises(ValueError, match=cause):
        checked_rle({"size": [6, 8], "counts": counts}, (6, 8))


@pytest.mark.parametrize("size", [[8, 6], [6], None, 48, "68", [6, 8, 1]])
def test_another_size_is_refused(size):
    with pytest.raises(ValueError, match="its size is"):
        checked_rle({"size": size, "counts": [48]}, (6, 8))


@given(arrays.arrays(float, st.tuples(st.integers(3, 9), st.just(2)), elements=st.floats(-39, 69)))
def test_polygons_near_the_image_are_drawn_as_by_pycocotools(points):
    (expected,) = mask_utils.frPyObjects([points.ravel().tolist()], 30, 40)
    assert rle_from_polygons([points], (30, 40)) == expected


@given(
    arrays.arrays(float, st.tuples(st.integers(3, 9), st.just(2)), elements=st.floats(-1, 1)),
    st.sampled_from([1e2, 1e4, 1e7, 9e8]),
)
def test_polygons_that_reach_far_out_have_the_pixels_inside(points, scale):
    points = points * scale + [20, 15]
    mask = decoded(rle_from_polygons([points], (30, 40)))
    x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5)
    # Even-odd by counting the edges to the right of each pixel's centre; those within a pixel of an edge may differ.
    start, end = points[:, None, None], np.roll(points, -1, 0)[:, None, None]
    crosses = (start[..., 1] > y) != (end[..., 1] > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = start[..., 0] + (y - start[..., 1]) / (end[..., 1] - start[..., 1]) * (end[..., 0] - start[..., 0])
        along = ((x - start[..., 0]) * (end - start)[..., 0] + (y - start[..., 1]) * (end - start)[..., 1]) / (
            (end - start) ** 2
        ).sum(-1)
    nearest = start + np.nan_to_num(np.clip(along, 0, 1))[..., None] * (end - start)
    distance = np.hypot(nearest[..., 0] - x, nearest[..., 1] - y).min(0)
    expected = ((crosses & (at > x)).sum(0) % 2).astype(bool)
    clear = distance > 1.5
    np.testing.assert_array_equal(mask[clear], expected[clear])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e9, -1e300])
def test_invalid_coordinates_are_refused(value):
    points = square(1, 1, 5, 5)
    points[2, 1] = value
    with pytest.raises(ValueError, match="coordinate"):
        rle_from_polygons([points], (30, 40))


def test_endless_outline_is_refused():
    zigzag = np.array([[-30, 0], [60, 20]] * 100_000, float)
    with pytest.raises(ValueError, match="an outline of"):
        rle_from_polygons([zigzag], (30, 40))


def test_even_odd_makes_holes_and_the_union_does_not():
    shapes = [square(2, 2, 22, 22), square(6, 6, 18, 18), square(10, 10, 14, 14)]
    assert mask_utils.area(rle_from_polygons(shapes, (30, 40))) == 400
    rle = rle_from_polygons(shapes, (30, 40), even_odd=True)
    expected = np.zeros((30, 40), bool)
    for points in shapes:
        expected ^= Outline(points).contains_points(np.indices((30, 40))[::-1].reshape(2, -1).T + 0.5).reshape(30, 40)
    np.testing.assert_array_equal(decoded(rle), expected)
    assert expected.sum() == 400 - 144 + 16


@given(st.lists(st.tuples(st.floats(0, 40), st.floats(0, 30), st.floats(1, 25), st.integers(3, 12)), max_size=5))
def test_even_odd_is_exclusive_or(circles):
    shapes = [ring((x, y), radius, corners) for x, y, radius, corners in circles]
    expected = np.zeros((30, 40), bool)
    for points in shapes:
        expected ^= decoded(mask_utils.frPyObjects([points.ravel().tolist()], 30, 40)[0])
    np.testing.assert_array_equal(decoded(rle_from_polygons(shapes, (30, 40), even_odd=True)), expected)


def test_no_polygon_is_an_empty_mask():
    assert not decoded(rle_from_polygons([np.zeros((2, 2))], (6, 8))).any()
