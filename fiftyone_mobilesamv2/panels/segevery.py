"""The SegEvery panel: the objects that segmentation found, their share of the ground truth, and the time it took."""

from __future__ import annotations

import html
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types
from fiftyone.operators.categories import Categories

from ..errors import message_of
from ..evaluation import figures
from ..fiftyone_internals import is_frame_field, is_generated
from ..labels.fields import label_fields
from ..operators.form import cell, code
from ..registration import PLUGIN
from .queries import (
    evaluations,
    fresh_results,
    missed_of_group,
    object_counts,
    results_of,
    sources,
    trained_on,
    with_objects,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fiftyone.core.collections import SampleCollection
    from fiftyone.operators.executor import ExecutionContext

    from ..evaluation.proposal_results import ProposalResults

logger = logging.getLogger(__name__)

HELP = (
    "How many ground truth objects the masks find (AR@K), how many masks the images have, how long segmentation took, "
    "and the models trained on this dataset. Click a point or a bar to see the objects or images behind it."
)
OPERATORS = {
    "segment_everything": "Segment everything",
    "evaluate_proposals": "Measure proposals (AR@K)",
    "find_unlabeled_objects": "Find unlabeled objects",
    "compare_prompting": "Compare prompting",
    "promote_to_labels": "Promote to labels",
    "train_on_labels": "Train on my labels",
}
# Events that change what the App shows outside the panel, but nothing in it.
_ELSEWHERE = {
    "show_missed_by_k",
    "show_missed_by_iou",
    "show_missed_by_group",
    "show_images",
    "show_everything",
    "open_form",
}
_CONFIG = {"displayModeBar": False, "scrollZoom": False}  # otherwise scrolling the panel would zoom the plot
# Widths of the items of a wrapping row: as needed, or all available space; minWidth=0 lets an item shrink.
_NARROW = {"item": {"sx": {"width": "auto"}}}
_PLOT = {"item": {"sx": {"width": "auto", "minWidth": 0, "flex": "1 1 24rem"}}}
_SHRINKS = {"item": {"sx": {"minWidth": 0}}}


class SegEvery(foo.Panel):
    """Plots of the dataset's evaluations of proposals or, without evaluations, of its segmented fields; its models."""

    @property
    def config(self) -> foo.PanelConfig:
        return foo.PanelConfig(
            name="segevery",
            label="SegEvery",
            help_markdown=HELP,
            category=Categories.ANALYZE,
            icon="show_chart",  # the App only supports icon files for its own panels
        )

    def execute(self, ctx: ExecutionContext) -> object:
        name = ctx.params.get("__method__")
        try:
            if name in _ELSEWHERE:
                return getattr(self, name)(ctx)
            return super().execute(ctx)
        except Exception as error:  # a failing event would make the whole panel unusable
            logger.error("%s of SegEvery failed", name, exc_info=error)
            ctx.ops.notify(message_of(error), variant="error")
            ctx.ops.show_panel_output(self.render(ctx))
            return None

    # Events ---------------------------------------------------------------------------------------------------------

    def on_load(self, ctx: ExecutionContext) -> None:
        ctx.panel.state.model = None  # the latest
        ctx.panel.state.runs = [] if ctx.dataset is None else evaluations(ctx.dataset)[:1]

    def on_change_dataset(self, ctx: ExecutionContext) -> None:
        self.on_load(ctx)

    def choose(self, ctx: ExecutionContext) -> None:
        ctx.panel.state.runs = ctx.params["value"] or []

    def choose_model(self, ctx: ExecutionContext) -> None:
        ctx.panel.state.model = ctx.params["value"]

    def refresh(self, ctx: ExecutionContext) -> None:
        """Redraws the panel: evaluations may have been added or deleted elsewhere."""

    def open_form(self, ctx: ExecutionContext) -> None:
        values = {"model": ctx.params["model"]} if "model" in ctx.params else {}
        ctx.prompt(f"{PLUGIN}/{ctx.params['operator']}", params=values, on_success=self.on_load)

    def show_everything(self, ctx: ExecutionContext) -> None:
        ctx.ops.clear_view()

    def show_missed_by_k(self, ctx: ExecutionContext) -> None:
        results = _clicked(ctx)
        _show_objects(ctx, results, results.missed(k=int(ctx.params["x"])))

    def show_missed_by_iou(self, ctx: ExecutionContext) -> None:
        results = _clicked(ctx)
        _show_objects(ctx, results, results.missed(iou=float(ctx.params["x"])))

    def show_missed_by_group(self, ctx: ExecutionContext) -> None:
        results = _clicked(ctx)
        _show_objects(ctx, results, missed_of_group(results, ctx.params["id"]))

    def show_images(self, ctx: ExecutionContext) -> None:
        samples, name = _sources(ctx)[html.unescape(ctx.params["trace"])]
        min_objects, max_objects = map(int, ctx.params["id"].split("-"))
        _show(ctx, with_objects(samples, name, min_objects, max_objects))

    # Contents -------------------------------------------------------------------------------------------------------

    def render(self, ctx: ExecutionContext) -> types.Property:
        panel = types.Object()
        if ctx.dataset is None:
            panel.md("Open a dataset first.", name="text")
        else:
            for name in ("head", "recall", "objects", "time", "training"):
                try:
                    getattr(self, f"_add_{name}")(panel, ctx)
                except Exception as error:  # still show the rest of the panel
                    logger.error("'%s' of SegEvery failed", name, exc_info=error)
                    message = types.Error(label="Part of the panel can't be shown", description=message_of(error))
                    panel.view(f"{name}_error", message)
        return types.Property(panel, view=types.GridView(orientation="2d", gap=2, pad=1))

    def _add_head(self, panel: types.Object, ctx: ExecutionContext) -> None:
        keys = evaluations(ctx.dataset)
        if keys:
            choices = types.DropdownView(multiple=True, label="Evaluations", compact=True)
            for key in keys:
                choices.add_choice(key, label=key)
            panel.list("runs", types.String(), view=choices, default=_chosen(ctx), on_change=self.choose)
            best = None
        else:
            text, best = _next_step(ctx.dataset)
            panel.md(text, name="text")
        buttons = panel.grid("buttons", orientation="2d", gap=1)
        style = {"variant": "outlined", "componentsProps": _NARROW}
        for name, label in OPERATORS.items():
            emphasis = {"variant": "contained"} if name == best else {}
            buttons.btn(name, label, on_click=self.open_form, params={"operator": name}, **style | emphasis)
        buttons.btn("everything", "Show everything", on_click=self.show_everything, **style)
        buttons.btn("refresh", "Refresh", on_click=self.refresh, **style)

    def _add_recall(self, panel: types.Object, ctx: ExecutionContext) -> None:
        results = {key: results_of(ctx.dataset, key) for key in _chosen(ctx)}
        runs = {key: each.average_recall for key, each in results.items()}
        if not runs:
            return
        _add_table(panel, results)
        lines = [figures.Line(*run) for run in runs.items()]
        _add_plot(
            panel,
            "by_k",
            "AR by number of masks K",
            "Click a point to see the objects that the K best masks of their image miss at IoU 0.5",
            figures.recall_by_k(lines),
            self.show_missed_by_k,
        )
        _add_plot(
            panel,
            "by_iou",
            "Recall by IoU",
            "Click a point to see the objects that no mask finds at that IoU",
            figures.recall_by_iou(lines),
            self.show_missed_by_iou,
        )
        _add_plot(
            panel,
            "by_group",
            "AR by size and frequency" if any("rare" in each.totals for each in runs.values()) else "AR by size",
            "Click a bar to see the objects of that group that no mask finds at IoU 0.5",
            figures.recall_by_group(runs),
            self.show_missed_by_group,
        )

    def _add_objects(self, panel: types.Object, ctx: ExecutionContext) -> None:
        counts = {name: object_counts(*source) for name, source in _sources(ctx).items()}
        if any(counts.values()):
            _add_plot(
                panel,
                "counts",
                "Masks per image",
                "Click a bar to see these images",
                figures.objects_per_image(counts),
                self.show_images,
            )

    def _add_time(self, panel: types.Object, ctx: ExecutionContext) -> None:
        from ..runs.record import recorded_runs

        runs, unknown = {}, []
        for samples, name in _sources(ctx).values():
            recorded = [run for run in recorded_runs(samples, name) if run.images]
            if recorded:
                runs[name] = recorded[-1]
            else:
                unknown.append(code(name))
        if runs:
            figure = figures.time_per_stage(runs)
            _add_plot(panel, "stages", "Time of the last run, by stage", "Milliseconds per image", figure, None)
        if unknown:
            names = ", ".join(dict.fromkeys(unknown))
            panel.md(f"The time for {names} is unknown: only Segment everything records it.", name="unknown")

    def _add_training(self, panel: types.Object, ctx: ExecutionContext) -> None:
        from ..modeling.checkpoints.trained_files import PARTS
        from ..training.card import measures_table
        from ..training.figures import learning_curve

        models = trained_on(ctx.dataset)
        if not models:
            return
        chosen = models.get(ctx.panel.state.model) or next(iter(models.values()))
        training = chosen.training
        text = f"{code(chosen.name)}: {PARTS[chosen.part]} of {code(chosen.base)}, trained on {code(training['field'])}"
        stack = _add_stack(panel, "training", "Trained models", text)
        if len(models) > 1:
            choices = types.DropdownView(label="Model", compact=True)
            for name in models:
                choices.add_choice(name, label=name)
            stack.enum("model", list(models), view=choices, default=chosen.name, on_change=self.choose_model)
        _draw(stack, learning_curve(training["curve"], chosen.part), None)
        stack.md(measures_table(training["before"], training["after"]), name="measures")
        given = {"operator": "segment_everything", "model": chosen.name}
        stack.btn("use", "Segment everything with it", on_click=self.open_form, params=given, variant="outlined")


def _add_plot(
    panel: types.Object,
    name: str,
    title: str,
    caption: str,
    figure: figures.Figure,
    on_click: Callable[[ExecutionContext], None] | None,
) -> None:
    _draw(_add_stack(panel, name, title, caption), figure, on_click)


def _add_stack(panel: types.Object, name: str, title: str, caption: str) -> types.Object:
    """A part of the panel with a title, whose contents are below each other."""
    stack = panel.v_stack(name, gap=0, columns=1, componentsProps=_PLOT)
    stack.md(f"**{title}**  \n{caption}", name="title")
    return stack


def _draw(stack: types.Object, figure: figures.Figure, on_click: Callable[[ExecutionContext], None] | None) -> None:
    data, layout = figure
    stack.plot(
        "plot",
        data=data,
        layout=layout,
        config=_CONFIG,
        on_click=on_click,
        height=f"{layout['height']}px",
        componentsProps=_SHRINKS,
    )


def _add_table(panel: types.Object, results: Mapping[str, ProposalResults]) -> None:
    from ..evaluation.proposal_results import comparison_table

    table = comparison_table(results)
    names = [name for name in map(str, table) if name.startswith("AR@")]
    table = table[[*sorted(names, key=lambda name: int(name[3:])), "AR"]].map("{:.3f}".format).replace("nan", "-")
    text = table.rename(cell).rename_axis("Evaluation").to_markdown(disable_numparse=True, stralign="right")
    panel.md(text, name="table")


def _next_step(dataset: fo.Dataset) -> tuple[str, str]:
    """The next step if there are no evaluations: a text, and the name of the operator."""
    from ..labels.fields import SHAPE_TYPES
    from ..runs.record import segmented_fields

    segmented = segmented_fields(dataset)
    others = [name for name in label_fields(dataset, SHAPE_TYPES) if name not in segmented]
    if not segmented:
        return (
            "No field has been segmented yet. Start by creating a mask for every object in every image.",
            "segment_everything",
        )
    names = ", ".join(code(name) for name in segmented)
    if others:
        return f"Evaluate {names} to see how many labeled objects the masks find.", "evaluate_proposals"
    return f"{names} can't be evaluated: this dataset has no labels to compare the masks with.", ""


def _chosen(ctx: ExecutionContext) -> list[str]:
    """The keys of the selected evaluations that still exist, or of the latest one."""
    keys = evaluations(ctx.dataset)
    return [key for key in ctx.panel.state.runs or [] if key in keys] or keys[:1]


def _sources(ctx: ExecutionContext) -> dict[str, tuple[SampleCollection, str]]:
    """The samples and mask field of each displayed evaluation or, without evaluations, of each segmented field."""
    return sources(ctx.dataset, _chosen(ctx))


# Clicks -------------------------------------------------------------------------------------------------------------


def _clicked(ctx: ExecutionContext) -> ProposalResults:
    """The evaluation of the clicked point."""
    return fresh_results(ctx.dataset, html.unescape(ctx.params["trace"]))


def _show_objects(ctx: ExecutionContext, results: ProposalResults, view: fo.DatasetView) -> None:
    """Shows the objects of a view, as patches if FiftyOne supports that."""
    field_name = results.gt_field
    if len(view) and not is_generated(view) and not is_frame_field(view, field_name):
        view = view.to_patches(field_name)
    _show(ctx, view)


def _show(ctx: ExecutionContext, view: fo.DatasetView) -> None:
    if len(view):
        ctx.ops.set_view(view)
    else:
        ctx.ops.notify("Nothing to show.")
