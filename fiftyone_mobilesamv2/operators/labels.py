"""Inputs that say how labels are compared, and what is told of images whose labels can't be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import fiftyone as fo
import fiftyone.core.stages as fosg
from bson import ObjectId

from ..stored_labels import SHAPE_TYPES, have_masks, label_fields
from .operator import FormError, code, count

if TYPE_CHECKING:
    from .operator import Form

SHAPES = (fo.Detections, fo.Polylines)
GROUND_TRUTH = "ground_truth"
_HIDING = (fosg.FilterLabels, fosg.SelectLabels, fosg.ExcludeLabels, fosg.LimitLabels)
RANKINGS = {
    "confidence": "Confidence, the detector's score",
    "predicted_iou": "IoU that the decoder predicts",
    "stability": "Stability of the mask",
    "sam": "SAM's: the mean of predicted IoU and stability",
}


def proposals_choice(form: Form, kinds: tuple[type, ...] = SHAPES) -> str:
    """Which field holds what the model found: masks that were made here, if there are any."""
    from ..segmentation_runs import segmented_fields

    fields = label_fields(form.samples, kinds)
    likely = [name for name in fields if name.endswith("segmentations")]
    likely += [name for name in fields if not name.endswith(GROUND_TRUTH)]
    default = next((name for name in (*segmented_fields(form.samples), *likely) if name in fields), None)
    if default is None:
        raise FormError(f"{form.dataset.name} has no field of proposals yet. Run 'Segment everything' first.")
    return form.label_field("pred_field", kinds, "Proposals", "What 'Segment everything' found", default)


def ground_truth_choice(form: Form, pred_field: str, kinds: tuple[type, ...] = SHAPES) -> str:
    """Which field holds the labels that the proposals are compared with."""
    prefix = form.samples._FRAMES_PREFIX if pred_field.startswith(form.samples._FRAMES_PREFIX) else ""
    found = form.label_field("gt_field", kinds, "Ground truth", "The labels", prefix + GROUND_TRUTH, pred_field)
    stages = form.samples.view()._all_stages
    if any(isinstance(stage, _HIDING) for stage in stages):
        form.warn("The view may hide some labels of its samples. Only what it shows is compared.")
    return found


def use_masks_switch(form: Form, *field_names: str) -> bool:
    """Whether masks are compared; where there are none, boxes."""
    known = label_fields(form.samples, SHAPE_TYPES)
    without = [name for name in field_names if name in known and not have_masks(form.samples, name)]
    use_masks = form.switch("use_masks", not without, "Compare masks", "Otherwise bounding boxes")
    if without:
        told = f"Labels in {' and '.join(map(repr, without))} have no masks"
        if use_masks:
            form.problem(f"{told}: compare boxes. 'Segment from prompts' turns boxes into masks.")
        else:
            form.note(f"{told}: boxes are compared. 'Segment from prompts' turns boxes into masks.")
    return use_masks


def field_of_selected(labels: Sequence[Mapping]) -> str:
    """The field that the labels selected in the App are of. Raises FormError where they are of several, or of none."""
    ids = [label.get(name) for label in labels for name in ("sample_id", "label_id")]
    if not all(map(ObjectId.is_valid, ids)) or not all(isinstance(label.get("field"), str) for label in labels):
        raise FormError("The selected labels are gone. Select others.")
    fields = sorted({label["field"] for label in labels})
    if len(fields) > 1:
        raise FormError(
            f"The selected labels are of several fields, {', '.join(fields)}. Select labels of one: the sidebar hides "
            f"the others."
        )
    return fields[0]


def skipped_text(skipped: Sequence[dict]) -> list[str]:
    """What a summary says of images that were skipped; nothing if none were."""
    if not skipped:
        return []
    first = skipped[0]
    return [f"**{count(len(skipped), 'image')} skipped.** The first: {code(first['filepath'])}: {code(first['cause'])}"]


def skipped_button(skipped: Sequence[dict]) -> list[tuple[str, str, dict]]:
    """The button that shows them."""
    ids = [each["id"] for each in skipped]
    return [("Show skipped samples", "@voxel51/operators/show_samples", {"samples": ids})] if ids else []
