"""Which fields there are, whether they can take masks or give prompts, and declaring new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.validation as fov

from ..errors import ArgumentError
from ..fiftyone_internals import (
    FRAMES_PREFIX,
    aggregate,
    contains_videos,
    is_generated,
    label_path,
    label_root,
    root_dataset,
    source_dataset,
    split_frame_field,
)
from .documents import labels_in

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

SHAPE_TYPES = (fol.Detections, fol.Polylines, fol.Detection, fol.Polyline)


def label_fields(samples: SampleCollection, kinds: tuple[type, ...]) -> list[str]:
    """The fields of samples, and of videos' frames, that hold labels of these kinds."""
    found = list(samples.get_field_schema(flat=True, embedded_doc_type=kinds))
    if contains_videos(samples):
        frames = samples.get_frame_field_schema(flat=True, embedded_doc_type=kinds)
        found += [FRAMES_PREFIX + name for name in frames]
    return found


def have_masks(samples: SampleCollection, field_name: str) -> bool:
    """Whether labels of the field have masks, or are polygons, judged by the first one."""
    samples = source_dataset(samples)  # what a view selects is not worth waiting for
    path, of_frames = split_frame_field(samples, label_path(samples, field_name))
    first = [{"$match": {f"{path}._id": {"$exists": True}}}, {"$limit": 1}]
    select = {"frames_only": True, "post_pipeline": first} if of_frames else {"pipeline": first}
    for document in aggregate(samples, **select):
        label = labels_in(document, field_name)[0]
        return bool(label.get("mask") or label.get("mask_path") or "points" in label)
    return True


def check_shapes_field(samples: SampleCollection, name: str, role: str) -> None:
    """Raises ValueError unless `name` is a field of detections or polylines; `role` is what the message calls them."""
    found = samples.get_field(name)
    if found is None:
        labels = samples.get_field_schema(flat=True, embedded_doc_type=SHAPE_TYPES)
        raise ArgumentError(
            f"{root_dataset(samples).name} has no field '{name}' for the {role}. Fields that could be meant: "
            f"{', '.join(sorted(labels)) or 'none'}."
        )
    if not (isinstance(found, fof.EmbeddedDocumentField) and issubclass(found.document_type, SHAPE_TYPES)):
        kind = found.document_type.__name__ if isinstance(found, fof.EmbeddedDocumentField) else found
        raise ArgumentError(f"Field '{name}' holds {kind}; detections or polylines were expected as {role}.")


def check_field_name(name: str) -> None:
    """Raises ValueError unless a new field can be called so."""
    if not name.isidentifier() or name.startswith("_"):
        raise ArgumentError(
            f"'{name}' can't be the name of a field: a letter was expected, then letters, digits and _."
        )


PROMPT_TYPES = (fol.Detections, fol.Keypoints, fol.Detection, fol.Keypoint)
_TRIES = 5


def _check_is_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ArgumentError(f"{name} must be the name of a field, not {value!r}.")


def check_label_field(samples: SampleCollection, label_field: str) -> None:
    """Raises ValueError where masks can't be stored in this field of these samples."""
    _check_is_text("label_field", label_field)
    fov.validate_non_grouped_collection(samples)
    if is_generated(samples):
        raise ArgumentError(
            "Patches, clips and views of frames can't be segmented: go back to the samples they are of."
        )
    is_video = samples.media_type == "video"
    if is_video != label_field.startswith(FRAMES_PREFIX):
        wanted = f"{FRAMES_PREFIX}{label_field}" if is_video else label_field.removeprefix("frames.")
        raise ArgumentError(f"Masks of {samples.media_type}s go into a field such as '{wanted}', not '{label_field}'.")
    name = label_field.removeprefix(FRAMES_PREFIX)
    found = root_dataset(samples).get_field(label_field)
    if found is None:
        check_field_name(name)
        return
    if "." in name:
        raise ArgumentError(f"'{label_field}' is inside another field: choose a field of its own for the masks.")
    if not _holds(found, (fol.Detections,)):
        kind = found.document_type.__name__ if isinstance(found, fof.EmbeddedDocumentField) else type(found).__name__
        raise ArgumentError(f"'{label_field}' holds {kind}, not Detections: choose another field for the masks.")
    if found.read_only:
        raise ArgumentError(f"'{label_field}' is read-only: choose another field for the masks.")


def check_prompt_field(samples: SampleCollection, prompt_field: str, in_place: bool) -> None:
    """Raises ValueError where this field can't prompt or, `in_place`, can't take the masks itself."""
    _check_is_text("prompt_field", prompt_field)
    fov.validate_non_grouped_collection(samples)
    if samples.media_type == "video" or is_generated(samples):
        raise ArgumentError(
            "Prompts have to be on a dataset's own images. Go back from patches to their samples; of videos, make a "
            "dataset of frames: dataset.to_frames(sample_frames=True).clone()."
        )
    found = samples.get_field(prompt_field)
    if found is None:
        raise ArgumentError(f"There is no field '{prompt_field}' to take prompts from, or the view hides it.")
    if not _holds(found, PROMPT_TYPES):
        raise ArgumentError(f"'{prompt_field}' holds neither detections nor keypoints, so it can't prompt.")
    if not in_place:
        return
    if not _holds(found, (fol.Detections, fol.Detection)):
        raise ArgumentError(f"'{prompt_field}' holds keypoints, which can't carry masks: name a field for the masks.")
    if found.read_only:
        raise ArgumentError(f"'{prompt_field}' is read-only: name a field for the masks.")


def _holds(found: fof.Field, kinds: tuple[type, ...]) -> bool:
    return isinstance(found, fof.EmbeddedDocumentField) and issubclass(found.document_type, kinds)


def declare_label_field(dataset: fo.Dataset, label_field: str) -> None:
    """Adds the field unless it exists.

    FiftyOne shares one object for a dataset among the threads of the App, each of which reloads it: a field that one
    adds just then is lost.
    """
    for _ in range(_TRIES):
        if dataset.has_field(label_field):
            return
        name, of_frames = split_frame_field(dataset, label_field)
        add = dataset.add_frame_field if of_frames else dataset.add_sample_field
        add(name, fof.EmbeddedDocumentField, embedded_doc_type=fol.Detections)
        dataset.reload()


def declare_mask_attributes(dataset: fo.Dataset, label_field: str) -> None:
    root, _ = label_root(dataset, label_field)
    for name, kind in MASK_ATTRIBUTES.items():
        if not dataset.has_field(f"{root}.{name}"):
            dataset.add_sample_field(f"{root}.{name}", kind)


MASK_ATTRIBUTES = {"predicted_iou": fof.FloatField, "stability": fof.FloatField, "area_px": fof.IntField}
