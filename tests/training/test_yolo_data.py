"""Examples reach ultralytics' trainer with boxes that fit their pixels, and each item depends on its number only."""

import numpy as np
import pytest
import torch
from ultralytics.cfg import get_cfg

from fiftyone_mobilesamv2.training.examples import Example
from fiftyone_mobilesamv2.training.yolo_data import IGNORED, OBJECT, EpochLoader, ExampleDataset, cached_image, seeded

NO_BOXES = np.zeros((0, 4), np.float32)


def example(number, height=60, width=120, ignored=True):
    """A black image with a white object, and a grey region that is ignored."""
    rng = np.random.default_rng(number)
    x, y = rng.integers(2, 40), rng.integers(2, 20)
    image = np.zeros((height, width, 3), np.uint8)
    image[y : y + 30, x : x + 36] = 255
    image[y : y + 20, 90:110] = 128
    boxes = np.array([[x, y, x + 36, y + 30]], np.float32)
    regions = np.array([[90, y, 110, y + 20]], np.float32) if ignored else NO_BOXES
    return Example(f"id{number}", f"{number}.png", lambda: image, boxes, None, regions)


def dataset(examples, cache=None, seed=0, **hyp):
    still = dict.fromkeys(("mosaic", "scale", "translate", "fliplr", "hsv_h", "hsv_s", "hsv_v"), 0.0)
    settings = get_cfg(overrides=still | hyp)
    options = {"imgsz": 128, "batch_size": 4, "augment": True, "hyp": settings}
    return ExampleDataset(examples, cache, seed, **options)


def tight_box(pixels):
    rows, columns = np.nonzero(pixels)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("hyp", [{}, {"fliplr": 1.0}, {"flipud": 1.0}, {"translate": 0.1, "scale": 0.3}])
def test_boxes_fit_the_augmented_pixels(hyp):
    items = dataset([example(number) for number in range(6)], **hyp)
    for i in range(6):
        item = items[i]
        grey = item["img"].float().mean(0).numpy()
        assert item["img"].shape == (3, 128, 128) and item["img"].dtype == torch.uint8
        for kind, pixels in ((OBJECT, grey > 190), (IGNORED, (grey > 118) & (grey < 138))):
            (box,) = item["bboxes"][item["cls"][:, 0] == kind].numpy() * 128
            center, size = box[:2], box[2:]
            corners = np.concatenate([center - size / 2, center + size / 2])
            if kind == OBJECT:  # letterbox padding is grey, too
                assert np.abs(corners - tight_box(pixels)).max() <= 2.5
            else:
                x, y = center.round().astype(int)
                assert pixels[y - 3 : y + 3, x - 3 : x + 3].all()


def test_items_depend_on_seed_epoch_and_index_only():
    examples = [example(number) for number in range(8)]
    hyp = {"mosaic": 1.0, "scale": 0.5, "translate": 0.1, "fliplr": 0.5}
    first, second = dataset(examples, **hyp), dataset(examples, **hyp)
    pixels = [first[i]["img"] for i in range(8)]
    np.random.seed(5)
    for i in (7, 3, 0, 3):  # in another order, after other random numbers
        assert torch.equal(second[i]["img"], pixels[i])
    second.epoch = 1
    assert not torch.equal(second[0]["img"], pixels[0])
    assert not torch.equal(dataset(examples, seed=1, **hyp)[0]["img"], pixels[0])


def test_workers_do_not_change_batches():
    examples = [example(number) for number in range(8)]
    hyp = {"mosaic": 1.0, "scale": 0.5, "fliplr": 0.5}
    batches = []
    for workers in (0, 2):
        loader = EpochLoader(dataset(examples, **hyp), 3, workers)
        epochs = []
        for epoch in (1, 0, 1):
            loader.start_epoch(epoch)
            epochs.append([batch["img"] for batch in loader])
        assert all(map(torch.equal, epochs[0], epochs[2])) and not all(map(torch.equal, epochs[0], epochs[1]))
        batches.append(epochs[0])
    assert [len(batch) for batch in batches[0]] == [3, 3, 2]
    assert all(map(torch.equal, *batches))


def test_random_numbers_of_others_are_left_alone():
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    with seeded(1, 2, 3):
        np.random.random()
    assert np.random.random() == expected


def test_cached_images_are_the_images(tmp_path):
    reads = []
    given = example(0)

    def read():
        reads.append(1)
        return given.read()

    counted = Example("id", "name", read, given.boxes, None, NO_BOXES)
    plain, size = cached_image(counted, 64, None)
    assert plain.shape == (32, 64, 3) and size == (60, 120)
    for _ in range(3):
        image, cached_size = cached_image(counted, 64, tmp_path)
        assert np.array_equal(image, plain) and cached_size == size
    assert len(reads) == 2
    assert cached_image(counted, 120, tmp_path)[0].shape == (60, 120, 3) and len(reads) == 3
