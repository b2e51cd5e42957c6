"""Turn boxes and points into masks."""

from __future__ import annotations

import fiftyone as fo

from ..errors import FormError
from ..fiftyone_internals import label_root
from ..labels.fields import label_fields
from .app_work import Outcome, Progress
from .choices import (
    detections_fields,
    fetch_with_progress,
    field_of_selected,
    model_choice,
    model_config,
    runtime_choices,
    segmentation_outcome,
    storage_choice,
)
from .form import Form, cached, count
from .operator import Operator

PROMPT_KINDS = (fo.Detections, fo.Keypoints, fo.Detection, fo.Keypoint)
BOX_KINDS = (fo.Detections, fo.Detection)


class SegmentAnything(Operator):
    identifier = "segment_anything"
    title = "Segment from prompts"
    description = "Turn boxes or points into masks: the selected labels, or a whole field"
    icon = "segment"

    def form(self, form: Form) -> None:
        from ..labels.fields import check_label_field, check_prompt_field

        selected = form.ctx.selected_labels
        prompts = "field"
        if selected:
            names = ", ".join(sorted({f"'{label['field']}'" for label in selected}))
            choices = {
                "selected": f"Selected: {count(len(selected), 'label')} of {names}",
                "field": "All labels of a field",
            }
            prompts = form.choice("prompts", choices, "selected", "Prompts", radio=True)
        if prompts == "selected":
            field = self._field_of_selected(form)
        else:
            form.target("Segment")
            field = form.label_field(
                "prompt_field", PROMPT_KINDS, "Field of prompts", "Boxes, or points inside objects", "ground_truth"
            )
        are_boxes = field in label_fields(form.samples, BOX_KINDS)
        places = {"new": "In a separate field, with the labels of their prompts"}
        if are_boxes:
            places = {"labels": "In the boxes' own labels; the boxes stay unchanged"} | places
        place = form.choice("place", places, next(iter(places)), "Where masks go", radio=True)
        label_field = None
        if place == "new":
            known = [name for name in detections_fields(form.samples) if name != field]
            label_field = form.new_field(
                "label_field",
                "masks",
                "Label field",
                "New field, or an existing field of detections; existing labels are kept",
                known,
            )
            if label_field == field:
                form.problem(f"'{field}' holds the prompts. To store masks in their own labels, choose that above.")
        replace = form.switch("replace", False, "Replace masks", "Also for labels that already have a mask")
        with form.checks():
            check_prompt_field(form.samples, field, in_place=label_field is None)
            if label_field is None:
                self._count(form, field, replace)
            else:
                check_label_field(form.samples, label_field)
                self._count_masks(form, label_field, replace)
        model_choice(form)
        storage_choice(form)
        form.number("batch_size", 1, "Batch size", "Images per batch; progress updates after each", min=1, whole=True)
        runtime_choices(form)

    def _field_of_selected(self, form: Form) -> str:
        field = field_of_selected(form.ctx.selected_labels)
        gone = FormError("The selected labels no longer exist. Select others.")
        if field not in label_fields(form.dataset, PROMPT_KINDS):
            raise gone
        form.samples = form.dataset.select_labels(labels=form.ctx.selected_labels, fields=field)
        if not form.samples.count(label_root(form.dataset, field)[0]):
            raise gone
        form.values["prompt_field"] = field
        return field

    def _count(self, form: Form, field: str, replace: bool) -> None:
        from ..runs.plan import count_labels_with_masks

        masks, total = cached(count_labels_with_masks, form.samples, field)
        bare = total - masks
        if replace and total > bare:
            form.warn(f"The masks of {count(total - bare, 'label')} in '{field}' will be replaced.")
        elif not total:
            form.problem(f"'{field}' has no labels here.")
        elif not bare:
            form.problem(
                f"Nothing to do: '{field}' has {count(total, 'label')} here, all with masks. Switch on 'Replace "
                f"masks', or select others."
            )
        elif total > bare:
            form.note(f"{bare:,} of {total:,} labels have no mask yet.")

    def _count_masks(self, form: Form, label_field: str, replace: bool) -> None:
        from ..runs.plan import count_labels

        if label_field in detections_fields(form.samples) and not replace:
            existing = cached(count_labels, form.samples, label_field)[1]
            form.note(
                f"'{label_field}' has {count(existing, 'label')} here. Prompts that have a mask there are skipped."
            )

    def run(self, form: Form, progress: Progress) -> Outcome:
        from .. import zoo
        from ..runs.segment import segment_anything

        values = form.values
        fetch_with_progress(values["model"], progress)
        progress.tell(None, f"Loading {values['model']}")
        model = zoo.MobileSAMv2Model(model_config(form))
        run = segment_anything(
            form.samples,
            model,
            values["prompt_field"],
            values.get("label_field"),
            replace=values["replace"],
            batch_size=values["batch_size"],
            progress=progress,
        )
        return segmentation_outcome(run, values["replace"])
