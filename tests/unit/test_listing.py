"""Merging pages of several shards, cursors, limits: without a database."""

from __future__ import annotations

import base64
import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardgate.errors import UsageError
from shardgate.listing import MAX_PAGE, check_limit, merge, read_cursor, write_cursor
from shardgate.sql.transactions import SessionInfo

START = datetime(2026, 1, 1)


def _info(session_id: str, listed_at: datetime = START) -> SessionInfo:
    return SessionInfo(session_id, 1, 1, START, START, listed_at)


def _place(info: SessionInfo) -> tuple[datetime, bytes]:
    return info.listed_at, info.session_id.encode()


session_ids = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
times = st.integers(0, 5).map(lambda minutes: START + timedelta(minutes=minutes, microseconds=1))
infos = st.lists(st.builds(_info, session_ids, times), unique_by=lambda info: info.session_id)


@given(infos=infos, shards=st.integers(1, 5), limit=st.integers(1, 30), data=st.data())
def test_merged_pages_are_the_beginning_of_all(
    infos: list[SessionInfo], shards: int, limit: int, data: st.DataObject
) -> None:
    pages: list[list[SessionInfo]] = [[] for _ in range(shards)]
    for info in infos:
        pages[data.draw(st.integers(0, shards - 1))].append(info)
    for page in pages:  # as a database orders them: by time, then by the bytes of the id
        page.sort(key=_place, reverse=True)
    model = sorted(infos, key=_place, reverse=True)
    assert list(merge((page[:limit] for page in pages), limit)) == model[:limit]


@given(session_id=session_ids, listed_at=st.datetimes(), tenant=st.text(min_size=1))
def test_a_cursor_comes_back_as_it_was_written(
    session_id: str, listed_at: datetime, tenant: str
) -> None:
    session_id = session_id[:255]
    cursor = write_cursor(tenant, "main", _info(session_id, listed_at))
    assert cursor.isascii()
    assert read_cursor(tenant, "main", cursor) == (listed_at, session_id)


@pytest.mark.parametrize("other", [("globex", "main"), ("acme", "eu"), ("Acme", "main")])
def test_a_cursor_of_somebody_else_is_refused(other: tuple[str, str]) -> None:
    cursor = write_cursor("acme", "main", _info("chat-1"))
    with pytest.raises(UsageError, match="another tenant or keyspace"):
        read_cursor(*other, cursor)


def _written(*values: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode()


TIME = START.isoformat()
TAMPERED: dict[str, Any] = {
    "empty": "",
    "no base64": "!!!",
    "not ASCII": "ä",
    "half": write_cursor("acme", "main", _info("chat-1"))[:-5],
    "no JSON": base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    "too deep": base64.urlsafe_b64encode(b"[" * 100_000).decode(),
    "a number": base64.urlsafe_b64encode(b"7").decode(),
    "too few": _written("acme", "main", TIME),
    "too many": _written("acme", "main", TIME, "chat-1", 1),
    "no time": _written("acme", "main", "yesterday", "chat-1"),
    "a time that is a number": _written("acme", "main", 7, "chat-1"),
    "a time with a zone": _written("acme", "main", f"{TIME}+02:00", "chat-1"),
    "a session that is a number": _written("acme", "main", TIME, 7),
    "a session that is none": _written("acme", "main", TIME, ""),
    "a session with NUL": _written("acme", "main", TIME, "a\0b"),
    "a session with a surrogate": _written("acme", "main", TIME, "\ud800"),
    "a session that is too long": _written("acme", "main", TIME, "x" * 256),
    "no text": 7,
}


@pytest.mark.parametrize("cursor", TAMPERED.values(), ids=TAMPERED)
def test_what_is_no_cursor_is_refused(cursor: Any) -> None:
    with pytest.raises(UsageError, match="not a cursor"):
        read_cursor("acme", "main", cursor)


@given(cursor=st.one_of(st.text(), st.binary().map(lambda data: base64.b64encode(data).decode())))
def test_no_text_at_all_does_more_than_be_refused(cursor: str) -> None:
    with pytest.raises(UsageError):
        read_cursor("acme", "main", cursor)


@given(st.integers(1, MAX_PAGE))
def test_limits(limit: int) -> None:
    assert check_limit(limit) == limit


@pytest.mark.parametrize("limit", [0, -1, MAX_PAGE + 1, True, False, 1.0, "5", None, 10**30])
def test_what_is_no_limit_is_refused(limit: object) -> None:
    with pytest.raises(UsageError, match=f"limit must be an integer from 1 to {MAX_PAGE}"):
        check_limit(limit)
