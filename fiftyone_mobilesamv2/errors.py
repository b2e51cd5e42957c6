"""Exceptions that callers may want to catch, as distinct from bugs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.error import URLError


class MobileSAMv2Error(Exception):
    """Base of the package's errors; the message explains what is wrong with a file, an argument or the machine."""


class ArgumentError(MobileSAMv2Error, ValueError):
    """An argument, a field or a view is invalid."""


class FormError(ArgumentError):
    """A form's input must be corrected before the operator can run."""


class CheckpointError(MobileSAMv2Error, RuntimeError):
    """A weights file is missing, is not the expected one, or does not match the model."""


class DownloadError(CheckpointError):
    """Files that could not be downloaded from any source.

    Attributes:
        reasons: source -> why the download failed.
        details: all files with their hashes, sources and reasons; the message has only the first source of each.
    """

    def __init__(self, message: str, reasons: Mapping[str, str], details: str) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)
        self.details = details


class LabelError(ArgumentError):
    """A label is unusable."""


class MissingError(LabelError):
    """A label lacks something that all labels of its field should have."""


class FieldBusyError(ArgumentError):
    """Another run is storing masks in the field."""


class ClusterError(MobileSAMv2Error, RuntimeError):
    """A cluster can't do the work."""


class StorageError(MobileSAMv2Error, OSError):
    """Masks or results can't be stored: the disk or a document is full, or the folder is not writable."""


class Cancelled(BaseException):
    """Raised by a `progress` callback to stop the work between two images.

    Not an Exception, so that it is not mistaken for the failure of an image, which would be recorded and skipped.
    """


# Bugs, whose messages mean little without the class.
_DEFECTS = (AssertionError, AttributeError, LookupError, NameError)


def message_of(error: BaseException) -> str:
    """The message of an exception for users, with its class only if the message means little without it.

    >>> message_of(ValueError("the file is empty"))
    'the file is empty'
    >>> message_of(URLError(OSError(111, "Connection refused")))
    'Connection refused'
    >>> message_of(KeyError("mask"))
    "KeyError: 'mask'"
    """
    if type(error) is URLError:
        return message_of(error.reason) if isinstance(error.reason, BaseException) else str(error.reason)
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error).strip())
    return text if text and not isinstance(error, _DEFECTS) else f"{type(error).__name__}: {text}".removesuffix(": ")


def with_file(path: str, message: str) -> str:
    """A message about a file, which names the file once.

    >>> with_file("a.png", "permission denied")
    'a.png: permission denied'
    >>> with_file("a.png", "'a.png' is a folder")
    "'a.png' is a folder"
    """
    return message if path in message or repr(path) in message else f"{path}: {message}"


def plain(value: object) -> object:
    """A value for a message: NumPy's and PyTorch's single numbers, also in lists, become Python's.

    >>> import numpy as np
    >>> plain([np.float64(10.0), 3])
    [10.0, 3]
    """
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value


@dataclass(frozen=True)
class Failure:
    """An image that could not be segmented."""

    sample_id: str | None
    filepath: str | None
    error: str

    def __str__(self) -> str:
        """The file, once, and the cause."""
        return self.error if self.filepath is None else with_file(self.filepath, self.error)
