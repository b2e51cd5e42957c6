"""Label fields: listing them, checking that they can store masks or provide prompts, and declaring new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.stages as fosg
import fiftyone.core.validation as fov

from ..errors import ArgumentError, plain
from ..fiftyone_internals import (
    FRAMES_PREFIX,
    aggregate,
    contains_videos,
    is_dynamic_groups,
    is_frame_field,
    is_frames_view,
    is_generated,
    is_patches_view,
    label_path,
    label_root,
    root_dataset,
    source_dataset,
    split_frame_field,
    view_stages,
)
from .documents import labels_in

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

GROUND_TRUTH_FIELD = "ground_truth"  # FiftyOne's usual name
SHAPE_TYPES = (fol.Detections, fol.Polylines, fol.Detection, fol.Polyline)


def label_fields(samples: SampleCollection, kinds: tuple[type, ...]) -> list[str]:
    """The sample and frame fields that contain labels of these types."""
    names = list(samples.get_field_schema(flat=True, embedded_doc_type=kinds))
    if contains_videos(samples):
        frame_names = samples.get_frame_field_schema(flat=True, embedded_doc_type=kinds)
        names += [FRAMES_PREFIX + name for name in frame_names]
    return names


def have_masks(samples: SampleCollection, field_name: str) -> bool:
    """Whether the first label of the field has a mask or is a polygon; True if the field has no labels."""
    samples = source_dataset(samples)  # evaluating a view would take too long
    path, of_frames = split_frame_field(samples, label_path(samples, field_name))
    first = [{"$match": {f"{path}._id": {"$exists": True}}}, {"$limit": 1}]
    select = {"frames_only": True, "post_pipeline": first} if of_frames else {"pipeline": first}
    for document in aggregate(samples, **select):
        label = labels_in(document, field_name)[0]
        return bool(label.get("mask") or label.get("mask_path") or "points" in label)
    return True


def with_lists(samples: SampleCollection, field_name: str) -> SampleCollection:
    """The samples in which a field of lists of labels contains a list.

    FiftyOne's filters of labels fail for the whole collection if one sample contains something else there.
    """
    path, is_list = label_root(samples, field_name)
    if not is_list or is_frame_field(samples, path):
        return samples
    return samples.match({path: {"$type": "array"}})


def check_shapes_field(samples: SampleCollection, name: str, role: str) -> None:
    """Raises ValueError unless `name` is a field of detections or polylines; `role` describes them in the message."""
    field = samples.get_field(name)
    if field is None:
        candidates = samples.get_field_schema(flat=True, embedded_doc_type=SHAPE_TYPES)
        raise ArgumentError(
            f"{root_dataset(samples).name} has no field '{name}' for the {role}. Possible fields: "
            f"{', '.join(sorted(candidates)) or 'none'}."
        )
    if not _contains(field, SHAPE_TYPES):
        kind = field.document_type.__name__ if isinstance(field, fof.EmbeddedDocumentField) else field
        raise ArgumentError(f"Field '{name}' contains {kind}; detections or polylines were expected as {role}.")


def check_field_name(name: str) -> None:
    """Raises ValueError unless `name` is valid for a new field."""
    if not name.isidentifier() or name.startswith("_"):
        raise ArgumentError(
            f"'{name}' is not a valid field name: a letter followed by letters, digits and _ was expected."
        )


PROMPT_TYPES = (fol.Detections, fol.Keypoints, fol.Detection, fol.Keypoint)


def _check_is_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ArgumentError(f"{name} must be the name of a field, not {plain(value)!r}.")


def check_not_grouped(samples: SampleCollection) -> None:
    """Raises ValueError if these are groups of samples: a grouped dataset, or dynamic groups."""
    fov.validate_collection(samples)
    if is_dynamic_groups(samples):
        raise ArgumentError(
            "Dynamic groups can't be processed as a whole: use the view that they were made from, or select their "
            "samples: dataset.select(view.flatten().values('id'))."
        )
    if samples.media_type == "group":
        raise ArgumentError(
            "Groups can't be processed as a whole: choose a slice with dataset.select_group_slices(...)."
        )


def check_label_field(samples: SampleCollection, label_field: str) -> None:
    """Raises ValueError if masks can't be stored in this field of these samples."""
    _check_is_text("label_field", label_field)
    check_not_grouped(samples)
    if is_generated(samples):
        raise ArgumentError(
            "Patches, clips and frame views can't be segmented: segment the samples that they come from."
        )
    is_video = samples.media_type == "video"
    if is_video != label_field.startswith(FRAMES_PREFIX):
        valid = f"{FRAMES_PREFIX}{label_field}" if is_video else label_field.removeprefix("frames.")
        raise ArgumentError(f"Masks of {samples.media_type}s need a field such as '{valid}', not '{label_field}'.")
    name = label_field.removeprefix(FRAMES_PREFIX)
    field = root_dataset(samples).get_field(label_field)
    if field is None:
        check_field_name(name)
        return
    if "." in name:
        raise ArgumentError(f"'{label_field}' is inside another field: choose a top-level field for the masks.")
    _check_stores_masks(field, label_field)


def _check_stores_masks(field: fof.Field, label_field: str) -> None:
    if not _contains(field, (fol.Detections,)):
        kind = field.document_type.__name__ if isinstance(field, fof.EmbeddedDocumentField) else type(field).__name__
        raise ArgumentError(f"'{label_field}' contains {kind}, not Detections: choose another field for the masks.")
    if field.read_only:
        raise ArgumentError(f"'{label_field}' is read-only: choose another field for the masks.")


def check_apply_model(
    samples: SampleCollection, label_field: str, prompt_field: str | None = None, num_workers: int = 0
) -> None:
    """Raises ValueError if FiftyOne's `apply_model` would lose the masks, or ignore the prompts, of these samples."""
    if is_patches_view(samples):
        raise ArgumentError("Patches can't be segmented: segment the samples that they come from.")
    if any(isinstance(stage, fosg.Flatten) for stage in view_stages(samples)):
        raise ArgumentError(
            "FiftyOne can't read the images of a flattened view: use the view that was grouped, or select its samples: "
            "dataset.select(view.values('id'))."
        )
    if is_frames_view(samples) and not samples.has_field(label_field) and not num_workers:
        raise ArgumentError(
            f"'{label_field}' is a new field, which FiftyOne adds to a frames view only if workers read the images: "
            f"pass num_workers=1 or more."
        )
    if samples.media_type == "video":
        label_field = FRAMES_PREFIX + label_field.removeprefix(FRAMES_PREFIX)
        if prompt_field is not None:
            raise ArgumentError(
                f"FiftyOne passes no prompts of videos to a model: to use '{prompt_field}', apply it to a frames view, "
                f"dataset.to_frames(sample_frames=True)."
            )
    if (field := samples.get_field(label_field)) is not None:
        _check_stores_masks(field, label_field)


def check_prompt_field(samples: SampleCollection, prompt_field: str, in_place: bool) -> None:
    """Raises ValueError if this field can't provide prompts or, with `in_place`, can't store the masks itself."""
    _check_is_text("prompt_field", prompt_field)
    check_not_grouped(samples)
    if samples.media_type == "video" or is_generated(samples):
        raise ArgumentError(
            "Prompts must be on a dataset's own images. For patches, use the samples that they come from; for videos, "
            "create a dataset of frames: dataset.to_frames(sample_frames=True).clone()."
        )
    field = samples.get_field(prompt_field)
    if field is None:
        raise ArgumentError(f"The prompt field '{prompt_field}' does not exist, or the view hides it.")
    if not _contains(field, PROMPT_TYPES):
        raise ArgumentError(f"'{prompt_field}' contains neither detections nor keypoints, so it has no prompts.")
    if not in_place:
        return
    if not _contains(field, (fol.Detections, fol.Detection)):
        raise ArgumentError(
            f"'{prompt_field}' contains keypoints, which can't store masks: name a field for the masks."
        )
    if field.read_only:
        raise ArgumentError(f"'{prompt_field}' is read-only: name a field for the masks.")


def _contains(field: fof.Field, kinds: tuple[type, ...]) -> bool:
    return isinstance(field, fof.EmbeddedDocumentField) and issubclass(field.document_type, kinds)


RUN_ID = "run_id"  # attribute of labels: the run that made them, see `runs.marks`
MASK_ATTRIBUTES = {
    "predicted_iou": fof.FloatField,
    "stability": fof.FloatField,
    "area_px": fof.IntField,
    RUN_ID: fof.StringField,
}
