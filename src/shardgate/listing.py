"""A tenant's sessions, listed page by page over several shards: merging, and the cursor."""

from __future__ import annotations

import base64
import heapq
import json
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING

from shardgate.errors import UsageError
from shardgate.slots import check_session_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shardgate.sql.transactions import SessionInfo

MAX_PAGE = 1000


@dataclass(frozen=True, slots=True)
class SessionPage:
    """One page of a tenant's sessions, most recently used first (to the minute).

    ``next_cursor`` is None on the last page. ``unavailable_shards`` names the shards that could not
    be asked: their sessions are missing from this page. A session that is used while its tenant's
    pages are being read moves to the front, and so may be missed by the pages still to come.
    """

    sessions: tuple[SessionInfo, ...]
    next_cursor: str | None
    unavailable_shards: tuple[str, ...] = ()


def merge(pages: Iterable[Sequence[SessionInfo]], limit: int) -> tuple[SessionInfo, ...]:
    """The first ``limit`` sessions of several shards' pages, each of them in listing order."""
    merged = heapq.merge(*pages, key=_place, reverse=True)
    return tuple(islice(merged, limit))


def _place(session: SessionInfo) -> tuple[datetime, str]:
    return session.listed_at, session.session_id


def write_cursor(tenant_id: str, keyspace: str, last: SessionInfo) -> str:
    """Where the next page begins, as opaque text; it is good for this tenant alone."""
    place = [tenant_id, keyspace, last.listed_at.isoformat(), last.session_id]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def read_cursor(tenant_id: str, keyspace: str, cursor: str) -> tuple[datetime, str]:
    """The place that a cursor stands for.

    Raises:
        UsageError: it is not a cursor, or was given out for another tenant or keyspace.
    """
    try:
        owner, where, listed_at, session_id = json.loads(
            base64.b64decode(cursor, altchars=b"-_", validate=True)
        )
        place = _checked_time(listed_at), check_session_id(session_id)
    except (ValueError, TypeError, RecursionError):
        raise UsageError(
            "this is not a cursor: pass on the next_cursor of the page before, unchanged"
        ) from None
    if (owner, where) != (tenant_id, keyspace):
        raise UsageError("this cursor was given out for another tenant or keyspace")
    return place


def _checked_time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is not None:
        raise ValueError("a stored time has no zone")
    return time


def check_limit(limit: object) -> int:
    """A page's size; raises UsageError."""
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_PAGE:
        raise UsageError(f"limit must be an integer from 1 to {MAX_PAGE}")
    return limit
