"""Ground truth in LVIS' format, on which the paper measures proposals -> a FiftyOne dataset."""

from __future__ import annotations

import random
from os import PathLike
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import fiftyone as fo

from .coco import make_dataset, read_instances


def load_lvis(
    images: str | PathLike,
    annotations: str | PathLike,
    sample: int | None = None,
    seed: int = 0,
    name: str | None = None,
    gt_field: str = "ground_truth",
) -> fo.Dataset:
    """Images and the objects in them, as `lvis_v1_val.json` lists them.

    The dataset is :func:`load_coco`'s; an object has the `frequency` of its category too: "r" (rare), "c" (common) or
    "f" (frequent).

    LVIS splits COCO's images anew, so its val needs COCO's val2017 and train2017. The paper measures on "100 randomly
    sampled LVIS images" without saying which: here they are drawn from all images of the file that exist on disk,
    images without annotations too. They depend on the seed and on which images exist, not on the order of the file.

    Args:
        images: the folder of `val2017/000000001000.jpg`, or of `000000001000.jpg` itself.
        annotations: the JSON file.
        sample: how many images to draw at random; None takes all, and all must exist.
        seed: of the draw.
        name: of a persistent dataset. Without it, the dataset lasts as long as the process.
        gt_field: the field of the objects.

    Raises:
        FileNotFoundError: the JSON file doesn't exist, or an image that it lists, or fewer than `sample` images do.
        ValueError: as :func:`load_coco`.
    """
    instances = read_instances(annotations)
    paths = {
        key: _find_image(Path(images), str(instances.value(image, "coco_url")))
        for key, image in instances.images.items()
    }
    if sample is not None:
        existing = sorted(key for key, path in paths.items() if path.is_file())
        if len(existing) < sample:
            raise FileNotFoundError(
                f"{len(existing)} of the {len(paths)} images in {instances.file} exist in {images}, and {sample} are "
                "to be drawn. Download COCO's val2017 and train2017 there, or draw fewer."
            )
        paths = {key: paths[key] for key in sorted(random.Random(seed).sample(existing, sample))}
    return make_dataset(instances, paths, name, gt_field)


def _find_image(folder: Path, coco_url: str) -> Path:
    """`folder/val2017/000.jpg` of "http://.../val2017/000.jpg", or `folder/000.jpg` if only that exists."""
    url = PurePosixPath(urlsplit(coco_url).path)
    path = folder / url.parent.name / url.name
    flat = folder / url.name
    return flat if flat.is_file() and not path.is_file() else path
