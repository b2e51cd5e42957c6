"""The database, where it isn't always there: restarted, out of reach, or too slow to answer."""

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
# What passes by itself: no server; one that restarts or steps down; one that ran out of the time it was given, or that
# has carried a write out but not as safely as was asked for.
AWAY = (ConnectionFailure, ExecutionTimeout, WriteConcernError)
PATIENCE = 300  # seconds
_ATTEMPTS_UNTIL_LOGGED = 4  # about a second
MAX_IDS = 800_000  # in a query: 16 MB, MongoDB's limit, at 20 bytes each


def retry_while_unavailable(call: Callable[[], T], given_up: threading.Event | None = None) -> T:
    """`call()`, again and again for five minutes while the database is away.

    Args:
        call: may be carried out twice, for where the answer got lost nobody knows whether it was.
        given_up: set from outside, ends the waiting.

    Raises:
        what `call` raises, at once if that does not pass by itself.
    """
    given_up = given_up or threading.Event()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(AWAY),
        stop=tenacity.stop_after_delay(PATIENCE) | tenacity.stop_when_event_set(given_up),
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
        logger.warning("The database doesn't answer; waiting up to %d s for it: %s", PATIENCE, first_line(error))


def with_journaled_writes(collection: Collection[Document]) -> Collection[Document]:
    """The collection, with writes that are acknowledged only when they are in the journal: MongoDB forgets what was
    written in the last tenth of a second before it is killed.
    """
    concern = collection.write_concern.document | {"j": True}
    return collection.with_options(write_concern=WriteConcern(**concern))


def first_line(error: BaseException | None) -> str:
    """What an error says, without the state of every server, which pymongo adds."""
    return str(error).split(", Timeout:")[0].split("\n")[0][:300]
