"""Letterboxing, NMS, border snapping and scaling back to the image, on cases computed by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from fiftyone_mobilesamv2.modeling.object_discovery import (
    ObjectDiscovery,
    boxes_from_raw,
    letterbox,
    snap_to_border,
    to_image,
)


class FixedDetector(nn.Module):
    """A detector that returns the same raw boxes for every input, and records its inputs."""

    def __init__(self, raw: torch.Tensor) -> None:
        super().__init__()
        self.raw = nn.Parameter(raw[None], requires_grad=False)
        self.seen: list[torch.Tensor] = []

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.seen.append(pixels)
        return self.raw, None


def raw_output(*boxes: tuple[float, float, float, float, float]) -> torch.Tensor:
    """(x0, y0, x1, y1, score) in network pixels -> the detector's output [5, anchors]."""
    x0, y0, x1, y1, score = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5).T
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, score])


@pytest.mark.parametrize(
    "size, expected",
    [
        ((480, 640), (256, 320)),  # 240 rows, and 8 rows of padding on either side
        ((640, 480), (320, 256)),
        ((320, 320), (320, 320)),
        ((100, 100), (320, 320)),
        ((1, 1), (320, 320)),
        ((1, 3000), (32, 320)),
        ((3000, 1), (320, 32)),
    ],
    ids=str,
)
def test_letterbox_size_and_padding(size, expected):
    pixels = letterbox(np.full((*size, 3), 255, np.uint8), 320)
    assert pixels.shape == (1, 3, *expected) and pixels.dtype == torch.float32
    assert pixels.max() == 1
    # As in the detectors' training, the padding is grey (114 of 255) and split evenly between both sides.
    seen = pixels[0, 0] == 1
    for axis in (0, 1):
        rows = torch.nonzero(seen.any(1 - axis)).flatten()
        before, after = int(rows[0]), expected[axis] - 1 - int(rows[-1])
        assert abs(before - after) <= 1
        if before:
            torch.testing.assert_close(
                pixels.select(axis + 2, 0), torch.full_like(pixels.select(axis + 2, 0), 114 / 255)
            )


def test_letterbox_keeps_the_order_of_channels():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:] = (255, 51, 0)
    torch.testing.assert_close(letterbox(image, 32)[0, :, 5, 5], torch.tensor([1, 0.2, 0]))


@pytest.mark.parametrize(
    "box, expected",
    [
        ((19.9, 19.9, 300, 150), (0, 0, 300, 150)),
        ((20, 20, 300, 150), (20, 20, 300, 150)),  # exactly 20 px from the border: not moved
        ((50, 60, 1004, 180), (50, 60, 1004, 180)),
        ((50, 60, 1004.1, 180.1), (50, 60, 1024, 200)),
        ((-5, -7, 1034, 205), (0, 0, 1024, 200)),
        ((5, 50, 10, 60), (0, 50, 10, 60)),  # only the side next to its border moves
        ((1014, 190, 1019, 195), (1014, 190, 1024, 200)),
        ((30, 30, 30, 30), (30, 30, 30, 30)),  # a point
        ((300, 150, 50, 60), (300, 150, 50, 60)),  # inverted
        ((10, 10, 1019, 195), (0, 0, 1024, 200)),
    ],
    ids=str,
)
def test_boxes_near_the_border_snap_to_it(box, expected):
    boxes = torch.tensor([box], dtype=torch.float32)
    before = boxes.clone()
    assert snap_to_border(boxes, (200, 1024)).tolist() == [list(expected)]
    assert torch.equal(boxes, before)
    # What is near depends on the size of the network input, the same share of an object's.
    assert (snap_to_border(boxes / 4, (50, 256)) * 4).tolist() == [list(expected)]


def test_snapping_of_no_boxes():
    assert snap_to_border(torch.zeros(0, 4), (200, 400)).shape == (0, 4)


@pytest.mark.parametrize(
    "size, box, expected",
    [
        # 480x640 is scaled by 0.5 to 240x320, with 8 rows of padding above.
        ((480, 640), (10, 18, 110, 68), (20, 20, 220, 120)),
        ((480, 640), (0, 0, 320, 256), (0, 0, 640, 480)),  # padding is clipped
        ((480, 640), (-9, 2, 400, 300), (0, 0, 640, 480)),
        ((480, 640), (50, 0, 60, 6), (100, 0, 120, 0)),  # entirely in the padding
        # 640x480 has padding on the left and right.
        ((640, 480), (18, 10, 68, 110), (20, 20, 120, 220)),
    ],
    ids=str,
)
def test_boxes_are_scaled_back_to_the_image(size, box, expected):
    network_size = (256, 320) if size == (480, 640) else (320, 256)
    scaled = to_image(torch.tensor([box], dtype=torch.float32), network_size, size)
    torch.testing.assert_close(scaled, torch.tensor([expected], dtype=torch.float32))


def test_threshold_nms_order_and_limit():
    raw = raw_output(
        (100, 100, 140, 140, 0.5),
        (30, 30, 70, 70, 0.9),
        (30, 30, 70, 71, 0.8),  # IoU 40/41 with the box above
        (30, 30, 70, 50, 0.7),  # IoU 0.5
        (100, 30, 140, 70, 0.4),  # not above the threshold
    )
    geometry = (256, 320), (480, 640)

    def scores(conf: float = 0.4, iou: float = 0.9, max_prompts: int = 320) -> list[float]:
        return [round(score, 3) for score in boxes_from_raw(raw, *geometry, conf, iou, max_prompts).scores.tolist()]

    assert scores() == [0.9, 0.7, 0.5]
    assert scores(iou=0.99) == [0.9, 0.8, 0.7, 0.5]
    assert scores(iou=0.45) == [0.9, 0.5]
    assert scores(conf=0.3) == [0.9, 0.7, 0.5, 0.4]
    assert scores(max_prompts=2) == [0.9, 0.7]
    assert scores(max_prompts=0) == []
    best = boxes_from_raw(raw, *geometry, 0.4, 0.9, 1)
    torch.testing.assert_close(best.boxes, torch.tensor([[60.0, 44, 140, 124]]))
    assert len(best) == 1 and best.boxes.dtype == best.scores.dtype == torch.float32


@pytest.mark.parametrize("raw", [raw_output((30, 30, 70, 70, 0.2)), raw_output()], ids=["unsure", "no anchors"])
def test_no_detections(raw):
    discovered = ObjectDiscovery(FixedDetector(raw), 320)(np.zeros((480, 640, 3), np.uint8))
    assert len(discovered) == 0 and discovered.boxes.shape == (0, 4) and discovered.scores.shape == (0,)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((480, 640), (200, 144, 400, 304)),  # scaled by 0.5, 8 rows of padding
        ((1, 640), (200, 1, 400, 1)),  # the box lies below the image's only row
        ((640, 1), (1, 160, 1, 320)),
    ],
    ids=str,
)
def test_boxes_do_not_depend_on_earlier_images(size, expected):
    """Each image's boxes are scaled by that image's own size."""
    detector = FixedDetector(raw_output((100, 80, 200, 160, 0.9)))
    discovery = ObjectDiscovery(detector, 320)
    image = np.zeros((*size, 3), np.uint8)
    discovered = discovery(image)
    torch.testing.assert_close(detector.seen[0], letterbox(image, 320))
    height, width = size
    assert (discovered.boxes >= 0).all() and (discovered.boxes <= torch.tensor([width, height, width, height])).all()
    torch.testing.assert_close(discovered.boxes, torch.tensor([expected], dtype=torch.float32))
    discovery(np.zeros((50, 70, 3), np.uint8))
    assert torch.equal(discovery(image).boxes, discovered.boxes)


def test_mask_branch_is_ignored():
    """A segmentation model returns additional rows (mask coefficients), in a tuple."""

    class Segmenter(FixedDetector):
        def forward(self, pixels):
            return (torch.cat([self.raw, torch.full((1, 32, self.raw.shape[2]), 9.0)], 1), None), None

    raw = raw_output((100, 80, 200, 160, 0.9))
    image = np.zeros((480, 640, 3), np.uint8)
    discovered = ObjectDiscovery(Segmenter(raw), 320)(image)
    assert torch.equal(discovered.boxes, ObjectDiscovery(FixedDetector(raw), 320)(image).boxes)
