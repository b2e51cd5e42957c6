"""A small dataset that can be evaluated quickly."""

import cv2
import fiftyone as fo
import numpy as np
import pytest

HEIGHT, WIDTH = 48, 64


def box(x, y, w, h, **attributes):
    bounding_box = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]
    return fo.Detection(label="a", bounding_box=bounding_box, mask=np.ones((h, w), bool), **attributes)


def make_labels():
    """Two objects; of two proposals for the first, confidence ranks one first and predicted IoU the other."""
    objects = [box(0, 0, 20, 20), box(30, 20, 10, 10)]
    proposals = [
        box(0, 0, 20, 18, confidence=0.9, predicted_iou=0.1),
        box(0, 0, 20, 19, confidence=0.1, predicted_iou=0.9),
        box(50, 30, 5, 5, confidence=0.5, predicted_iou=0.5),
    ]
    return fo.Detections(detections=objects), fo.Detections(detections=proposals)


@pytest.fixture
def small(dataset, tmp_path):
    """Three images with labels, a fourth with none, and a fifth that the evaluations don't include."""
    for number in range(5):
        path = str(tmp_path / f"{number}.png")
        cv2.imwrite(path, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        sample = fo.Sample(path, metadata=fo.ImageMetadata(width=WIDTH, height=HEIGHT))
        if number != 3:
            sample["ground_truth"], sample["proposals"] = make_labels()
        dataset.add_sample(sample)
    return dataset
