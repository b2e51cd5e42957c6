"""Fixtures for labels drawn as full-image masks, and for datasets of them."""

import bson
import fiftyone as fo
import numpy as np
import pytest

HEIGHT, WIDTH = 120, 160


@pytest.fixture(scope="session")
def rectangle():
    """Returns a full-image mask of a rectangle given by x, y, width and height."""

    def draw(x, y, w, h):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[y : y + h, x : x + w] = True
        return mask

    return draw


@pytest.fixture(scope="session")
def detection():
    """Returns a Detection for a full-image mask, stored cropped to its tight box."""

    def label(mask, **attributes):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        height, width = mask.shape
        return fo.Detection(
            label=attributes.pop("label", "object"),
            bounding_box=[x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height],
            mask=mask[y0:y1, x0:x1],
            **attributes,
        )

    return label


@pytest.fixture
def add_image(dataset):
    """Adds an image to the dataset, with the given list of labels in each field (None leaves the field empty)."""

    def add(**fields):
        sample = fo.Sample(f"/nowhere/{len(dataset)}.png", metadata=fo.ImageMetadata(width=WIDTH, height=HEIGHT))
        for name, labels in fields.items():
            sample[name] = None if labels is None else fo.Detections(detections=labels)
        dataset.add_sample(sample)
        return sample

    return add


@pytest.fixture
def stored(dataset):
    """Returns the samples' raw documents; any write to a sample changes its `last_modified_at`."""
    return lambda: [bson.encode(document) for document in dataset._sample_collection.find({})]
