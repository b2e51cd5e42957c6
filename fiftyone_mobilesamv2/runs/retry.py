"""The database, where it isn't always there: restarted, out of reach, or too slow to answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

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
    start, pause = time.monotonic(), 0.1
    while True:
        try:
            found = call()
        except AWAY as error:
            waited = time.monotonic() - start
            if given_up.is_set() or waited > PATIENCE:
                raise
            if pause < 1 <= 2 * pause:  # once
                logger.warning(
                    "The database doesn't answer; waiting up to %d s for it: %s", PATIENCE, first_line(error)
                )
            given_up.wait(pause)
            pause = min(2 * pause, 10)
        else:
            if pause > 1:
                logger.warning("The database answers again")
            return found


def with_journaled_writes(collection: Collection[Document]) -> Collection[Document]:
    """The collection, with writes that are acknowledged only when they are in the journal: MongoDB forgets what was
    written in the last tenth of a second before it is killed.
    """
    concern = collection.write_concern.document | {"j": True}
    return collection.with_options(write_concern=WriteConcern(**concern))


def first_line(error: Exception) -> str:
    """What an error says, without the state of every server, which pymongo adds."""
    return str(error).split(", Timeout:")[0].split("\n")[0][:300]
