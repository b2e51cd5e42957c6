"""What the operators share: forms that say what is wrong, work with a bar and a Cancel button, a summary at the end."""

from __future__ import annotations

import contextvars
import hashlib
import logging
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import fiftyone as fo
import fiftyone.operators as foo
from bson import ObjectId
from fiftyone.operators import types
from fiftyone.operators.constants import ViewTarget
from pymongo.errors import OperationFailure, PyMongoError
from tqdm import tqdm

from ..errors import MobileSAMv2Error
from ..progress import Cancelled
from ..registration import PLUGIN
from ..stored_labels import label_fields

if TYPE_CHECKING:
    from fiftyone.operators.executor import ExecutionContext, ExecutionResult
    from fiftyone.operators.message import GeneratedMessage

    Samples = fo.core.collections.SampleCollection

logger = logging.getLogger(__name__)

T = TypeVar("T")

MANY_IMAGES = 500  # from which on work is better scheduled than watched

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel's plugin is the package, a checkout's the folder around it.
_ICONS = "/icons" if (_PACKAGE / "fiftyone.yml").exists() else f"/{_PACKAGE.name}/icons"

_UNAUTHORIZED = 13  # MongoDB's code for it
_MOST_TOLD = 2000  # characters of a message: MongoDB quotes whole documents
_LONGEST_TEXT = 4096  # as the longest path on Linux
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_REFRESH = 0.4  # seconds between two states of the bar in the App


class Form:
    """An operator's form as the user has filled it in: each method adds an input and returns its value.

    Attributes:
        ctx: FiftyOne's context.
        values: of all inputs by name, defaults where nothing was given.
        samples: those to work on, once :meth:`target` was called.
        problems: what has to be mended before the operator can run.
    """

    def __init__(self, ctx: ExecutionContext) -> None:
        self.ctx = ctx
        self.inputs = types.Object()
        self.values: dict[str, object] = {}
        self.samples: Samples | None = None
        self.problems: list[str] = []

    @property
    def dataset(self) -> fo.Dataset:
        return self.ctx.dataset

    @property
    def size(self) -> int:
        """How many samples there are to work on."""
        return cached(len, self.samples)

    def target(self, action: str) -> Samples:
        """Which samples: the dataset, the view or the selected ones. `action` is what is done to them, as a verb."""
        if self.ctx.dataset is None:
            raise FormError("Open a dataset first.")
        if not all(map(ObjectId.is_valid, self.ctx.selected)):
            raise FormError("The selected samples are gone. Select others.")
        target = self.ctx.request_params.get("view_target")  # FiftyOne moves it there
        if target and target not in ViewTarget.values():  # which FiftyOne would take for the whole dataset
            raise FormError(f"Target: {_shortened(target)} is none. Choose one of {', '.join(ViewTarget.values())}.")
        if self.ctx.view._is_generated:  # patches, clips or frames, which the App shows in place of the samples
            self.note("The whole dataset is worked on, not what this view has made of it.")
            self.samples = self.dataset
        else:  # of groups, the slice that the App shows
            self.inputs.view_target(self.ctx, action_description=action, require_flat=True)
            self.samples = self.ctx.target_view(require_flat=True)
        if not self.size:
            empty = "This dataset has" if not len(self.ctx.dataset) else "The current view has"
            raise FormError(f"{empty} no samples. There is nothing to {action[0].lower() + action[1:]}.")
        return self.samples

    def number(
        self,
        name: str,
        default: float | None,
        label: str,
        description: str | None = None,
        least: float | None = None,
        most: float | None = None,
        whole: bool = False,
    ) -> float | None:
        """A number; whole ones may be required. Empty, it is the default."""
        add = self.inputs.int if whole else self.inputs.float
        # Limits are checked here, not by FiftyOne, which would not say what is expected.
        found = add(name, label=label, description=description, default=default)
        value = self._value(name, default)
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.maxsize
        expected = "a whole number" if whole else "a number"
        if least is not None and most is not None:
            expected += f" from {least:g} to {most:g}"
        elif least is not None:
            expected += f" of at least {least:g}"
        if (
            not number
            or (whole and value != int(value))
            or (least is not None and value < least)
            or (most is not None and value > most)
        ):
            self._invalid(found, f"{label}: {expected} was expected, not {_shortened(value)}.")
        elif whole:
            value = self.values[name] = int(value)
        return value

    def switch(self, name: str, default: bool, label: str, description: str | None = None) -> bool:
        """Yes or no."""
        self.inputs.bool(name, label=label, description=description, default=default, view=types.SwitchView())
        return bool(self._value(name, default))

    def text(self, name: str, default: str | None, label: str, description: str | None = None) -> str | None:
        """A line of text."""
        found = self.inputs.str(name, label=label, description=description, default=default)
        return self.text_of(found, name, default, label)

    def choice(
        self,
        name: str,
        choices: Mapping[str, str],
        default: str | None,
        label: str,
        description: str | None = None,
        radio: bool = False,
    ) -> str | None:
        """One of `choices`: values and what the user reads."""
        view = types.RadioGroup() if radio else types.DropdownView()
        for value, text in choices.items():
            view.add_choice(value, label=text)
        found = self.inputs.enum(name, list(choices), label=label, description=description, default=default, view=view)
        value = self.text_of(found, name, default, label)
        if value not in choices and not found.invalid:
            self._invalid(found, f"{label}: {value!r} isn't there (any more). Choose one of {', '.join(choices)}.")
        return value

    def label_field(
        self,
        name: str,
        kinds: tuple[type, ...],
        label: str,
        description: str | None = None,
        default: str | None = None,
        without: str | None = None,
    ) -> str:
        """One of the fields that hold labels of these kinds, but not the field `without`.

        Raises:
            FormError: there is none.
        """
        found = label_fields(self.samples, kinds)
        found = [each for each in found if each != without]
        if not found:
            names = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
            other = f" beside '{without}'" if without else ""
            raise FormError(f"{label}: {self.dataset.name} has no field of {names}{other}.")
        return self.choice(
            name, {each: each for each in found}, default if default in found else found[0], label, description
        )

    def new_field(self, name: str, default: str, label: str, description: str, known: Sequence[str] = ()) -> str:
        """The name of a field, which need not exist; `known` are suggested."""
        view = types.AutocompleteView(allow_clearing=False)
        for each in dict.fromkeys([default, *known]):
            view.add_choice(each, label=each)
        found = self.inputs.str(name, label=label, description=description, default=default, view=view)
        return self.text_of(found, name, default, label)

    def note(self, text: str) -> None:
        """Something good to know."""
        self._message("note", types.Notice(label=text))

    def warn(self, text: str) -> None:
        """Something to think about before running."""
        self._message("warning", types.Warning(label=text))

    def problem(self, text: str) -> None:
        """Something that has to be mended first."""
        self._invalid(self._message("problem", types.Error(label=text)), text)

    def _message(self, kind: str, view: types.View) -> types.Property:
        number = sum(name.startswith(f"{kind}_") for name in self.inputs.properties)
        return self.inputs.view(f"{kind}_{number + 1}", view)  # the App shows the name where it can't execute

    def text_of(self, found: types.Property, name: str, default: str | None, label: str) -> str | None:
        """The text that was given for the input `found`."""
        value = self._value(name, default)
        if value is None:
            return None
        if not isinstance(value, str):
            self._invalid(found, f"{label}: text was expected, not {_shortened(value)}.")
        elif len(value) > _LONGEST_TEXT:
            self._invalid(found, f"{label}: at most {_LONGEST_TEXT:,} characters were expected, not {len(value):,}.")
        elif _CONTROLS.search(value):
            self._invalid(found, f"{label}: text on one line was expected, not {_shortened(value)}.")
        else:
            return value
        self.values[name] = default  # for the rest of the form
        return default

    def _value(self, name: str, default: object) -> object:
        value = self.ctx.params.get(name)
        self.values[name] = default if value is None or value == "" else value
        return self.values[name]

    def _invalid(self, found: types.Property, text: str) -> None:
        self.problems.append(text)
        found.invalid = True
        found.error_message = text


class FormError(ValueError):
    """Something has to be mended before the rest of a form makes sense."""


def cached(compute: Callable[..., T], samples: Samples, *args: Hashable) -> T:
    """`compute(samples, *args)`, once for the samples as they are: a form is resolved anew at every keystroke."""
    dataset = samples._root_dataset
    collections = [dataset._sample_collection]
    if dataset._frame_collection is not None:
        collections.append(dataset._frame_collection)
    newest = [("last_modified_at", -1)]  # FiftyOne keeps an index of it
    state = [(c.estimated_document_count(), c.find_one({}, {newest[0][0]: True}, sort=newest)) for c in collections]
    view = hashlib.sha256(str(samples.view()._serialize(include_uuids=False)).encode()).digest()  # it may list ids
    key = (compute, args, dataset.name, view, str(state))
    if key not in _cached:
        if len(_cached) >= 100:
            _cached.clear()
        _cached[key] = compute(samples, *args)
    return _cached[key]


_cached: dict[tuple, object] = {}


def code(text: object) -> str:
    """Markdown that shows a text as it is, whatever is in it."""
    return "`" + "".join(c if c.isprintable() else "?" for c in str(text)).replace("`", "'") + "`"


def _shortened(value: object) -> str:
    text = repr(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 100 else f"{text[:100]}..."


def count(number: int, noun: str) -> str:
    """Such as "1 image" or "2,000 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


@dataclass
class Outcome:
    """What an operator has to show.

    Attributes:
        text: a summary, as Markdown.
        result: the same for programs, as JSON.
        view: to open in the App.
        panel: to open in the App.
        buttons: (label, URI of an operator, its parameters) below the summary.
    """

    text: str
    result: dict
    view: fo.DatasetView | None = None
    panel: str | None = None
    buttons: list[tuple[str, str, dict]] = field(default_factory=list)


class Progress:
    """How far work is: told by it, shown to the user, who may cancel."""

    def __init__(self, show: Callable[[float | None, str], None] = lambda share, label: None) -> None:
        self._show = show
        self.share: float | None = None
        self.label = "Starting"
        self.cancelled = threading.Event()

    def tell(self, share: float | None, label: str) -> None:
        """`share` of the work is done, from 0 to 1, None where it isn't known. Raises Cancelled if asked to stop."""
        self.share, self.label = share, label
        self._show(share, label)
        if self.cancelled.is_set():
            raise Cancelled

    def __call__(self, bar: fo.ProgressBar) -> None:
        """As FiftyOne's `progress`."""
        total = bar.total or 0
        self.tell(bar.iteration / total if total else None, f"{bar.iteration:,} of {total:,} images")


class Operator(foo.Operator):
    """A form, and a call into the layers below. Subclasses give the attributes and the two methods.

    Attributes:
        identifier: the last part of the URI.
        title: what the App calls it.
        description: what it is for.
        icon: the name of its icon.
        risk: FiftyOne's risk level, by which assistants decide whether to ask first.
    """

    identifier: str
    title: str
    description: str
    icon: str
    risk = "medium"

    def form(self, form: Form) -> None:
        """Adds the inputs. Raises FormError where the rest of them would make no sense."""
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
        samples: Samples | None = None,
        delegate: bool = False,
        selected: Sequence[str] = (),
        selected_labels: Sequence[Mapping] = (),
        **params: object,
    ) -> ExecutionResult:
        """Runs the operator on a dataset or view from Python; its summary is in `result` of what comes back.

        Args:
            delegate: schedules it instead, for a `fiftyone delegated launch` worker.
            selected: ids of samples, as if selected in the App.
            selected_labels: likewise, in the form of `session.selected_labels`.
            params: what the form would ask for; the rest are its defaults.
        """
        ctx = {"view" if isinstance(samples, fo.DatasetView) else "dataset": samples}
        ctx |= {"selected": list(selected), "selected_labels": list(selected_labels)}
        return foo.execute_operator(self.uri, ctx, params=params, request_delegation=delegate)

    def resolve_input(self, ctx: ExecutionContext) -> types.Property:
        return types.Property(self._filled(ctx).inputs, view=types.View(label=self.title))

    def resolve_execution_options(self, ctx: ExecutionContext) -> foo.ExecutionOptions:
        form = Form(ctx)
        with suppress(FormError):  # the form itself tells
            if ctx.dataset is not None:
                form.target(self.title)
        # Where nobody has allowed workers to take scheduled work, the App can't schedule.
        can_schedule = fo.config.allow_legacy_orchestrators
        many = form.samples is not None and form.size > MANY_IMAGES
        return foo.ExecutionOptions(
            allow_immediate_execution=True,
            allow_delegated_execution=True,
            default_choice_to_delegated=bool(many and can_schedule),
        )

    def execute(self, ctx: ExecutionContext) -> dict | Iterator[GeneratedMessage]:
        form = self._filled(ctx)
        if form.problems:
            raise ValueError(" ".join(form.problems))
        if ctx.delegated:
            return self.run(form, Progress(_throttled(ctx.set_progress))).result
        if "spaces" not in ctx.request_params:  # which panels are open: only the App tells
            with tqdm(total=1, bar_format="{l_bar}{bar}| {elapsed}") as bar:
                return self.run(form, Progress(_throttled(lambda share, label: _advance(bar, share, label)))).result
        return self._run_in_app(ctx, form)

    def _filled(self, ctx: ExecutionContext) -> Form:
        form = Form(ctx)
        try:
            self.form(form)
        except FormError as error:
            form.problem(str(error))
        return form

    def _run_in_app(self, ctx: ExecutionContext, form: Form) -> Iterator[GeneratedMessage]:
        work = _Work(lambda progress: self.run(form, progress))
        _running[work.id] = work
        try:
            work.start()
            while not work.finished.wait(_REFRESH):
                yield _show_progress(ctx, work)
            yield from _show_outcome(ctx, self.title, work)
        finally:  # also when nobody listens any more, because the tab was closed
            work.progress.cancelled.set()
            del _running[work.id]


class CancelWork(foo.Operator):
    """What the Cancel button runs."""

    identifier = "cancel"

    @property
    def config(self) -> foo.OperatorConfig:
        return foo.OperatorConfig(name=self.identifier, label="MobileSAMv2: cancel", unlisted=True, risk_level="low")

    def execute(self, ctx: ExecutionContext) -> dict:
        work = _running.get(str(ctx.params.get("work")))
        if work is not None:
            work.progress.cancelled.set()
        return {"cancelled": work is not None}


class _Work:
    """An operator's work in a thread of its own, while the App is told how far it is."""

    def __init__(self, run: Callable[[Progress], Outcome]) -> None:
        self.id = uuid.uuid4().hex
        self.progress = Progress()
        self.finished = threading.Event()
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self._run = run

    def start(self) -> None:
        context = contextvars.copy_context()  # in which FiftyOne keeps whose request this is
        threading.Thread(target=context.run, args=(self._work,), name=f"mobilesamv2-{self.id}", daemon=True).start()

    def _work(self) -> None:
        try:
            while not _one_at_a_time.acquire(timeout=_REFRESH):
                self.progress.tell(None, "Waiting for other work to end")
            try:
                self.outcome = self._run(self.progress)
            finally:
                _one_at_a_time.release()
        except BaseException as error:  # told to the user by the thread that waits
            self.error = error
        finally:
            self.finished.set()


_running: dict[str, _Work] = {}

# Two models at a time would take each other's cores and memory, and FiftyOne's progress bars of two threads share one
# capture of what is printed, which the first to end closes.
_one_at_a_time = threading.Lock()


def _show_progress(ctx: ExecutionContext, work: _Work) -> GeneratedMessage:
    outputs, progress = types.Object(), work.progress
    stopping = progress.cancelled.is_set()
    label = "Stopping after what is being worked on now ..." if stopping else progress.label
    outputs.float("share", view=types.ProgressView(label=label))
    if not stopping:
        cancel = f"{PLUGIN}/{CancelWork.identifier}"
        outputs.btn("cancel", label="Cancel", on_click=cancel, params={"work": work.id}, variant="outlined")
        # FiftyOne puts a "Done" below, which closes the dialog until its next state.
        outputs.str("text", view=types.MarkdownView())
    text = "This dialog stays until the work is over; closing the tab stops the work."
    return ctx.ops.show_output(types.Property(outputs).to_json(), {"share": progress.share, "text": text})


def _show_outcome(ctx: ExecutionContext, title: str, work: _Work) -> Iterator[GeneratedMessage]:
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
            else:  # it has not heard of the result
                load = f"{PLUGIN}/{outcome.panel}#on_load"
                yield ctx.trigger(load, {"panel_id": panel_id, "panel_state": {}})
        outputs.str("text", view=types.MarkdownView())
        text = outcome.text
        if was_open:  # FiftyOne keeps what it has once shown of it
            text += "\n\nThe sample that was open shows this in the grid; opened again, after the page is reloaded."
        for number, (label, operator, params) in enumerate(outcome.buttons):
            outputs.btn(f"button_{number}", label=label, on_click=operator, params=params, variant="outlined")
    elif isinstance(error, Cancelled):
        outputs.str("text", view=types.MarkdownView())
        text = f"**{title}** was cancelled. What was stored by then stays."
    else:
        if not _explains_itself(error):
            logger.error("%s failed", title, exc_info=error)
        outputs.view("error", types.Error(label=f"{title} failed", description=_told(error)))
    yield ctx.ops.show_output(types.Property(outputs).to_json(), {"text": text})


def _explains_itself(error: BaseException) -> bool:
    """Whether its message says what is wrong and what to do. Others are defects, and are logged with their trace."""
    return isinstance(error, (ValueError, OSError, PyMongoError, MobileSAMv2Error))


def _told(error: BaseException) -> str:
    if isinstance(error, OperationFailure) and error.code == _UNAUTHORIZED:
        return f"The database lets this user read only: {str(error).split('{')[0].strip()}. Ask whoever runs it."
    return str(error)[:_MOST_TOLD] if _explains_itself(error) else f"{type(error).__name__}: {error}"[:_MOST_TOLD]


def _panel_id(space: fo.Space | None, name: str) -> str | None:
    """Of the open panel of that name, if there is one."""
    for child in space.children if space is not None else ():
        found = _panel_id(child, name) if isinstance(child, fo.Space) else child.component_id
        if found is not None and (isinstance(child, fo.Space) or child.type == name):
            return found
    return None


def _throttled(show: Callable[[float | None, str], None]) -> Callable[[float | None, str], None]:
    """`show`, at most once a second; the end is always shown."""
    last = 0.0

    def throttled(share: float | None, label: str) -> None:
        nonlocal last
        if share == 1 or time.monotonic() - last >= 1:
            last = time.monotonic()
            show(share, label)

    return throttled


def _advance(bar: tqdm, share: float | None, label: str) -> None:
    bar.set_description(label, refresh=False)
    bar.update((share or 0) - bar.n)
