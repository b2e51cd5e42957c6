"""Make proposals ground truth."""

from __future__ import annotations

import fiftyone as fo
from bson import ObjectId
from fiftyone.operators import types

from ..errors import FormError
from ..fiftyone_internals import is_patches_view, label_path
from ..labels.fields import GROUND_TRUTH_FIELD, label_fields
from .app_work import Outcome, Progress
from .choices import SHAPES, field_of_selected, skipped_button, skipped_text
from .form import Form, code, count
from .operator import Operator

PROMOTE, DISMISS = "promote", "dismiss"
VERDICTS = {
    PROMOTE: "Right: turn into labels",
    DISMISS: "Wrong: don't suggest again",
}


class PromoteToLabels(Operator):
    identifier = "promote_to_labels"
    title = "Promote to labels"
    description = "Turn the selected proposals into ground truth of a class, or dismiss them"
    icon = "curate"

    def form(self, form: Form) -> None:
        from ..curation.promote import check_promotion

        if form.dataset is None:
            raise FormError("Open a dataset first.")
        self._selection(form)
        field = form.values["pred_field"]
        form.note(f"{count(len(form.values['ids']), 'object')} of '{field}' selected.")
        if form.choice("verdict", VERDICTS, PROMOTE, "Verdict", radio=True) == DISMISS:
            return
        known = [name for name in label_fields(form.dataset, SHAPES) if name != field]
        gt_field = form.new_field(
            "gt_field",
            GROUND_TRUTH_FIELD,
            "Label field",
            "New field, or an existing field of detections or polylines",
            known,
        )
        check_promotion(form.samples, field, gt_field)
        view = types.AutocompleteView()
        for name in self._classes(form.dataset, gt_field):
            view.add_choice(name, label=name)
        # No class is filled in: a user who doesn't read it would put a wrong one into the ground truth.
        prop = form.inputs.str("label", label="Class", description="Existing or new class", required=True, view=view)
        label = form.text_of(prop, "label", None, "Class")
        if label is not None and not label.strip():
            form.problem("Class: a name was expected.")

    def _selection(self, form: Form) -> None:
        """Gets the selected proposals: labels in samples, or patches."""
        ctx = form.ctx
        is_patches = is_patches_view(ctx.view)
        if ctx.selected_labels:
            form.values["pred_field"] = field_of_selected(ctx.selected_labels)
            sample_ids = {label["sample_id"] for label in ctx.selected_labels}
            form.samples = ctx.view if is_patches else ctx.dataset.select(sample_ids)
            form.values["ids"] = [label["label_id"] for label in ctx.selected_labels]
        elif is_patches and (selected := [id for id in ctx.selected if ObjectId.is_valid(id)]):
            form.samples = ctx.view.select(selected)
            field = form.label_field("pred_field", (fo.Detection,), "Proposals")
            form.values["ids"] = [] if form.problems else form.samples.values(f"{field}.id")
        else:
            raise FormError(
                "Select the proposals first: check patches in a patches view, or click objects in an open sample."
            )

    def _classes(self, dataset: fo.Dataset, gt_field: str) -> list[str]:
        classes: list[str] | None = dataset.classes.get(gt_field, dataset.default_classes)
        if not classes and dataset.has_field(gt_field):
            classes = dataset.distinct(label_path(dataset, gt_field, "label"))
        return classes or []

    def run(self, form: Form, progress: Progress) -> Outcome:
        from ..curation.promote import dismiss, promote_to_labels

        values = form.values
        if values["verdict"] == DISMISS:
            number = dismiss(form.samples, values["ids"], values["pred_field"])
            return Outcome(
                f"**{count(number, 'object')} dismissed**\n\nThe tag `dismissed` keeps them from being suggested "
                f"again.",
                {"dismissed": number},
                view=_shown(form),
            )
        promotion = promote_to_labels(
            form.samples,
            values["ids"],
            values["pred_field"],
            values["gt_field"],
            label=values["label"],
            progress=progress,
        )
        lines = [f"**{count(promotion.promoted, 'object')} labeled {code(values['label'])}**"]
        if promotion.promoted:
            lines.append(f"Stored in {code(values['gt_field'])} of {count(promotion.samples, 'image')}.")
        if promotion.already:
            lines.append(f"Already labels, left unchanged: {promotion.already:,}.")
        if promotion.missing:
            lines.append(f"No longer there: {len(promotion.missing):,}.")
        lines += skipped_text(promotion.skipped)
        text, buttons = "\n\n".join(lines), skipped_button(promotion.skipped)
        return Outcome(text, vars(promotion), view=_shown(form), buttons=buttons)


def _shown(form: Form) -> fo.DatasetView | None:
    """The open patches view, without the patches that have been decided on; None if no such view is open."""
    view = form.ctx.view
    if not is_patches_view(view):
        return None
    view.reload()
    return view
