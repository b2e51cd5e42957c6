"""Find objects without a label, or labels without an object."""

from __future__ import annotations

from .app_work import Outcome, Progress
from .choices import (
    ground_truth_choice,
    proposals_choice,
    ranking_choice,
    skipped_button,
    skipped_text,
    use_masks_switch,
)
from .form import Form, code, count
from .operator import Operator

OBJECTS, LABELS = "objects", "labels"
LOOK_FOR = {
    OBJECTS: "Objects without a label: proposals that no label explains",
    LABELS: "Labels without an object: labels that no proposal matches",
}


class FindUnlabeledObjects(Operator):
    identifier = "find_unlabeled_objects"
    title = "Find unlabeled objects"
    description = "Find objects without a label, or labels without an object"
    icon = "curate"

    def form(self, form: Form) -> None:
        from ..curation.findings import check_images, check_tagged_field

        samples = form.target("Look at")
        check_images(samples)
        look_for = form.choice("look_for", LOOK_FOR, OBJECTS, "What to look for", radio=True)
        pred_field = proposals_choice(form)
        gt_field = ground_truth_choice(form, pred_field)
        if not form.problems:
            with form.checks():
                check_tagged_field(samples, gt_field if look_for == LABELS else pred_field, "labels to tag")
        form.number("iou", 0.5, "IoU", "Minimum IoU of a proposal and a label of the same object", min=0.01, max=1)
        if look_for == OBJECTS:
            form.number(
                "max_inside",
                0.7,
                "Share inside labels",
                "Minimum share inside labels for a proposal to count as part of them",
                min=0.01,
                max=1,
            )
            ranking_choice(form, "Score", "Order of the results, best first")
            form.number("min_score", 0, "Minimum score", "Proposals below it are ignored", min=0)
            form.number("min_area", 0, "Minimum mask area (pixels)", "Smaller proposals are ignored", min=0, whole=True)
        use_masks_switch(form, pred_field, gt_field)

    def run(self, form: Form, progress: Progress) -> Outcome:
        from ..curation.unlabeled import find_unlabeled_objects, find_unsupported_labels

        options = dict(form.values)
        of_objects = options.pop("look_for") == OBJECTS
        find = find_unlabeled_objects if of_objects else find_unsupported_labels
        findings = find(form.samples, progress=progress, **options)
        number = len(findings)
        what, lacks = ("object", "a label") if of_objects else ("label", "an object")
        lines = [f"**{count(number, what)} without {lacks}**"]
        if number:
            order = "highest score" if of_objects else "least overlap with any proposal"
            lines.append(
                f"In {findings.num_samples:,} of {count(len(form.samples), 'image')}, tagged {code(findings.tag)} in "
                f"{code(findings.label_field)}. They are shown, {order} first."
            )
            if of_objects:
                lines.append(
                    "Select some of them and run 'Promote to labels' to make them labels, or to dismiss them for good."
                )
        if findings.left_out:
            lines.append(
                f"{count(findings.left_out, 'image')} left out, without a value in {code(options['pred_field'])}: "
                f"segment them first."
            )
        result = {
            "field": findings.label_field,
            "tag": findings.tag,
            "found": number,
            "samples": findings.num_samples,
            "left_out": findings.left_out,
            "skipped": findings.skipped,
        }
        return Outcome(
            "\n\n".join(lines + skipped_text(findings.skipped)),
            result,
            view=findings.patches if number else None,
            buttons=skipped_button(findings.skipped),
        )
