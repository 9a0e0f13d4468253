"""SQLite, through aiosqlite: each operation is one function on the connection's own thread.

A transaction of three statements would cost a hop to the thread and back for each; as one function
it costs one, and nothing else can come between on that connection, not even under StaticPool,
where every task shares it. ``BEGIN IMMEDIATE`` takes the database's write lock before the first
read, so nothing that was read can change before it is written.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from shardgate.settling import settle
from shardgate.sql.dialect import LISTED_AT_SECONDS, Dialect, Key, Popped, Row, nbytes, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

_APPEND_SESSION = """
    INSERT INTO {sessions}
        (tenant_id, session_id, h, incarnation, next_seq, floor_seq, revision,
         item_count, byte_count, created_at, updated_at, listed_at)
    VALUES (:tenant, :session, :h, :incarnation, :n + 1, 1, 1, :n, :size, :now, :now, :now)
    ON CONFLICT (tenant_id, session_id) DO UPDATE SET
        next_seq = next_seq + :n,
        revision = revision + 1,
        item_count = item_count + :n,
        byte_count = byte_count + :size,
        updated_at = :now,
        listed_at = CASE WHEN listed_at < :stale THEN :now ELSE listed_at END
"""

_NEXT_SEQ = "SELECT next_seq FROM {sessions} WHERE tenant_id = :tenant AND session_id = :session"

_APPEND_ITEM = """
    INSERT INTO {messages} (tenant_id, session_id, seq, message_data, nbytes, created_at)
    VALUES (?, ?, ?, ?, ?, ?)
"""

_TAIL = """
    SELECT seq, message_data, nbytes FROM {messages}
    WHERE tenant_id = :tenant AND session_id = :session AND seq >= (
        SELECT floor_seq FROM {sessions} WHERE tenant_id = :tenant AND session_id = :session)
    ORDER BY seq DESC LIMIT :limit
"""

_DELETE_ITEM = """
    DELETE FROM {messages} WHERE tenant_id = :tenant AND session_id = :session AND seq = :seq
"""

_COUNT_POP = """
    UPDATE {sessions} SET
        revision = revision + 1,
        item_count = item_count - 1,
        byte_count = byte_count - :size,
        updated_at = :now
    WHERE tenant_id = :tenant AND session_id = :session
"""

_CLEAR_SESSION = """
    UPDATE {sessions} SET
        floor_seq = next_seq,
        revision = revision + 1,
        item_count = 0,
        byte_count = 0,
        updated_at = :now
    WHERE tenant_id = :tenant AND session_id = :session
"""

_DELETE_ITEMS = "DELETE FROM {messages} WHERE tenant_id = :tenant AND session_id = :session"

_ALL = -1
_PRIMARY_CODE = 0xFF


class BusyConnection(sqlite3.OperationalError):
    """The shared connection is inside somebody's transaction; nothing was done."""


class SQLite(Dialect):
    """aiosqlite."""

    driver: ClassVar[str] = "aiosqlite"
    one_thread: ClassVar[bool] = True

    def _prepare(self) -> None:
        names = self.names()

        def write(statement: str) -> str:
            return one_line(statement.format_map(names))

        self.append_session_sql = write(_APPEND_SESSION)
        self.next_seq_sql = write(_NEXT_SEQ)
        self.append_item_sql = write(_APPEND_ITEM)
        self.tail_sql = write(_TAIL)
        self.delete_item_sql = write(_DELETE_ITEM)
        self.count_pop_sql = write(_COUNT_POP)
        self.clear_session_sql = write(_CLEAR_SESSION)
        self.delete_items_sql = write(_DELETE_ITEMS)

    async def append(
        self, connection: Any, key: Key, items: Sequence[str], incarnation: int
    ) -> None:
        await _on_thread(connection, self._append, key, items, incarnation)

    async def tail(self, connection: Any, key: Key, limit: int | None) -> list[Row]:
        return await _on_thread(connection, self._tail, key, limit)

    async def pop(self, connection: Any, key: Key) -> Popped:
        return await _on_thread(connection, self._pop, key)

    async def clear(self, connection: Any, key: Key) -> None:
        await _on_thread(connection, self._clear, key)

    def in_transaction(self, connection: Any) -> bool:
        """Asked on the connection's thread, within each operation: see ``_transaction``."""
        return False

    async def abandon(self, connection: Any) -> None:
        """Each function has already rolled back on its way out."""

    def is_contention(self, error: BaseException) -> bool:
        if not isinstance(error, sqlite3.OperationalError):
            return False
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & _PRIMARY_CODE
        busy = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        return isinstance(error, BusyConnection) or code in busy

    def _append(self, connection: Any, key: Key, items: Sequence[str], incarnation: int) -> None:
        now = datetime.now(UTC)
        sizes = [nbytes(item) for item in items]
        ids = _ids(key)
        session = ids | {
            "h": key.h,
            "incarnation": incarnation,
            "n": len(items),
            "size": sum(sizes),
            "now": _timestamp(now),
            "stale": _timestamp(now - timedelta(seconds=LISTED_AT_SECONDS)),
        }
        with _transaction(connection) as raw:
            raw.execute(self.append_session_sql, session)
            ((next_seq,),) = raw.execute(self.next_seq_sql, ids)
            first = next_seq - len(items)
            raw.executemany(
                self.append_item_sql,
                [
                    (key.tenant_id, key.session_id, first + place, item, size, session["now"])
                    for place, (item, size) in enumerate(zip(items, sizes, strict=True))
                ],
            )

    def _tail(self, connection: Any, key: Key, limit: int | None) -> list[Row]:
        parameters = _ids(key) | {"limit": _ALL if limit is None else limit}
        with _idle(connection) as raw:
            return [Row(seq, data) for seq, data, _ in raw.execute(self.tail_sql, parameters)]

    def _pop(self, connection: Any, key: Key) -> Popped:
        ids = _ids(key)
        with _transaction(connection) as raw:
            row = raw.execute(self.tail_sql, ids | {"limit": 1}).fetchone()
            if row is None:
                return Popped("empty")
            seq, data, size = row
            if not _is_json(data):
                return Popped("undecodable")
            raw.execute(self.delete_item_sql, ids | {"seq": seq})
            now = _timestamp(datetime.now(UTC))
            raw.execute(self.count_pop_sql, ids | {"size": size, "now": now})
            return Popped("popped", data)

    def _clear(self, connection: Any, key: Key) -> None:
        ids = _ids(key)
        with _transaction(connection) as raw:
            raw.execute(self.clear_session_sql, ids | {"now": _timestamp(datetime.now(UTC))})
            raw.execute(self.delete_items_sql, ids)


async def _on_thread(connection: Any, act: Callable[..., T], *arguments: Any) -> T:
    """Run ``act`` on the connection's thread, to its end even if the caller is cancelled: nothing
    can stop it half-way, and the connection is of no use to anybody before."""
    return await settle(connection._execute(act, connection, *arguments))


def _ids(key: Key) -> dict[str, Any]:
    return {"tenant": key.tenant_id, "session": key.session_id}


def _timestamp(moment: datetime) -> str:
    """As SQLAlchemy's DateTime writes it."""
    return moment.replace(tzinfo=None).isoformat(" ", "microseconds")


def _is_json(data: object) -> bool:
    try:
        json.loads(data)  # type: ignore[arg-type]  # SQLite gives whatever was stored
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def is_always_in_transaction(connection: Any) -> bool:
    """Whether the caller has asked sqlite3 (Python 3.12+) for ``autocommit=False``."""
    return getattr(connection._conn, "autocommit", None) is False


@contextmanager
def _idle(connection: Any) -> Iterator[sqlite3.Connection]:
    """The sqlite3 connection outside any transaction (a shared one may be inside somebody's)."""
    raw: Any = connection._conn
    if is_always_in_transaction(connection):
        raw.autocommit = True
        try:
            yield raw
        finally:
            raw.autocommit = False
    elif raw.in_transaction:
        raise BusyConnection("the engine's only connection is inside another transaction")
    else:
        yield raw


@contextmanager
def _transaction(connection: Any) -> Iterator[sqlite3.Connection]:
    with _idle(connection) as raw:
        raw.execute("BEGIN IMMEDIATE")
        try:
            yield raw
            raw.execute("COMMIT")
        except BaseException:
            if raw.in_transaction:
                raw.execute("ROLLBACK")
            raise
