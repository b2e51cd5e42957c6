"""What callers may want to catch, told apart from bugs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class MobileSAMv2Error(Exception):
    """Something that the message explains: a file, an argument or a machine is not what is needed."""


class ArgumentError(MobileSAMv2Error, ValueError):
    """An argument, a field or a view is not what a function needs."""


class FormError(ArgumentError):
    """A form, or what it is about, has to be mended before an operator can run."""


class CheckpointError(MobileSAMv2Error, RuntimeError):
    """A file of weights is missing, is not the expected one, or does not fit the model."""


class DownloadError(CheckpointError):
    """Files that no source gave.

    Attributes:
        reasons: source -> why it did not give its file.
        details: all files with their hashes, all sources and all reasons; the message has only the first ones.
    """

    def __init__(self, message: str, reasons: Mapping[str, str], details: str) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)
        self.details = details


class LabelError(ArgumentError):
    """A label that can't be used."""


class MissingError(LabelError):
    """A label lacks what its whole field is expected to have."""


class FieldBusyError(ArgumentError):
    """Another run is storing masks in the field."""


class ClusterError(MobileSAMv2Error, RuntimeError):
    """A cluster can't do the work."""


class StorageError(MobileSAMv2Error, OSError):
    """Masks can't be stored: the disk is full, or the folder can't be written to."""


class Cancelled(BaseException):
    """Raised by a `progress` callback to end the work between two images.

    Not an Exception, so that nothing takes it for the failure of an image, which would be noted and passed over.
    """


@dataclass(frozen=True)
class Failure:
    """An image that could not be segmented."""

    sample_id: str | None
    filepath: str | None
    error: str

    def __str__(self) -> str:
        """The file, once, and the cause."""
        return self.error if self.filepath is None or self.filepath in self.error else f"{self.filepath}: {self.error}"


def cause_of(error: BaseException) -> str:
    """What an error says, for people to read.

    The class is named only where the message alone says too little: it is empty, or was not written to be read, as a
    KeyError's, which is a defect.

    >>> cause_of(ValueError("the file is empty"))
    'the file is empty'
    >>> cause_of(KeyError("mask"))
    "KeyError: 'mask'"
    """
    text = str(error).strip()
    if text and isinstance(error, (MobileSAMv2Error, ValueError, OSError, RuntimeError)):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")
