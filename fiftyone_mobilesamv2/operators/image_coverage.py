"""Measure how much of each image its objects cover."""

from __future__ import annotations

from .app_work import Outcome, Progress
from .choices import SHAPES, skipped_button, skipped_text
from .form import Form, code, count
from .operator import Operator


class ImageCoverage(Operator):
    identifier = "image_coverage"
    title = "Measure image coverage"
    description = (
        "Store on each sample how much of its image objects cover, how many objects there are, and their sizes"
    )
    icon = "curate"
    risk = "low"

    def form(self, form: Form) -> None:
        from ..curation.coverage import NUMBERS, check_coverage
        from ..curation.findings import check_images
        from ..labels.fields import have_masks

        samples = form.target("Measure")
        check_images(samples)
        field = form.label_field("field", SHAPES, "Labels", "The objects", "segmentations")
        if form.problems:
            return
        check_coverage(samples, field)
        has_masks = have_masks(samples, field)
        if form.switch("use_masks", has_masks, "Measure masks", "Otherwise bounding boxes") and not has_masks:
            form.problem(f"Labels in '{field}' have no masks: measure boxes.")
        form.note(f"Stored on the samples, to filter and sort by: {', '.join(f'{field}_{end}' for end in NUMBERS)}.")

    def run(self, form: Form, progress: Progress) -> Outcome:
        from ..curation.coverage import image_coverage

        coverage = image_coverage(form.samples, progress=progress, **form.values)
        field, means = form.values["field"], coverage.means
        lines = [f"**{count(coverage.images, 'image')} measured**"]
        if coverage.images:
            lines.append(
                f"On average, {means['objects']:.1f} objects cover {means['coverage']:.1%}: {means['small']:.1f} "
                f"small, {means['medium']:.1f} medium, {means['large']:.1f} large."
            )
            lines.append(f"Sort the images by {code(field + '_coverage')}, or filter them in the sidebar.")
        if coverage.unsegmented:
            lines.append(
                f"Not measured: {coverage.unsegmented:,} without a value in {code(field)}. Segment them first."
            )
        lines += skipped_text(coverage.skipped)
        return Outcome("\n\n".join(lines), vars(coverage), buttons=skipped_button(coverage.skipped))
