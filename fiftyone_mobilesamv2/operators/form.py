"""An operator's form, with the values that the user has entered."""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import cachetools
import fiftyone as fo
from bson import ObjectId
from fiftyone.operators import types
from fiftyone.operators.constants import ViewTarget
from fiftyone.operators.executor import ExecutionContext

from ..errors import FormError, MobileSAMv2Error, plain
from ..fiftyone_internals import (
    frame_collection,
    is_dynamic_groups,
    is_generated,
    root_dataset,
    sample_collection,
    samples_of_dynamic_groups,
    serialized_view,
)
from ..labels.fields import check_not_grouped, label_fields

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

    from ..zoo.config import Parameter

T = TypeVar("T")
Default = TypeVar("Default", bound=str | None)

_MAX_TEXT = 4096  # the longest path on Linux
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Form:
    """An operator's form, with the values that the user has entered. Each method adds an input and returns its value.

    Attributes:
        ctx: FiftyOne's context.
        values: the values of all inputs by name; defaults for empty inputs.
        samples: the samples to work on, set by :meth:`target`.
        problems: what must be corrected before the operator can run.
    """

    samples: SampleCollection

    def __init__(self, ctx: ExecutionContext) -> None:
        self.ctx = ctx
        self.inputs = types.Object()
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []

    @property
    def dataset(self) -> fo.Dataset:
        return self.ctx.dataset

    @property
    def size(self) -> int:
        """The number of samples to work on."""
        return cached(len, self.samples)

    def target(self, action: str) -> SampleCollection:
        """The samples: the dataset, the view or the selected ones. `action` is a verb for what is done to them."""
        if self.ctx.dataset is None:
            raise FormError("Open a dataset first.")
        if not all(map(ObjectId.is_valid, self.ctx.selected)):
            raise FormError("The selected samples no longer exist. Select others.")
        target = self.ctx.request_params.get("view_target")  # FiftyOne moves it there from the parameters
        if target and target not in ViewTarget.values():  # FiftyOne would use the whole dataset
            raise FormError(
                f"{_shortened(target)} is not a valid target: choose one of {', '.join(ViewTarget.values())}."
            )
        if is_generated(self.ctx.view):  # patches, clips or frames, which the App shows in place of the samples
            self.note("This works on the whole dataset, not on the patches, clips or frames of this view.")
            self.samples = self.ctx.flatten_group_slices(self.dataset)
        else:  # of grouped datasets, the slice that the App shows
            ctx = self.ctx
            if is_dynamic_groups(ctx.view):
                self.note("The current view counts as all samples of its groups.")
                ctx = _context_without_dynamic_groups(ctx)
            self.inputs.view_target(ctx, action_description=action, require_flat=True)
            self.samples = ctx.target_view(require_flat=True)
        check_not_grouped(self.samples)
        if not self.size:
            empty = "This dataset has" if not len(self.ctx.dataset) else "The current view has"
            raise FormError(f"{empty} no samples. There is nothing to {action[0].lower() + action[1:]}.")
        return self.samples

    def whole_dataset(self) -> fo.Dataset:
        """The dataset, for work that a view does not limit."""
        if self.ctx.dataset is None:
            raise FormError("Open a dataset first.")
        if not len(self.dataset):
            raise FormError("This dataset has no samples.")
        self.samples = self.dataset
        return self.dataset

    def parameter(self, parameter: Parameter, default: Any = None) -> Any:
        """A parameter of the model, as declared; `default` replaces the declared default."""
        name, title, text = parameter.name, parameter.title, parameter.description
        default = parameter.default if default is None else default
        if parameter.choices:
            return self.choice(name, parameter.choices, default, title, text, radio=len(parameter.choices) == 2)
        if parameter.kind is bool:
            return self.switch(name, default, title, text)
        if parameter.kind is str:
            return self.text(name, default, title, text)
        return self.number(name, default, title, text, parameter.min, parameter.max, whole=parameter.kind is int)

    def number(
        self,
        name: str,
        default: float | None,
        label: str,
        description: str | None = None,
        min: float | None = None,
        max: float | None = None,
        whole: bool = False,
    ) -> float | None:
        """A number, or a whole number. Returns the default if the input is empty or not valid."""
        add = self.inputs.int if whole else self.inputs.float
        # FiftyOne could check the limits, but would not say what is expected.
        prop = add(name, label=label, description=description, default=default)
        value = self._value(name, default)
        if value is None:
            return None
        expected = "a whole number" if whole else "a number"
        if min is not None and max is not None:
            expected += f" from {min:g} to {max:g}"
        elif min is not None:
            expected += f" of at least {min:g}"
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not abs(value) <= sys.maxsize  # true for NaN, too
            or (whole and value != int(value))
            or (min is not None and value < min)
            or (max is not None and value > max)
        ):
            self._invalid(prop, f"{label}: {expected} was expected, not {_shortened(value)}.")
            return default
        if whole:
            value = self.values[name] = int(value)
        return value

    def switch(self, name: str, default: bool, label: str, description: str | None = None) -> bool:
        """A switch."""
        self.inputs.bool(name, label=label, description=description, default=default, view=types.SwitchView())
        return bool(self._value(name, default))

    def text(self, name: str, default: Default, label: str, description: str | None = None) -> str | Default:
        """A line of text."""
        prop = self.inputs.str(name, label=label, description=description, default=default)
        return self.text_of(prop, name, default, label)

    def choice(
        self,
        name: str,
        choices: Mapping[str, str],
        default: str,
        label: str,
        description: str | None = None,
        radio: bool = False,
    ) -> str:
        """One of `choices`, which maps values to the texts that the user reads."""
        view = types.RadioGroup() if radio else types.DropdownView()
        for value, text in choices.items():
            view.add_choice(value, label=text)
        prop = self.inputs.enum(name, list(choices), label=label, description=description, default=default, view=view)
        value = self.text_of(prop, name, default, label)
        if value not in choices and not prop.invalid:
            self._invalid(prop, f"{label}: {value!r} is no longer available. Choose one of {', '.join(choices)}.")
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
            FormError: no field holds such labels.
        """
        fields = [field for field in label_fields(self.samples, kinds) if field != without]
        if not fields:
            names = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
            other = f" other than '{without}'" if without else ""
            raise FormError(f"{label}: {self.dataset.name} has no field of {names}{other}.")
        return self.choice(
            name, {field: field for field in fields}, default if default in fields else fields[0], label, description
        )

    def new_field(self, name: str, default: str, label: str, description: str, known: Sequence[str] = ()) -> str:
        """The name of a field, which need not exist; the fields `known` are suggested."""
        view = types.AutocompleteView(allow_clearing=False)
        for each in dict.fromkeys([default, *known]):
            view.add_choice(each, label=each)
        prop = self.inputs.str(name, label=label, description=description, default=default, view=view)
        return self.text_of(prop, name, default, label)

    @contextmanager
    def checks(self, label: str = "") -> Iterator[None]:
        """Turns errors raised in this block into problems of the form; `label` names the input, such as "File: "."""
        try:
            yield
        except MobileSAMv2Error as error:
            self.problem(f"{label}{error}")

    def note(self, text: str) -> None:
        """Shows a note."""
        self._message("note", types.Notice(label=without_links(text)))

    def warn(self, text: str) -> None:
        """Shows a warning to consider before running."""
        self._message("warning", types.Warning(label=without_links(text)))

    def problem(self, text: str) -> None:
        """Shows an error that must be corrected before running."""
        self._invalid(self._message("problem", types.Error(label=without_links(text))), text)

    def _message(self, kind: str, view: types.View) -> types.Property:
        number = sum(name.startswith(f"{kind}_") for name in self.inputs.properties)
        return self.inputs.view(f"{kind}_{number + 1}", view)  # the App shows this name if it can't execute

    def text_of(self, prop: types.Property, name: str, default: Default, label: str) -> str | Default:
        """The text entered in the input `prop`."""
        value = self._value(name, default)
        if value is None:
            return default
        if not isinstance(value, str):
            self._invalid(prop, f"{label}: text was expected, not {_shortened(value)}.")
        elif len(value) > _MAX_TEXT:
            self._invalid(prop, f"{label}: at most {_MAX_TEXT:,} characters were expected, not {len(value):,}.")
        elif _CONTROLS.search(value):
            self._invalid(prop, f"{label}: text on one line was expected, not {_shortened(value)}.")
        else:
            return value
        self.values[name] = default  # for the rest of the form
        return default

    def _value(self, name: str, default: object) -> object:
        value = plain(self.ctx.params.get(name))
        self.values[name] = value = default if value is None or value == "" else value
        return value

    def _invalid(self, prop: types.Property, text: str) -> None:
        self.problems.append(text)
        prop.invalid = True
        prop.error_message = text


def _context_without_dynamic_groups(ctx: ExecutionContext) -> ExecutionContext:
    """The same request with the samples of the view's dynamic groups as its view."""
    view = {"view": serialized_view(samples_of_dynamic_groups(ctx.view))}
    return ExecutionContext({**ctx.request_params, "view_name": None, "filters": None, "extended": None, **view})


def _state(compute: Callable[..., object], samples: SampleCollection, *args: Hashable) -> Hashable:
    """A cache key, which changes whenever the result of `compute(samples, *args)` may have changed."""
    dataset = root_dataset(samples)
    collections = [sample_collection(dataset)]
    if (frames := frame_collection(dataset)) is not None:
        collections.append(frames)
    newest = [("last_modified_at", -1)]  # FiftyOne indexes it
    state = [(c.estimated_document_count(), c.find_one({}, {newest[0][0]: True}, sort=newest)) for c in collections]
    view = hashlib.sha256(str(serialized_view(samples, include_uuids=False)).encode()).digest()  # it may list ids
    return compute, args, dataset.name, view, str(state)


def cached(compute: Callable[..., T], samples: SampleCollection, *args: Hashable) -> T:
    """`compute(samples, *args)`, cached until the samples change: a form is resolved again at every keystroke."""
    result: T = _cached(compute, samples, *args)
    return result


@cachetools.cached(cachetools.LRUCache(maxsize=100), key=_state, lock=threading.Lock())
def _cached(compute: Callable[..., Any], samples: SampleCollection, *args: Hashable) -> Any:
    return compute(samples, *args)


def without_links(text: str) -> str:
    """Text for notices and errors, which the App renders as Markdown: names in it become neither links nor images."""
    return text.replace("](", "]\\(")


def code(text: object) -> str:
    """Markdown that shows a text literally, whatever it contains."""
    return "`" + "".join(c if c.isprintable() else "?" for c in str(text)).replace("`", "'") + "`"


def cell(text: object) -> str:
    """Like :func:`code`, in a cell of a table."""
    return code(text).replace("|", "\\|")


def _shortened(value: object) -> str:
    text = repr(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 100 else f"{text[:100]}..."


def count(number: int, noun: str) -> str:
    """A number with its noun, such as "1 image" or "2,000 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
