"""Procedural scenes with exact instance masks, on which the demo weights are trained and evaluated.

A scene is a textured background with overlapping textured shapes. ``(seed, index)`` determines everything, so a
training set is a range of numbers, and an unseen set is another.

    python -m fiftyone_mobilesamv2.training.scenes --output scenes --count 30

writes unseen scenes as a dataset in COCO format.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

from ..modeling.arrays import AnyArray, FloatArray, ImageArray, MaskArray
from ..modeling.complete_files import complete_file
from ..modeling.rle import RLE
from .examples import Example

# Seeds of this project's sets. Published figures refer to TEST_SEED.
TRAIN_SEED = 1
VALIDATION_SEED = 2
TEST_SEED = 3

MIN_OBJECT_AREA = 80  # visible pixels; smaller objects are hard to distinguish from texture
MIN_VISIBLE_SHARE = 0.35  # minimum share of an object's area that later objects leave visible


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        image: uint8 RGB [H, W, 3].
        labels: uint8 [H, W]; 0 is background, i the visible part of object i.
    """

    image: ImageArray
    labels: ImageArray

    @property
    def num_objects(self) -> int:
        return int(self.labels.max())

    def masks(self) -> MaskArray:
        """The visible part of each object, bool [N, H, W]."""
        masks: MaskArray = self.labels[None] == np.arange(1, self.num_objects + 1, dtype=np.uint8)[:, None, None]
        return masks

    def boxes(self) -> FloatArray:
        """The tight box of each visible part, float32 [N, 4], xyxy, ends exclusive."""
        boxes = np.zeros((self.num_objects, 4), np.float32)
        for i in range(self.num_objects):
            x, y, w, h = cv2.boundingRect((self.labels == i + 1).astype(np.uint8))
            boxes[i] = x, y, x + w, y + h
        return boxes

    def rle(self) -> tuple[RLE, ...]:
        """The visible part of each object as COCO RLE."""
        return tuple(mask_utils.encode(np.asfortranarray(mask, np.uint8)) for mask in self.masks())


class SceneExamples(Sequence[Example]):
    """The first `count` scenes of a set, to train on. Each is made when it is asked for."""

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.indices = seed, range(count)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[i] for i in self.indices[index]]
        index = self.indices[index]
        scene = make_scene(self.seed, index)
        return Example(
            id=f"{self.seed}-{index}",
            name=f"scene {index} of set {self.seed}",
            read=lambda: scene.image,
            boxes=scene.boxes(),
            masks=scene.rle(),
            ignored=np.zeros((0, 4), np.float32),
        )


def make_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the set `seed`: sides of 256 to 512 px, 3 to 20 objects."""
    rng = np.random.default_rng((seed, index))
    height, width = (int(v) for v in rng.integers(256, 513, 2))
    image: AnyArray = _texture(rng, height, width, _color(rng), contrast=0.7)
    labels = np.zeros((height, width), np.uint8)
    areas: list[int] = []
    for _ in range(int(rng.integers(3, 21))):
        shape = _shape(rng, height, width)
        if not _leaves_all_visible(labels, areas, shape):
            continue
        x, y, w, h = cv2.boundingRect(shape)
        box = np.s_[y : y + h, x : x + w]
        inside = shape[box] > 0
        image[box][inside] = _shaded(rng, _texture(rng, h, w, _color(rng), contrast=1.0), shape[box])[inside]
        areas.append(int(inside.sum()))
        labels[box][inside] = len(areas)
    image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.3, 0.8))
    image += rng.normal(0, rng.uniform(1, 6), image.shape).astype(np.float32)
    return Scene(np.clip(np.round(image), 0, 255).astype(np.uint8), labels)


def _leaves_all_visible(labels: ImageArray, areas: list[int], shape: ImageArray) -> bool:
    """Whether `shape` is large enough and leaves enough of every earlier object visible."""
    if int(np.count_nonzero(shape)) < MIN_OBJECT_AREA:
        return False
    left = np.bincount(labels[shape == 0], minlength=len(areas) + 1)[1:]
    return all(n >= max(MIN_OBJECT_AREA, MIN_VISIBLE_SHARE * area) for n, area in zip(left, areas))


def _color(rng: np.random.Generator) -> FloatArray:
    hsv = np.array([[[rng.uniform(0, 180), rng.uniform(20, 255), rng.uniform(40, 250)]]], np.uint8)
    color: FloatArray = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)
    return color


def _shape(rng: np.random.Generator, height: int, width: int) -> ImageArray:
    """A random shape, uint8 [H, W], 1 inside: a closed outline in polar form around a random centre."""
    # Log-uniform sizes, so that small objects are as common as large ones.
    radius = 0.5 * min(height, width) * float(np.exp(rng.uniform(np.log(0.05), np.log(0.55))))
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    kind = rng.integers(0, 5)
    if kind == 0:  # ellipse
        outline = np.ones_like(angle)
    elif kind == 1:  # regular polygon, or a star
        corners = int(rng.integers(3, 8))
        sector = (angle % (2 * np.pi / corners)) - np.pi / corners
        outline = np.cos(np.pi / corners) / np.cos(sector)
        if rng.random() < 0.4:
            outline = 1 / (1 + rng.uniform(0.3, 0.8) * np.abs(np.cos(corners * angle / 2)))
    elif kind == 2:  # rectangle
        outline = 1 / np.maximum(np.abs(np.cos(angle)), np.abs(np.sin(angle)))
    else:  # blob
        outline = np.ones_like(angle)
        for k in range(2, int(rng.integers(3, 7))):
            outline += rng.uniform(0, 0.6 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    stretch = np.exp(rng.uniform(-0.6, 0.6))
    points = radius * outline[:, None] * np.stack([np.cos(angle) * stretch, np.sin(angle) / stretch], 1)
    turn = rng.uniform(0, 2 * np.pi)
    points = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    points += rng.uniform((0, 0), (width, height))
    shape = np.zeros((height, width), np.uint8)
    cv2.fillPoly(shape, [np.round(points).astype(np.int32)], 1)
    return shape


def _texture(rng: np.random.Generator, height: int, width: int, color: FloatArray, contrast: float) -> FloatArray:
    """A texture around `color`, float32 [H, W, 3]: plain, gradient, stripes, checks, or cloudy noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    turn = rng.uniform(0, np.pi)
    along = x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn))
    kind = rng.integers(0, 5)
    pattern: AnyArray
    if kind == 0:
        pattern = np.zeros((height, width), np.float32)
    elif kind == 1:
        pattern = along / max(height, width) - 0.5
    elif kind == 2:
        pattern = 0.5 * np.sin(along * np.float32(2 * np.pi / rng.uniform(5, 30)))
    elif kind == 3:
        across = y * np.float32(np.cos(turn)) - x * np.float32(np.sin(turn))
        side = rng.uniform(4, 20)
        pattern = ((along // side + across // side) % 2).astype(np.float32) - 0.5
    else:
        coarse = rng.uniform(-0.8, 0.8, (int(rng.integers(3, 10)), int(rng.integers(3, 10)))).astype(np.float32)
        pattern = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    other = _color(rng)
    strength = contrast * rng.uniform(0.2, 0.7)
    texture: FloatArray = color + pattern[..., None] * np.float32(strength) * (other - color)
    return texture


def _shaded(rng: np.random.Generator, texture: FloatArray, shape: ImageArray) -> FloatArray:
    """Darkens some objects towards their outline, like a curved surface."""
    if rng.random() < 0.5:
        return texture
    depth = cv2.distanceTransform(np.pad(shape, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    light = 1 - rng.uniform(0.1, 0.45) * np.exp(-depth / max(1.0, 0.2 * float(depth.max())))
    shaded: FloatArray = texture * light[..., None].astype(np.float32)
    return shaded


def write_coco(folder: Path, count: int, make: Callable[[int], Scene] | None = None) -> tuple[Path, Path]:
    """Writes scenes in COCO format, with their objects' masks as RLE.

    Existing images are kept, since they are the same.

    Args:
        count: how many.
        make: makes a scene by its number; default: those of the test set.

    Returns:
        The folder of the images, and the JSON file.
    """
    images_folder, file = folder / "images", folder / "scenes.json"
    images_folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in tqdm(range(count), desc="Making scenes"):
        scene = make_scene(TEST_SEED, index) if make is None else make(index)
        path = images_folder / f"{index:03d}.png"
        if not path.exists():
            with complete_file(path) as temporary:
                cv2.imwrite(str(temporary), scene.image[:, :, ::-1])
        height, width = scene.labels.shape
        images.append({"id": index, "file_name": path.name, "height": height, "width": width})
        for rle in scene.rle():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": int(mask_utils.area(rle)),
                    "bbox": mask_utils.toBbox(rle).tolist(),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    categories = [{"id": 1, "name": "object"}]
    with complete_file(file) as temporary:
        temporary.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return images_folder, file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("scenes"))
    parser.add_argument("--count", type=int, default=30)
    args = parser.parse_args()
    print("\n".join(map(str, write_coco(args.output, args.count))))


if __name__ == "__main__":
    main()
