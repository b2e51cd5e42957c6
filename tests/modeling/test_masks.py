"""Cropped masks equal the fully upsampled ones, and their RLE equals that of pycocotools."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2.modeling.masks import Segmentation, crop_masks, rle_from_crop, upsample

GEOMETRIES = {"demo": (64, 256), "release": (256, 1024), "tiny": (8, 32)}  # sides of the logits and the network input


def input_size_of(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """(h, w) after SAM's resizing: the long side becomes `image_size`; sides round half up, to at least one pixel."""
    scale = image_size / max(size)
    return tuple(max(1, int(side * scale + 0.5)) for side in size)


def logit_map(kind: str, side: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(side, side, generator=generator)
    if kind == "smooth":
        return F.interpolate(noise[None, None, :4, :4], (side, side), mode="bicubic")[0, 0] * 4
    if kind == "huge":
        return noise * 1e4
    if kind == "negative":
        return -noise.abs() - 1e-3
    if kind == "between":  # some above -1, none above 0: empty mask, nonzero stability denominator
        return -noise.abs() * 0.5 - 1e-3
    if kind == "steps":  # exact zeros, where rounding must not matter
        return noise.round()
    if kind == "object":  # one or two cells, often at a border
        logits = torch.full((side, side), -6.0)
        y, x = (torch.randint(-2, side, (2,), generator=generator)).clamp(min=0).tolist()
        logits[y : y + 2, x : x + 1] = 7.0
        return logits
    return {"noise": noise, "zero": torch.zeros(side, side), "one": torch.ones(side, side)}[kind]


KINDS = ["smooth", "noise", "huge", "negative", "between", "steps", "object", "zero", "one"]


def assert_as_upsampled(logits: torch.Tensor, image_size: int, size: tuple[int, int]) -> None:
    input_size = input_size_of(size, image_size)
    whole = upsample(logits, image_size, input_size, size)
    boxes, masks, stability = crop_masks(logits, image_size, input_size, size)
    assert len(boxes) == len(masks) == len(stability) == len(logits)
    for box, mask, score, values in zip(boxes, masks, stability, whole):
        x0, y0, x1, y1 = box
        assert mask.dtype == bool and mask.shape == (y1 - y0, x1 - x0)
        full = np.zeros(size, bool)
        full[y0:y1, x0:x1] = mask
        # Pixels within rounding error of 0 may fall on either side: exact zeros do, if sums are in another order.
        clear = (values.abs() > 1e-6 * values.abs().max()).numpy()
        np.testing.assert_array_equal(full[clear], (values.numpy() > 0)[clear])
        if not mask.any():
            assert mask.shape == (0, 0) and not box.any() and score == 0
            continue
        # The box is tight: this computes the mask's extent in another way.
        (rows,), (columns,) = np.nonzero(full.any(1)), np.nonzero(full.any(0))
        assert (x0, y0, x1, y1) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        # Pixels within rounding error of +1 or -1 may fall on either side.
        above, below = int((values > 1).sum()), int((values > -1).sum())
        at_offset = int(((values.abs() - 1).abs() < 1e-5 * float(values.abs().max())).sum())
        assert abs(score - above / below) <= (1 + at_offset) / below * 1e-6 + at_offset / below


@settings(max_examples=80, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    geometry=st.sampled_from(["demo", "tiny"]),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
@example(kinds=KINDS, geometry="demo", height=1, width=333, seed=0)
@example(kinds=KINDS, geometry="demo", height=333, width=1, seed=0)
@example(kinds=KINDS, geometry="tiny", height=1, width=1, seed=0)
@example(kinds=["smooth", "smooth", "steps"], geometry="demo", height=33, width=96, seed=0)  # exact zeros
def test_crops_equal_the_upsampled_masks(kinds, geometry, height, width, seed):
    side, image_size = GEOMETRIES[geometry]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack([logit_map(kind, side, generator) for kind in kinds])
    assert_as_upsampled(logits, image_size, (height, width))


@pytest.mark.parametrize("side, image_size", [(128, 256), (256, 1024)])
@pytest.mark.parametrize("size", [(480, 640), (1333, 800), (1, 1500)], ids=str)
def test_crops_equal_the_upsampled_masks_at_real_sizes(side, image_size, size):
    generator = torch.Generator().manual_seed(1)
    assert_as_upsampled(torch.stack([logit_map(kind, side, generator) for kind in KINDS]), image_size, size)


def test_object_in_the_padding_is_empty():
    """A wide image fills only the top of the network input; the rest is padding."""
    logits = torch.full((1, 64, 64), -5.0)
    logits[0, 50:60, 10:20] = 5.0
    boxes, (mask,), stability = crop_masks(logits, 256, (64, 256), (100, 400))
    assert not boxes.any() and mask.size == 0 and stability == 0


def test_no_logits():
    boxes, masks, stability = crop_masks(torch.zeros(0, 64, 64), 256, (256, 256), (10, 10))
    assert boxes.shape == (0, 4) and masks == [] and stability.shape == (0,)


@st.composite
def mask_in_image(draw):
    """A full-image bool mask, and a box that contains all of its pixels."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    x0, y0 = draw(st.integers(0, width)), draw(st.integers(0, height))
    x1, y1 = draw(st.integers(x0, width)), draw(st.integers(y0, height))
    full = np.zeros((height, width), bool)
    bits = draw(st.lists(st.booleans(), min_size=(y1 - y0) * (x1 - x0), max_size=(y1 - y0) * (x1 - x0)))
    full[y0:y1, x0:x1] = np.array(bits, bool).reshape(y1 - y0, x1 - x0)
    return full, np.array([x0, y0, x1, y1])


@settings(max_examples=500, deadline=None)
@given(mask_in_image())
@example((np.ones((1, 1), bool), np.array([0, 0, 1, 1])))
@example((np.zeros((1, 1), bool), np.array([0, 0, 0, 0])))
@example((np.ones((5, 3), bool), np.array([0, 0, 3, 5])))
def test_rle_equals_that_of_pycocotools(case):
    full, (x0, y0, x1, y1) = case
    assert rle_from_crop(full[y0:y1, x0:x1], case[1], full.shape) == mask_utils.encode(np.asfortranarray(full))


def segmentation() -> Segmentation:
    """Two masks and an empty one, in a 4x6 image."""
    return Segmentation(
        boxes=np.array([[1, 0, 3, 2], [0, 0, 0, 0], [5, 3, 6, 4]], np.int32),
        masks=[np.array([[1, 0], [1, 1]], bool), np.zeros((0, 0), bool), np.ones((1, 1), bool)],
        confidence=np.array([0.9, 0.8, 0.7], np.float32),
        predicted_iou=np.array([0.1, 0.2, 0.3], np.float32),
        stability=np.array([1, 0, 0.5], np.float32),
        size=(4, 6),
        points=np.array([[1, 1], [2, 2], [3, 3]], np.float32),
    )


def test_segmentation_gives_areas_full_masks_and_rle():
    masks = segmentation()
    first, last = np.zeros((2, 4, 6), bool)
    first[0, 1] = first[1, 1] = first[1, 2] = last[3, 5] = True
    expected = [first, np.zeros((4, 6), bool), last]
    assert len(masks) == 3
    assert masks.areas.tolist() == [3, 0, 1] and masks.areas.dtype == np.int64
    for i, mask in enumerate(expected):
        np.testing.assert_array_equal(masks.full_mask(i), mask)
    assert masks.rle() == [mask_utils.encode(np.asfortranarray(mask)) for mask in expected]


def test_select_keeps_the_given_order():
    selected = segmentation().select([2, 0])
    assert selected.boxes.tolist() == [[5, 3, 6, 4], [1, 0, 3, 2]] and selected.areas.tolist() == [1, 3]
    np.testing.assert_array_equal(selected.confidence, np.float32([0.7, 0.9]))
    np.testing.assert_array_equal(selected.predicted_iou, np.float32([0.3, 0.1]))
    np.testing.assert_array_equal(selected.stability, np.float32([0.5, 1]))
    np.testing.assert_array_equal(selected.points, [[3, 3], [1, 1]])
    assert selected.size == (4, 6)
    none = selected.select([])
    assert len(none) == 0 and none.boxes.shape == (0, 4) and none.areas.dtype == np.int64 and none.rle() == []
