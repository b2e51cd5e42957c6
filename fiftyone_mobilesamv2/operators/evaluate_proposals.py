"""Measure proposals against ground truth: AR@K."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING

from ..errors import ArgumentError
from .app_work import Outcome, Progress
from .choices import (
    SKIPPED,
    ground_truth_choice,
    proposals_choice,
    ranking_choice,
    samples_button,
    skipped_samples,
    skipped_text,
    use_masks_switch,
)
from .form import Form, code, count
from .operator import Operator

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

    from ..evaluation.proposal_results import ProposalResults

PANEL = "segevery"
MAX_PROPOSALS = 10_000  # results hold counts for every K up to the largest; a 64x64 grid makes 12,288 masks


class EvaluateProposals(Operator):
    identifier = "evaluate_proposals"
    title = "Measure proposals (AR@K)"
    description = "Share of ground-truth objects that the K best-ranked masks or boxes of each image find"
    icon = "evaluate"

    def form(self, form: Form) -> None:
        from ..evaluation.proposals import ProposalEvaluationConfig
        from ..labels.fields import SHAPE_TYPES

        samples = form.target("Measure")
        pred_field = proposals_choice(form, SHAPE_TYPES)
        gt_field = ground_truth_choice(form, pred_field, SHAPE_TYPES)
        if not form.problems:
            with form.checks():
                ProposalEvaluationConfig(pred_field, gt_field).build().check_fields(samples)
        ks = form.text("ks", "10, 100, 1000", "K", "Number of proposals per image; one row of the table each")
        with form.checks("K: "):
            form.values["ks"] = whole_numbers(ks)
        ranking_choice(form, "Ranking", "How proposals are ranked")
        use_masks_switch(form, pred_field, gt_field)
        self._eval_key(form)

    def _eval_key(self, form: Form) -> None:
        keys = form.dataset.list_evaluations()
        free = (f"ar_{number}" if number > 1 else "ar" for number in itertools.count(1))
        unused = next(key for key in free if key not in keys)
        key = form.text("eval_key", unused, "Evaluation key", "Name of this evaluation and of the attributes it stores")
        if not key.isidentifier() or key.startswith("_"):
            form.problem(f"Evaluation key: '{key}' is not valid. Use letters, digits and _, starting with a letter.")
        elif key in keys:
            if form.dataset.get_evaluation_info(key).config.method == "proposals":
                form.warn(f"The existing evaluation '{key}' will be replaced.")
            else:
                form.problem(f"Evaluation key: '{key}' is an evaluation of another kind. Choose another key.")

    def run(self, form: Form, progress: Progress) -> Outcome:
        from ..evaluation.proposals import evaluate_proposals

        return _outcome(form.samples, evaluate_proposals(form.samples, **form.values, progress=progress))


def whole_numbers(text: str) -> list[int]:
    """The whole numbers in a line of text, ascending. Raises ValueError if it has none, or anything else."""
    parts = re.findall(r"[^\s,;]+", str(text))
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= MAX_PROPOSALS for part in parts):
        expected = f"whole numbers from 1 to {MAX_PROPOSALS:,} were expected, such as '10, 100, 1000'"
        raise ArgumentError(f"{expected}, not '{text}'.")
    return sorted({int(part) for part in parts})


def _outcome(samples: SampleCollection, results: ProposalResults) -> Outcome:
    config, recall = results.config, results.average_recall
    objects = recall.totals["all"]
    lines = [
        f"**AR@{config.ks[-1]} is {results.mAR():.3f}**" if objects else f"**No objects in {code(config.gt_field)}**",
        f"{code(config.pred_field)} against {count(objects, 'object')} of {code(config.gt_field)} in "
        f"{count(recall.images, 'image')}, comparing {'masks' if config.use_masks else 'boxes'}, ranked by "
        f"{config.rank_by}. Stored as evaluation {code(results.key)}.",
        results.report().rounded().replace("nan", "-").to_markdown(disable_numparse=True, stralign="right"),
        "AR@K: the share of objects that the K best-ranked proposals of their image find, averaged over IoU thresholds "
        "from 0.50 to 0.95.",
    ]
    metrics = {name: None if math.isnan(value) else value for name, value in results.metrics().items()}
    return Outcome(
        "\n\n".join(lines + skipped_text(results.skipped)),
        {"eval_key": results.key, "metrics": metrics, "images": recall.images, "skipped": results.skipped},
        panel=PANEL,
        buttons=samples_button(SKIPPED, skipped_samples(samples, config.gt_field, results.skipped)),
    )
