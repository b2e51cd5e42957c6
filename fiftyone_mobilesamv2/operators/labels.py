"""Inputs that say how labels are compared, and what is told of images whose labels can't be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import fiftyone as fo

from .operator import FormError, count, label_fields

if TYPE_CHECKING:
    from .operator import Form

SHAPES = (fo.Detections, fo.Polylines)
GROUND_TRUTH = "ground_truth"
RANKINGS = {
    "confidence": "Confidence, the detector's score",
    "predicted_iou": "IoU that the decoder predicts",
    "stability": "Stability of the mask",
    "sam": "SAM's: the mean of predicted IoU and stability",
}


def proposals_choice(form: Form) -> str:
    """Which field holds what the model found."""
    found = [name for name in label_fields(form.samples, SHAPES) if name != GROUND_TRUTH]
    if not found:
        raise FormError(f"{form.dataset.name} has no field of proposals yet. Run 'Segment everything' first.")
    default = "segmentations" if "segmentations" in found else found[0]
    return form.label_field("pred_field", SHAPES, "Proposals", "What 'Segment everything' found", default)


def use_masks_switch(form: Form, *field_names: str) -> bool:
    """Whether masks are compared; where there are none, boxes."""
    from ..curation.findings import have_masks

    known = label_fields(form.samples, SHAPES)
    without = [name for name in field_names if name in known and not have_masks(form.samples, name)]
    use_masks = form.switch("use_masks", not without, "Compare masks", "Otherwise bounding boxes")
    if without:
        told = f"Labels in {' and '.join(map(repr, without))} have no masks"
        if use_masks:
            form.problem(f"{told}: compare boxes.")
        else:
            form.note(f"{told}: boxes are compared.")
    return use_masks


def skipped_text(skipped: Sequence[dict]) -> list[str]:
    """What a summary says of images that were skipped; nothing if none were."""
    if not skipped:
        return []
    first = skipped[0]
    return [f"**{count(len(skipped), 'image')} skipped.** The first: `{first['filepath']}`: {first['cause']}"]


def skipped_button(skipped: Sequence[dict]) -> list[tuple[str, str, dict]]:
    """The button that shows them."""
    ids = [each["id"] for each in skipped]
    return [("Show skipped samples", "@voxel51/operators/show_samples", {"samples": ids})] if ids else []
