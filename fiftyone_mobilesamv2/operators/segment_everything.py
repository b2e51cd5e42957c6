"""Segment every object of every image."""

from __future__ import annotations

import uuid
from dataclasses import asdict

import fiftyone as fo
from fiftyone.operators import types
from fiftyone.operators.delegated import DelegatedOperationService
from fiftyone.operators.executor import ExecutionContext

from ..fiftyone_internals import FRAMES_PREFIX
from ..runs.shards import MAX_SHARDS, Shard
from .app_work import Outcome, Progress
from .choices import (
    FAILED,
    SHOW_SAMPLES,
    advanced_parameters,
    detections_fields,
    fetch_with_progress,
    model_choice,
    model_config,
    runtime_choices,
    scheduling_note,
    segmentation_outcome,
    storage_choice,
)
from .form import Form, cached, count
from .operator import MANY_IMAGES, Operator

# Parameters whose inputs differ from the declaration in default, choices or position.
_OWN_INPUTS = ("prompting", "confidence_thresh", "masks_on_disk", "device", "dtype")
EXISTING = {
    "keep": "Skip samples that already have masks",
    "replace": "Replace existing masks",
}


class SegmentEverything(Operator):
    identifier = "segment_everything"
    title = "Segment everything"
    description = "Find every object in every image and store its mask"
    icon = "segment"
    risk = "medium"

    def resolve_placement(self, ctx: ExecutionContext) -> types.Placement:
        icon = self.config
        return types.Placement(
            types.Places.SAMPLES_GRID_SECONDARY_ACTIONS,
            types.Button(
                label=self.title, prompt=True, icon=icon.icon, lightIcon=icon.light_icon, darkIcon=icon.dark_icon
            ),
        )

    def form(self, form: Form) -> None:
        from ..modeling.defaults import CONFIDENCE
        from ..runs.plan import check_same_parameters, parameters_of
        from ..zoo.config import PARAMETERS

        form.target("Segment")
        with form.checks():
            self._label_field(form)
        model_choice(form)
        prompting = form.parameter(PARAMETERS["prompting"])
        for parameter in PARAMETERS.values():
            applies = parameter.applies_to in (None, prompting) and parameter.is_in_forms
            if applies and not parameter.is_advanced and parameter.name not in _OWN_INPUTS:
                form.parameter(parameter)
        if prompting == "object_aware":
            form.parameter(PARAMETERS["confidence_thresh"], default=CONFIDENCE)
        elif not form.problems:
            prompts = form.values["points_per_side"] ** 2
            form.note(f"{prompts:,} prompts per image, with three masks each, most of which are discarded.")
        storage_choice(form)
        form.number("batch_size", 1, "Batch size", "Images per batch; progress updates after each", min=1, whole=True)
        runtime_choices(form)
        form.number(
            "num_shards",
            1,
            "Jobs",
            "Split into N scheduled jobs, run by 'fiftyone delegated launch' workers",
            min=1,
            max=MAX_SHARDS,
            whole=True,
        )
        advanced_parameters(form, prompting)
        _shard(form)
        if not form.problems and form.values.get("existing") == "keep":
            with form.checks():
                check_same_parameters(form.samples, form.values["label_field"], parameters_of(model_config(form)))
        if form.size > MANY_IMAGES:
            scheduling_note(form, f"{form.size:,} images take")

    def _label_field(self, form: Form) -> None:
        from ..labels.fields import check_label_field
        from ..runs.plan import count_labels
        from ..runs.record import failed_samples

        samples = form.samples
        prefix = FRAMES_PREFIX if samples.media_type == "video" else ""
        known = detections_fields(samples, prefix)
        name = form.new_field(
            "label_field",
            f"{prefix}segmentations",
            "Label field",
            "New field, or an existing field of detections",
            known,
        )
        check_label_field(samples, name)
        done, objects = cached(count_labels, samples, name)
        if failed := failed_samples(samples, name).values("id"):
            form.note(
                f"The last run into '{name}' failed for {count(len(failed), 'sample')}. To retry only these, show them "
                f"and open this form again for the current view."
            )
            form.inputs.btn(
                "show_failed", FAILED, on_click=SHOW_SAMPLES, params={"samples": failed}, variant="outlined"
            )
        if not done:
            return
        existing = form.choice("existing", EXISTING, "keep", f"'{name}' exists", radio=True)
        left = form.size - done
        if "shard" in form.ctx.params:  # the form that scheduled this shard has already shown what is left
            return
        if existing == "replace":
            form.warn(f"{count(objects, 'label')} of {count(done, 'sample')} in '{name}' will be deleted and replaced.")
        elif left:
            form.note(f"{done:,} of {form.size:,} samples are already done; {count(left, 'sample')} to do.")
        else:
            form.problem(f"All {done:,} samples are already done. Replace existing masks, or choose another field.")

    def run(self, form: Form, progress: Progress) -> Outcome:
        from .. import zoo
        from ..runs.segment import segment_everything

        values, shard = form.values, _shard(form)
        if values["num_shards"] > 1 and shard is None:
            return self._schedule_shards(form)
        fetch_with_progress(values["model"], progress)
        progress.tell(None, f"Loading {values['model']}")
        model = zoo.MobileSAMv2Model(model_config(form))

        def report(bar: fo.ProgressBar) -> None:
            done = f"{bar.iteration:,} of {bar.total:,} images, {model.num_labels:,} objects"
            progress.tell(bar.iteration / bar.total, done)

        run = segment_everything(
            form.samples,
            model,
            values["label_field"],
            replace=values.get("existing") == "replace",
            batch_size=values["batch_size"],
            progress=report,
            shard=shard,
        )
        return segmentation_outcome(run, values.get("existing") == "replace")

    def _schedule_shards(self, form: Form) -> Outcome:
        from ..runs.plan import prepare

        values, group = form.values, uuid.uuid4().hex
        prepare(form.samples, values["label_field"], model_config(form), values.get("existing") == "replace")
        service, ids = DelegatedOperationService(), []
        for index in range(values["num_shards"]):
            shard = Shard(index, values["num_shards"], group)
            request = {**form.ctx.request_params, "delegated": True}
            request["params"] = {**form.ctx.params, "shard": asdict(shard)}
            context = ExecutionContext(request, operator_uri=self.uri)
            operation = service.queue_operation(self.uri, f"{self.title}, {shard}", context=context.serialize())
            ids.append(str(operation.id))
        text = (
            f"**Scheduled as {count(len(ids), 'operation')}**, for any number of `fiftyone delegated launch -t local` "
            f"workers on this database. `fiftyone delegated list` shows them; `fiftyone delegated rerun <id>` repeats "
            f"one whose worker died: it does only what is missing."
        )
        return Outcome(text, {"label_field": values["label_field"], "operations": ids})


def _shard(form: Form) -> Shard | None:
    """The shard of an operation that does one of several; scheduling sets it, the form doesn't ask for it."""
    given = form.ctx.params.get("shard")
    if given is None:
        return None
    try:
        return Shard(**given)
    except (TypeError, ValueError) as error:
        form.problem(f"shard: index, count and group of a shard were expected, not {given!r} ({error}).")
        return None
