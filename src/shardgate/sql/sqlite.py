"""SQLite, through aiosqlite: each operation is one function on the connection's own thread.

A transaction of three statements would cost a hop to the thread and back for each; as one function
it costs one, and nothing else can come between on that connection, not even under StaticPool,
where every task shares it. ``BEGIN IMMEDIATE`` takes the database's write lock before the first
read, so nothing that was read can change before it is written.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from shardgate.items import joined
from shardgate.settling import settle
from shardgate.sql.dialect import (
    LISTED_AT_SECONDS,
    Admission,
    Dialect,
    Outcome,
    Server,
    nbytes,
    new_incarnation,
    one_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardgate.items import Texts
    from shardgate.sql.dialect import Append, Guard, Key, Operation, TailRead

T = TypeVar("T")

_GUARD = """
    SELECT 1 FROM {slots} AS slot, {tenants} AS tenant
    WHERE slot.slot = :slot AND slot.owner = :owner AND slot.state = 'owned'
        AND tenant.tenant_id = :tenant AND tenant.status = 'admitted'
"""

_ADMIT = "SELECT shard_uuid, map_version FROM {shard}"

_OP = """
    INSERT INTO {ops}
        (h, tenant_id, session_id, op_id, kind, fingerprint, first_seq, n, result, created_at)
    VALUES (:h, :tenant, :session, :op, :kind, :fingerprint, :first, :n, :result, :now)
    ON CONFLICT DO NOTHING
"""

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
    INSERT INTO {messages} (tenant_id, session_id, seq, message_data, op_id, nbytes, created_at)
    VALUES (?, ?, ?, ?, ?, ?, ?)
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

        self.guard_sql = write(_GUARD) if self.tables.of_gateway else None
        self.admit_sql = write(_ADMIT) if self.tables.of_gateway else None
        self.op_sql = write(_OP)
        self.append_session_sql = write(_APPEND_SESSION)
        self.next_seq_sql = write(_NEXT_SEQ)
        self.append_item_sql = write(_APPEND_ITEM)
        self.tail_sql = write(_TAIL)
        self.delete_item_sql = write(_DELETE_ITEM)
        self.count_pop_sql = write(_COUNT_POP)
        self.clear_session_sql = write(_CLEAR_SESSION)
        self.delete_items_sql = write(_DELETE_ITEMS)

    async def append(self, connection: Any, append: Append) -> Outcome:
        return await _on_thread(connection, self._append, append)

    async def tail(self, connection: Any, read: TailRead) -> Texts | None:
        return await _on_thread(connection, self._tail, read)

    async def pop(
        self, connection: Any, key: Key, guard: Guard | None, operation: Operation
    ) -> tuple[Outcome, str | None]:
        return await _on_thread(connection, self._pop, key, guard, operation)

    async def clear(
        self, connection: Any, key: Key, guard: Guard | None, operation: Operation
    ) -> Outcome:
        return await _on_thread(connection, self._clear, key, guard, operation)

    async def admit(self, connection: Any) -> Admission:
        return await _on_thread(connection, self._admission)

    def _admission(self, connection: Any) -> Admission:
        raw = connection._conn
        shard = None
        if self.admit_sql is not None:
            with suppress(sqlite3.OperationalError):  # there is no such table yet
                shard = raw.execute(self.admit_sql).fetchone()
        uuid, version = shard or (None, 0)
        return Admission(_server(raw), shard_uuid=uuid, map_version=version)

    def is_passing(self, error: BaseException) -> bool:
        return False

    async def abandon(self, connection: Any) -> None:
        """Each function has already rolled back on its way out."""

    def is_contention(self, error: BaseException) -> bool:
        if not isinstance(error, sqlite3.OperationalError):
            return False
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & _PRIMARY_CODE
        busy = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        return isinstance(error, BusyConnection) or code in busy

    def _append(self, connection: Any, append: Append) -> Outcome:
        now = datetime.now(UTC)
        key, operation, items = append.key, append.operation, append.items
        sizes = [nbytes(item) for item in items]
        values = _change(key, operation, now, n=len(items)) | {
            "incarnation": new_incarnation(),
            "size": sum(sizes),
            "stale": _timestamp(now - timedelta(seconds=LISTED_AT_SECONDS)),
        }
        with _transaction(connection) as raw:
            outcome = self._admit(raw, key, append.guard, values)
            if outcome is not Outcome.DONE:
                return outcome
            raw.execute(self.append_session_sql, values)
            ((next_seq,),) = raw.execute(self.next_seq_sql, values)
            row = (key.tenant_id, key.session_id)
            raw.executemany(
                self.append_item_sql,
                [
                    (*row, seq, item, operation.op_id, size, values["now"])
                    for seq, item, size in zip(
                        range(next_seq - len(items), next_seq), items, sizes, strict=True
                    )
                ],
            )
            return Outcome.DONE

    def _tail(self, connection: Any, read: TailRead) -> Texts | None:
        values = _ids(read.key) | {"limit": _ALL if read.limit is None else read.limit}
        with _transaction(connection, "BEGIN") as raw:
            if not self._holds(raw, read.key, read.guard):
                return None
            return joined([_text(data) for _, data, _ in raw.execute(self.tail_sql, values)])

    def _pop(
        self, connection: Any, key: Key, guard: Guard | None, operation: Operation
    ) -> tuple[Outcome, str | None]:
        with _transaction(connection) as raw:
            if not self._holds(raw, key, guard):
                return Outcome.REFUSED, None
            row = raw.execute(self.tail_sql, _ids(key) | {"limit": 1}).fetchone()
            if row is None:
                return Outcome.EMPTY, None
            seq, data, size = row
            if not _is_json(data):
                return Outcome.UNDECODABLE, None
            values = _change(key, operation, datetime.now(UTC), n=1)
            values |= {"first": seq, "result": data, "seq": seq, "size": size}
            if raw.execute(self.op_sql, values).rowcount == 0:
                return Outcome.REPEATED, None
            raw.execute(self.delete_item_sql, values)
            raw.execute(self.count_pop_sql, values)
            return Outcome.DONE, data

    def _clear(
        self, connection: Any, key: Key, guard: Guard | None, operation: Operation
    ) -> Outcome:
        values = _change(key, operation, datetime.now(UTC), n=None)
        with _transaction(connection) as raw:
            outcome = self._admit(raw, key, guard, values)
            if outcome is Outcome.DONE:
                raw.execute(self.clear_session_sql, values)
                raw.execute(self.delete_items_sql, values)
            return outcome

    def _holds(self, raw: sqlite3.Connection, key: Key, guard: Guard | None) -> bool:
        if guard is None or self.guard_sql is None:
            return True
        values = {"slot": guard.slot, "owner": guard.owner, "tenant": key.tenant_id}
        return raw.execute(self.guard_sql, values).fetchone() is not None

    def _admit(
        self, raw: sqlite3.Connection, key: Key, guard: Guard | None, values: dict[str, Any]
    ) -> Outcome:
        """Check the guard, and record the operation if it is new."""
        if not self._holds(raw, key, guard):
            return Outcome.REFUSED
        new = raw.execute(self.op_sql, values).rowcount == 1
        return Outcome.DONE if new else Outcome.REPEATED


def _server(raw: sqlite3.Connection) -> Server:
    """The file that a connection has open, if it has one."""
    databases = raw.execute("PRAGMA database_list").fetchall()
    path = next((path for _, name, path in databases if name == "main"), "")
    if not path:
        return Server("memory")
    found = Path(path).stat()
    return Server(f"{found.st_dev}/{found.st_ino}")


async def _on_thread(connection: Any, act: Callable[..., T], *arguments: Any) -> T:
    """Run ``act`` on the connection's thread, to its end even if the caller is cancelled: nothing
    can stop it half-way, and the connection is of no use to anybody before."""
    return await settle(connection._execute(act, connection, *arguments))


def _ids(key: Key) -> dict[str, Any]:
    return {"tenant": key.tenant_id, "session": key.session_id}


def _change(key: Key, operation: Operation, now: datetime, *, n: int | None) -> dict[str, Any]:
    return _ids(key) | {
        "h": key.h,
        "op": operation.op_id,
        "kind": operation.kind,
        "fingerprint": operation.fingerprint,
        "first": None,
        "n": n,
        "result": None,
        "now": _timestamp(now),
    }


def _timestamp(moment: datetime) -> str:
    """As SQLAlchemy's DateTime writes it."""
    return moment.replace(tzinfo=None).isoformat(" ", "microseconds")


def _text(data: str | bytes) -> str:
    """The text of a row: somebody else may have put bytes there. Where they are none, no item's."""
    try:
        return data if isinstance(data, str) else data.decode()
    except UnicodeDecodeError:
        return ""


def _is_json(data: object) -> bool:
    try:
        json.loads(data)  # type: ignore[arg-type]  # SQLite gives whatever was stored
    except (ValueError, TypeError, RecursionError):
        return False
    return True


async def begin_immediate(connection: Any) -> None:
    """Take the database's write lock on a driver's connection that SQLAlchemy has begun with.

    What a "begin" listener has begun is empty so far, and is begun anew.
    """

    def begin(connection: Any) -> None:
        if is_always_in_transaction(connection):
            return
        if connection._conn.in_transaction:
            connection._conn.execute("ROLLBACK")
        connection._conn.execute("BEGIN IMMEDIATE")

    await _on_thread(connection, begin)


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
def _transaction(connection: Any, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
    with _idle(connection) as raw:
        raw.execute(begin)
        try:
            yield raw
            raw.execute("COMMIT")
        except BaseException:
            if raw.in_transaction:
                raw.execute("ROLLBACK")
            raise
