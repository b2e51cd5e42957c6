"""Items to train on: prompts fit their targets, augmented masks and boxes agree, nothing depends on threads."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config, preprocess
from fiftyone_mobilesamv2.modeling.prompt_guided_decoder import MULTIMASK, SINGLE_MASK
from fiftyone_mobilesamv2.training import prompted_images
from fiftyone_mobilesamv2.training.prompted_images import (
    PromptedImage,
    PromptedImages,
    UnreadableImage,
    View,
    prefetched,
    random_view,
    seen_boxes,
    visible_object,
)
from fiftyone_mobilesamv2.training.scenes import TRAIN_SEED, SceneExamples

from .conftest import example_of, rectangle, simple_example

CONFIG = encoder_config("resnet_demo")
CELLS = 4 * CONFIG.embed_size
CELL = CONFIG.image_size / CELLS


def tight_box(target):
    rows, columns = np.nonzero(target.numpy() > 0.5)
    return CELL * np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def tensors_of(item):
    yield from (item.pixels, item.boxes, item.ignored)
    for prompts in item.prompts:
        yield from (t for t in (prompts.boxes, prompts.points, prompts.point_labels, prompts.targets) if t is not None)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(tensors_of(first), tensors_of(second), strict=True))


def test_prompts_fit_their_targets():
    images = PromptedImages(SceneExamples(TRAIN_SEED, 6), CONFIG, 16, seed=0)
    for index in range(6):
        item = images.item(0, index)
        assert item.pixels.shape == (3, 256, 256) and item.pixels.dtype == torch.float32
        several, point, box = item.prompts
        assert [len(kind.targets) for kind in item.prompts] == [2, 6, 8]
        assert (several.masks, point.masks, box.masks) == (SINGLE_MASK, MULTIMASK, SINGLE_MASK)
        assert point.point_labels.tolist() == [[1]] * 6 and several.point_labels.tolist() == [[1, 1, 0]] * 2
        for target, given_box in zip(box.targets, box.boxes.numpy()):
            tight = tight_box(target)
            sides = np.tile(tight[2:] - tight[:2], 2)
            assert (np.abs(given_box - tight) <= 0.3 * sides + 4).all()  # jitter, and the targets' coarser resolution
        for kind in (several, point):
            for target, points, labels in zip(kind.targets, kind.points.numpy(), kind.point_labels):
                for (x, y), label in zip(points / CELL, labels):
                    covered = target[int(np.clip(y, 0, CELLS - 1)), int(np.clip(x, 0, CELLS - 1))]
                    assert covered > 0 if label else covered < 1


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_box_of_an_augmented_mask_is_the_augmented_box(data):
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    view = random_view(rng, (height, width), np.array([(x0 + x1) / 2, (y0 + y1) / 2]), CONFIG.image_size)
    assert 0 <= view.x and view.x + view.width <= width and 0 <= view.y and view.y + view.height <= height

    example = example_of(None, [rectangle((height, width), (x0, y0, x1, y1))])
    _, (rows, columns) = preprocess(np.zeros((view.height, view.width, 3), np.uint8), view.side)
    seen = visible_object(example.masks[0], view, (rows, columns), CELL, CELLS)
    # The box, cut off at the view's edges, mirrored in it and scaled with it.
    left, right = np.clip([x0 - view.x, x1 - view.x], 0, view.width)
    top, bottom = np.clip([y0 - view.y, y1 - view.y], 0, view.height)
    if view.mirrored:
        left, right = view.width - right, view.width - left
    assert left < right and top < bottom  # it was made to contain the object's centre
    box = np.array([left, top, right, bottom]) * np.tile([columns / view.width, rows / view.height], 2)
    if seen is None:  # less than half of any cell
        assert min(box[2:] - box[:2]) < CELL
        return
    np.testing.assert_allclose(seen.box, box)
    assert seen.target.sum() * CELL**2 == pytest.approx(np.prod(box[2:] - box[:2]), rel=1e-4)
    covered_rows, covered_columns = np.nonzero(seen.target > 1e-4)
    cells = np.array([covered_columns.min(), covered_rows.min(), covered_columns.max() + 1, covered_rows.max() + 1])
    assert (np.abs(cells * CELL - box) < CELL + 1e-3).all()


def test_pixels_and_masks_are_augmented_alike():
    """The object is the only bright part of the image, so its target shows where the bright pixels are."""
    mask = rectangle((120, 90), (20, 30, 70, 100))
    image = np.where(mask[..., None], 255, 0).repeat(3, 2).astype(np.uint8)
    images = PromptedImages([example_of(image, [mask])], CONFIG, 2, seed=0)
    for epoch in range(20):
        item = images.item(epoch, 0)
        # Normalised, white is 2.4, black -2 and the padding 0, before colours are changed.
        bright = torch.nn.functional.avg_pool2d((item.pixels.mean(0) > 1)[None].float(), int(CELL))[0]
        target = item.prompts[-1].targets[0]
        overlap = torch.minimum(bright, target).sum() / torch.maximum(bright, target).sum()
        assert overlap > 0.9, epoch


def test_items_do_not_depend_on_threads_or_order():
    images = PromptedImages([simple_example(i) for i in range(4)], CONFIG, 8, seed=3)
    keys = [(epoch, index) for epoch in range(2) for index in range(4)]
    alone = {key: images.item(*key) for key in reversed(keys)}
    for workers in (0, 1, 3):
        items = prefetched(keys, lambda key: images.item(*key), workers, ahead=5)
        assert all(same(alone[key], item) for key, item in zip(keys, items, strict=True))
    assert not same(alone[0, 1], alone[1, 1])
    assert not same(alone[0, 1], PromptedImages(images.examples, CONFIG, 8, seed=4).item(0, 1))


def test_few_items_are_ahead_and_the_rest_is_never_loaded():
    loaded = []

    def load(key):
        time.sleep(0.001)
        loaded.append(key)
        return key

    items = prefetched(range(1000), load, workers=2, ahead=4)
    assert [next(items) for _ in range(10)] == list(range(10))
    items.close()
    assert len(loaded) <= 14
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("training-images")]


def test_unreadable_images_say_why():
    def fail():
        raise OSError("no such file")

    image = np.zeros((80, 96, 3), np.uint8)
    good = simple_example(0)
    broken = type(good)("a", "broken.png", fail, good.boxes, good.masks, good.ignored)
    turned = type(good)("b", "turned.png", lambda: image.transpose(1, 0, 2), good.boxes, good.masks, good.ignored)
    images = PromptedImages([broken, turned], CONFIG, 4, seed=0)
    assert images.item(0, 0) == UnreadableImage("broken.png", "no such file")
    assert images.item(0, 1) == UnreadableImage(
        "turned.png", "the mask of object 0 is of an image of 96x80 pixels, but this one has 80x96"
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (300, 2)])
def test_images_and_objects_of_any_size(size):
    masks = [rectangle(size, (0, 0, size[1], size[0])), rectangle(size, (0, 0, 1, 1)), np.zeros(size, bool)]
    images = PromptedImages([example_of(np.zeros((*size, 3), np.uint8), masks)], CONFIG, 3, seed=0)
    for epoch in range(10):
        item = images.item(epoch, 0)
        assert isinstance(item, PromptedImage) and all(tensor.isfinite().all() for tensor in tensors_of(item))


def test_objects_that_cannot_be_seen_are_not_prompted():
    image = np.zeros((600, 600, 3), np.uint8)
    images = PromptedImages([example_of(image, [rectangle((600, 600), (300, 300, 301, 301))])], CONFIG, 4, seed=0)
    assert all(images.item(epoch, 0).prompts == () for epoch in range(5))


def test_only_prompted_masks_are_decoded(monkeypatch):
    size = (400, 400)
    cells = [(x, y, x + 4, y + 4) for x in range(0, 400, 5) for y in range(0, 400, 6)]
    example = example_of(np.zeros((*size, 3), np.uint8), [rectangle(size, box) for box in cells])
    assert len(example.masks) > 5000
    decoded = []
    decode = prompted_images.mask_utils.decode
    monkeypatch.setattr(prompted_images.mask_utils, "decode", lambda rle: decoded.append(1) or decode(rle))
    item = PromptedImages([example], CONFIG, 16, seed=0).item(0, 0)
    assert sum(len(prompts.targets) for prompts in item.prompts) == 16
    assert len(decoded) <= 32


def test_seen_boxes():
    """A 40x60 image, of whose right half a view shows the upper 20 rows, mirrored, at twice the size."""
    masks = [
        rectangle((40, 60), (35, 5, 45, 15)),  # within the view
        rectangle((40, 60), (20, 2, 50, 6)),  # cut on the left
        rectangle((40, 60), (40, 18, 50, 38)),  # a tenth of it is visible
        rectangle((40, 60), (0, 0, 10, 10)),  # outside
        rectangle((40, 60), (55, 5, 56, 9)),  # 2 px of the network input wide
    ]
    masks[1][2:6, 30:40] = False  # less of the mask is visible than of the box
    example = example_of(np.zeros((40, 60, 3), np.uint8), masks)
    example = replace(example, ignored=np.array([[50, 10, 60, 30]], np.float32))
    view = View(30, 0, 30, 20, mirrored=True, side=60)
    objects, ignored = seen_boxes(example, view, (40, 60))
    assert objects.tolist() == [[30, 10, 50, 30], [20, 4, 40, 12]]
    assert ignored.tolist() == [[20, 36, 40, 40], [8, 10, 10, 18], [0, 20, 20, 40]]
    of_boxes, _ = seen_boxes(replace(example, masks=None), view, (40, 60))
    assert of_boxes.tolist() == [[30, 10, 50, 30], [20, 4, 60, 12]]


def test_items_have_the_boxes_of_their_objects():
    images, checked = PromptedImages(SceneExamples(TRAIN_SEED, 6), CONFIG, 64, seed=0), 0
    for index in range(6):
        item = images.item(1, index)
        kind = item.prompts[-1]
        assert len(item.boxes) > 0 and not item.boxes.isnan().any()
        for target in kind.targets:  # one that the view doesn't cut is one of the boxes
            tight = tight_box(target)
            if 10 < tight.min() and tight.max() < 246 and (tight[2:] - tight[:2]).min() >= 8:
                assert np.abs(item.boxes.numpy() - tight).max(1).min() <= 4
                checked += 1
    assert checked > 20
