"""Retries database operations while the database is unavailable: restarting, unreachable or too slow."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import tenacity
from pymongo import WriteConcern
from pymongo.errors import ConnectionFailure, ExecutionTimeout, WriteConcernError

if TYPE_CHECKING:
    from pymongo.collection import Collection

    from ..fiftyone_internals import Document

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Transient errors: no server; a server that restarts or steps down; an operation that exceeded its time limit, or a
# write that was carried out without the requested write concern.
UNAVAILABLE = (ConnectionFailure, ExecutionTimeout, WriteConcernError)
MAX_WAIT = 300  # seconds
MAX_IDS = 800_000  # per query: at 20 bytes each they fill MongoDB's limit of 16 MB
_ATTEMPTS_UNTIL_LOGGED = 4  # about a second


def retry_while_unavailable(call: Callable[[], T], given_up: threading.Event | None = None) -> T:
    """Returns `call()`, retrying for up to five minutes while the database is unavailable.

    Args:
        call: may be executed twice, because a lost response does not tell whether it was executed.
        given_up: an event that, once set by another thread, ends the retries.

    Raises:
        Whatever `call` raises: immediately if the error is not transient.
    """
    given_up = given_up or threading.Event()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UNAVAILABLE),
        stop=tenacity.stop_after_delay(MAX_WAIT) | tenacity.stop_when_event_set(given_up),
        wait=tenacity.wait_exponential(0.1, max=10),  # seconds: 0.1, 0.2, 0.4, ...
        sleep=tenacity.sleep_using_event(given_up),
        before_sleep=_log_once,
        reraise=True,
    )
    result = retrying(call)
    if retrying.statistics["attempt_number"] > _ATTEMPTS_UNTIL_LOGGED:
        logger.warning("The database answers again")
    return result


def _log_once(state: tenacity.RetryCallState) -> None:
    if state.attempt_number == _ATTEMPTS_UNTIL_LOGGED and state.outcome is not None:
        error = state.outcome.exception()
        logger.warning("The database doesn't answer; waiting up to %d s for it: %s", MAX_WAIT, first_line(error))


def with_journaled_writes(collection: Collection[Document]) -> Collection[Document]:
    """The collection, with writes that are acknowledged only once they are in the journal.

    Without this, MongoDB loses the writes of the last tenth of a second if it is killed.
    """
    concern = collection.write_concern.document | {"j": True}
    return collection.with_options(write_concern=WriteConcern(**concern))


def first_line(error: BaseException | None) -> str:
    """An error's message, without the state of every server, which PyMongo appends."""
    return str(error).split(", Timeout:")[0].split("\n")[0][:300]
