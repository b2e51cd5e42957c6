"""The base of the operators: a form that shows problems, work with progress and a Cancel button, a final summary."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types
from tqdm import tqdm

from ..errors import ArgumentError
from .app_work import REFRESH, Outcome, Progress, Work, advance, running, show_outcome, show_progress, throttled
from .form import Form

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection
    from fiftyone.operators.executor import ExecutionContext, ExecutionResult
    from fiftyone.operators.message import GeneratedMessage

logger = logging.getLogger(__name__)
T = TypeVar("T")
MANY_IMAGES = 500  # above this, the App suggests scheduling
_PACKAGE = Path(__file__).resolve().parents[1]
# The plugin's folder is the package in a wheel, and the folder around it in a checkout.
_ICONS = "/icons" if (_PACKAGE / "fiftyone.yml").exists() else f"/{_PACKAGE.name}/icons"


class Operator(foo.Operator):
    """A form and a call into the layers below. Subclasses define the attributes, :meth:`form` and :meth:`run`.

    Attributes:
        identifier: the last part of the URI.
        title: its name in the App.
        description: what it is for.
        icon: the name of its icon.
        risk: FiftyOne's risk level; assistants ask before they run an operator with a high risk.
        if_cancelled: what the App says after the user has cancelled it.
    """

    identifier: str
    title: str
    description: str
    icon: str
    risk = "medium"
    if_cancelled = "Everything stored so far is kept."

    def form(self, form: Form) -> None:
        """Adds the inputs. Raises ArgumentError if the remaining inputs would make no sense."""
        raise NotImplementedError

    def run(self, form: Form, progress: Progress) -> Outcome:
        """Does the work."""
        raise NotImplementedError

    @property
    def config(self) -> foo.OperatorConfig:
        return foo.OperatorConfig(
            name=self.identifier,
            label=self.title,
            description=self.description,
            dynamic=True,
            execute_as_generator=True,
            allow_delegated_execution=True,
            icon=f"{_ICONS}/{self.icon}-dark.svg",
            light_icon=f"{_ICONS}/{self.icon}-light.svg",
            dark_icon=f"{_ICONS}/{self.icon}-dark.svg",
            risk_level=self.risk,
        )

    def __call__(
        self,
        samples: SampleCollection | None = None,
        delegate: bool = False,
        selected: Sequence[str] = (),
        selected_labels: Sequence[Mapping[str, Any]] = (),
        **params: object,
    ) -> ExecutionResult:
        """Runs the operator on a dataset or view from Python. The summary is in the `result` of the returned object.

        Args:
            delegate: whether to schedule it for a `fiftyone delegated launch` worker instead.
            selected: ids of samples to treat as selected in the App.
            selected_labels: labels to treat as selected, in the format of `session.selected_labels`.
            params: values of the form's inputs; the others have their defaults.
        """
        ctx = {"view" if isinstance(samples, fo.DatasetView) else "dataset": samples}
        ctx |= {"selected": list(selected), "selected_labels": list(selected_labels)}
        return foo.execute_operator(self.uri, ctx, params=params, request_delegation=delegate)

    def resolve_input(self, ctx: ExecutionContext) -> types.Property:
        return types.Property(self._filled(ctx).inputs, view=types.View(label=self.title))

    def resolve_execution_options(self, ctx: ExecutionContext) -> foo.ExecutionOptions:
        form, many = Form(ctx), False
        with suppress(ArgumentError):  # the form itself shows the error
            if ctx.dataset is not None:
                form.target(self.title)
                many = form.size > MANY_IMAGES
        # Without this setting, workers don't take scheduled work, and the App can't schedule.
        can_schedule = fo.config.allow_legacy_orchestrators
        return foo.ExecutionOptions(
            allow_immediate_execution=True,
            allow_delegated_execution=True,
            default_choice_to_delegated=bool(many and can_schedule),
        )

    def execute(self, ctx: ExecutionContext) -> dict[str, Any] | Iterator[GeneratedMessage]:
        form = self._filled(ctx)
        if form.problems:
            raise ArgumentError(" ".join(form.problems))
        if ctx.delegated:
            return self.run(form, Progress(throttled(ctx.set_progress))).result
        if "spaces" not in ctx.request_params:  # the open panels, which only the App sends
            with tqdm(total=1, bar_format="{l_bar}{bar}| {elapsed}") as bar:
                return self.run(form, Progress(throttled(lambda share, label: advance(bar, share, label)))).result
        return self._run_in_app(ctx, form)

    def _filled(self, ctx: ExecutionContext) -> Form:
        form = Form(ctx)
        with form.checks():
            self.form(form)
        return form

    def _run_in_app(self, ctx: ExecutionContext, form: Form) -> Iterator[GeneratedMessage]:
        work = Work(lambda progress: self.run(form, progress))
        running[work.id] = work
        try:
            work.start()
            while not work.finished.wait(REFRESH):
                yield show_progress(ctx, work)
            yield from show_outcome(ctx, self.title, work, self.if_cancelled)
        finally:  # also if the tab was closed and nobody consumes the messages any more
            work.progress.cancelled.set()
            del running[work.id]
