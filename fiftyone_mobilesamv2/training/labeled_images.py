"""Examples from the labels of a FiftyOne dataset, and which of them are for validation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import fiftyone as fo
import fiftyone.core.collections as foc
import fiftyone.core.utils as fou
import numpy as np
from bson import ObjectId
from PIL import Image

from ..errors import ArgumentError, LabelError, message_of, plain
from ..fiftyone_internals import is_frame_field
from ..images import check_is_file, read_image
from ..labels.documents import Progress, Skipped, StoredImage, ensure_metadata, is_crowd, stored_images, tags_of
from ..labels.fields import check_not_grouped, check_shapes_field
from ..labels.masks import boxes_of, masks_of
from ..modeling.arrays import FloatArray
from ..runs.videos import VideoError, check_ffmpeg, read_frames
from .examples import NOTHING_SEEN, Example, Seen

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

IGNORE = "ignore"  # tag of labels that are not to be trained on
_NO_BOXES = np.zeros((0, 4), np.float32)


@dataclass
class LabeledImages:
    """The images of a view, to train on or to validate with.

    Attributes:
        examples: images with a value in the field; no labels in it mean no objects.
        unlabeled: images without one.
        contents: id of each example -> hash of its file, or the id of its video: those that are equal stay together.
        skipped: images that could not be used.
    """

    examples: list[Example] = field(default_factory=list)
    unlabeled: list[Example] = field(default_factory=list)
    contents: dict[str, str] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def num_objects(self) -> int:
        return sum(len(example.boxes) for example in self.examples)

    @property
    def example_contents(self) -> frozenset[str]:
        return frozenset(self.contents[example.id] for example in self.examples)

    def without(self, contents: set[str]) -> LabeledImages:
        """Those whose content is none of these."""
        return LabeledImages(
            [each for each in self.examples if self.contents[each.id] not in contents],
            [each for each in self.unlabeled if self.contents[each.id] not in contents],
            self.contents,
            self.skipped,
        )

    def only(self, contents: set[str]) -> LabeledImages:
        """Those whose content is one of these. The skipped ones stay with the others."""
        return dataclasses.replace(self.without(set(self.contents.values()) - contents), skipped=[])


def read_labels(samples: SampleCollection, gt_field: str, frames_folder: Path, progress: Progress) -> LabeledImages:
    """Reads the labels of a dataset or view of images, or those of the frames of videos.

    Crowds, and labels with the tag "ignore", become ignored regions. An image that can't be read, or with an unusable
    label, is skipped.

    Args:
        gt_field: detections or polylines; of videos, a field of their frames.
        frames_folder: where frames of videos are kept as images.

    Raises:
        ValueError: the field is missing or of another type.
    """
    check_not_grouped(samples)
    check_shapes_field(samples, gt_field, "ground truth")
    ensure_metadata(samples, progress)
    of_frames = is_frame_field(samples, gt_field)
    frames = _Frames(samples, frames_folder) if of_frames else None
    found = LabeledImages()
    with fou.ProgressBar(total=samples.count("frames") if of_frames else len(samples), progress=progress) as bar:
        for stored in bar(stored_images(samples, [gt_field])):
            try:
                _add(found, stored, gt_field, frames)
            except (LabelError, OSError, ValueError) as error:
                found.skipped.append(
                    {"id": str(stored.document["_id"]), "filepath": stored.name, "cause": message_of(error)}
                )
    if frames is not None:
        frames.write(found)
    return found


def _add(found: LabeledImages, stored: StoredImage, gt_field: str, frames: _Frames | None) -> None:
    labels, size, id = stored.labels(gt_field), stored.known_size, str(stored.document["_id"])
    is_ignored = [is_crowd(label) or IGNORE in tags_of(label) for label in labels]
    objects = [label for label, ignored in zip(labels, is_ignored) if not ignored]
    regions = [label for label, ignored in zip(labels, is_ignored) if ignored]
    has_masks = all(label.get("mask") or label.get("mask_path") or "points" in label for label in objects)
    if frames is None:
        path = stored.document["filepath"]
        content, read = _file_hash(path), partial(read_image, path)
        if read().shape[:2] != size:
            raise LabelError(f"the image has other sides than its metadata, which says {size[1]}x{size[0]} pixels")
    else:
        content = str(stored.sample_id)
        read = partial(read_image, frames.path(stored.sample_id, stored.document["frame_number"]))
    example = Example(
        id,
        stored.name,
        read,
        _corners(objects, size),
        tuple(masks_of(objects, size)) if has_masks else None,
        _corners(regions, size),
    )
    found.contents[id] = content
    (found.examples if stored.has(gt_field) else found.unlabeled).append(example)


def _corners(labels: Sequence[dict[str, object]], size: tuple[int, int]) -> FloatArray:
    """float32 [N, 4]: xyxy in pixels, within the image. Raises LabelError if one lies outside."""
    if not labels:
        return _NO_BOXES
    boxes = boxes_of(labels, size)
    ends = np.array([size[1], size[0]] * 2)
    corners = np.clip(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), 0, ends)
    empty = (corners[:, 2:] <= corners[:, :2]).any(1)
    if empty.any():
        raise LabelError(f"label {labels[int(empty.argmax())].get('_id')} lies outside the image")
    as_floats: FloatArray = corners.astype(np.float32)
    return as_floats


def _file_hash(path: str) -> str:
    check_is_file(path)
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _Frames:
    """Labelled frames of videos, as image files."""

    def __init__(self, videos: SampleCollection, folder: Path) -> None:
        check_ffmpeg()
        self.folder = folder
        self.videos = {ObjectId(id): path for id, path in zip(*videos.values(["id", "filepath"]))}
        self.numbers: dict[ObjectId, set[int]] = defaultdict(set)

    def path(self, video: ObjectId, number: int) -> str:
        """Where the frame will be."""
        self.numbers[video].add(number)
        return str(self.folder / f"{video}-{number:06d}.png")

    def write(self, found: LabeledImages) -> None:
        """Writes the frames that are not there yet. Those that can't be read are skipped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        causes: dict[str, str] = {}
        for video, numbers in self.numbers.items():
            missing = {n for n in numbers if not Path(self.path(video, n)).exists()}
            try:
                with closing(read_frames(self.videos[video], batch_size=1)) as frames:
                    for number, (frame,) in enumerate(frames, 1):
                        if not missing:
                            break
                        if number in missing:
                            Image.fromarray(frame).save(self.path(video, number))
                            missing.remove(number)
            except VideoError as error:
                causes[str(video)] = message_of(error)
            for number in missing:
                causes[self.path(video, number)] = causes.get(str(video), "the video has no such frame")
        for group in (found.examples, found.unlabeled):
            for example in list(group):
                path = example.read.args[0]  # type: ignore[attr-defined]
                if path in causes:
                    group.remove(example)
                    found.skipped.append({"id": example.id, "filepath": example.name, "cause": causes[path]})


# Training and validation ----------------------------------------------------------------------------------------------

Validation: TypeAlias = "float | str | Sequence[str] | SampleCollection"


def split(
    samples: SampleCollection,
    gt_field: str,
    validation: Validation,
    frames_folder: Path,
    progress: Progress,
    seen: Seen = NOTHING_SEEN,
) -> tuple[LabeledImages, LabeledImages]:
    """The images to train on, and those to validate with, which are never trained on.

    Args:
        validation: the share of the labelled images; or the tags of their samples; or a view. A share is chosen by the
            content of the files: it is the same in any order, and files with the same content stay together. It leaves
            out what the base was trained on, if anything else is there.
        seen: what the base knows.

    Raises:
        ValueError: `validation` is invalid.
    """
    if isinstance(validation, foc.SampleCollection):
        held_out = read_labels(validation, gt_field, frames_folder, progress)
        rest = read_labels(samples, gt_field, frames_folder, progress)
        training = rest.without(set(held_out.contents.values()))
    elif isinstance(validation, (int, float)) and not isinstance(validation, bool) and 0 < validation < 1:
        found = read_labels(samples, gt_field, frames_folder, progress)
        labeled = found.examples or found.unlabeled
        chosen = _share_of({found.contents[each.id] for each in labeled}, float(validation), seen)
        held_out, training = found.only(chosen), found.without(chosen)
    elif tags := _tags(validation):
        is_held_out = fo.ViewField("tags").contains(tags)
        held_out = read_labels(samples.match(is_held_out), gt_field, frames_folder, progress)
        rest = read_labels(samples.match(~is_held_out), gt_field, frames_folder, progress)
        training = rest.without(set(held_out.contents.values()))
    else:
        raise ArgumentError(
            f"validation must be a share between 0 and 1, tags of samples, or a view, not {plain(validation)!r}."
        )
    return training, held_out


def _share_of(contents: set[str], share: float, seen: Seen) -> set[str]:
    # Hashes are random numbers: the lowest ones are a random choice, and the same one in any order.
    candidates = sorted(
        contents - seen.trained_on or contents,
        key=lambda content: (content not in seen.held_out, hashlib.blake2b(content.encode()).digest()),
    )
    return set(candidates[: max(1, round(share * len(contents)))])


def _tags(value: object) -> list[str]:
    tags = [value] if isinstance(value, str) else value
    if isinstance(tags, Sequence) and all(isinstance(tag, str) and tag for tag in tags):
        return list(tags)
    return []


def check_not_empty(images: LabeledImages, held_out: LabeledImages, gt_field: str, part: str) -> None:
    """Checks that there is something to train `part` on, and to validate it with. Raises ValueError if not."""
    skipped = [*images.skipped, *held_out.skipped]
    cause = f" Images skipped: {len(skipped)}; the first: {skipped[0]['cause']}." if skipped else ""
    for group, purpose in ((images, "to train on"), (held_out, "for validation")):
        if not group.num_objects:
            raise ArgumentError(
                f"There are no labels in '{gt_field}' {purpose}: at least two different images with labels are "
                f"needed.{cause}"
            )
        if part == "masks" and not any(example.masks for example in group.examples):
            raise ArgumentError(
                f"The labels in '{gt_field}' {purpose} are boxes without masks, from which masks can't be learnt. "
                f"Segment them first, with {gt_field} as the prompts, and correct the masks.{cause}"
            )
