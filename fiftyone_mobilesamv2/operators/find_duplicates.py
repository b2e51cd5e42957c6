"""Find labels that cover the same object, and labels that are parts of others."""

from __future__ import annotations

from .app_work import Outcome, Progress
from .choices import SHAPES, ranking_choice, skipped_button, skipped_text, use_masks_switch
from .form import Form, code, count
from .operator import Operator

SHOW = {
    "duplicate": "Duplicates: a better label covers the same object",
    "part": "Parts: they lie inside a larger label",
    "whole": "Wholes: they contain parts",
}


class FindDuplicates(Operator):
    identifier = "find_duplicates"
    title = "Find duplicates and parts"
    description = "Find labels that cover the same object, and labels that are parts of others"
    icon = "curate"

    def form(self, form: Form) -> None:
        from ..curation.duplicates import ATTRIBUTES
        from ..curation.findings import check_images, check_tagged_field

        samples = form.target("Look at")
        check_images(samples)
        name = form.label_field("field", SHAPES, "Labels", "Compared with each other", "segmentations")
        if not form.problems:
            with form.checks():
                check_tagged_field(samples, name, "labels to compare", ATTRIBUTES.values())
        form.number("iou", 0.8, "IoU", "Minimum IoU of two labels to count as duplicates", min=0.01, max=1)
        form.number(
            "containment",
            0.9,
            "Share inside",
            "Minimum share of a label inside a larger one to count as its part",
            min=0.01,
            max=1,
        )
        ranking_choice(form, "Score", "Decides which duplicate is kept; without scores, the largest")
        use_masks_switch(form, name)
        form.choice("show", SHOW, "duplicate", "Show afterwards", radio=True)

    def run(self, form: Form, progress: Progress) -> Outcome:
        from ..curation.duplicates import ATTRIBUTES, find_duplicates

        options = dict(form.values)
        show = options.pop("show")
        duplicates = find_duplicates(form.samples, progress=progress, **options)
        counts = duplicates.counts
        lines = [
            f"**{count(counts['duplicate'], 'duplicate')}, {count(counts['part'], 'part')} of "
            f"{count(counts['whole'], 'label')}**",
            f"Tagged in {code(duplicates.label_field)}; {code(ATTRIBUTES['duplicate'])} and "
            f"{code(ATTRIBUTES['part'])} hold the id of the other label.",
        ]
        result = {"field": duplicates.label_field, "counts": counts, "skipped": duplicates.skipped}
        return Outcome(
            "\n\n".join(lines + skipped_text(duplicates.skipped)),
            result,
            view=duplicates.patches(show) if counts[show] else None,
            buttons=skipped_button(duplicates.skipped),
        )
