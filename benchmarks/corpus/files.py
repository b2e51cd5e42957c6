"""Files in COCO and LVIS format with mutated values: each is loaded as it should be, or refused in one sentence."""

from __future__ import annotations

import json
import random
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mutations import VALUES, mutated

SIZES = {1: (10, 12), 2: (30, 40), 3: (48, 64)}  # image id -> height, width
_VALUES = [*VALUES, "\ud800", 10**25, 10**400, "../1.png", "x" * 300 + ".png", [[1, 1, 5, 1, 5, 5]], "a" * 100_000]
_SENTENCE = re.compile(r"\b(annotation|image|category) (number )?\S+|\b(annotation|image|categorie)s\b")
MAX_LENGTH = 500  # of a message, without the paths in it


class Violation(Exception):
    """Something that should not happen."""


# Cases ---------------------------------------------------------------------------------------------------------------


@st.composite
def files(draw: st.DrawFn) -> str:
    """The text of a file that COCO's and LVIS's loaders can read but for up to two values."""
    rng = random.Random(draw(st.integers(0, 2**32)))  # drawing each number from hypothesis takes 20 times as long
    ids = rng.sample(sorted(SIZES), rng.randint(1, 3))
    images = [
        {
            "id": id,
            "file_name": f"{id}.png",
            "coco_url": f"http://images.cocodataset.org/val2017/{id}.png",
            "height": SIZES[id][0],
            "width": SIZES[id][1],
            "license": 1,
            "neg_category_ids": [2],
            "not_exhaustive_category_ids": [],
        }
        for id in ids
    ]
    categories = [
        {"id": 1, "name": "cat", "supercategory": "animal", "frequency": "r", "synset": "cat.n.01", "image_count": 3},
        {"id": 5, "name": "dog", "supercategory": "animal", "frequency": "f", "synset": "dog.n.01", "image_count": 9},
    ]
    annotations = [_annotation(rng, number, rng.choice(ids)) for number in range(1, rng.randint(2, 5))]
    content = {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": categories}
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2]))):
        if content:
            content, _ = draw(mutated(content, _VALUES))
    text = json.dumps(content)
    if not draw(st.integers(0, 40)):
        text = text[: draw(st.integers(0, len(text)))]
    return text


def _annotation(rng: random.Random, number: int, image: int) -> dict[str, Any]:
    height, width = SIZES[image]
    x, y = rng.randint(0, width - 4), rng.randint(0, height - 4)
    w, h = rng.randint(1, width - x), rng.randint(1, height - y)
    mask = np.zeros((height, width), bool)
    mask[y : y + h, x : x + w] = True
    mask[y + h // 2, x + w // 2] = False
    kind = rng.choice(["polygons", "polygons", "far", "pairs", "runs", "text", "none"])
    reach = 1e7 if kind == "far" else 2 * max(height, width)
    polygons = [
        [[round(rng.uniform(-reach, reach), 2) for _ in "xy"] for _ in range(rng.randint(2, 6))]
        for _ in range(rng.randint(1, 2))
    ]
    polygons.append([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
    segmentation: object = [[value for point in polygon for value in point] for polygon in polygons]
    if kind == "pairs":
        segmentation = polygons[-1:]
    elif kind == "runs":
        segmentation = {"size": [height, width], "counts": _runs(mask)}
    elif kind == "text":
        from pycocotools import mask as mask_utils

        rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": [height, width], "counts": rle["counts"].decode()}
    elif kind == "none":
        segmentation = rng.choice([[], None, [[1, 1]]])
    return {
        "id": number,
        "image_id": image,
        "category_id": rng.choice([1, 5]),
        "iscrowd": rng.choice([0, 1, False, True]),
        "area": rng.choice([1.5, 20, None]),
        "bbox": [x + 0.5, y, w, h],
        "segmentation": segmentation,
    }


def _runs(mask: np.ndarray) -> list[int]:
    pixels = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    return np.diff([0, *changes, mask.size]).tolist()


# What happens with them ---------------------------------------------------------------------------------------------


class Loading:
    """Loads files with `load_coco` or `load_lvis` and compares the result with pycocotools and geometry."""

    def __init__(self, name: str, folder: Path) -> None:
        import fiftyone as fo
        from PIL import Image

        from fiftyone_mobilesamv2 import errors
        from fiftyone_mobilesamv2.evaluation.coco import load_coco
        from fiftyone_mobilesamv2.evaluation.lvis import load_lvis

        self.load: Callable[..., Any] = {"load_coco": load_coco, "load_lvis": load_lvis}[name]
        fo.config.show_progress_bars = False
        self.fo, self.error = fo, errors.ArgumentError
        self.path_key = {"load_coco": "file_name", "load_lvis": "coco_url"}[name]
        self.folder, self.file = folder / name, folder / name / "instances.json"
        self.folder.mkdir()
        self.name = f"corpus-{uuid.uuid4().hex}"
        for id, (height, width) in SIZES.items():
            Image.new("RGB", (width, height)).save(self.folder / f"{id}.png")
        self(["{}"])  # connects to the database, before memory is limited

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """For each file: "used" or "refused: ...". Raises Violation for what should not happen."""
        return [self._outcome(text) for text in texts]

    def _outcome(self, text: str) -> str:
        self.file.write_text(text)
        try:
            dataset = self.load(self.folder, self.file, name=self.name)
        except (self.error, FileNotFoundError) as error:
            self._check_message(str(error))
            if self.fo.dataset_exists(self.name):
                raise Violation("a dataset was left behind") from error
            return f"refused: {error}"
        try:
            self._compare(dataset, json.loads(text))
        finally:
            dataset.delete()
        return "used"

    def _check_message(self, message: str) -> None:
        rest = message.replace(str(self.file), "").replace(str(self.folder), "")
        if str(self.file) not in message:
            raise Violation(f"the file is not named: {message[:1000]}")
        if not message.isprintable() or len(rest) > MAX_LENGTH:
            raise Violation(f"not one sentence of at most {MAX_LENGTH} characters: {message[:1000]!r}")
        if not (_SENTENCE.search(rest) or "can't be read as JSON" in rest):
            raise Violation(f"no annotation, image or category is named: {message}")

    def _compare(self, dataset: Any, content: dict[str, Any]) -> None:
        names = {category["id"]: category for category in content["categories"]}
        _expect(len(dataset), len(content["images"]), "number of images")
        for sample, image in zip(dataset, content["images"]):
            _expect(Path(sample.filepath).name, image[self.path_key].split("/")[-1], "file")
            size = image["height"], image["width"]
            _expect(size, SIZES[int(Path(sample.filepath).stem)], "size")
            _expect((sample.metadata.height, sample.metadata.width), size, "size in the metadata")
            annotations = [each for each in content["annotations"] if _same(each["image_id"], image["id"])]
            detections = sample.ground_truth.detections
            _expect(len(detections), len(annotations), f"number of objects in image {image['id']}")
            for detection, annotation in zip(detections, annotations):
                what = f"annotation {annotation['id']}"
                category = names[annotation["category_id"]]
                _expect(detection.label, category["name"], f"class of {what}")
                _expect(detection.iscrowd, annotation.get("iscrowd", 0) == 1, f"crowd of {what}")
                _expect(annotation.get("iscrowd", 0) in (0, 1), True, f"valid iscrowd in {what}")
                if "frequency" in category:
                    _expect(detection.frequency, category["frequency"], f"frequency of {what}")
                mask = _pasted(detection, size)
                area = annotation.get("area")
                _expect(detection.area, float(mask.sum() if area is None else area), f"area of {what}")
                expected, certain = _pixels(annotation.get("segmentation"), size)
                if (mask != expected)[certain].any():
                    raise Violation(f"other pixels in {what}: {annotation.get('segmentation')!r:.500}")


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _expect(found: object, expected: object, what: str) -> None:
    if not _same(found, expected):
        raise Violation(f"{what}: {found!r:.200} was loaded, {expected!r:.200} was expected")


def _pasted(detection: Any, size: tuple[int, int]) -> np.ndarray:
    """bool [height, width], of a detection whose box must lie on whole pixels of the image, tight unless empty."""
    height, width = size
    box = np.array(detection.bounding_box) * [width, height, width, height]
    x, y, w, h = np.round(box).astype(int)
    if not np.allclose(box, [x, y, w, h], atol=1e-9) or detection.mask.shape != (h, w):
        raise Violation(f"the box {box} does not fit its mask of shape {detection.mask.shape}")
    if x < 0 or y < 0 or w < 1 or h < 1 or x + w > width or y + h > height:
        raise Violation(f"the box {box} is outside the image")
    if detection.mask.any() and not (detection.mask.any(0)[[0, -1]].all() and detection.mask.any(1)[[0, -1]].all()):
        raise Violation(f"the box {box} is not tight")
    mask = np.zeros(size, bool)
    mask[y : y + h, x : x + w] = detection.mask
    return mask


def _pixels(segmentation: Any, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """bool [height, width] each: the pixels of a segmentation, and those of which that is certain."""
    from pycocotools import mask as mask_utils

    height, width = size
    everywhere = np.ones(size, bool)
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        runs = segmentation["counts"]
        values = np.arange(len(runs)) % 2 == 1
        return np.repeat(values, runs).reshape(width, height).T, everywhere
    if isinstance(segmentation, dict):
        rle = {"size": [height, width], "counts": segmentation["counts"].encode()}
        return mask_utils.decode(rle).astype(bool), everywhere
    mask, certain = np.zeros(size, bool), everywhere
    for polygon in segmentation or []:
        points = np.array(polygon, float).reshape(-1, 2)
        if len(points) < 3:
            continue
        margin = max(size)
        if ((points >= -margin) & (points <= np.array([width, height]) + margin)).all():
            mask |= mask_utils.decode(mask_utils.frPyObjects([points.ravel().tolist()], height, width)[0]).astype(bool)
        else:
            inside, distance = _even_odd(points, size)
            mask |= inside
            certain = certain & (distance > 1.5)
    return mask, certain


def _even_odd(points: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """bool and float [height, width]: whether a pixel's centre is in a polygon, and how far its outline is."""
    x, y = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)
    start, end = points[:, None, None], np.roll(points, -1, 0)[:, None, None]
    step = end - start
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = start[..., 0] + (y - start[..., 1]) / step[..., 1] * step[..., 0]
        along = ((x - start[..., 0]) * step[..., 0] + (y - start[..., 1]) * step[..., 1]) / (step**2).sum(-1)
    to_the_right = ((start[..., 1] > y) != (end[..., 1] > y)) & (crossing > x)
    nearest = start + np.nan_to_num(np.clip(along, 0, 1))[..., None] * step
    return to_the_right.sum(0) % 2 == 1, np.hypot(nearest[..., 0] - x, nearest[..., 1] - y).min(0)
