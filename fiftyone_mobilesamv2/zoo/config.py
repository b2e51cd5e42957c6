"""The one declaration of a model's parameters: checks, forms, the command line and docs/parameters.md come from it."""

from __future__ import annotations

import numbers
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ..errors import ArgumentError, plain
from ..modeling.checkpoints.lookup import model_name
from ..modeling.defaults import (
    CONFIDENCE,
    MAX_NMS_CANDIDATES,
    MAX_POINTS_PER_SIDE,
    MAX_PROMPTS,
    NMS_IOU,
    POINTS_PER_SIDE,
    PRED_IOU_THRESH,
    STABILITY_SCORE_THRESH,
)

_NOT_IN_PATHS = re.compile("[\0\ud800-\udfff]")  # surrogates stand for bytes that are not UTF-8: databases reject them
_MAX_INT64 = 2**63 - 1  # the largest integer that fits into the database
CHECKPOINTS = ("encoder_checkpoint", "decoder_checkpoint", "detector_checkpoint")


def _plain_number(value: object) -> float:
    """Converts numbers of any library to Python's own, which JSON and the database accept."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError("not a number")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _fits_database(value: int) -> int:
    if value > _MAX_INT64:
        raise ValueError("too large")
    return value


def _usable_text(value: str) -> str:
    if not value or _NOT_IN_PATHS.search(value):
        raise ValueError("not a name or path")
    return value


def _model_name(value: object) -> object:
    return model_name(value) if isinstance(value, str | os.PathLike) else value


def _device_name(value: object) -> object:
    torch = sys.modules.get("torch")  # not imported here, so that the command line's help need not wait for it
    return str(value) if torch is not None and isinstance(value, torch.device) else value


Whole = Annotated[int, BeforeValidator(_plain_number), AfterValidator(_fits_database)]
Share = Annotated[float, BeforeValidator(_plain_number), Field(ge=0, le=1)]
Text = Annotated[str, AfterValidator(_usable_text)]
Prompting = Literal["object_aware", "grid"]
T = TypeVar("T")
_REQUIRED: Any = ...  # in place of the default of a required parameter


def _declared(
    default: T,
    title: str,
    description: str,
    *,
    min: int | None = None,
    max: int | None = None,
    choices: Mapping[str, str] | None = None,
    applies_to: Prompting | None = None,
    advanced: bool = False,
    in_forms: bool = True,
    changes_results: bool = True,
    fixed: bool = False,
) -> T:
    """Declares a parameter: a field of the configuration.

    Args:
        title, description: texts for forms, the command line and the docs.
        choices: its values, and the text of each in a form.
        applies_to: the prompting that uses it; None if both do.
        advanced: whether forms show it only on request.
        in_forms: False if it makes sense only in Python and on the command line.
        changes_results: False if it changes only where or how masks are computed or stored, so that a run may continue
            with another value.
        fixed: whether it takes effect when a model is loaded and cannot be changed afterwards.
    """
    return Field(
        default,
        title=title,
        description=description,
        ge=min,
        le=max,
        frozen=fixed or None,
        json_schema_extra={
            "choices": {**(choices or {})},
            "applies_to": applies_to,
            "advanced": advanced,
            "in_forms": in_forms,
            "changes_results": changes_results,
        },
    )


def _declared_file(part: str) -> Any:
    """Declares a weights file. Runs compare the hash of its content, not its path."""
    text = "File to use instead of the zoo's own"
    return _declared(None, f"{part} checkpoint", text, in_forms=False, changes_results=False, fixed=True)


class MobileSAMv2ModelConfig(BaseModel):
    # Its docstring is generated from the fields, at the end of this file.
    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, validate_default=False)

    name: Annotated[Text, BeforeValidator(_model_name)] = _declared(
        _REQUIRED, "Model", "Name of the model, or folder of a trained one", in_forms=False, fixed=True
    )
    device: Annotated[Text, BeforeValidator(_device_name)] | None = _declared(
        None,
        "Device",
        "cuda, mps or cpu; the best available if unset",
        changes_results=False,
        fixed=True,
    )
    dtype: Literal["float32", "bfloat16", "float16"] = _declared(
        "float32",
        "Precision",
        "Number format of the heavy computation",
        choices={
            "float32": "float32: exact",
            "bfloat16": "bfloat16: faster on processors that support it; a few pixels of each outline differ",
            "float16": "float16: for GPUs without bfloat16",
        },
        fixed=True,
    )
    prompting: Prompting = _declared(
        "object_aware",
        "Prompting",
        "How objects are found",
        choices={
            "object_aware": "Object-aware: find the objects first, then one mask each (fast)",
            "grid": "Grid: SAM's search over a grid of points (many times slower)",
        },
    )
    confidence_thresh: Share | None = _declared(
        None,
        "Minimum confidence",
        f"Lower finds more objects and more false ones. If unset: the paper's {CONFIDENCE} for detected boxes, and no "
        "minimum for the grid and your own prompts, where the confidence is the predicted IoU",
    )
    iou: Share = _declared(NMS_IOU, "NMS IoU", "Boxes with a higher IoU count as one object", applies_to="object_aware")
    max_prompts: Whole = _declared(
        MAX_PROMPTS,
        "Maximum prompts",
        "Maximum number of objects to prompt for in an image",
        min=1,
        max=MAX_NMS_CANDIDATES,
        applies_to="object_aware",
    )
    points_per_side: Whole = _declared(
        POINTS_PER_SIDE,
        "Points per side",
        "Size of the grid over an image",
        min=1,
        max=MAX_POINTS_PER_SIDE,
        applies_to="grid",
    )
    pred_iou_thresh: Share = _declared(
        PRED_IOU_THRESH,
        "Minimum predicted IoU",
        "For masks of the grid; 0 keeps all",
        applies_to="grid",
        advanced=True,
    )
    stability_score_thresh: Share = _declared(
        STABILITY_SCORE_THRESH,
        "Minimum stability",
        "For masks of the grid; 0 keeps all",
        applies_to="grid",
        advanced=True,
    )
    min_area: Whole = _declared(
        0, "Minimum mask area (pixels)", "0 keeps all; masks of your own prompts are always kept", min=0
    )
    max_masks: Whole | None = _declared(
        None, "Maximum masks per image", "The most confident are stored; unset keeps all", min=1, advanced=True
    )
    masks_on_disk: bool = _declared(
        False,
        "Store masks on disk",
        "As PNG files; otherwise only masks that don't fit into the database go to disk",
        changes_results=False,
        fixed=True,
    )
    mask_dir: Text | None = _declared(
        None,
        "Folder for masks on disk",
        "Unset: 'mobilesamv2_masks' in FiftyOne's default_dataset_dir",
        advanced=True,
        changes_results=False,
    )
    raise_failures: bool = _declared(
        False,
        "Raise failures",
        "In apply_model, stop at the first image that fails; otherwise list it and continue",
        in_forms=False,
        changes_results=False,
    )
    encoder_checkpoint: Text | None = _declared_file("Encoder")
    decoder_checkpoint: Text | None = _declared_file("Decoder")
    detector_checkpoint: Text | None = _declared_file("Detector")

    def __init__(self, d: Mapping[str, object]) -> None:
        """Takes parameters by name; None means the default. Raises ArgumentError if one is unknown or invalid."""
        if unknown := [key for key in d if key not in PARAMETERS]:
            raise ArgumentError(
                f"Unknown parameter {', '.join(unknown)} of {d.get('name')}; it takes {', '.join(PARAMETERS)}."
            )
        try:
            super().__init__(**{key: value for key, value in d.items() if value is not None})
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            raise PARAMETERS[name].refusal(d.get(name)) from None

    def __setattr__(self, name: str, value: object) -> None:
        """Sets a parameter for later calls. Raises ArgumentError if it is unknown or fixed, or the value is invalid."""
        parameter = PARAMETERS.get(name)
        if parameter is None:
            raise ArgumentError(f"Unknown parameter {name} of {self.name}; it takes {', '.join(PARAMETERS)}.")
        if parameter.is_fixed:
            again = f"load the model again with {name}={plain(value)!r}"
            raise ArgumentError(f"{name} cannot be changed after loading: {again}.")
        try:
            super().__setattr__(name, parameter.default if value is None else value)
        except ValidationError:
            raise parameter.refusal(value) from None

    @property
    def files(self) -> dict[str, str]:
        """The files to use instead of the zoo's, by parameter name."""
        return {name: value for name in CHECKPOINTS if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Parameter:
    """The declaration of a parameter; see :func:`_declared`."""

    name: str
    kind: type  # bool, int, float or str
    default: Any  # None if the parameter is required
    title: str
    description: str
    min: int | None
    max: int | None
    choices: Mapping[str, str]
    applies_to: Prompting | None
    is_advanced: bool
    is_in_forms: bool
    changes_results: bool
    is_fixed: bool

    @classmethod
    def of(cls, name: str, field: FieldInfo) -> Parameter:
        """The declaration in a field of the configuration."""
        kind, limits = _kind_and_limits(field.annotation)
        limits |= {type(each): each for each in field.metadata}
        extra: Any = field.json_schema_extra  # as set by `_declared`
        return cls(
            name=name,
            kind=kind,
            default=None if field.is_required() else field.default,
            title=field.title or name,
            description=field.description or "",
            min=limits[Ge].ge if Ge in limits else None,
            max=limits[Le].le if Le in limits else None,
            choices=extra["choices"],
            applies_to=extra["applies_to"],
            is_advanced=extra["advanced"],
            is_in_forms=extra["in_forms"],
            changes_results=extra["changes_results"],
            is_fixed=bool(field.frozen),
        )

    @property
    def expected(self) -> str:
        """Its valid values, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "True or False"
        if self.kind is str:
            return "text that can be a name or a path"
        number = "a whole number" if self.kind is int else "a number"
        return f"{number} of at least {self.min}" if self.max is None else f"{number} from {self.min} to {self.max}"

    def refusal(self, value: object) -> ArgumentError:
        """The error for an invalid value, which says what was expected."""
        return ArgumentError(f"{self.name} must be {self.expected}, not {plain(value)!r}.")


def _kind_and_limits(annotation: object) -> tuple[type, dict[type, Any]]:
    """The plain type in an annotation such as ``Annotated[int, ...] | None``, and its limits."""
    if isinstance(annotation, type):
        return annotation, {}
    if get_origin(annotation) is Literal:
        return str, {}
    first, *others = (each for each in get_args(annotation) if each is not NoneType)
    kind, limits = _kind_and_limits(first)
    for other in others:
        for each in getattr(other, "metadata", ()):
            limits[type(each)] = each
    return kind, limits


PARAMETERS = {name: Parameter.of(name, field) for name, field in MobileSAMv2ModelConfig.model_fields.items()}
MobileSAMv2ModelConfig.__doc__ = "\n".join(
    [
        "Parameters of a :class:`MobileSAMv2Model`; all can be given to `load_zoo_model`.",
        "",
        "Parameters that take effect when a model is loaded are fixed afterwards; the others can be changed:",
        "",
        '>>> model = foz.load_zoo_model("mobilesamv2-tinyvit-torch")',
        ">>> model.config.max_prompts = 100",
        "",
        "Args:",
        *(f"    {p.name} ({p.default!r}): {p.expected}. {p.title}: {p.description}." for p in PARAMETERS.values()),
    ]
)


def mask_folder(config: MobileSAMv2ModelConfig) -> str:
    """The folder for masks on disk."""
    import fiftyone as fo  # not at the top, like torch above

    return os.path.abspath(config.mask_dir or os.path.join(fo.config.default_dataset_dir, "mobilesamv2_masks"))
