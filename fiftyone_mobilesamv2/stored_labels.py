"""Labels as the database holds them -> their masks and boxes.

FiftyOne's own loading alone takes longer than everything here (benchmarks/evaluation.py).
"""

from __future__ import annotations

import io
import logging
import math
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.storage as fos
import fiftyone.core.utils as fou
import numpy as np
from bson import ObjectId
from fiftyone import ViewField as F
from pycocotools import mask as mask_utils

from .modeling.rle import rle_from_crop

if TYPE_CHECKING:
    import fiftyone as fo

    Samples = fo.core.collections.SampleCollection

logger = logging.getLogger(__name__)

SHAPE_TYPES = (fol.Detections, fol.Polylines, fol.Detection, fol.Polyline)


class LabelError(ValueError):
    """A label that can't be used."""


class MissingError(LabelError):
    """A label lacks what its whole field is expected to have."""


@dataclass(frozen=True)
class StoredImage:
    """A sample, or a frame of a video, with its labels as they are stored.

    Attributes:
        document: what the database holds of it: the fields that were asked for.
        sample_id: of the dataset's sample that it is, or belongs to.
        name: what messages call it.
        size: (height, width) in pixels; None where its metadata is missing.
    """

    document: Mapping
    sample_id: ObjectId
    name: str
    size: tuple[int, int] | None

    @property
    def known_size(self) -> tuple[int, int]:
        """`size`. Raises LabelError where it isn't known."""
        if self.size is None:
            raise LabelError("it has no metadata, and its size can't be read from its file")
        return self.size

    def labels(self, field_name: str) -> list[dict]:
        """The single labels of a field that was asked for. Raises LabelError where one has no id."""
        found = labels_in(self.document, field_name)
        if not all("_id" in label for label in found):
            raise LabelError(f"a label in '{field_name}' has no id: it was not stored by FiftyOne")
        return found

    def has(self, field_name: str) -> bool:
        """Whether that field has a value. One in which nothing was found has: an empty list."""
        return value_in(self.document, field_name) is not None


def stored_images(samples: Samples, field_names: Sequence[str]) -> Iterator[StoredImage]:
    """The images of a collection with these fields of theirs; the frames of its videos if the fields are of frames."""
    names = [samples._handle_frame_field(name)[0] for name in field_names]
    keep = dict.fromkeys([*names, "filepath", "metadata", "frame_number", "_sample_id"], True)
    if not any(samples._is_frame_field(name) for name in field_names):
        for document in samples._aggregate(pipeline=[{"$project": keep}]):
            metadata = document.get("metadata") or {}
            size = metadata.get("height"), metadata.get("width")
            sample_id = document.get("_sample_id", document["_id"])  # of the source, if it is a patch or a frame
            yield StoredImage(document, sample_id, document["filepath"], size if all(size) else None)
        return
    paths = ["id", "filepath", "metadata.frame_height", "metadata.frame_width"]
    videos = {ObjectId(id): (path, (h, w) if h and w else None) for id, path, h, w in zip(*samples.values(paths))}
    for document in samples._aggregate(frames_only=True, post_pipeline=[{"$project": keep}]):
        path, size = videos[document["_sample_id"]]
        yield StoredImage(document, document["_sample_id"], f"{path}, frame {document['frame_number']}", size)


def labels_in(document: Mapping, field_name: str) -> list[dict]:
    """The single labels of a field of a document of a sample or frame."""
    labels = value_in(document, field_name)
    for name in ("detections", "polylines", "keypoints"):
        if labels and name in labels:
            return labels[name] or []  # None where a view hides all
    return [labels] if labels else []


def value_in(document: Mapping, field_name: str) -> Mapping | None:
    """Of a field of a document of a sample or frame: its labels, as they are stored."""
    value = document
    for part in field_name.removeprefix("frames.").split("."):
        value = (value or {}).get(part)
    return value


def look_at_each(
    samples: Samples,
    field_names: Sequence[str],
    look: Callable[[StoredImage], None],
    progress: bool | Callable | None = None,
) -> list[dict]:
    """Calls `look` with each image and these fields of it; stores nothing but missing metadata.

    Returns:
        of each image that `look` can't use a label of, its id, filepath and cause. They are logged, too.

    Raises:
        ValueError: labels lack what their whole field is expected to have, or no image could be used.
    """
    skipped, total = look_at_part(samples, field_names, look, progress)
    tell_skipped(skipped, total)
    return skipped


def tell_skipped(skipped: Sequence[Mapping], total: int) -> None:
    """Logs which images could not be used. Raises ValueError where these are all."""
    if skipped:
        told = f"images skipped: {len(skipped)}; the first: {skipped[0]['filepath']}: {skipped[0]['cause']}"
        if len(skipped) == total:
            raise ValueError(f"No image could be used; {told}.")
        logger.warning("%s. All are in `skipped` of the result.", told)


def look_at_part(
    samples: Samples, field_names: Sequence[str], look: Callable[[StoredImage], None], progress: bool | Callable | None
) -> tuple[list[dict], int]:
    """:func:`look_at_each` of a part, of which perhaps no image can be used. Also returns how many images it has."""
    ensure_metadata(samples, progress)
    of_frames = any(samples._is_frame_field(name) for name in field_names)
    total = samples.count("frames") if of_frames else len(samples)
    skipped = []
    with fou.ProgressBar(total=total, progress=progress) as bar:
        for stored in bar(stored_images(samples, field_names)):
            try:
                look(stored)
            except MissingError as error:
                raise ValueError(f"{stored.name}: {error}.") from error
            except LabelError as error:
                skipped.append({"id": str(stored.document["_id"]), "filepath": stored.name, "cause": str(error)})
    return skipped, total


def label_fields(samples: Samples, kinds: tuple[type, ...]) -> list[str]:
    """The fields of samples, and of videos' frames, that hold labels of these kinds."""
    found = list(samples.get_field_schema(flat=True, embedded_doc_type=kinds))
    if samples._contains_videos():
        frames = samples.get_frame_field_schema(flat=True, embedded_doc_type=kinds)
        found += [samples._FRAMES_PREFIX + name for name in frames]
    return found


def have_masks(samples: Samples, field_name: str) -> bool:
    """Whether labels of the field have masks, or are polygons, as far as the first one tells."""
    samples = samples._dataset  # what a view selects is not worth waiting for
    path, of_frames = samples._handle_frame_field(samples._get_label_field_path(field_name)[1])
    first = [{"$match": {f"{path}._id": {"$exists": True}}}, {"$limit": 1}]
    select = {"frames_only": True, "post_pipeline": first} if of_frames else {"pipeline": first}
    for document in samples._aggregate(**select):
        label = labels_in(document, field_name)[0]
        return bool(label.get("mask") or label.get("mask_path") or "points" in label)
    return True


def check_shapes_field(samples: Samples, name: str, role: str) -> None:
    """Raises ValueError unless `name` is a field of detections or polylines; `role` is what the message calls them."""
    found = samples.get_field(name)
    if found is None:
        labels = samples.get_field_schema(flat=True, embedded_doc_type=SHAPE_TYPES)
        raise ValueError(
            f"{samples._root_dataset.name} has no field '{name}' for the {role}. Fields that could be meant: "
            f"{', '.join(sorted(labels)) or 'none'}."
        )
    if not (isinstance(found, fof.EmbeddedDocumentField) and issubclass(found.document_type, SHAPE_TYPES)):
        kind = found.document_type.__name__ if isinstance(found, fof.EmbeddedDocumentField) else found
        raise ValueError(f"Field '{name}' holds {kind}; detections or polylines were expected as {role}.")


def check_field_name(name: str) -> None:
    """Raises ValueError unless a new field can be called so."""
    if not name.isidentifier() or name.startswith("_"):
        raise ValueError(f"'{name}' can't be the name of a field: a letter was expected, then letters, digits and _.")


def ensure_metadata(samples: Samples, progress: bool | Callable | None = None) -> None:
    """Computes and stores the sizes of the images that have none."""
    sides = ("metadata.height", "metadata.width")
    if samples.media_type == "video":
        sides = ("metadata.frame_height", "metadata.frame_width")
    missing = samples.match((F(sides[0]) == None) | (F(sides[1]) == None))  # noqa: E711
    if len(missing):
        missing.compute_metadata(overwrite=True, progress=progress)


def number_of(label: Mapping, names: Iterable[str]) -> float:
    """The mean of these attributes.

    Raises:
        MissingError: the label lacks one. LabelError: one is no number.
    """
    values = {name: label.get(name) for name in names}
    for name, value in values.items():
        if value is None:
            raise MissingError(f"{name_of(label)} has no {name}")
        if not isinstance(value, (int, float)) or math.isnan(value):
            raise LabelError(f"{name_of(label)} has {name}={value!r}: a number was expected")
    return sum(values.values()) / len(values)


def is_crowd(label: Mapping) -> bool:
    """COCO's `iscrowd`: a region of several objects. Raises LabelError where it is neither 0 nor 1."""
    value = label.get("iscrowd")
    if value not in (None, 0, 1):  # False and True are equal to these
        raise LabelError(f"{name_of(label)} has iscrowd={value!r}: true or false, or 0 or 1, was expected")
    return bool(value)


def masks_of(labels: Sequence[Mapping], size: tuple[int, int], wanted: Sequence[bool] | None = None) -> list[dict]:
    """COCO RLE of each label of an image.

    A mask of another resolution than its box in pixels is stretched to it, as the App draws it.

    Args:
        labels: documents of `fo.Detection`, with their mask in `mask` or a file, or of `fo.Polyline`.
        size: (height, width) of the image in pixels.
        wanted: of each label; the others get an empty mask, for decoding masks is what takes the time. Default: all.

    Raises:
        MissingError: a detection has no mask, wanted or not.
        LabelError: a label can't be used; the message names it and says why.
    """
    for label in labels:
        _check_has_mask(label)
    if wanted is None:
        wanted = [True] * len(labels)
    empty = _empty_mask(size)
    return [_mask_of(label, size) if decode else empty for label, decode in zip(labels, wanted)]


def boxes_of(labels: Sequence[Mapping], size: tuple[int, int]) -> np.ndarray:
    """float64 [N, 4]: x, y, width and height of each label, in pixels. Raises as :func:`masks_of` does."""
    scale = np.array([size[1], size[0]] * 2, float)
    return np.array([_relative_box(label) for label in labels], float).reshape(-1, 4) * scale


def meet(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [boxes, others], for x, y, width, height in pixels: whether labels of these boxes could overlap.

    They may be a pixel or two apart: masks begin at whole pixels, boxes need not.
    """
    starts = np.maximum(boxes[:, None, :2], others[None, :, :2])
    ends = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], (others[:, :2] + others[:, 2:])[None])
    return (starts <= ends + 2).all(2)


def _mask_of(label: Mapping, size: tuple[int, int]) -> dict:
    if "points" in label:
        return _polygons_mask(label, size)
    mask = _stored_mask(label)
    height, width = size
    x, y, w, h = _relative_box(label) * [width, height, width, height]
    if not mask.any():
        return _empty_mask(size)
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise LabelError(f"{name_of(label)} has a mask, but its bounding_box lies outside the image")
    rows, columns = mask.shape
    if abs(rows - h) > 1 or abs(columns - w) > 1:  # else the box's ends were rounded to pixels, this way or that
        # A coarser mask's pixels are squares in the image, again but for rounding at the ends.
        scale = max(h / rows, w / columns)
        if mask.shape == size or abs(rows * scale - h) > 1 + scale or abs(columns * scale - w) > 1 + scale:
            raise LabelError(
                f"{name_of(label)} has a mask of {columns}x{rows} pixels in a bounding_box of {w:.0f}x{h:.0f}: a mask "
                f"must be cropped to its box"
            )
        rows, columns = max(1, round(h)), max(1, round(w))
        mask = cv2.resize(mask.view(np.uint8), (columns, rows), interpolation=cv2.INTER_NEAREST).view(bool)
    x, y = round(x), round(y)
    mask = mask[max(0, -y) : height - y, max(0, -x) : width - x]
    x, y = max(0, x), max(0, y)
    return rle_from_crop(mask, np.array([x, y, x + mask.shape[1], y + mask.shape[0]]), size)


def _empty_mask(size: tuple[int, int]) -> dict:
    return rle_from_crop(np.zeros((0, 0), bool), np.zeros(4), size)


def _polygons_mask(label: Mapping, size: tuple[int, int]) -> dict:
    height, width = size
    polygons = [np.array(points, float).reshape(-1, 2) * [width, height] for points in label["points"]]
    polygons = [points.ravel().tolist() for points in polygons if len(points) >= 3]
    if not polygons:
        raise LabelError(f"{name_of(label)} has no polygon of at least 3 points")
    if not np.isfinite(np.concatenate(polygons)).all():
        raise LabelError(f"{name_of(label)} has points that are no numbers")
    return mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))


def _relative_box(label: Mapping) -> np.ndarray:
    if "points" in label:
        points = np.array([point for points in label["points"] for point in points], float).reshape(-1, 2)
        if not len(points):
            raise LabelError(f"{name_of(label)} has no points")
        low, high = points.min(0), points.max(0)
        box = [*low, *(high - low)]
    else:
        box = label.get("bounding_box") or []
    if len(box) != 4 or not all(isinstance(v, (int, float)) and abs(v) <= 2 for v in box) or min(box[2:]) <= 0:
        raise LabelError(
            f"{name_of(label)} has bounding_box={box}: [x, y, width, height] was expected, relative to the image"
        )
    return np.array(box, float)


def _stored_mask(label: Mapping) -> np.ndarray:
    """bool [h, w]"""
    _check_has_mask(label)
    if (stored := label.get("mask")) is not None:
        try:
            mask = _deserialized(stored)
        except (zlib.error, ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
            raise LabelError(f"{name_of(label)} has a mask that can't be decoded: {error}") from error
    else:
        path = label["mask_path"]
        try:
            content = np.frombuffer(fos.read_file(path, binary=True), np.uint8)
            mask = cv2.imdecode(content, cv2.IMREAD_UNCHANGED) if content.size else None
        except OSError as error:
            raise LabelError(f"{name_of(label)} has a mask_path that can't be read: {error}") from error
        if mask is None:
            raise LabelError(f"{name_of(label)} has a mask_path that is no image: {path}")
    if mask.ndim == 3:
        mask = _single_channel(label, mask)
    if mask.ndim != 2:
        raise LabelError(f"{name_of(label)} has a mask of shape {mask.shape}: two dimensions were expected")
    if mask.dtype != bool:
        if not (mask >= 0).all():
            raise LabelError(f"{name_of(label)} has a mask with values that are negative or no numbers")
        mask = mask > 0
    return np.ascontiguousarray(mask)


def _single_channel(label: Mapping, mask: np.ndarray) -> np.ndarray:
    colors, alpha = mask[..., :3], mask[..., 3:]
    if (colors != colors[..., :1]).any() or (alpha != alpha.max(initial=0)).any():
        raise LabelError(
            f"{name_of(label)} has a mask in colours or with transparency: grey was expected, 0 is outside"
        )
    return mask[..., 0]


def _check_has_mask(label: Mapping) -> None:
    if label.get("mask") is None and not label.get("mask_path") and "points" not in label:
        raise MissingError(
            f"{name_of(label)} has no mask. Make masks from boxes by `apply_model(model, ..., prompt_field=...)`, or "
            f"measure boxes by `use_masks=False`"
        )


def serialized(mask: np.ndarray) -> bytes:
    """What `fiftyone.core.utils.serialize_numpy_array` gives, compressed by run lengths.

    zlib then takes a quarter to a sixth of the time that it takes to look for whatever repeats. Masks of 100x100 pixels
    become an eighth larger, those of 300x300 a quarter smaller.
    """
    content = io.BytesIO()
    np.save(content, mask, allow_pickle=False)
    compressor = zlib.compressobj(strategy=zlib.Z_RLE)
    return compressor.compress(content.getvalue()) + compressor.flush()


def _deserialized(stored: bytes) -> np.ndarray:
    """What `fiftyone.core.utils.deserialize_numpy_array` gives, but for the 60 µs of parsing the header each time."""
    data = zlib.decompress(stored)
    if data[:8] != b"\x93NUMPY\x01\x00":  # version 1.0, which numpy writes for headers of up to 64 KB
        raise ValueError("it is no array in numpy's format")
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, fortran_order, dtype = _array_header(data[8:start])
    array = np.frombuffer(data, dtype, math.prod(shape), start)
    return array.reshape(shape, order="F" if fortran_order else "C")


@lru_cache(maxsize=4096)
def _array_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, fortran_order, dtype


def name_of(label: Mapping) -> str:
    """How messages call a label."""
    return f"{label.get('_cls', 'label')} {label.get('_id')}"
