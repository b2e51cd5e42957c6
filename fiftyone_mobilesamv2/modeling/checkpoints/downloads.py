"""Downloads weights from known hosts only; resumes, retries, and verifies files before it puts them in place."""

from __future__ import annotations

import errno
import http.client
import logging
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import tenacity
from tqdm import tqdm

from ...errors import CheckpointError, message_of
from .catalog import HOSTS, HubFile, Weights
from .verification import find_problem, record_path

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

logger = logging.getLogger(__name__)

DOWNLOAD_HOSTS_VARIABLE = "FIFTYONE_MOBILESAMV2_DOWNLOAD_HOSTS"

MAX_ATTEMPTS = 4  # in a row without receiving a byte
FIRST_WAIT = 1.0  # seconds before the second attempt; doubled for each further one
MAX_WAIT = 60.0  # longest wait in seconds that a host may request; beyond it, the next source is tried
TIMEOUT = 30.0  # seconds without a response

# Rate limits and transient faults: https://www.rfc-editor.org/rfc/rfc9110#name-status-codes, RFC 6585.
_TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_SECRETS = re.compile(r"(?<=//)[^\s'\"]*@|\?[^\s'\"]+")  # in a URL: user and password, and the query

# Called with the file's name, the bytes received, and the total bytes if the server reports them.
DownloadProgress = Callable[[str, int, int | None], None]

T = TypeVar("T")


class _Broken(OSError):
    """The connection broke before the file was complete."""


class _WrongFile(CheckpointError):
    """A source offers a different file from the one in the catalog."""


def download(weights: Weights, path: Path, progress: DownloadProgress | None = None) -> dict[str, str]:
    """Downloads `weights` to a file beside `path`, and moves it to `path` once it is verified.

    Sources are tried in order. An interrupted download is resumed, even by a later call.

    Args:
        progress: called as data arrives, instead of showing a progress bar on stderr. An exception that it raises
            stops the download, which can be resumed later.

    Returns:
        Source -> why it failed, if all sources failed; empty if the file is now at `path`.
    """
    partial = partial_path(path)
    reasons: dict[str, str] = {}
    for source in weights.sources:
        name = without_secrets(str(source))
        try:
            _get(_location(source, weights), weights, partial, record_path(path), progress)
        except Exception as error:  # OSErrors and those of the hub's HTTP client have no closer common base
            reasons[name] = explain(error)
            level = logging.WARNING if isinstance(error, _WrongFile) else logging.INFO
            logger.log(level, "Could not download %s from %s: %s", weights.filename, name, reasons[name])
            if isinstance(error, OSError) and error.errno in _FULL_DISK:
                break
            continue  # the partial file is kept for resuming
        partial.replace(path)
        return {}
    return reasons


def _get(url: str, weights: Weights, partial: Path, record: Path, progress: DownloadProgress | None) -> None:
    """Downloads `url` to `partial`. If it is another file, deletes it and raises _WrongFile."""
    limit = weights.size or 2_000_000 * weights.megabytes
    while True:
        resumed = partial.exists()
        retried(lambda: _transfer(url, partial, limit, progress), partial, progress)
        problem = find_problem(partial, weights, record)
        if problem is None:
            return
        partial.unlink()
        if not resumed:
            raise _WrongFile(f"the file there {problem}")
        # The beginning came from an earlier attempt, perhaps of another file: start over.


def partial_path(path: Path) -> Path:
    """Path of a download until it is complete."""
    return path.with_name(path.name + ".partial")


# Sources -------------------------------------------------------------------------------------------------------------


def _location(source: HubFile | str, weights: Weights) -> str:
    """The URL of a source. Raises _WrongFile if the hub's metadata shows that it has another file."""
    check_online()
    if isinstance(source, str):
        return source
    metadata = hub_metadata(source)
    if weights.sha256 and is_sha256(metadata.etag) and metadata.etag != weights.sha256:
        raise _WrongFile(f"the file there is not {weights.filename}: its sha256 is {metadata.etag}")
    return metadata.location


def hub_metadata(source: HubFile) -> HfFileMetadata:
    """The hub's metadata for a file: `etag` (the sha256 for large files), `size`, `location`, `commit_hash`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    # The hub's library resolves a file's location (mirrors, offline mode, tokens). Its own downloader would retry a
    # dead network for 23 seconds per file and keep a folder beside the weights.
    url = hf_hub_url(source.repo, source.path, revision=source.revision)
    check_host(url)  # it may be a mirror's, and it receives the user's token
    return retried(lambda: get_hf_file_metadata(url))


def is_sha256(etag: str | None) -> bool:
    """Whether the hub's etag of a file is its sha256, as for files in large file storage."""
    return bool(etag and re.fullmatch(r"[0-9a-f]{64}", etag))


def check_online() -> None:
    """Raises CheckpointError if the hub library is in offline mode, which applies to all sources."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError("offline mode (HF_HUB_OFFLINE is set)")


def check_host(url: str) -> None:
    """Raises CheckpointError unless weights may be downloaded from `url`.

    Allowed are the catalog's hosts over https, and the origins listed in $FIFTYONE_MOBILESAMV2_DOWNLOAD_HOSTS, such as
    "https://mirror.example http://10.0.0.5:8000".
    """
    parts = urllib.parse.urlsplit(url)
    origin = f"{parts.scheme}://{parts.netloc}".lower()
    if parts.scheme == "https" and HOSTS.fullmatch(parts.netloc.lower()):
        return
    if "@" not in origin and origin in os.environ.get(DOWNLOAD_HOSTS_VARIABLE, "").lower().split():
        return
    try:
        parts.port  # noqa: B018  raises if an unquoted password has shifted the other parts
    except ValueError:
        origin = "The host of this URL"
    raise CheckpointError(
        f"{without_secrets(origin)} is not a trusted host for weights; if you trust it, add it to "
        f"{DOWNLOAD_HOSTS_VARIABLE}"
    )


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        check_host(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    """Opens a URL on one of the allowed hosts; redirects are checked, too."""
    check_host(url)
    request = urllib.request.Request(url, headers=headers, method=method)
    response: http.client.HTTPResponse = urllib.request.build_opener(_CheckedRedirects).open(request, timeout=TIMEOUT)
    return response


def explain(error: BaseException) -> str:
    """Describes a request's error as part of a sentence, without secrets."""
    if status := http_status(error):
        text = f"HTTP status {status} ({getattr(error, 'reason', '') or http.client.responses.get(status)})"
    else:
        text = message_of(error)
    return without_secrets(" ".join(text.split()))


def without_secrets(text: str) -> str:
    """`text` with possible secrets removed from its URLs."""
    return _SECRETS.sub("", text)


# Bytes ---------------------------------------------------------------------------------------------------------------


def _transfer(url: str, partial: Path, limit: int, progress: DownloadProgress | None) -> None:
    """Downloads `url` to `partial`, resuming an earlier attempt. Accepts at most `limit` bytes."""
    start = partial.stat().st_size if partial.exists() else 0
    try:
        response = open_url(url, **({"Range": f"bytes={start}-"} if start else {}))
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # the file is already complete
            return
        raise
    with response:
        if response.status != 206:  # the server ignores the range and sends the whole file
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        too_large = _WrongFile(f"the file there is not {partial.stem}: it has more than {limit:,} bytes")
        if total is not None and total > limit:
            raise too_large
        bar = tqdm(
            initial=start,
            total=total,
            unit="B",
            unit_scale=True,
            desc=partial.stem,
            file=sys.stderr,
            disable=progress is not None,
        )
        with partial.open("ab" if start else "wb") as file, bar:
            while chunk := _read(response):
                if file.tell() + len(chunk) > limit:
                    file.truncate(0)
                    raise too_large
                file.write(chunk)
                bar.update(len(chunk))
                if progress is not None:
                    progress(partial.stem, file.tell(), total)
    if total is not None and partial.stat().st_size < total:
        raise _Broken(f"the connection broke after {partial.stat().st_size:,} of {total:,} bytes; try again to resume")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(1 << 20)
    except http.client.IncompleteRead as error:
        return error.partial  # the missing bytes show in the file's size
    except (TimeoutError, ConnectionError) as error:
        raise _Broken(f"the connection broke ({message_of(error)}); try again to resume") from error


# Retries -------------------------------------------------------------------------------------------------------------


def retried(request: Callable[[], T], partial: Path | None = None, progress: DownloadProgress | None = None) -> T:
    """Calls `request` and returns its result, retrying after rate limits, server errors and broken connections.

    Args:
        partial: the file being downloaded; attempts during which it grows don't count.
        progress: also called while waiting, so that it can stop the wait by raising.
    """

    def sleep(seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if progress is not None and partial is not None:
                progress(partial.stem, partial.stat().st_size if partial.exists() else 0, None)
            time.sleep(min(left, 0.5))

    def log_retry(state: tenacity.RetryCallState) -> None:
        if (error := _error_of(state)) and state.next_action:
            logger.info("%s; trying again in %.0f s", explain(error), state.next_action.sleep)

    return tenacity.Retrying(
        sleep=sleep,
        retry=tenacity.retry_if_exception(_is_transient),
        stop=_Attempts(partial),
        wait=_wait,
        before_sleep=log_retry,
        reraise=True,
    )(request)


class _Attempts:
    """Stops retrying after MAX_ATTEMPTS failures in a row in which no data arrived."""

    def __init__(self, partial: Path | None) -> None:
        self.partial = partial
        self.size = self._size()
        self.failures = 0

    def _size(self) -> int:
        return self.partial.stat().st_size if self.partial is not None and self.partial.exists() else 0

    def __call__(self, state: tenacity.RetryCallState) -> bool:
        size = self._size()
        self.failures = 1 if size > self.size else self.failures + 1
        self.size = size
        return self.failures >= MAX_ATTEMPTS


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, _Broken):
        return True
    status = http_status(error)
    return status in _TRANSIENT_STATUSES and (_requested_wait(error) or 0) <= MAX_WAIT


def _wait(state: tenacity.RetryCallState) -> float:
    error = _error_of(state)
    requested = None if error is None else _requested_wait(error)
    return FIRST_WAIT * 2 ** (min(state.attempt_number, MAX_ATTEMPTS) - 1) if requested is None else requested


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


def http_status(error: BaseException) -> int | None:
    """The HTTP status of an error of urllib or of the hub's HTTP client; None if it has none."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    return getattr(getattr(error, "response", None), "status_code", None)


def _requested_wait(error: BaseException) -> float | None:
    """The wait that the host requests, if it gives it in seconds."""
    response = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "response", None)
    value = (getattr(response, "headers", None) or {}).get("Retry-After", "")
    return float(value) if re.fullmatch(r"\d+", value) else None
