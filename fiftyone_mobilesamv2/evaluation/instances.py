"""Instance annotations in COCO or LVIS format: reads a file and checks everything in it that is used."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from reprlib import repr  # shortened: values may be of any length
from typing import Any, NoReturn

import numpy as np

from ..errors import ArgumentError, message_of
from ..modeling.arrays import FloatArray, MaskArray
from ..modeling.rle import MAX_COORDINATE, RLE, checked_rle, rle_from_polygons

Entry = dict[str, Any]  # an image, category or annotation, as in the file
Id = int | str
_KINDS = {"images": "image", "categories": "category", "annotations": "annotation"}


@dataclass(frozen=True)
class Instances:
    """The content of a JSON file.

    Attributes:
        file: its path.
        images: the entry of each image by its id.
        categories: the entry of each category by its id.
        objects: the annotations of each image by its id.
    """

    file: Path
    images: dict[Id, Entry]
    categories: dict[Id, Entry]
    objects: Mapping[Id, list[Entry]]

    def image_text(self, image: Id, key: str) -> str:
        """A text of an image's entry, such as its "file_name"."""
        return self._text("images", self.images[image], key)

    def category_name(self, annotation: Entry) -> str:
        return self._text("categories", self.categories[annotation["category_id"]], "name")

    def frequency(self, annotation: Entry) -> str | None:
        """LVIS's "r", "c" or "f"; None in COCO."""
        category = self.categories[annotation["category_id"]]
        return self._text("categories", category, "frequency") if "frequency" in category else None

    def size(self, image: Id) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        entry = self.images[image]
        height, width = (self._value("images", entry, key) for key in ("height", "width"))
        if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (height, width)):
            self._refuse(
                "images", entry, f"has width={repr(width)} and height={repr(height)}: whole numbers were expected"
            )
        return height, width

    def is_crowd(self, annotation: Entry) -> bool:
        value = annotation.get("iscrowd", 0)
        if not isinstance(value, (int, float)) or value not in (0, 1):
            self._refuse("annotations", annotation, f"has iscrowd={repr(value)}: 0 or 1 was expected")
        return bool(value)

    def area(self, annotation: Entry) -> float | None:
        """The area that the file states, in pixels; None if it states none."""
        value = annotation.get("area")
        if value is not None and not (_is_number(value) and value >= 0):
            self._refuse("annotations", annotation, f"has area={repr(value)}: a number of pixels was expected")
        return None if value is None else float(value)

    def box(self, annotation: Entry) -> tuple[float, float, float, float]:
        """x, y, width, height in pixels."""
        box = self._value("annotations", annotation, "bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            self._refuse("annotations", annotation, f"has bbox={repr(box)}: [x, y, width, height] was expected")
        x, y, width, height = box
        return x, y, width, height

    def mask(self, annotation: Entry, size: tuple[int, int]) -> MaskArray:
        """bool [height, width]: the object's pixels, as pycocotools has them; none without a segmentation."""
        from pycocotools import mask as mask_utils

        try:
            mask: MaskArray = mask_utils.decode(_rle(annotation.get("segmentation"), size)).astype(bool)
        except ValueError as error:
            raise ArgumentError(
                f"{self.file}: the segmentation of annotation {repr(annotation['id'])} is unusable: {error}. Polygons, "
                f"[[x, y, x, y, ...], ...], or RLE of {size[0]} rows and {size[1]} columns were expected."
            ) from error
        return mask

    def _text(self, key: str, entry: Entry, name: str) -> str:
        value = self._value(key, entry, name)
        if not isinstance(value, str) or not value or not _is_unicode(value):
            self._refuse(key, entry, f"has {name}={repr(value)}: text was expected")
        return value

    def _value(self, key: str, entry: Entry, name: str) -> Any:
        if name not in entry:
            self._refuse(key, entry, f"has no '{name}'; it has {_shortened(entry, 10)}")
        return entry[name]

    def _refuse(self, key: str, entry: Entry, problem: str) -> NoReturn:
        raise ArgumentError(f"{self.file}: {_KINDS[key]} {repr(entry['id'])} {problem}.")


def read_instances(file: str | PathLike[str]) -> Instances:
    """Reads a JSON file in COCO or LVIS format.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it isn't in this format, an id occurs twice, or an annotation refers to an image or category that
            the file doesn't list.
    """
    file = Path(file)
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{file} can't be read as JSON: {message_of(error)}") from error
    try:
        images, categories, annotations = (_entries(content, key) for key in _KINDS)
        instances = Instances(file, _by_id("images", images), _by_id("categories", categories), defaultdict(list))
        for id, annotation in _by_id("annotations", annotations).items():
            owner = f"annotation {repr(id)}"
            image, category = (_id(annotation, key, owner) for key in ("image_id", "category_id"))
            if image not in instances.images or category not in instances.categories:
                raise ArgumentError(
                    f"{owner} refers to image {repr(image)} and category {repr(category)}, but the file doesn't list "
                    "both: complete 'images' and 'categories', or remove the annotation."
                )
            instances.objects[image].append(annotation)
    except ArgumentError as error:
        raise ArgumentError(f"{file}: {error}") from error
    return instances


def _entries(content: object, key: str) -> list[Entry]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ArgumentError(
            f"it isn't in COCO format, which has a list of objects '{key}': it must contain 'images', 'annotations' "
            "and 'categories', like COCO's instances_*.json and lvis_v1_*.json."
        )
    return entries


def _by_id(key: str, entries: Sequence[Entry]) -> dict[Id, Entry]:
    ids = [_id(entry, "id", f"{_KINDS[key]} number {number}") for number, entry in enumerate(entries)]
    if repeated := [id for id, times in Counter(ids).items() if times > 1]:
        raise ArgumentError(
            f"{len(repeated)} ids occur more than once in '{key}': {_shortened(repeated)}. An id must identify one "
            f"{_KINDS[key]}."
        )
    if len({type(id) for id in ids}) > 1:
        raise ArgumentError(f"the ids in '{key}' are partly text and partly numbers: {_shortened(ids)}.")
    return dict(zip(ids, entries))


def _id(entry: Entry, key: str, owner: str) -> Id:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ArgumentError(f"it isn't in COCO format: {owner} has {key}={repr(value)}; a whole number was expected.")
    return value


def _shortened(values: Iterable[object], count: int = 5) -> str:
    texts = [repr(value) for value in values]
    return ", ".join(texts[:count]) + (", ..." if len(texts) > count else "")


def _is_unicode(text: str) -> bool:
    """Whether text can be stored: JSON may contain halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_COORDINATE  # not NaN


def _rle(segmentation: object, size: tuple[int, int]) -> RLE:
    if isinstance(segmentation, dict):
        return checked_rle(segmentation, size)
    if segmentation is None:
        segmentation = []
    if not isinstance(segmentation, list):
        raise ArgumentError(f"it is {type(segmentation).__name__}")
    if len(segmentation) >= 3 and all(isinstance(each, list) and len(each) == 2 for each in segmentation):
        raise ArgumentError("it is a list of points, not of polygons")
    return rle_from_polygons([_polygon(each) for each in segmentation], size)


def _polygon(polygon: object) -> FloatArray:
    """float64 [N, 2] of [x, y, x, y, ...], or of the unambiguous [[x, y], [x, y], ...]."""
    if not isinstance(polygon, list):
        raise ArgumentError(f"a polygon is {type(polygon).__name__}")
    if polygon and all(isinstance(point, list) and len(point) == 2 for point in polygon):
        polygon = [value for point in polygon for value in point]
    for value in polygon:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentError(f"a polygon contains {repr(value)}")
        if not abs(value) <= MAX_COORDINATE:
            raise ArgumentError(f"a polygon has the coordinate {repr(value)}")
    if len(polygon) % 2:
        raise ArgumentError(f"a polygon has an odd number of coordinates, {len(polygon)}")
    return np.array(polygon, float).reshape(-1, 2)
