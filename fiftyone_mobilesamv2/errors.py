"""What callers may want to catch, told apart from bugs."""

from __future__ import annotations

from collections.abc import Mapping


class MobileSAMv2Error(Exception):
    """Something that the message explains: a file, an argument or a machine is not what is needed."""


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
