"""Repair a dataset."""

from __future__ import annotations

from .app_work import Outcome, Progress
from .choices import samples_button
from .form import Form, code, count
from .operator import Operator


class RepairDataset(Operator):
    identifier = "repair_dataset"
    title = "Repair dataset"
    description = (
        "Declare fields that FiftyOne lost, so that samples can be loaded again, and find masks whose files were moved"
    )
    icon = "curate"

    def form(self, form: Form) -> None:
        from ..curation.repair import check_mask_dir

        form.whole_dataset()
        form.text("mask_dir", None, "Folder of masks", "Where the folder of mask files was moved to, if it was moved")
        check_mask_dir(form.values["mask_dir"])

    def run(self, form: Form, progress: Progress) -> Outcome:
        from ..curation.repair import repair

        result = repair(form.dataset, form.values["mask_dir"], progress)
        lines = ["**Nothing to repair**" if result.is_sound else "**Repaired**"]
        if result.declared:
            lines.append(f"Declared again: {', '.join(map(code, result.declared))}.")
        if result.emptied:
            lines.append(f"Removed, since they had no values: {', '.join(map(code, result.emptied))}.")
        if result.found:
            lines.append(f"{count(result.found, 'mask')} found in the folder.")
        if result.missing:
            masks = count(sum(result.missing.values()), "mask")
            lines.append(f"**{masks} of {count(len(result.missing), 'sample')} have no file.** Segment these again.")
        buttons = samples_button("Show samples without files", list(result.missing))
        return Outcome("\n\n".join(lines), vars(result), buttons=buttons)
