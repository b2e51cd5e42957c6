"""Compare object-aware prompting with SAM's grid on some images of the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..labels.fields import GROUND_TRUTH_FIELD, label_fields
from .app_work import Outcome, Progress
from .choices import fetch_with_progress, model_choice, runtime_choices, use_masks_switch
from .form import Form, code, count
from .operator import Operator

if TYPE_CHECKING:
    from ..evaluation.comparison import Comparison

GRIDS = {str(side): f"{side}x{side}: {side**2:,} prompts per image" for side in (16, 32, 64)}
NO_GROUND_TRUTH = "(none)"


class ComparePrompting(Operator):
    identifier = "compare_prompting"
    title = "Compare prompting"
    description = "Compare object-aware prompts with SAM's grid on some images: masks found, and time"
    icon = "evaluate"

    def form(self, form: Form) -> None:
        from ..curation.findings import check_images
        from ..evaluation.comparison import IMAGES, kept_fields

        samples = form.target("Compare on")
        check_images(samples)
        form.number("images", IMAGES, "Images", "Chosen at random; the same ones each time", min=1, whole=True)
        model_choice(form)
        grid = form.choice("grid", GRIDS, "32", "Grid", "SAM's grid search; three masks for each point")
        form.switch("filters", True, "SAM's filters", "If off, all masks of the grid count")
        runtime_choices(form)
        names = kept_fields(int(grid)) if grid in GRIDS else ()
        self._ground_truth(form, names)
        self._keep(form, names)

    def _ground_truth(self, form: Form, kept: Sequence[str]) -> None:
        from ..labels.fields import SHAPE_TYPES

        fields = {name: name for name in label_fields(form.samples, SHAPE_TYPES) if name not in kept}
        gt_field = form.choice(
            "gt_field",
            {NO_GROUND_TRUTH: "None: compare only counts and times", **fields},
            GROUND_TRUTH_FIELD if GROUND_TRUTH_FIELD in fields else NO_GROUND_TRUTH,
            "Ground truth",
            "Objects to measure AR@K with",
        )
        if gt_field in fields:
            use_masks_switch(form, gt_field)

    def _keep(self, form: Form, names: Sequence[str]) -> None:
        from ..evaluation.comparison import draw
        from ..labels.fields import check_label_field
        from ..runs.plan import count_labels

        keep = form.switch("keep", False, "Keep the masks", f"In {' and '.join(names)}, with their evaluations")
        if not keep or form.problems:
            return
        drawn = draw(form.samples, form.values["images"])
        for name in names:
            with form.checks():
                check_label_field(form.samples, name)
                if labels := count_labels(drawn, name)[1]:
                    form.warn(f"{count(labels, 'label')} of these images in '{name}' will be replaced.")

    def run(self, form: Form, progress: Progress) -> Outcome:
        from .. import zoo
        from ..evaluation.comparison import compare_promptings

        values = form.values
        fetch_with_progress(values["model"], progress)
        progress.tell(None, f"Loading {values['model']}")
        thresholds = {} if values["filters"] else {"pred_iou_thresh": 0, "stability_score_thresh": 0}
        model = zoo.load_model(values["model"], device=values["device"], dtype=values["dtype"], **thresholds)
        gt_field = values["gt_field"]
        comparison = compare_promptings(
            form.samples,
            model,
            int(values["grid"]),
            values["images"],
            gt_field=None if gt_field == NO_GROUND_TRUTH else gt_field,
            use_masks=values.get("use_masks", True),
            keep=values["keep"],
            progress=progress.tell,
        )
        return _outcome(comparison, values)


def _outcome(comparison: Comparison, values: dict[str, Any]) -> Outcome:
    grid = comparison.grid
    lines = [
        f"**{comparison}**",
        comparison.table().to_markdown(disable_numparse=True, stralign="right"),
        f"Means over {count(len(comparison.samples), 'image')} by {code(values['model'])} on {values['device']} in "
        f"{values['dtype']}. Times include finding objects, decoding and cropping masks, but not the encoder, which "
        f"both need once.",
    ]
    if values["filters"] and grid.masks < 1:
        lines.append(
            f"SAM's filters keep {grid.masks:.1f} of the grid's masks per image: this model's predicted IoU or "
            f"stability rarely reaches their thresholds. Switch the filters off to see all masks."
        )
    buttons = [("Show these images", comparison.samples.values("id"))]
    if failures := {failure.sample_id: failure for failure in (*comparison.object_aware.failures, *grid.failures)}:
        first = next(iter(failures.values()))
        lines.append(
            f"**{count(len(failures), 'image')} failed** and count as images without masks. The first: {code(first)}"
        )
        buttons.append(("Show failed samples", list(failures)))
    return Outcome(
        "\n\n".join(lines),
        comparison.to_dict(),
        view=comparison.samples if values["keep"] else None,
        buttons=[(label, "@voxel51/operators/show_samples", {"samples": ids}) for label, ids in buttons],
    )
