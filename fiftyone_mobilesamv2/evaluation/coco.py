"""Ground truth in COCO format -> a FiftyOne dataset whose masks equal those of pycocotools.

FiftyOne's own importer crops each mask to the rounded annotated box, which loses pixels, and stores the box unrounded,
so that the position of the mask's pixels is no longer exact.
"""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Iterator, Mapping
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import NoReturn

import fiftyone as fo
import fiftyone.core.labels as fol
import numpy as np

from ..errors import ArgumentError, plain
from ..images import size_of
from ..labels.documents import image_metadata
from ..labels.fields import GROUND_TRUTH_FIELD
from .instances import Entry, Id, Instances, read_instances

logger = logging.getLogger(__name__)


def load_coco(
    images: str | PathLike[str],
    annotations: str | PathLike[str],
    sample: int | None = None,
    seed: int = 0,
    name: str | None = None,
    gt_field: str = GROUND_TRUTH_FIELD,
) -> fo.Dataset:
    """Loads images and their objects from a file such as COCO's `instances_*.json`.

    Every image of the file, or every drawn image, becomes a sample with its metadata and `fo.Detections`, even without
    objects. Every object becomes a `fo.Detection`:

    - `label`: the name of its category.
    - `mask`: bool [h, w], the pixels according to pycocotools, cropped to their tight box.
    - `bounding_box`: that tight box, [x, y, w, h] relative to the image; a whole number of pixels.
    - `iscrowd`: bool.
    - `area`: the area in the file, in pixels; for polygons, it may differ slightly from the mask's pixel count, which
      it is where the file states none.

    Annotations lie on the image as the App shows it, with its EXIF orientation applied if it is a JPEG or PNG file.

    An object without pixels, such as a polygon of two points, keeps the file's box, rounded outwards to pixels, and an
    all-False mask: as in pycocotools, no proposal can find it. A warning lists these objects.

    Args:
        images: the folder that the images' file names are relative to.
        annotations: the JSON file.
        sample: number of existing images to draw at random, including those without objects; None uses all images, all
            of which must exist. The draw doesn't depend on the order in the file.
        seed: seed of the draw.
        name: the name of a persistent dataset. Without it, the dataset is not persistent.
        gt_field: the field for the objects.

    Raises:
        FileNotFoundError: the JSON file or a listed image doesn't exist, or fewer than `sample` images do.
        ValueError: the JSON file isn't in COCO format or is inconsistent, an image's size differs from the file's, or a
            dataset of this name exists. Nothing is then left in the database.
    """
    instances = read_instances(annotations)
    paths = {key: Path(images) / instances.image_text(key, "file_name") for key in instances.images}
    return make_dataset(instances, paths, sample, seed, name, gt_field)


def make_dataset(
    instances: Instances, paths: Mapping[Id, Path], sample: int | None, seed: int, name: str | None, gt_field: str
) -> fo.Dataset:
    """A dataset of the images `paths` (id -> path) with their objects; otherwise like :func:`load_coco`."""
    if sample is not None and (isinstance(sample, bool) or not isinstance(sample, Integral) or sample < 1):
        raise ArgumentError(f"sample must be a number of images, 1 or more, or None for all; got {plain(sample)!r}.")
    existing = sorted(key for key, path in paths.items() if os.path.isfile(path))  # False for names that are too long
    if len(existing) < (len(paths) if sample is None else sample):
        missing = [f"{str(path)!r:.300}" for path in paths.values() if not os.path.isfile(path)]
        raise FileNotFoundError(
            f"{len(missing)} of the {len(paths)} images in {instances.file} don't exist: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. Pass the folder that contains them as `images`"
            f"{'.' if sample is None else f', or draw fewer than {sample}.'}"
        )
    if sample is not None:
        paths = {key: paths[key] for key in sorted(random.Random(seed).sample(existing, int(sample)))}
    if name is not None and fo.dataset_exists(name):
        raise ArgumentError(
            f"A dataset named {name!r} exists. Choose another name, or delete it: fiftyone.delete_dataset({name!r})."
        )
    dataset = fo.Dataset(name, persistent=name is not None)
    try:
        _declare_fields(dataset, instances, gt_field)
        empty: list[Id] = []
        # A generator, so that only one batch of masks is in memory at a time.
        dataset.add_samples(_samples(instances, paths, gt_field, empty), num_samples=len(paths))
    except BaseException:
        dataset.delete()
        raise
    if empty:
        logger.warning(
            "%s: annotations without pixels, kept with empty masks: %d; ids: %s%s",
            instances.file,
            len(empty),
            ", ".join(map(str, empty[:10])),
            ", ..." if len(empty) > 10 else "",
        )
    return dataset


def _declare_fields(dataset: fo.Dataset, instances: Instances, gt_field: str) -> None:
    # The App only filters by declared attributes.
    dataset.add_sample_field(gt_field, fo.EmbeddedDocumentField, embedded_doc_type=fol.Detections)
    dataset.add_sample_field(f"{gt_field}.detections.iscrowd", fo.BooleanField)
    dataset.add_sample_field(f"{gt_field}.detections.area", fo.FloatField)
    if any("frequency" in category for category in instances.categories.values()):
        dataset.add_sample_field(f"{gt_field}.detections.frequency", fo.StringField)


def _samples(instances: Instances, paths: Mapping[Id, Path], gt_field: str, empty: list[Id]) -> Iterator[fo.Sample]:
    """Yields the samples; adds the ids of annotations without pixels to `empty`."""
    for key, path in paths.items():
        size = instances.size(key)
        metadata = image_metadata(str(path))
        shown = metadata.height, metadata.width
        if shown != size:
            _refuse_size(instances, path, shown, size)
        detections = []
        for annotation in instances.objects.get(key, ()):
            detection = _detection(instances, annotation, size)
            if not detection.mask.any():
                empty.append(annotation["id"])
            detections.append(detection)
        sample = fo.Sample(str(path.resolve()), metadata=metadata)
        sample[gt_field] = fol.Detections(detections=detections)
        yield sample


def _refuse_size(instances: Instances, path: Path, shown: tuple[int, int], size: tuple[int, int]) -> NoReturn:
    found = f"{shown[1]}x{shown[0]} pixels, but {instances.file} says {size[1]}x{size[0]}"
    if shown == size[::-1] and size_of(path) == size:
        raise ArgumentError(
            f"{path} is shown with {found}: its EXIF orientation rotates it, and the annotations lie on the image "
            "without this rotation. Remove the orientation from the images, for example with: exiftool -Orientation= "
            f"{path.parent}"
        )
    raise ArgumentError(f"{path} has {found}: use the annotated images, not resized or rotated ones.")


def _detection(instances: Instances, annotation: Entry, size: tuple[int, int]) -> fol.Detection:
    height, width = size
    mask = instances.mask(annotation, size)
    if mask.any():
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        x0, y0, x1, y1 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    else:
        x, y, w, h = instances.box(annotation)
        (x0, x1), (y0, y1) = _whole_pixels(x, w, width), _whole_pixels(y, h, height)
    area, frequency = instances.area(annotation), instances.frequency(annotation)
    return fol.Detection(
        label=instances.category_name(annotation),
        bounding_box=[x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height],
        mask=mask[y0:y1, x0:x1].copy(),  # a view would keep the whole image's mask in memory
        iscrowd=instances.is_crowd(annotation),
        area=float(mask.sum()) if area is None else area,
        **({} if frequency is None else {"frequency": frequency}),
    )


def _whole_pixels(start: float, length: float, limit: int) -> tuple[int, int]:
    """The range of pixels in 0 ... `limit` that a range touches, at least one; the end is exclusive."""
    first = min(max(math.floor(start), 0), limit - 1)
    return first, min(max(math.ceil(start + length), first + 1), limit)
