"""What a file of `torch.save` holds, without calling anything that the file names.

Such a file is a zip archive that isn't compressed: a pickle, and beside it the bytes of each storage. A pickle is a
program for a stack machine, and one of its instructions calls what another has named. With `weights_only=True` PyTorch
calls only what it holds to be harmless; yet with that, 400 bytes can fill the memory (`bytearray(10**11)`) or keep
their reader busy for ever. Here, tensors are made, modules become containers of what they hold, and everything else
becomes None, in time and memory that the size of the file bounds.
"""

from __future__ import annotations

import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# That of a ViT-H is 0.1 MB. What a byte of it makes may take 200.
_MAX_PICKLE = 4 * 2**20
_MAX_NAME = 1000
_MAX_DIMENSIONS = 8
_MAX_LEFT_OUT = 100  # buffers of a module

_MODULES = re.compile(r"(torch\.nn\.modules|ultralytics\.(yolo\.)?nn)\.[\w.]+")
# Of these nothing is kept. In the pickles of ultralytics: `Detect.forward`, which it has as an attribute; the type of
# its settings; fitness, a scalar.
_OTHERS = re.compile(
    r"_codecs\.encode|builtins\.(getattr|bytes|bytearray|complex)|torch\.nn\.parameter\.Parameter|"
    r"torch\.(Size|device|Tensor|\w+Storage|storage\.(Unt|T)ypedStorage|(bfloat|float|u?int|complex|bool|q|per_)\w*)|"
    r"torch\.(_utils\._rebuild_\w+|serialization\._get_layout)|numpy\.(_?core\.multiarray\.scalar|dtype|dtypes\.\w+)|"
    r"pathlib\.(Posix|Windows)?Path|ultralytics\.(yolo\.)?utils\.IterableSimpleNamespace"
)
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_Arguments = tuple[Any, ...]  # of what an instruction calls: a file may hold anything
_KEYS = (str, int, float, type(None))  # to hash a tuple that holds another twice, which holds ..., takes for ever


class SavedModule:
    """A module: its tensors, and the modules in it.

    Attributes:
        state: its attributes by name, all that is known of it.
    """

    def __init__(self) -> None:
        self.state: dict[object, object] = {}

    def parts(self) -> Iterator[tuple[dict[object, object], Collection[object]]]:
        """Its parameters, buffers and modules by name, and which of these are not to be saved."""
        left_out = self.state.get("_non_persistent_buffers_set")
        for name in ("_parameters", "_buffers", "_modules"):
            part = self.state.get(name)
            if isinstance(part, dict):
                yield part, left_out if name == "_buffers" and isinstance(left_out, set) else ()


class _Storage(NamedTuple):
    dtype: torch.dtype | None
    content: bytearray


class _Name(NamedTuple):
    """What an instruction names, and what is made in place of calling it with a tuple of arguments."""

    text: str
    make: Callable[[_Arguments], object]


def read_saved(path: Path) -> object:
    """What was saved: tensors, modules, dictionaries, lists, tuples, numbers and strings.

    Raises:
        Exception: the file is none of these or damaged, or it names what files of weights don't name. Of many types:
            zipfile and torch have their own.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        folder = next(iter(entries), "").partition("/")[0]
        program = entries.get(f"{folder}/data.pkl")
        if program is None:
            raise ValueError("it is a zip archive without a data.pkl")
        if f"{folder}/constants.pkl" in entries:
            raise ValueError("it is a program in TorchScript, not a file of weights")
        if len(entries) < len(archive.infolist()):
            raise ValueError("several of its entries have the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries.values()) > path.stat().st_size:
            raise ValueError("its entries claim to be larger than the file")
        if program.file_size > _MAX_PICKLE:
            raise ValueError(f"its data.pkl has {program.file_size:,} bytes, more than {_MAX_PICKLE:,}")
        byteorder = entries.get(f"{folder}/byteorder")
        if byteorder and archive.read(byteorder) != sys.byteorder.encode():
            raise ValueError("its numbers are in another byte order than this machine's")
        contents: dict[str, bytearray] = {}

        def storage(key: str) -> bytearray:
            if key not in contents:
                contents[key] = bytearray(archive.read(f"{folder}/data/{key}"))
            return contents[key]

        try:
            return _interpret(archive.read(program), storage)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"its pickle makes no sense: {error!r}") from error


def named_tensors(
    content: dict[Any, Any] | SavedModule,
    prefix: str = "",
    left_out: Collection[object] = (),
    seen: set[int] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors in what was saved, as (name, tensor), names within names joined by dots.

    Each container counts once, for it may hold itself.

    Args:
        left_out: keys of `content`.

    Raises:
        ValueError: a name is too long. RecursionError: containers are within each other too deep.
    """
    seen = set() if seen is None else seen
    if isinstance(content, SavedModule):
        for part, without in content.parts():
            yield from named_tensors(part, prefix, without, seen)
        return
    if id(content) in seen:
        return
    seen.add(id(content))
    if len(prefix) > _MAX_NAME:
        raise ValueError(f"it names something by more than {_MAX_NAME:,} characters")
    for key, value in content.items():
        if key in left_out:
            continue
        if isinstance(value, dict | SavedModule):
            yield from named_tensors(value, f"{prefix}{key}.", (), seen)
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def _interpret(program: bytes, storage: Callable[[str], bytearray]) -> object:
    """The result of a pickle.

    Args:
        storage: key -> the bytes of a storage.

    Raises:
        Exception: it has an instruction that torch.save doesn't write, names something else, or makes no sense.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the rest of the stack, for each mark
    memo: dict[object, object] = {}
    for instruction, argument, _ in pickletools.genops(program):
        match instruction.name:
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(instruction.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(instruction.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS":
                items, stack = stack, below.pop()
                _extend(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [(key, value)])
            case "SETITEMS":
                items, stack = stack, below.pop()
                _update(stack[-1], zip(items[::2], items[1::2]))
            case "GLOBAL":
                stack.append(_name(str(argument)))
            case "NEWOBJ" | "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(called.make(arguments) if isinstance(called, _Name) else None)
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], SavedModule) and isinstance(state, dict):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(_storage(stack.pop(), storage))
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(f"its pickle has the instruction {other}, which torch.save doesn't write")
    raise ValueError("its pickle has no end")


def _extend(target: object, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)


def _update(target: object, items: Iterable[tuple[Any, Any]]) -> None:
    if isinstance(target, dict):
        target.update((key, value) for key, value in items if isinstance(key, _KEYS))


def _name(argument: str) -> _Name:
    """Of an instruction's "module attribute". Raises ValueError where files of weights name no such thing."""
    text = argument.replace(" ", ".", 1)
    if text.startswith("__builtin__."):  # as Python 2 called it
        text = text.replace("__builtin__", "builtins", 1)
    make = _MAKE.get(text)
    if make is None and _MODULES.fullmatch(text):
        make = _module
    if make is None and not _OTHERS.fullmatch(text):
        raise ValueError(
            f"its pickle names {text[:100]}, and only classes of torch.nn and ultralytics are allowed. It may try to "
            "run code; get the file from a source that you trust"
        )
    return _Name(text, make or _nothing)


def _storage(reference: object, storage: Callable[[str], bytearray]) -> _Storage:
    match reference:
        case ("storage", _Name(text=kind), str() as key, _, _):
            return _Storage(_STORAGES.get(kind), storage(key))
    raise ValueError("its pickle refers to something that is no storage")


def _tensor(arguments: _Arguments, dtype: torch.dtype | None = None) -> Tensor | None:
    storage, offset, size, stride = arguments[:4]
    dtype = dtype or storage.dtype
    if dtype is None:  # complex or quantized
        return None
    if len(size) > _MAX_DIMENSIONS:
        raise ValueError(f"it has a tensor of {len(size):,} dimensions")
    flat = torch.frombuffer(storage.content, dtype=dtype) if storage.content else torch.empty(0, dtype=dtype)
    return flat.as_strided(size, stride, offset)  # raises where it would go beyond


def _tensor_of_dtype(arguments: _Arguments) -> Tensor | None:
    return _tensor(arguments, _DTYPES[arguments[6].text])


def _tensor_with_attributes(arguments: _Arguments) -> Tensor | None:
    made_by, kind, arguments, _ = arguments
    is_plain = kind.text in ("torch.Tensor", "torch.nn.parameter.Parameter")
    return made_by.make(arguments) if is_plain and made_by.make in (_tensor, _tensor_of_dtype, _parameter) else None


def _parameter(arguments: _Arguments) -> object:
    return arguments[0]


def _module(arguments: _Arguments) -> SavedModule:
    return SavedModule()


def _dict(arguments: _Arguments) -> dict[object, object]:
    return {}


def _set(arguments: _Arguments) -> set[str] | None:
    """Such as the names of a module's buffers that are not to be saved."""
    (items,) = arguments
    return {item for item in items if isinstance(item, str)} if len(items) <= _MAX_LEFT_OUT else None


def _nothing(arguments: _Arguments) -> None: ...


_MAKE = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "builtins.set": _set,
}
