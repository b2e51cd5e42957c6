"""Reads files written by `torch.save` without calling anything that they name.

Such a file is an uncompressed zip archive of a pickle and the bytes of each storage. A pickle is a program for a stack
machine, and one of its instructions calls an object that another has named. With `weights_only=True`, PyTorch calls
only objects that it considers harmless; even so, 400 bytes can fill the memory (`bytearray(10**11)`) or keep the reader
busy forever. This module builds tensors, turns modules into containers of their attributes and everything else into
None. The file's size bounds its time and memory.
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

# In bytes. A ViT-H's pickle has 0.1 MB. One byte of a pickle can create an object of 200 bytes.
_MAX_PICKLE = 4 * 2**20
_MAX_NAME = 1000
_MAX_DIMENSIONS = 8
_MAX_EXCLUDED = 100  # non-persistent buffers of a module

_MODULES = re.compile(r"(torch\.nn\.modules|ultralytics\.(yolo\.)?nn)\.[\w.]+")
# Objects that are read as None. In ultralytics' pickles: `Detect.forward`, stored as an attribute; the type of its
# settings; its fitness, a scalar.
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
_Arguments = tuple[Any, ...]  # of a call in the pickle: a file may contain anything
_KEYS = (str, int, float, type(None))  # hashing tuples that each contain another twice takes exponential time


class SavedModule:
    """A module read from a file: its tensors and submodules.

    Attributes:
        state: its attributes by name.
    """

    def __init__(self) -> None:
        self.state: dict[object, object] = {}

    def members(self) -> Iterator[tuple[dict[object, object], Collection[object]]]:
        """Its parameters, buffers and submodules by name, each with the names that are not part of the state dict."""
        non_persistent = self.state.get("_non_persistent_buffers_set")
        for name in ("_parameters", "_buffers", "_modules"):
            members = self.state.get(name)
            if isinstance(members, dict):
                yield members, non_persistent if name == "_buffers" and isinstance(non_persistent, set) else ()


class _Storage(NamedTuple):
    dtype: torch.dtype | None
    content: bytearray


class _Name(NamedTuple):
    """A name in a pickle, and the function that replaces calls to it."""

    text: str
    make: Callable[[_Arguments], object]


def read_saved(path: Path) -> object:
    """The saved object: tensors, modules, dictionaries, lists, tuples, numbers and strings.

    Raises:
        Exception: the file is not such a file or is damaged, or it names objects that weights files don't name. The
            type varies: zipfile and torch have their own.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        folder = next(iter(entries), "").partition("/")[0]
        program = entries.get(f"{folder}/data.pkl")
        if program is None:
            raise ValueError("it is a zip archive without a data.pkl")
        if f"{folder}/constants.pkl" in entries:
            raise ValueError("it is a TorchScript program, not a weights file")
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
            raise ValueError("its byte order differs from this machine's")
        contents: dict[str, bytearray] = {}

        def storage(key: str) -> bytearray:
            if key not in contents:
                contents[key] = bytearray(archive.read(f"{folder}/data/{key}"))
            return contents[key]

        try:
            return _interpret(archive.read(program), storage)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError("its pickle is malformed") from error


def named_tensors(
    content: dict[Any, Any] | SavedModule,
    prefix: str = "",
    excluded: Collection[object] = (),
    seen: set[int] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the saved object, as (name, tensor), with nested names joined by dots.

    Each container is visited only once, since it may contain itself.

    Args:
        excluded: keys of `content` to skip.

    Raises:
        ValueError: a name is too long.
        RecursionError: containers are nested too deeply.
    """
    seen = set() if seen is None else seen
    if isinstance(content, SavedModule):
        for members, excluded_members in content.members():
            yield from named_tensors(members, prefix, excluded_members, seen)
        return
    if id(content) in seen:
        return
    seen.add(id(content))
    if len(prefix) > _MAX_NAME:
        raise ValueError(f"it contains a name longer than {_MAX_NAME:,} characters")
    for key, value in content.items():
        if key in excluded:
            continue
        if isinstance(value, dict | SavedModule):
            yield from named_tensors(value, f"{prefix}{key}.", (), seen)
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def _interpret(program: bytes, storage: Callable[[str], bytearray]) -> object:
    """Interprets a pickle and returns its result.

    Args:
        storage: returns the bytes of a storage, given its key.

    Raises:
        Exception: it has an instruction that torch.save doesn't write, names a forbidden object, or is malformed.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # for each mark, the stack below it
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
    raise ValueError("its pickle is truncated")


def _extend(target: object, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)


def _update(target: object, items: Iterable[tuple[Any, Any]]) -> None:
    if isinstance(target, dict):
        target.update((key, value) for key, value in items if isinstance(key, _KEYS))


def _name(argument: str) -> _Name:
    """Resolves a "module attribute" argument. Raises ValueError unless weights files may name such an object."""
    text = argument.replace(" ", ".", 1)
    if text.startswith("__builtin__."):  # its name in Python 2
        text = text.replace("__builtin__", "builtins", 1)
    make = _MAKE.get(text)
    if make is None and _MODULES.fullmatch(text):
        make = _module
    if make is None and not _OTHERS.fullmatch(text):
        raise ValueError(
            f"its pickle names {text[:100]}, but only classes of torch.nn and ultralytics are allowed. The file may "
            "try to run code; get it from a source that you trust"
        )
    return _Name(text, make or _nothing)


def _storage(reference: object, storage: Callable[[str], bytearray]) -> _Storage:
    match reference:
        case ("storage", _Name(text=kind), str() as key, _, _):
            return _Storage(_STORAGES.get(kind), storage(key))
    raise ValueError("its pickle refers to an object that is not a storage")


def _tensor(arguments: _Arguments, dtype: torch.dtype | None = None) -> Tensor | None:
    storage, offset, size, stride = arguments[:4]
    dtype = dtype or storage.dtype
    if dtype is None:  # complex or quantized
        return None
    if len(size) > _MAX_DIMENSIONS:
        raise ValueError(f"it has a tensor of {len(size):,} dimensions")
    flat = torch.frombuffer(storage.content, dtype=dtype) if storage.content else torch.empty(0, dtype=dtype)
    return flat.as_strided(size, stride, offset)  # raises if it exceeds the storage


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
    """For example, the names of a module's non-persistent buffers."""
    (items,) = arguments
    return {item for item in items if isinstance(item, str)} if len(items) <= _MAX_EXCLUDED else None


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
