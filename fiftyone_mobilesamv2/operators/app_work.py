"""Runs an operator's work in the App: in its own thread, with a progress bar, a Cancel button and a final summary."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types
from pymongo.errors import OperationFailure, PyMongoError
from tqdm import tqdm

from ..errors import Cancelled, MobileSAMv2Error, message_of
from ..registration import PLUGIN
from .form import without_links

if TYPE_CHECKING:
    from fiftyone.operators.executor import ExecutionContext
    from fiftyone.operators.message import GeneratedMessage

logger = logging.getLogger(__name__)

_UNAUTHORIZED = 13  # MongoDB's error code for missing permissions
_MAX_MESSAGE = 2000  # characters; MongoDB's messages quote whole documents
REFRESH = 0.4  # seconds between updates of the progress bar in the App
# Label, URI of an operator, parameters of the operator. Operators of the plugin show their forms first.
Button = tuple[str, str, dict[str, Any]]


@dataclass
class Outcome:
    """The result of an operator.

    Attributes:
        text: a summary, as Markdown.
        result: the same as JSON, for programs.
        view: a view to open in the App.
        panel: a panel to open in the App.
        buttons: buttons to show below the summary.
    """

    text: str
    result: dict[str, Any]
    view: fo.DatasetView | None = None
    panel: str | None = None
    buttons: list[Button] = field(default_factory=list)


class Progress:
    """Progress that work reports and the App shows to the user, who may cancel the work."""

    def __init__(self, show: Callable[[float | None, str], None] = lambda share, label: None) -> None:
        self._show = show
        self.share: float | None = None
        self.label = "Starting"
        self.cancelled = threading.Event()

    def tell(self, share: float | None, label: str) -> None:
        """Reports that `share` (from 0 to 1; None if unknown) is done. Raises Cancelled if the user has cancelled."""
        self.share, self.label = share, label
        self._show(share, label)
        if self.cancelled.is_set():
            raise Cancelled

    def __call__(self, bar: fo.ProgressBar) -> None:
        """Reports the state of a progress bar: an instance can be passed as FiftyOne's `progress`."""
        total = bar.total or 0
        self.tell(bar.iteration / total if total else None, f"{bar.iteration:,} of {total:,} images")


class CancelWork(foo.Operator):
    """The operator that the Cancel button runs."""

    identifier = "cancel"

    @property
    def config(self) -> foo.OperatorConfig:
        return foo.OperatorConfig(name=self.identifier, label="MobileSAMv2: cancel", unlisted=True, risk_level="low")

    def execute(self, ctx: ExecutionContext) -> dict[str, bool]:
        work = running.get(str(ctx.params.get("work")))
        if work is not None:
            work.progress.cancelled.set()
        return {"cancelled": work is not None}


class Work:
    """An operator's work, which runs in its own thread while the App shows its progress."""

    def __init__(self, run: Callable[[Progress], Outcome]) -> None:
        self.id = uuid.uuid4().hex
        self.progress = Progress()
        self.finished = threading.Event()
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self._run = run

    def start(self) -> None:
        context = contextvars.copy_context()  # FiftyOne keeps the user of the request in it
        threading.Thread(target=context.run, args=(self._work,), name=f"mobilesamv2-{self.id}", daemon=True).start()

    def _work(self) -> None:
        try:
            while not _one_at_a_time.acquire(timeout=REFRESH):
                self.progress.tell(None, "Waiting for another operation to finish")
            try:
                self.outcome = self._run(self.progress)
            finally:
                _one_at_a_time.release()
        except BaseException as error:  # shown to the user by the waiting thread
            self.error = error
        finally:
            self.finished.set()


running: dict[str, Work] = {}
# Two models at a time would compete for cores and memory. Besides, FiftyOne's progress bars of two threads share one
# capture of the printed output, which the first bar to finish closes.
_one_at_a_time = threading.Lock()


def show_progress(ctx: ExecutionContext, work: Work) -> GeneratedMessage:
    outputs, progress = types.Object(), work.progress
    stopping = progress.cancelled.is_set()
    label = "Stopping after the current images ..." if stopping else progress.label
    outputs.float("share", view=types.ProgressView(label=label))
    if not stopping:
        cancel = f"{PLUGIN}/{CancelWork.identifier}"
        outputs.btn("cancel", label="Cancel", on_click=cancel, params={"work": work.id}, variant="outlined")
        # FiftyOne adds a "Done" button below, which closes the dialog until the next update.
        outputs.str("text", view=types.MarkdownView())
    text = "Keep this dialog open: closing the tab stops the work."
    return ctx.ops.show_output(types.Property(outputs).to_json(), {"share": progress.share, "text": text})


def show_outcome(ctx: ExecutionContext, title: str, work: Work, if_cancelled: str) -> Iterator[GeneratedMessage]:
    outcome, error = work.outcome, work.error
    was_open = ctx.current_sample is not None
    if was_open:
        yield ctx.ops.close_sample()
        yield ctx.ops.reload_samples()
    yield ctx.ops.reload_dataset()
    outputs, text = types.Object(), None
    if outcome is not None:
        if outcome.view is not None:
            yield ctx.ops.clear_selected_samples()
            yield ctx.ops.set_view(outcome.view)
        if outcome.panel is not None:
            if (panel_id := _panel_id(ctx.spaces, outcome.panel)) is None:
                yield ctx.ops.open_panel(outcome.panel, layout="horizontal")
            else:  # an open panel doesn't know of the new result
                load = f"{PLUGIN}/{outcome.panel}#on_load"
                yield ctx.trigger(load, {"panel_id": panel_id, "panel_state": {}})
        outputs.str("text", view=types.MarkdownView())
        text = outcome.text
        if was_open:  # the App keeps showing the labels that it has loaded for it
            text += "\n\nThe grid shows the new labels. To see them in an open sample, reload the page."
        for number, (label, operator, params) in enumerate(outcome.buttons):
            prompt = operator.startswith(PLUGIN)
            outputs.btn(f"button_{number}", label, on_click=operator, prompt=prompt, params=params, variant="outlined")
    elif isinstance(error, Cancelled):
        outputs.str("text", view=types.MarkdownView())
        text = f"**{title}** was cancelled. {if_cancelled}"
    elif error is not None:
        if not _explains_itself(error):
            logger.error("%s failed", title, exc_info=error)
        outputs.view("error", types.Error(label=f"{title} failed", description=without_links(_error_text(error))))
    yield ctx.ops.show_output(types.Property(outputs).to_json(), {"text": text})


def _explains_itself(error: BaseException) -> bool:
    """Whether the message says what is wrong and what to do. Other errors are bugs, logged with their traceback."""
    return isinstance(error, (ValueError, OSError, PyMongoError, MobileSAMv2Error))


def _error_text(error: BaseException) -> str:
    if isinstance(error, OperationFailure) and error.code == _UNAUTHORIZED:
        return f"This database user has read-only access: {str(error).split('{')[0].strip()}. Ask its administrator."
    return message_of(error)[:_MAX_MESSAGE]


def _panel_id(space: fo.Space | None, name: str) -> str | None:
    """The id of the open panel with this name; None if it is not open."""
    for child in space.children if space is not None else ():
        panel_id = _panel_id(child, name) if isinstance(child, fo.Space) else child.component_id
        if panel_id is not None and (isinstance(child, fo.Space) or child.type == name):
            return panel_id
    return None


def throttled(show: Callable[[float | None, str], None]) -> Callable[[float | None, str], None]:
    """`show`, called at most once a second, and always at the end."""
    last = 0.0

    def throttled(share: float | None, label: str) -> None:
        nonlocal last
        if share == 1 or time.monotonic() - last >= 1:
            last = time.monotonic()
            show(share, label)

    return throttled


def advance(bar: tqdm[Any], share: float | None, label: str) -> None:
    bar.set_description(label, refresh=False)
    bar.update((share or 0) - bar.n)
