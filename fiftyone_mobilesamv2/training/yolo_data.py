"""Examples as ultralytics' trainer reads them: its augmentations of images that stay where they are."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader
from ultralytics.data.dataset import YOLODataset

from ..modeling.arrays import ImageArray
from ..modeling.complete_files import complete_file
from .examples import Example

# Classes of boxes during training. The detector has one class; ignored regions go through the same augmentations as
# objects, and the loss tells them apart.
OBJECT, IGNORED = 0, 1


class ExampleDataset(YOLODataset):
    """Examples as items of ultralytics' trainer.

    An item depends only on the seed, the epoch and its index, so that any number of workers, and a training that was
    interrupted, see the same data.

    Args:
        examples: images with boxes.
        cache: folder for images at the size of the network; None: read the images every time.
        seed: of the augmentations.
        options: ultralytics' own, such as `imgsz` and `hyp`.
    """

    imgsz: Any  # int

    def __init__(self, examples: Sequence[Example], cache: Path | None, seed: int, **options: Any) -> None:
        self.examples, self.cache_folder, self.seed, self.epoch = examples, cache, seed, 0
        # "ram" makes a mosaic of any images, rather than of those that this worker has read lately.
        super().__init__(img_path="", data={"names": {0: "object"}}, task="detect", cache="ram", **options)

    def get_img_files(self, img_path: str | list[str]) -> list[str]:
        return [example.name for example in self.examples]

    def get_labels(self) -> list[dict[str, Any]]:
        return [_label(example) for example in self.examples]

    def check_cache_ram(self, safety_margin: float = 0.5) -> bool:
        return False  # images are not kept in memory

    def load_image(
        self, i: int, rect_mode: bool = True, resize_short: bool = False
    ) -> tuple[ImageArray, tuple[int, int], tuple[int, int]]:
        image, size = cached_image(self.examples[i], self.imgsz, self.cache_folder)
        return np.ascontiguousarray(image[..., ::-1]), size, image.shape[:2]  # BGR, as ultralytics augments it

    def update_labels_info(self, label: dict[str, Any]) -> dict[str, Any]:
        label = super().update_labels_info(label)
        height, width = label["ori_shape"]  # unknown before the image was read
        label["instances"].normalize(width, height)
        return label

    def __getitem__(self, index: int) -> dict[str, Any]:
        with seeded(self.seed, self.epoch, index):
            item: dict[str, Any] = super().__getitem__(index)
        return item


def _label(example: Example) -> dict[str, Any]:
    boxes = np.concatenate([example.boxes, example.ignored]).astype(np.float32).reshape(-1, 4)
    kinds = np.repeat([OBJECT, IGNORED], [len(example.boxes), len(example.ignored)]).astype(np.float32)[:, None]
    return {
        "im_file": example.name,
        "cls": kinds,
        "bboxes": boxes,
        "segments": [],
        "keypoints": None,
        "normalized": False,
        "bbox_format": "xyxy",
    }


def cached_image(example: Example, size: int, cache: Path | None) -> tuple[ImageArray, tuple[int, int]]:
    """An example's pixels, with its long side resized to `size`, and its own (height, width).

    Args:
        cache: folder to keep the resized image in; None: don't keep it.
    """
    path = None if cache is None else cache / f"{example.id}-{size}.npz"
    if path is not None and path.exists():
        with np.load(path, allow_pickle=False) as saved:
            height, width = (int(side) for side in saved["size"])
            return saved["image"], (height, width)
    image = example.read()
    height, width = image.shape[:2]
    ratio = size / max(height, width)
    if ratio != 1:  # as ultralytics resizes images
        sides = min(math.ceil(width * ratio), size), min(math.ceil(height * ratio), size)
        image = np.asarray(cv2.resize(image, sides, interpolation=cv2.INTER_LINEAR), np.uint8)
    if path is not None:
        with complete_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, image=image, size=(height, width))
    return image, (height, width)


class EpochLoader(DataLoader[Any]):
    """Loads the items of an epoch in an order that depends only on the seed and the epoch."""

    def __init__(self, dataset: ExampleDataset, batch_size: int, workers: int) -> None:
        self.order = torch.Generator()
        super().__init__(
            dataset,
            batch_size,
            shuffle=True,
            num_workers=workers,
            collate_fn=YOLODataset.collate_fn,
            generator=self.order,
        )

    def start_epoch(self, epoch: int) -> None:
        dataset: Any = self.dataset
        dataset.epoch = epoch
        self.order.manual_seed(dataset.seed * 1_000_003 + epoch)

    def reset(self) -> None:
        """ultralytics calls it when augmentations change: workers start anew in each epoch anyway."""


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Within it, Python's and NumPy's random numbers depend on these numbers only."""
    states = random.getstate(), np.random.get_state()
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
