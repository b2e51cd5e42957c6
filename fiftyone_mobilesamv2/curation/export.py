"""Exports the masks of a field to a JSON file in COCO format, which is verified before it is moved into place."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from ..errors import ArgumentError
from ..evaluation.measuring import NO_CLASS
from ..labels.documents import Progress, Skipped, StoredImage, class_of, is_crowd, number_of, visit_images
from ..labels.fields import check_shapes_field
from ..labels.masks import masks_of
from .findings import check_images

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

# Key of an annotation -> attribute of the label.
SCORES = {"score": "confidence", "predicted_iou": "predicted_iou", "stability": "stability"}


@dataclass(frozen=True)
class Export:
    """The result of :func:`export_masks`.

    Attributes:
        path: the path of the file.
        root: the folder that the images' file names are relative to.
        images, annotations: their numbers.
        bytes: the size of the file.
        skipped: id, filepath and cause of each image with an unusable label, which is not in the file.
    """

    path: Path
    root: Path
    images: int
    annotations: int
    bytes: int
    skipped: list[Skipped]


def export_masks(
    samples: SampleCollection,
    field: str,
    path: str | PathLike[str],
    overwrite: bool = False,
    progress: Progress = None,
) -> Export:
    """Writes the masks of a field as RLE, in the format of COCO's `instances_*.json`.

    Each sample is an image, even without objects; its `file_name` is relative to the deepest folder that contains all
    images. Each label is an annotation: `category_id` of its class ("object" without one), `segmentation` as RLE with
    its counts as text, `area` in pixels, the tight `bbox` of the mask, `iscrowd`, and, if the label has them, `score`
    (its confidence), `predicted_iou` and `stability`.

    The file is written to a temporary folder, compared with the stored labels by :func:`check_export`, and then moved
    into place; an existing file is kept until then. Writing needs memory for the masks of one image; the comparison
    needs memory for the whole file, like any use of pycocotools.

    Args:
        samples: a dataset or view of images. Missing metadata is computed and stored.
        field: detections with masks, or polylines. Labels that a view hides aren't written.
        path: the file, which must end with ".json"; "~" is the home folder. Missing folders are created.
        overwrite: whether to replace an existing file.
        progress: as elsewhere in FiftyOne.

    Raises:
        ValueError: `field` is missing or of the wrong type; `path` has another extension, or exists; there are no
            samples, or none can be used; or the written file differs from the stored labels.
        OSError: the file can't be written.
    """
    check_images(samples)
    check_shapes_field(samples, field, "masks")
    path = Path(path).expanduser()
    check_path(path, overwrite)
    if not len(samples):
        raise ArgumentError(f"{samples.name} has no samples: nothing was written.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        root = _common_folder(samples)
        images, annotations, skipped = _write(temporary, root, samples, field, progress)
        check_export(temporary, samples.exclude([image["id"] for image in skipped]), field, progress)
        size = temporary.stat().st_size
        temporary.replace(path)
    return Export(path, root, images, annotations, size, skipped)


def check_path(path: Path, overwrite: bool) -> None:
    """Raises ValueError if an export can't be written to `path`."""
    if path.suffix.lower() != ".json":
        raise ArgumentError(f"{path} must end with .json.")
    if path.is_dir():
        raise ArgumentError(f"{path} is a folder.")
    if path.exists() and not overwrite:
        raise ArgumentError(f"{path} exists: choose another name, or overwrite it.")


def check_export(path: str | PathLike[str], samples: SampleCollection, field: str, progress: Progress = None) -> None:
    """Reads a file of :func:`export_masks` with pycocotools and compares it completely with the stored labels.

    Raises:
        ValueError: they differ; the message names the first difference.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints to stdout
        coco = COCO(str(path))
        for annotation in coco.dataset["annotations"][:1]:  # as tools read masks to evaluate
            coco.loadRes([dict(annotation)])
    entries = iter(coco.dataset["images"])

    def visit(stored: StoredImage) -> None:
        expected = _annotations(stored, field)
        entry = next(entries, None)
        if entry is None or not Path(stored.name).as_posix().endswith(f"/{entry['file_name']}"):
            raise ArgumentError(f"{path} contains {entry}; {stored.name} was expected.")
        if (entry["height"], entry["width"]) != stored.size:
            raise ArgumentError(f"{path} contains {entry}, but (height, width) of {stored.name} is {stored.size}.")
        annotations = coco.imgToAnns[entry["id"]]
        if len(annotations) != len(expected):
            raise ArgumentError(
                f"{path} has {len(annotations)} annotations of {stored.name}; {len(expected)} were expected."
            )
        for annotation, label in zip(annotations, expected):
            written = {**annotation, "category": coco.cats[annotation["category_id"]]["name"]}
            different = [key for key, value in label.items() if written.get(key) != value]
            if mask_utils.area(coco.annToRLE(annotation)) != label["area"]:
                different.append("area of the mask")
            if different:
                raise ArgumentError(
                    f"{path}: annotation {annotation['id']} of {stored.name} differs from the stored label in "
                    f"{', '.join(different)}."
                )

    visit_images(samples, [field], visit, progress)
    if (entry := next(entries, None)) is not None:
        raise ArgumentError(f"{path} contains {entry}, which is not among the samples.")


def _write(
    path: Path, root: Path, samples: SampleCollection, field: str, progress: Progress
) -> tuple[int, int, list[Skipped]]:
    """Writes the file; returns the numbers of images and annotations, and the skipped images."""
    images: list[dict[str, Any]] = []
    categories: dict[str, int] = {}
    count = 0
    with path.open("w") as file:

        def visit(stored: StoredImage) -> None:
            nonlocal count
            annotations = _annotations(stored, field)
            file_name = Path(stored.name).relative_to(root).as_posix()
            height, width = stored.known_size
            images.append({"id": len(images) + 1, "file_name": file_name, "height": height, "width": width})
            for annotation in annotations:
                category_id = categories.setdefault(annotation.pop("category"), len(categories) + 1)
                ids = {"id": count + 1, "image_id": len(images), "category_id": category_id}
                file.write((",\n" if count else "\n") + json.dumps(ids | annotation))
                count += 1

        # Versions of pycocotools up to 2.0.10 can't read files without "info".
        info = {"description": f"Masks in {field} of {samples.name}"}
        file.write(f'{{"info": {json.dumps(info)},\n"licenses": [],\n"annotations": [')
        skipped = visit_images(samples, [field], visit, progress)
        named = [{"id": id, "name": name} for name, id in categories.items()]
        file.write(f'\n],\n"images": {json.dumps(images)},\n"categories": {json.dumps(named)}}}\n')
    return len(images), count, skipped


def _annotations(stored: StoredImage, field: str) -> list[dict[str, Any]]:
    """An image's annotations without ids, with the name of their `category`."""
    labels = stored.labels(field)
    annotations = []
    for label, mask in zip(labels, masks_of(labels, stored.known_size)):
        annotation = {
            "category": class_of(label) or NO_CLASS,
            "segmentation": {"size": list(mask["size"]), "counts": mask["counts"].decode()},
            "area": int(mask_utils.area(mask)),
            "bbox": mask_utils.toBbox(mask).tolist(),
            "iscrowd": int(is_crowd(label)),
        }
        for key, attribute in SCORES.items():
            if label.get(attribute) is not None:
                annotation[key] = number_of(label, [attribute])
        annotations.append(annotation)
    return annotations


def _common_folder(samples: SampleCollection) -> Path:
    """The deepest folder that contains all images."""
    return Path(os.path.commonpath({os.path.dirname(filepath) for filepath in samples.values("filepath")}))
