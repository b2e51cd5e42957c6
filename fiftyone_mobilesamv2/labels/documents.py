"""Samples and labels as the database holds them, read without making FiftyOne's objects of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import fiftyone.core.utils as fou
from bson import ObjectId
from fiftyone import ViewField as F

from ..errors import ArgumentError, LabelError, MissingError
from ..fiftyone_internals import Document, aggregate, is_frame_field, split_frame_field

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)
# What FiftyOne takes for one: whether there is a bar (None: as its settings say), or what is called with the bar.
Progress = bool | Callable[[fou.ProgressBar], object] | None


class Skipped(TypedDict):
    """An image that could not be used."""

    id: str
    filepath: str
    cause: str


@dataclass(frozen=True)
class StoredImage:
    """A sample, or a frame of a video, with its labels as they are stored.

    Attributes:
        document: what the database holds of it: the fields that were asked for.
        sample_id: of the dataset's sample that it is, or belongs to.
        name: what messages call it.
        size: (height, width) in pixels; None where its metadata is missing.
    """

    document: Document
    sample_id: ObjectId
    name: str
    size: tuple[int, int] | None

    @property
    def known_size(self) -> tuple[int, int]:
        """`size`. Raises LabelError where it isn't known."""
        if self.size is None:
            raise LabelError("it has no metadata, and its size can't be read from its file")
        return self.size

    def labels(self, field_name: str) -> list[Document]:
        """The single labels of a field that was asked for. Raises LabelError where one has no id."""
        found = labels_in(self.document, field_name)
        if not all("_id" in label for label in found):
            raise LabelError(f"a label in '{field_name}' has no id: it was not stored by FiftyOne")
        return found

    def has(self, field_name: str) -> bool:
        """Whether that field has a value. One in which nothing was found has: an empty list."""
        return value_in(self.document, field_name) is not None


def stored_images(samples: SampleCollection, field_names: Sequence[str]) -> Iterator[StoredImage]:
    """The images of a collection with these fields of theirs; the frames of its videos if the fields are of frames."""
    names = [split_frame_field(samples, name)[0] for name in field_names]
    keep = dict.fromkeys([*names, "filepath", "metadata", "frame_number", "_sample_id"], True)
    if not any(is_frame_field(samples, name) for name in field_names):
        for document in aggregate(samples, pipeline=[{"$project": keep}]):
            metadata = document.get("metadata") or {}
            # Of the source, if it is a patch or a frame.
            sample_id = document["_sample_id"] if "_sample_id" in document else document["_id"]
            size = _size(metadata.get("height"), metadata.get("width"))
            yield StoredImage(document, sample_id, document["filepath"], size)
        return
    paths = ["id", "filepath", "metadata.frame_height", "metadata.frame_width"]
    videos = {ObjectId(id): (path, _size(h, w)) for id, path, h, w in zip(*samples.values(paths))}
    for document in aggregate(samples, frames_only=True, post_pipeline=[{"$project": keep}]):
        path, size = videos[document["_sample_id"]]
        yield StoredImage(document, document["_sample_id"], f"{path}, frame {document['frame_number']}", size)


def _size(height: int | None, width: int | None) -> tuple[int, int] | None:
    return (height, width) if height and width else None


def labels_in(document: Document, field_name: str) -> list[Document]:
    """The single labels of a field of a document of a sample or frame."""
    labels = value_in(document, field_name)
    for name in ("detections", "polylines", "keypoints"):
        if labels and name in labels:
            return labels[name] or []  # None where a view hides all
    return [labels] if labels else []


def value_in(document: Document, field_name: str) -> Document | None:
    """Of a field of a document of a sample or frame: its labels, as they are stored."""
    value: Document | None = document
    for part in field_name.removeprefix("frames.").split("."):
        value = (value or {}).get(part)
    return value


def visit_images(
    samples: SampleCollection,
    field_names: Sequence[str],
    look: Callable[[StoredImage], None],
    progress: Progress = None,
) -> list[Skipped]:
    """Calls `look` with each image and these fields of it; stores nothing but missing metadata.

    Returns:
        of each image that `look` can't use a label of, its id, filepath and cause. They are logged, too.

    Raises:
        ValueError: labels lack what their whole field is expected to have, or no image could be used.
    """
    skipped, total = visit_shard(samples, field_names, look, progress)
    log_skipped(skipped, total)
    return skipped


def log_skipped(skipped: Sequence[Skipped], total: int) -> None:
    """Logs which images could not be used. Raises ValueError where these are all."""
    if skipped:
        told = f"images skipped: {len(skipped)}; the first: {skipped[0]['filepath']}: {skipped[0]['cause']}"
        if len(skipped) == total:
            raise ArgumentError(f"No image could be used; {told}.")
        logger.warning("%s. All are in `skipped` of the result.", told)


def visit_shard(
    samples: SampleCollection,
    field_names: Sequence[str],
    look: Callable[[StoredImage], None],
    progress: Progress,
) -> tuple[list[Skipped], int]:
    """:func:`visit_images` of a part, of which perhaps no image can be used. Also returns how many images it has."""
    ensure_metadata(samples, progress)
    of_frames = any(is_frame_field(samples, name) for name in field_names)
    total = samples.count("frames") if of_frames else len(samples)
    skipped: list[Skipped] = []
    with fou.ProgressBar(total=total, progress=progress) as bar:
        for stored in bar(stored_images(samples, field_names)):
            try:
                look(stored)
            except MissingError as error:
                raise ArgumentError(f"{stored.name}: {error}.") from error
            except LabelError as error:
                skipped.append({"id": str(stored.document["_id"]), "filepath": stored.name, "cause": str(error)})
    return skipped, total


def ensure_metadata(samples: SampleCollection, progress: Progress = None) -> None:
    """Computes and stores the sizes of the images that have none."""
    sides = ("metadata.height", "metadata.width")
    if samples.media_type == "video":
        sides = ("metadata.frame_height", "metadata.frame_width")
    missing = samples.match((F(sides[0]) == None) | (F(sides[1]) == None))  # noqa: E711
    if len(missing):
        missing.compute_metadata(overwrite=True, progress=progress)


def number_of(label: Document, names: Iterable[str]) -> float:
    """The mean of these attributes.

    Raises:
        MissingError: the label lacks one. LabelError: one is no number.
    """
    values: list[float] = []
    for name in names:
        value = label.get(name)
        if value is None:
            raise MissingError(f"{name_of(label)} has no {name}")
        if not isinstance(value, (int, float)) or math.isnan(value):
            raise LabelError(f"{name_of(label)} has {name}={value!r}: a number was expected")
        values.append(value)
    return sum(values) / len(values)


def is_crowd(label: Document) -> bool:
    """COCO's `iscrowd`: a region of several objects. Raises LabelError where it is neither 0 nor 1."""
    value = label.get("iscrowd")
    if value not in (None, 0, 1):  # False and True are equal to these
        raise LabelError(f"{name_of(label)} has iscrowd={value!r}: true or false, or 0 or 1, was expected")
    return bool(value)


def name_of(label: Document) -> str:
    """How messages call a label."""
    return f"{label.get('_cls', 'label')} {label.get('_id')}"
