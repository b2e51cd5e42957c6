"""Checks, without downloading, that hosts have the files that the catalog declares."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .catalog import HubFile, Weights
from .downloads import check_online, explain, http_status, hub_metadata, is_sha256, open_url, retried, without_secrets

_NO_HEAD = (403, 405, 501)  # replies of hosts that reject HEAD but accept GET
_GONE = (401, 403, 404, 410)  # the hub also answers 401 for a deleted repository


@dataclass(frozen=True)
class SourceCheck:
    """A host's answer for one declared file.

    Attributes:
        weights, source: the file, and where it is declared to be.
        verdict: "right"; "wrong", if it is missing or another file; "unknown", if the host could not be reached.
        result: the comparison, in a few words.
    """

    weights: Weights
    source: str
    verdict: str
    result: str


def check_sources(files: Iterable[Weights]) -> Iterator[SourceCheck]:
    """Queries every source of `files` in turn.

    On the hub, content is compared by its sha256 (or, for small files, its git blob id) if one is declared. On other
    hosts, only the size can be compared.
    """
    for weights in files:
        for source in weights.sources:
            try:
                is_right, result = _check(weights, source)
                verdict = "right" if is_right else "wrong"
            except Exception as error:  # has many types, as for downloads
                verdict = "wrong" if http_status(error) in _GONE else "unknown"
                result = explain(error)
            yield SourceCheck(weights, without_secrets(str(source)), verdict, result)


def _check(weights: Weights, source: HubFile | str) -> tuple[bool, str]:
    check_online()
    if isinstance(source, str):
        return _compare(weights, _plain_size(source), None)
    metadata = hub_metadata(source)
    return _compare(weights, metadata.size, metadata.etag)


def _plain_size(url: str) -> int | None:
    """The size of a file as reported by a plain host; None if it is not reported."""

    def ask() -> int | None:
        try:
            with open_url(url, "HEAD") as response:
                return _number(response.headers.get("Content-Length"))
        except urllib.error.HTTPError as error:
            if error.code not in _NO_HEAD:
                raise
        with open_url(url, Range="bytes=0-0") as response:  # closed unread in case the host sends everything
            length = response.headers.get("Content-Length")
            return _number(response.headers.get("Content-Range", length or "").rpartition("/")[2])

    return retried(ask)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _compare(weights: Weights, size: int | None, etag: str | None) -> tuple[bool, str]:
    shown = "unknown size" if size is None else f"{size:,} bytes"
    if weights.size and size is not None and size != weights.size:
        return False, f"differs: {shown} instead of {weights.size:,}"
    expected, kind = (weights.sha256, "sha256") if is_sha256(etag) else (weights.git_blob, "git blob")
    if etag and expected and len(etag) == len(expected):
        return (True, f"{kind} matches, {shown}") if etag == expected else (False, f"differs: its {kind} is {etag}")
    if weights.size and size is not None:
        return True, "size matches, content not checked"
    return True, f"exists ({shown}), content not checked"
