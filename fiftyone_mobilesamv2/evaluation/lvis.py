"""Ground truth in LVIS format, on which the paper evaluates proposals -> a FiftyOne dataset."""

from __future__ import annotations

from os import PathLike
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import fiftyone as fo

from ..labels.fields import GROUND_TRUTH_FIELD
from .coco import make_dataset
from .instances import read_instances


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
    paths = {key: _find_image(Path(images), instances.image_text(key, "coco_url")) for key in instances.images}
    return make_dataset(instances, paths, sample, seed, name, gt_field)


def _find_image(folder: Path, coco_url: str) -> Path:
    """`folder/val2017/000.jpg` of "http://.../val2017/000.jpg", or `folder/000.jpg` if only that exists."""
    url = PurePosixPath(urlsplit(coco_url).path)
    path = folder / url.parent.name / url.name
    flat = folder / url.name
    return flat if flat.is_file() and not path.is_file() else path
