"""Reads samples and labels as database documents, without building FiftyOne objects."""

from __future__ import annotations

import logging
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as shortened  # stored values may be of any length
from typing import TYPE_CHECKING, Any, TypedDict

import fiftyone.core.metadata as fomt
import fiftyone.core.utils as fou
from bson import ObjectId
from fiftyone import ViewField as F

from ..errors import ArgumentError, LabelError, MissingError, with_file
from ..fiftyone_internals import Document, aggregate, is_frame_field, split_frame_field
from ..images import shown_size

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)
# As in FiftyOne: whether to show a progress bar (None: FiftyOne's setting), or a function that is called with the bar.
Progress = bool | Callable[[fou.ProgressBar], object] | None


class Skipped(TypedDict):
    """An image that was skipped because it could not be used."""

    id: str
    filepath: str
    cause: str


@dataclass(frozen=True)
class StoredImage:
    """A sample or video frame with its labels as stored in the database.

    Attributes:
        document: its database document, with the requested fields.
        sample_id: id of the dataset's sample that it is or belongs to.
        name: its name in messages.
        size_in_metadata: (height, width) in pixels; None if its metadata is missing.
    """

    document: Document
    sample_id: ObjectId
    name: str
    size_in_metadata: tuple[int, int] | None

    @cached_property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, as the App shows the image; None if its metadata is missing.

        Labels lie where the App draws them: relative to the image as shown, whatever its metadata says.
        """
        size, filepath = self.size_in_metadata, self.document.get("filepath")
        return size[::-1] if size and filepath and _is_shown_with_swapped_sides(filepath, size) else size

    @property
    def known_size(self) -> tuple[int, int]:
        """`size`. Raises LabelError if it isn't known."""
        if self.size is None:
            raise LabelError("it has no metadata, and its size can't be read from its file")
        return self.size

    def labels(self, field_name: str) -> list[Document]:
        """The individual labels of a requested field. Raises LabelError if one isn't a label or has no id."""
        labels = labels_in(self.document, field_name)
        for label in labels:
            if not isinstance(id := label.get("_id"), ObjectId):
                found = f"the id {shortened(id)}" if "_id" in label else "no id"
                raise LabelError(f"a label in '{field_name}' has {found}: it was not stored by FiftyOne")
        return labels

    def distinct_labels(self, field_name: str) -> list[Document]:
        """Like :meth:`labels`, to store something on each. Raises LabelError if two have the same id, too."""
        labels = self.labels(field_name)
        if len({label["_id"] for label in labels}) < len(labels):
            id, times = Counter(label["_id"] for label in labels).most_common(1)[0]
            raise LabelError(f"{times} labels in '{field_name}' have the id {id}")
        return labels

    def has(self, field_name: str) -> bool:
        """Whether the field has a value; an empty list of labels counts as one."""
        return value_in(self.document, field_name) is not None


def stored_images(samples: SampleCollection, field_names: Sequence[str]) -> Iterator[StoredImage]:
    """Yields the images of a collection with these fields; for frame fields, the frames of its videos."""
    names = [split_frame_field(samples, name)[0] for name in field_names]
    keep = dict.fromkeys([*names, "filepath", "metadata", "frame_number", "_sample_id"], True)
    if not any(is_frame_field(samples, name) for name in field_names):
        for document in aggregate(samples, pipeline=[{"$project": keep}]):
            metadata = document.get("metadata")
            # For a patch or frame, the id of its source.
            sample_id = document["_sample_id"] if "_sample_id" in document else document["_id"]
            sides = (metadata.get("height"), metadata.get("width")) if isinstance(metadata, dict) else (None, None)
            size = _size(*sides)
            yield StoredImage(document, sample_id, document["filepath"], size)
        return
    paths = ["id", "filepath", "metadata.frame_height", "metadata.frame_width"]
    videos = {ObjectId(id): (path, _size(h, w)) for id, path, h, w in zip(*samples.values(paths))}
    for document in aggregate(samples, frames_only=True, post_pipeline=[{"$project": keep}]):
        path, size = videos[document["_sample_id"]]
        yield StoredImage(document, document["_sample_id"], f"{path}, frame {document['frame_number']}", size)


def _is_shown_with_swapped_sides(path: str, size: tuple[int, int]) -> bool:
    """Whether the App shows an image whose metadata says `size` (height, width) with height and width swapped."""
    if size[0] == size[1]:
        return False
    try:
        return shown_size(path) == size[::-1]
    except (OSError, ValueError):  # with metadata, labels can be evaluated without the image
        return False


def _size(height: object, width: object) -> tuple[int, int] | None:
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return (height, width) if height > 0 and width > 0 else None


def labels_in(document: Document, field_name: str) -> list[Document]:
    """The individual labels of a field in a sample or frame document. Raises LabelError if one isn't a label."""
    value = value_in(document, field_name)
    labels = [value]
    for name in ("detections", "polylines", "keypoints"):
        if isinstance(value, dict) and name in value:
            labels = value[name]
    if value is None or labels is None:  # the list is None if a view hides all of them
        return []
    if not isinstance(labels, list) or not all(isinstance(label, dict) for label in labels):
        raise LabelError(f"'{field_name}' contains something else than labels")
    return labels


def value_in(document: Document, field_name: str) -> Any:
    """The stored labels of a field in a sample or frame document."""
    value: Any = document
    for part in field_name.removeprefix("frames.").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def visit_images(
    samples: SampleCollection,
    field_names: Sequence[str],
    visit: Callable[[StoredImage], None],
    progress: Progress = None,
) -> list[Skipped]:
    """Calls `visit` with each image and these fields; stores nothing except missing metadata.

    Returns:
        The skipped images, those for which `visit` raised LabelError. They are also logged.

    Raises:
        ValueError: labels lack something that their whole field is expected to have, or no image could be used.
    """
    skipped, total = visit_shard(samples, field_names, visit, progress)
    log_skipped(skipped, total)
    return skipped


def log_skipped(skipped: Sequence[Skipped], total: int) -> None:
    """Logs the skipped images. Raises ValueError if all images were skipped."""
    if skipped:
        text = f"images skipped: {len(skipped)}; the first: {with_file(skipped[0]['filepath'], skipped[0]['cause'])}"
        if len(skipped) == total:
            raise ArgumentError(f"No image could be used; {text}.")
        logger.warning("%s. All are in `skipped` of the result.", text)


def visit_shard(
    samples: SampleCollection,
    field_names: Sequence[str],
    visit: Callable[[StoredImage], None],
    progress: Progress,
) -> tuple[list[Skipped], int]:
    """Like :func:`visit_images`, but all images may be skipped; also returns the number of images."""
    ensure_metadata(samples, progress)
    of_frames = any(is_frame_field(samples, name) for name in field_names)
    total = samples.count("frames") if of_frames else len(samples)
    skipped: list[Skipped] = []
    with fou.ProgressBar(total=total, progress=progress) as bar:
        for stored in bar(stored_images(samples, field_names)):
            try:
                visit(stored)
            except MissingError as error:
                raise ArgumentError(f"{with_file(stored.name, str(error))}.") from error
            except LabelError as error:
                skipped.append({"id": str(stored.document["_id"]), "filepath": stored.name, "cause": str(error)})
    return skipped, total


def ensure_metadata(samples: SampleCollection, progress: Progress = None) -> None:
    """Computes and stores the missing metadata of images, with their sizes as the App shows them."""
    is_video = samples.media_type == "video"
    sides = ("metadata.frame_height", "metadata.frame_width") if is_video else ("metadata.height", "metadata.width")
    missing = samples.match((F(sides[0]) == None) | (F(sides[1]) == None))  # noqa: E711
    ids = [id for id, path in zip(*missing.values(["id", "filepath"])) if not _is_special(path)]
    if not ids:
        return
    computed = samples.select(ids)
    computed.compute_metadata(overwrite=True, progress=progress)
    if is_video:
        return
    found = zip(*computed.values(["id", "filepath", "metadata"]))
    swapped = {id: metadata for id, path, metadata in found if metadata and _swap_sides_if_shown_so(metadata, path)}
    if swapped:
        samples.set_values("metadata", swapped, key_field="id")


def image_metadata(path: str) -> fomt.ImageMetadata:
    """An image's metadata, with its size as the App shows it."""
    metadata = fomt.ImageMetadata.build_for(path)
    _swap_sides_if_shown_so(metadata, path)
    return metadata


def _swap_sides_if_shown_so(metadata: fomt.ImageMetadata, path: str) -> bool:
    """Corrects the size that FiftyOne computes, which lacks some EXIF orientations. Returns whether it was wrong."""
    is_wrong = _is_shown_with_swapped_sides(path, (metadata.height, metadata.width))
    if is_wrong:
        metadata.height, metadata.width = metadata.width, metadata.height
    return is_wrong


def _is_special(path: str) -> bool:
    """Whether a path leads to a pipe or a device, reading which may never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def number_of(label: Document, names: Iterable[str]) -> float:
    """The mean of these attributes of a label.

    Raises:
        MissingError: the label lacks one of them.
        LabelError: one of them is not a finite number.
    """
    values: list[float] = []
    for name in names:
        value = label.get(name)
        if value is None:
            raise MissingError(f"{name_of(label)} has no {name}")
        if not is_number(value):
            raise LabelError(f"{name_of(label)} has {name}={shortened(value)}: a number was expected")
        values.append(value)
    return sum(values) / len(values)


def is_crowd(label: Document) -> bool:
    """COCO's `iscrowd`: whether the label covers a group of objects. Raises LabelError if it is neither 0 nor 1."""
    return is_set(label, "iscrowd")


def is_set(label: Document, name: str) -> bool:
    """Whether an attribute is true; None is false. Raises LabelError if it is neither true nor false, nor 0 or 1."""
    value = label.get(name)
    if value not in (None, 0, 1):  # False and True equal 0 and 1
        raise LabelError(f"{name_of(label)} has {name}={shortened(value)}: true or false, or 0 or 1, was expected")
    return bool(value)


def tags_of(label: Document) -> set[str]:
    """The tags of a label's database document. Raises LabelError if they aren't a list of texts."""
    tags = label.get("tags")
    if tags is None:
        return set()
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise LabelError(f"{name_of(label)} has tags={shortened(tags)}: a list of texts was expected")
    return set(tags)


def class_of(label: Document) -> str | None:
    """The class of a label; None without one. Raises LabelError if it isn't text."""
    name = label.get("label")
    if not isinstance(name, str | None):
        raise LabelError(f"{name_of(label)} has label={shortened(name)}: text was expected")
    return name or None


def is_number(value: object) -> bool:
    """Whether a stored value is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def name_of(label: Document) -> str:
    """The name of a label in messages."""
    kind = label.get("_cls")
    return f"{kind if kind in ('Detection', 'Polyline', 'Keypoint') else 'label'} {label.get('_id')}"
