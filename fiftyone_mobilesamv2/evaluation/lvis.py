"""Ground truth in LVIS format, on which the paper evaluates proposals -> a FiftyOne dataset."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import fiftyone as fo

from ..errors import ArgumentError
from ..labels.fields import GROUND_TRUTH_FIELD
from .coco import make_dataset
from .instances import Id, Instances, read_instances


def load_lvis(
    images: str | PathLike[str],
    annotations: str | PathLike[str],
    sample: int | None = None,
    seed: int = 0,
    name: str | None = None,
    gt_field: str = GROUND_TRUTH_FIELD,
) -> fo.Dataset:
    """Loads images and their objects from a file such as `lvis_v1_val.json`.

    Works like :func:`~fiftyone_mobilesamv2.evaluation.coco.load_coco`, with two differences: an object also has the
    `frequency` of its category, "r" (rare), "c" (common) or "f" (frequent), and `images` is the folder that contains
    `val2017/000000001000.jpg`, or `000000001000.jpg` itself. LVIS has its own split of COCO's images, so its val split
    needs COCO's val2017 and train2017.

    The paper uses "100 randomly sampled LVIS images" without naming them: `sample=100` draws different ones.
    """
    instances = read_instances(annotations)
    paths = {key: _find_image(Path(images), _path_of(instances, key)) for key in instances.images}
    return make_dataset(instances, paths, sample, seed, name, gt_field)


def _path_of(instances: Instances, image: Id) -> PurePosixPath:
    """The path in an image's URL."""
    url = instances.image_text(image, "coco_url")
    try:
        return PurePosixPath(urlsplit(url).path)
    except ValueError as error:
        raise ArgumentError(f"{instances.file}: image {image!r} has coco_url={url!r:.100}: {error}.") from error


def _find_image(folder: Path, url_path: PurePosixPath) -> Path:
    """`folder/val2017/000.jpg` of `/val2017/000.jpg`, or `folder/000.jpg` if only that exists."""
    path = folder / url_path.parent.name / url_path.name
    flat = folder / url_path.name
    return flat if os.path.isfile(flat) and not os.path.isfile(path) else path
