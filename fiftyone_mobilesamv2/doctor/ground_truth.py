"""Images with known objects: photos from installed packages, and scenes generated for this package.

The photos' masks were drawn by hand for this package, accurate to about 3 pixels. The objects fill less than 55 % of
their boxes, so the filled box and the ellipse in it are poor answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..images import read_image
from ..installed_photos import find_photo
from ..modeling.arrays import FloatArray, ImageArray, MaskArray
from ..modeling.checkpoints.verification import file_hashes
from ..training.scenes import TEST_SEED, make_scene

PHOTO_OBJECTS = Path(__file__).with_name("photo_objects.json")
MAX_FILL = 0.55  # maximum share of its box that an object fills
MIN_AREA = 400  # minimum pixels of an object in a scene: for smaller ones, an error of one pixel dominates
NUM_SCENES = 20

_FRACTION_BITS = 3  # fractional bits of the coordinates for drawing


@dataclass(frozen=True)
class KnownImage:
    """An image and masks of some of its objects.

    Attributes:
        name: the name of the file, or the number of the scene.
        image: uint8 RGB [H, W, 3].
        objects: the names of the objects.
        masks: bool [N, H, W].
    """

    name: str
    image: ImageArray
    objects: list[str]
    masks: MaskArray

    @property
    def boxes(self) -> FloatArray:
        """float32 [N, 4], xyxy: the tight box of each mask, ends exclusive."""
        x, y, w, h = np.array([cv2.boundingRect(mask.astype(np.uint8)) for mask in self.masks], np.float32).T
        return np.stack([x, y, x + w, y + h], 1)

    @property
    def fills(self) -> FloatArray:
        """[N], the share of its box that each object fills."""
        boxes = self.boxes
        fills: FloatArray = self.masks.sum((1, 2)) / ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        return fills


def known_images(kind: str) -> list[KnownImage]:
    """The images for checking a model: "photos" or "scenes", as given in the catalog.

    >>> known_images("scenes")[0].masks.dtype
    dtype('bool')
    """
    return photos() if kind == "photos" else scenes()


def photos() -> list[KnownImage]:
    """The photos from installed packages whose files are the annotated ones."""
    images = []
    for photo in json.loads(PHOTO_OBJECTS.read_text())["photos"]:
        path = find_photo(photo["package"], photo["path"])
        if path is None or file_hashes(path)[0] != photo["sha256"]:
            continue  # perhaps another version of the package with different photos
        image = read_image(str(path))
        masks = [filled(each["rings"], image.shape[:2]) for each in photo["objects"]]
        images.append(KnownImage(path.name, image, [each["name"] for each in photo["objects"]], np.stack(masks)))
    return images


def scenes() -> list[KnownImage]:
    """Scenes that the demo model was not trained on, with the objects that don't fill their boxes."""
    images = []
    for index in range(NUM_SCENES):
        scene = make_scene(TEST_SEED, index)
        names = [f"object {i}" for i in range(scene.num_objects)]
        whole = KnownImage(f"scene {index}", scene.image, names, scene.masks())
        kept = np.flatnonzero((whole.fills < MAX_FILL) & (whole.masks.sum((1, 2)) >= MIN_AREA))
        if len(kept):
            images.append(KnownImage(whole.name, whole.image, [names[i] for i in kept], whole.masks[kept]))
    return images


def filled(rings: list[list[list[float]]], size: tuple[int, int]) -> MaskArray:
    """bool [H, W]: polygons of (x, y), filled by the even-odd rule; pixels that they touch are inside."""
    mask = np.zeros(size, np.uint8)
    points = [np.round(np.array(ring, float) * 2**_FRACTION_BITS).astype(np.int32) for ring in rings]
    cv2.fillPoly(mask, points, 1, shift=_FRACTION_BITS)
    return mask.astype(bool)
