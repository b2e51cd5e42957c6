"""Examples and modules to train."""

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_decoder, load_encoder
from fiftyone_mobilesamv2.training.examples import Example


def example_of(image, masks, name="image"):
    """An Example of an image and its objects' masks, bool [N, H, W]."""
    rles = tuple(mask_utils.encode(np.asfortranarray(mask, np.uint8)) for mask in masks)
    boxes = np.array([mask_utils.toBbox(rle) for rle in rles], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Example(name, name, lambda: image, boxes, rles, np.zeros((0, 4), np.float32))


def rectangle(size, box):
    """A mask of an image of `size` (height, width) that fills a box."""
    mask = np.zeros(size, bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


def simple_example(index):
    """A bright rectangle on dark noise, 96 x 80 pixels."""
    rng = np.random.default_rng(index)
    x, y = rng.integers(4, 40, 2)
    mask = rectangle((80, 96), (x, y, x + rng.integers(20, 50), y + rng.integers(20, 35)))
    image = rng.integers(0, 40, (80, 96, 3)).astype(np.uint8)
    image[mask] += np.array([180, 160, 60], np.uint8)
    return example_of(image, [mask], f"image {index}")


@pytest.fixture
def demo_modules():
    """The demo model's image encoder and decoder."""
    weights = PACKAGED_WEIGHTS / "demo_sam.safetensors"
    return load_encoder(weights, "resnet_demo"), load_decoder(weights, "resnet_demo")
