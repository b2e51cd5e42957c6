"""Delete the masks of a field, with their files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import FormError
from .app_work import Outcome, Progress
from .form import Form, cached, code, count
from .operator import Operator

if TYPE_CHECKING:
    from ..runs.deletion import MadeMasks


class DeleteMasks(Operator):
    identifier = "delete_masks"
    title = "Delete masks"
    description = "Delete the masks that runs stored in a field of the dataset, with their files and their record"
    icon = "curate"
    risk = "high"

    def form(self, form: Form) -> None:
        from ..runs.deletion import made_masks
        from ..runs.record import fields_of_runs

        dataset = form.whole_dataset()
        names = fields_of_runs(dataset)
        if not names:
            raise FormError(f"No run has stored masks in {dataset.name}.")
        field = form.choice("label_field", {name: name for name in names}, names[0], "Field")
        if form.problems:
            return
        made = cached(made_masks, dataset, field)
        if not form.switch("confirm", False, "Delete them", "This can't be undone"):
            form.problem(f"Confirm that these should be deleted: {_described(made, field)}")
        if made.evaluations:
            form.note(f"These evaluations keep their figures, but not these masks: {', '.join(made.evaluations)}.")

    def run(self, form: Form, progress: Progress) -> Outcome:
        from ..runs.deletion import delete_masks

        field = form.values["label_field"]
        made = delete_masks(form.dataset, field, progress)
        return Outcome(f"**{count(made.masks, 'mask')} deleted** from {code(field)}.", vars(made))


def _described(made: MadeMasks, field: str) -> str:
    """A sentence about what is deleted."""
    text = f"{count(made.masks, 'mask')} of {count(made.images, 'image')}"
    if made.files:
        text += f", {made.files:,} of them with their files"
    if made.only_masks:
        return f"{text}. Their labels, which existed before, are kept without masks."
    if made.others:
        verb = "is" if made.others == 1 else "are"
        return f"{text}. {count(made.others, 'other label')} of '{field}' {verb} kept."
    return f"{text}, and the field '{field}'."
