"""MySQL and MariaDB, through aiomysql: each operation is one packet of several statements.

The driver always negotiates multi-statements, so a whole transaction is one round trip. Values are
put into the text as literals: ids as hexadecimal bytes, which no character set and no sql_mode
reads differently; items as strings by the driver's own escaping, which knows NO_BACKSLASH_ESCAPES.
The session's row is locked first, and rows are read after that, so the result is the same at every
isolation level. Only what both MySQL 8 and MariaDB understand is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pymysql

from shardgate.errors import UsageError
from shardgate.sql.dialect import LISTED_AT_SECONDS, Dialect, Key, Popped, Row, nbytes, one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOW = "@shardgate_now"

# User variables outlive a statement, and SELECT … INTO leaves them as they were when it finds
# nothing: so each packet sets those that it uses first.
_APPEND = """
    SET {now} = UTC_TIMESTAMP(6), @shardgate_next = NULL;
    START TRANSACTION;
    INSERT INTO {sessions}
        (tenant_id, session_id, h, incarnation, next_seq, floor_seq, revision,
         item_count, byte_count, created_at, updated_at, listed_at)
    VALUES (%(tenant)s, %(session)s, %(h)s, %(incarnation)s, %(n)s + 1, 1, 1,
            %(n)s, %(size)s, {now}, {now}, {now})
    ON DUPLICATE KEY UPDATE
        next_seq = next_seq + %(n)s,
        revision = revision + 1,
        item_count = item_count + %(n)s,
        byte_count = byte_count + %(size)s,
        updated_at = {now},
        listed_at = IF(listed_at < {now} - INTERVAL {coarse} SECOND, {now}, listed_at);
    SELECT next_seq - %(n)s INTO @shardgate_next FROM {sessions}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s FOR UPDATE;
    INSERT INTO {messages} (tenant_id, session_id, seq, message_data, nbytes, created_at)
    VALUES %(rows)s;
    COMMIT
"""

_APPEND_ROW = "(%(tenant)s, %(session)s, @shardgate_next + %(place)s, %(data)s, %(size)s, {now})"

# One SELECT is one snapshot. At SERIALIZABLE it would lock what it reads, hence the first line. The
# last one ends the transaction that a connection without autocommit is in by now: not every pool
# does it on return.
_TAIL = """
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
    SELECT seq, CAST(message_data AS BINARY) FROM {messages}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq >= (
        SELECT floor_seq FROM {sessions}
        WHERE tenant_id = %(tenant)s AND session_id = %(session)s)
    ORDER BY seq DESC %(limit)s;
    COMMIT
"""

_POP = """
    SET {now} = UTC_TIMESTAMP(6), @shardgate_floor = NULL, @shardgate_seq = NULL,
        @shardgate_json = NULL, @shardgate_size = NULL;
    START TRANSACTION;
    SELECT floor_seq INTO @shardgate_floor FROM {sessions}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s FOR UPDATE;
    SELECT seq, JSON_VALID(message_data), nbytes
    INTO @shardgate_seq, @shardgate_json, @shardgate_size FROM {messages}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq >= @shardgate_floor
    ORDER BY seq DESC LIMIT 1;
    SELECT @shardgate_seq, @shardgate_json, (
        SELECT CAST(message_data AS BINARY) FROM {messages}
        WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq = @shardgate_seq
            AND @shardgate_json = 1);
    DELETE FROM {messages}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq = @shardgate_seq
        AND @shardgate_json = 1;
    UPDATE {sessions} SET
        revision = revision + 1,
        item_count = item_count - 1,
        byte_count = byte_count - @shardgate_size,
        updated_at = {now}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND @shardgate_json = 1;
    COMMIT
"""

_CLEAR = """
    SET {now} = UTC_TIMESTAMP(6), @shardgate_floor = NULL;
    START TRANSACTION;
    UPDATE {sessions} SET
        floor_seq = next_seq,
        revision = revision + 1,
        item_count = 0,
        byte_count = 0,
        updated_at = {now}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s;
    SELECT floor_seq INTO @shardgate_floor FROM {sessions}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s FOR UPDATE;
    DELETE FROM {messages}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq < @shardgate_floor;
    COMMIT
"""

_LOCK_WAIT_TIMEOUT, _DEADLOCK, _RECORD_CHANGED = 1205, 1213, 1020
_LARGE_PACKET = 1 << 20
_IN_TRANSACTION = 0x0001


def _bytes_literal(value: str) -> str:
    """An id as SQL: a hexadecimal literal, a VARBINARY in every character set and sql_mode."""
    return f"X'{value.encode().hex()}'"


class MySQL(Dialect):
    """aiomysql, for MySQL 8 and MariaDB."""

    driver: ClassVar[str] = "aiomysql"

    def _prepare(self) -> None:
        names = self.names() | {"now": _NOW, "coarse": str(LISTED_AT_SECONDS)}
        # A percent sign in a table's name has been doubled by SQLAlchemy, as its own formatting of
        # parameters needs it; so does ours.
        self.append_sql = one_line(_APPEND.format_map(names))
        self.append_row_sql = one_line(_APPEND_ROW.format_map(names))
        self.tail_sql = one_line(_TAIL.format_map(names))
        self.pop_sql = one_line(_POP.format_map(names))
        self.clear_sql = one_line(_CLEAR.format_map(names))
        self._cursor = self.sqlalchemy_dialect.loaded_dbapi.Cursor

    async def append(
        self, connection: Any, key: Key, items: Sequence[str], incarnation: int
    ) -> None:
        sizes = [nbytes(item) for item in items]
        ids = self._ids(key)
        rows = ", ".join(
            self.append_row_sql
            % (ids | {"place": place, "data": _text_literal(connection, item), "size": size})
            for place, (item, size) in enumerate(zip(items, sizes, strict=True))
        )
        await self._send(
            connection,
            self.append_sql
            % (
                ids
                | {
                    "h": key.h,
                    "incarnation": incarnation,
                    "n": len(items),
                    "size": sum(sizes),
                    "rows": rows,
                }
            ),
        )

    async def tail(self, connection: Any, key: Key, limit: int | None) -> list[Row]:
        clause = "" if limit is None else f"LIMIT {int(limit)}"
        results = await self._send(connection, self.tail_sql % (self._ids(key) | {"limit": clause}))
        rows = next((rows for rows in results if rows), ())
        return [Row(seq, data.decode()) for seq, data in rows]

    async def pop(self, connection: Any, key: Key) -> Popped:
        results = await self._send(connection, self.pop_sql % self._ids(key))
        ((seq, is_json, data),) = next(rows for rows in results if rows)
        if seq is None:
            return Popped("empty")
        return Popped("popped", data.decode()) if is_json else Popped("undecodable")

    async def clear(self, connection: Any, key: Key) -> None:
        await self._send(connection, self.clear_sql % self._ids(key))

    def in_transaction(self, connection: Any) -> bool:
        return bool(connection.server_status & _IN_TRANSACTION)

    async def abandon(self, connection: Any) -> None:
        await connection.rollback()

    def is_contention(self, error: BaseException) -> bool:
        codes = (_LOCK_WAIT_TIMEOUT, _DEADLOCK, _RECORD_CHANGED)
        return isinstance(error, pymysql.MySQLError) and error.args[:1] in [(c,) for c in codes]

    def is_lost(self, error: BaseException) -> bool:
        """aiomysql closes a connection whose call was cancelled, and says so to the next one."""
        return isinstance(error, pymysql.InterfaceError)

    @staticmethod
    def _ids(key: Key) -> dict[str, Any]:
        return {
            "tenant": _bytes_literal(key.tenant_id),
            "session": _bytes_literal(key.session_id),
        }

    async def _send(self, connection: Any, packet: str) -> list[Sequence[Any]]:
        """The result set of each statement in ``packet``; the first error ends it."""
        if len(packet) > _LARGE_PACKET:
            await self._check_size(connection, packet)
        results = []
        async with connection.cursor(self._cursor) as cursor:
            await cursor.execute(packet)
            results.append(await cursor.fetchall())
            while await cursor.nextset():
                results.append(await cursor.fetchall())
        return results

    async def _check_size(self, connection: Any, packet: str) -> None:
        """The server drops the connection on a packet that is too large, without saying why."""
        (((limit,),),) = await self._send(connection, "SELECT @@max_allowed_packet")
        size = nbytes(packet)
        if size >= limit:
            raise UsageError(
                f"these items make a statement of {size:,} bytes, and this server's "
                f"max_allowed_packet is {limit:,}: raise it, or add the items in several calls"
            )


def _text_literal(connection: Any, text: str) -> str:
    """An item as SQL. Where the connection's character set cannot carry it, as bytes."""
    if text.isascii() or connection.charset == "utf8mb4":
        return str(connection.escape(text))
    return f"CONVERT(X'{text.encode().hex()}' USING utf8mb4)"
