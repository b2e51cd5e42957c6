"""Write masks as a COCO file."""

from __future__ import annotations

from pathlib import Path

import fiftyone as fo

from ..errors import ArgumentError, FormError, message_of
from .app_work import Outcome, Progress
from .choices import SHAPES, skipped_button, skipped_text
from .form import Form, code, count
from .operator import Operator


class ExportMasks(Operator):
    identifier = "export_masks"
    title = "Export masks as COCO"
    description = "Write masks as RLE to a JSON file in COCO format, and verify it against the stored masks"
    icon = "curate"

    def form(self, form: Form) -> None:
        from ..curation.export import check_path
        from ..curation.findings import check_images
        from ..labels.fields import have_masks

        samples = form.target("Export")
        check_images(samples)
        field = form.label_field("field", SHAPES, "Masks", "The labels to export", "segmentations")
        if form.problems:
            return
        if not have_masks(samples, field):
            raise FormError(f"Labels in '{field}' have no masks: create them with 'Segment from prompts'.")
        default = Path(fo.config.default_dataset_dir, form.dataset.slug, "masks.json")
        typed = form.text("path", str(default), "File", "Path on the machine of the App's server; must end with .json")
        try:
            path = Path(typed).expanduser()
            if not path.is_absolute():
                raise ArgumentError(f"a full path was expected, such as {default}, not {typed}.")
            form.values["path"] = str(path)
            overwrite = path.exists() and form.switch(
                "overwrite", False, "Overwrite", "The file exists; it is replaced when the new one is complete"
            )
            check_path(path, overwrite)
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: "~name" of an unknown user
            form.problem(f"File: {message_of(error)}")

    def run(self, form: Form, progress: Progress) -> Outcome:
        from ..curation.export import export_masks

        export = export_masks(form.samples, progress=progress, **form.values)
        lines = [
            f"**{count(export.annotations, 'mask')} of {count(export.images, 'image')}**",
            f"Written to {code(export.path)} ({export.bytes / 1e6:,.1f} MB), read back with pycocotools, and "
            "identical to the stored masks.",
            f"Images are named relative to {code(export.root)}.",
        ]
        result = vars(export) | {"path": str(export.path), "root": str(export.root)}
        return Outcome(
            "\n\n".join(lines + skipped_text(export.skipped)), result, buttons=skipped_button(export.skipped)
        )
