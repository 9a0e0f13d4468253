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
from shardgate.items import joined
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
    from collections.abc import Sequence

    from shardgate.items import Texts
    from shardgate.sql.dialect import Append, Guard, Key, Operation, TailRead

_NOW = "@shardgate_now"

# User variables outlive a statement, and SELECT … INTO leaves them as they were when it finds
# nothing: so each packet sets those that it uses first.
_HELD = """
    SELECT 1 FROM {slots} AS slot, {tenants} AS tenant
    WHERE slot.slot = %(slot)s AND slot.owner = %(owner)s AND slot.state = 'owned'
        AND tenant.tenant_id = %(tenant)s AND tenant.status = 'admitted'
"""

# By primary key and of rows that exist, so no gap is locked. A mover's fence waits for it.
_GUARD = """
    SELECT 1 INTO @shardgate_here FROM {slots}
    WHERE slot = %(slot)s AND owner = %(owner)s AND state = 'owned' LOCK IN SHARE MODE;
    SELECT 1 INTO @shardgate_admitted FROM {tenants}
    WHERE tenant_id = %(tenant)s AND status = 'admitted' LOCK IN SHARE MODE;
    SET @shardgate_here = @shardgate_here AND @shardgate_admitted
"""
_NO_GUARD = "SET @shardgate_here = 1"

_BEGIN = """
    SET {now} = UTC_TIMESTAMP(6), @shardgate_here = NULL, @shardgate_admitted = NULL,
        @shardgate_new = 0, @shardgate_next = NULL, @shardgate_floor = NULL,
        @shardgate_seq = NULL, @shardgate_json = NULL, @shardgate_size = NULL;
    START TRANSACTION;
    {guard}
"""

# An op of the same id in flight is waited for, by the primary key. IGNORE: it is no error.
_OP = """
    INSERT IGNORE INTO {ops}
        (h, tenant_id, session_id, op_id, kind, fingerprint, n, created_at)
    SELECT %(h)s, %(tenant)s, %(session)s, %(op)s, '{kind}', %(fingerprint)s, %(n)s, {now}
    FROM DUAL WHERE @shardgate_here = 1;
    SET @shardgate_new = ROW_COUNT()
"""

_END = """
    SELECT @shardgate_here, @shardgate_new;
    COMMIT
"""

_APPEND = """
    {begin};
    {op};
    INSERT INTO {sessions}
        (tenant_id, session_id, h, incarnation, next_seq, floor_seq, revision,
         item_count, byte_count, created_at, updated_at, listed_at)
    SELECT %(tenant)s, %(session)s, %(h)s, %(incarnation)s, %(n)s + 1, 1, 1,
           %(n)s, %(size)s, {now}, {now}, {now}
    FROM DUAL WHERE @shardgate_new = 1
    ON DUPLICATE KEY UPDATE
        next_seq = next_seq + %(n)s,
        revision = revision + 1,
        item_count = item_count + %(n)s,
        byte_count = byte_count + %(size)s,
        updated_at = {now},
        listed_at = IF(listed_at < {now} - INTERVAL {coarse} SECOND, {now}, listed_at);
    SELECT next_seq - %(n)s INTO @shardgate_next FROM {sessions}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND @shardgate_new = 1 FOR UPDATE;
    %(rows)s;
    {end}
"""

# One statement for each item: a list of VALUES cannot be made to depend on @shardgate_new.
_APPEND_ROW = """
    INSERT INTO {messages}
        (tenant_id, session_id, seq, message_data, op_id, nbytes, created_at)
    SELECT %(tenant)s, %(session)s, @shardgate_next + %(place)s, %(data)s, %(op)s, %(size)s, {now}
    FROM DUAL WHERE @shardgate_new = 1
"""

# The uptime is in whole seconds, so when the server was started is known to the second.
_SERVER = """
    SELECT @@hostname, @@port, @@server_id, @@read_only, UNIX_TIMESTAMP(SYSDATE(6));
    SHOW GLOBAL STATUS LIKE 'Uptime'
"""
_ADMIT = "{server}; SELECT shard_uuid, map_version FROM {shard}"

# One SELECT is one snapshot. At SERIALIZABLE it would lock what it reads, hence the second line.
# The first and the last one end what a connection without autocommit is in: a listener of the pool
# may have read something, and not every pool rolls back on return.
_TAIL = """
    COMMIT;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
    SELECT held.here, newest.seq, newest.data
    FROM (SELECT EXISTS ({held}) AS here) AS held LEFT JOIN (
        SELECT seq, CAST(message_data AS BINARY) AS data FROM {messages}
        WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq >= (
            SELECT floor_seq FROM {sessions}
            WHERE tenant_id = %(tenant)s AND session_id = %(session)s)
        ORDER BY seq DESC %(limit)s
    ) AS newest ON held.here
    ORDER BY newest.seq DESC;
    COMMIT
"""

_POP = """
    {begin};
    SELECT floor_seq INTO @shardgate_floor FROM {sessions}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND @shardgate_here = 1 FOR UPDATE;
    SELECT seq, JSON_VALID(message_data), nbytes
    INTO @shardgate_seq, @shardgate_json, @shardgate_size FROM {messages}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq >= @shardgate_floor
    ORDER BY seq DESC LIMIT 1;
    INSERT IGNORE INTO {ops}
        (h, tenant_id, session_id, op_id, kind, fingerprint, first_seq, n, result, created_at)
    SELECT %(h)s, %(tenant)s, %(session)s, %(op)s, 'pop', %(fingerprint)s, seq, 1, message_data,
           {now}
    FROM {messages}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq = @shardgate_seq
        AND @shardgate_json = 1;
    SET @shardgate_new = ROW_COUNT();
    SELECT CAST(message_data AS BINARY) FROM {messages}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq = @shardgate_seq
        AND @shardgate_new = 1;
    DELETE FROM {messages}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq = @shardgate_seq
        AND @shardgate_new = 1;
    UPDATE {sessions} FORCE INDEX (PRIMARY) SET
        revision = revision + 1,
        item_count = item_count - 1,
        byte_count = byte_count - @shardgate_size,
        updated_at = {now}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND @shardgate_new = 1;
    SELECT @shardgate_here, @shardgate_seq, @shardgate_json;
    COMMIT
"""

_CLEAR = """
    {begin};
    {op};
    UPDATE {sessions} FORCE INDEX (PRIMARY) SET
        floor_seq = next_seq,
        revision = revision + 1,
        item_count = 0,
        byte_count = 0,
        updated_at = {now}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND @shardgate_new = 1;
    SELECT floor_seq INTO @shardgate_floor FROM {sessions}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND @shardgate_new = 1 FOR UPDATE;
    DELETE FROM {messages}
    WHERE tenant_id = %(tenant)s AND session_id = %(session)s AND seq < @shardgate_floor;
    {end}
"""

_LOCK_WAIT_TIMEOUT, _DEADLOCK, _RECORD_CHANGED = 1205, 1213, 1020
_NO_SUCH_TABLE = 1146
_FINAL = [(code,) for code in (1044, 1045, 1049, 1698)]
"""No access for this user, or no such database."""
_PASSING = [(code,) for code in (1290, 1317, 1792, 1836, 1969, 3024)]
"""Read-only servers; statements that were cancelled, or that took too long."""
_LARGE_PACKET = 1 << 20


def _bytes_literal(value: str) -> str:
    """An id as SQL: a hexadecimal literal, a VARBINARY in every character set and sql_mode."""
    return f"X'{value.encode().hex()}'"


class MySQL(Dialect):
    """aiomysql, for MySQL 8 and MariaDB."""

    driver: ClassVar[str] = "aiomysql"

    def _prepare(self) -> None:
        names = self.names() | {"now": _NOW, "coarse": str(LISTED_AT_SECONDS), "end": _END}
        # A percent sign in a table's name has been doubled by SQLAlchemy, as its own formatting of
        # parameters needs it; so does ours.
        guarded = self.tables.of_gateway
        guard = (_GUARD if guarded else _NO_GUARD).format_map(names)
        names["held"] = (_HELD if guarded else "SELECT 1").format_map(names)
        names["begin"] = _BEGIN.format_map(names | {"guard": guard})

        def write(statement: str, kind: str = "") -> str:
            op = _OP.format_map(names | {"kind": kind})
            return one_line(statement.format_map(names | {"op": op}))

        names["server"] = _SERVER
        self.admit_sql = (write(_ADMIT) if guarded else _SERVER) % ()
        self.append_sql = write(_APPEND, "append")
        self.append_row_sql = write(_APPEND_ROW)
        self.tail_sql = write(_TAIL)
        self.pop_sql = write(_POP)
        self.clear_sql = write(_CLEAR, "clear")
        self._cursor = self.sqlalchemy_dialect.loaded_dbapi.Cursor

    async def append(self, connection: Any, append: Append) -> Outcome:
        items = append.items
        sizes = [nbytes(item) for item in items]
        change = _change(append.key, append.guard, append.operation, n=len(items))
        rows = "; ".join(
            self.append_row_sql
            % (change | {"place": place, "data": _text_literal(connection, item), "size": size})
            for place, (item, size) in enumerate(zip(items, sizes, strict=True))
        )
        values = change | {"incarnation": new_incarnation(), "size": sum(sizes), "rows": rows}
        return _outcome(await self._change(connection, self.append_sql % values))

    async def tail(self, connection: Any, read: TailRead) -> Texts | None:
        limit = "" if read.limit is None else f"LIMIT {int(read.limit)}"
        place = _place(read.key, read.guard) | {"limit": limit}
        (rows,) = await self._send(connection, self.tail_sql % place)
        if not rows[0][0]:
            return None
        return joined([data.decode() for _, seq, data in rows if seq is not None])

    async def pop(
        self, connection: Any, key: Key, guard: Guard | None, operation: Operation
    ) -> tuple[Outcome, str | None]:
        change = _change(key, guard, operation, n=1)
        results = await self._change(connection, self.pop_sql % change)
        ((here, seq, is_json),) = results[-1]
        if len(results) > 1:
            ((data,),) = results[0]
            return Outcome.DONE, data.decode()
        if not here:
            return Outcome.REFUSED, None
        if seq is None:
            return Outcome.EMPTY, None
        return (Outcome.REPEATED if is_json else Outcome.UNDECODABLE), None

    async def clear(
        self, connection: Any, key: Key, guard: Guard | None, operation: Operation
    ) -> Outcome:
        change = _change(key, guard, operation, n=None)
        return _outcome(await self._change(connection, self.clear_sql % change))

    def is_passing(self, error: BaseException) -> bool:
        return isinstance(error, pymysql.MySQLError) and error.args[0:1] in _PASSING

    async def admit(self, connection: Any) -> Admission:
        try:
            found = await self._send(connection, self.admit_sql)
        except pymysql.ProgrammingError as error:
            if error.args[0] != _NO_SUCH_TABLE:
                raise
            await self.abandon(connection)
            found = await self._send(connection, _SERVER)
        ((*name, standby, now),), ((_, uptime),), *shard = found
        started = float(now) - float(uptime)
        server = Server("/".join(map(str, name)), started, standby=bool(standby))
        uuid, version = shard[0][0] if shard else (None, 0)
        return Admission(server, shard_uuid=uuid, map_version=version)

    async def abandon(self, connection: Any) -> None:
        await connection.rollback()

    def is_contention(self, error: BaseException) -> bool:
        codes = (_LOCK_WAIT_TIMEOUT, _DEADLOCK, _RECORD_CHANGED)
        return isinstance(error, pymysql.MySQLError) and error.args[:1] in [(c,) for c in codes]

    def is_final(self, error: BaseException) -> bool:
        return isinstance(error, pymysql.MySQLError) and error.args[0:1] in _FINAL

    def is_lost(self, error: BaseException) -> bool:
        """aiomysql closes a connection whose call was cancelled, and says so to the next one."""
        return isinstance(error, pymysql.InterfaceError)

    async def _change(self, connection: Any, packet: str) -> list[Sequence[Any]]:
        """Send a transaction: on MariaDB as one compound statement, so that it is whole or not.

        As several statements it was seen not to be: where the client is lost while the answers are
        sent, MariaDB 10.11 can commit an op without its items. MySQL has no compound statements
        outside of stored programs.
        """
        if "MariaDB" in connection.get_server_info():
            packet = f"BEGIN NOT ATOMIC {packet}; END"
        return await self._send(connection, packet)

    async def _send(self, connection: Any, packet: str) -> list[Sequence[Any]]:
        """The result sets that have rows, of the statements in ``packet``; an error ends it."""
        if len(packet) > _LARGE_PACKET:
            await self._check_size(connection, packet)
        results = []
        async with connection.cursor(self._cursor) as cursor:
            await cursor.execute(packet)
            results.append(await cursor.fetchall())
            while await cursor.nextset():
                results.append(await cursor.fetchall())
        return [rows for rows in results if rows]

    async def _check_size(self, connection: Any, packet: str) -> None:
        """The server drops the connection on a packet that is too large, without saying why."""
        (((limit,),),) = await self._send(connection, "SELECT @@max_allowed_packet")
        size = nbytes(packet)
        if size >= limit:
            raise UsageError(
                f"these items make a statement of {size:,} bytes, and this server's "
                f"max_allowed_packet is {limit:,}: raise it, or add the items in several calls"
            )


def _place(key: Key, guard: Guard | None) -> dict[str, Any]:
    place: dict[str, Any] = {
        "tenant": _bytes_literal(key.tenant_id),
        "session": _bytes_literal(key.session_id),
    }
    if guard is not None:
        place |= {"slot": guard.slot, "owner": _ascii_literal(guard.owner)}
    return place


def _change(
    key: Key, guard: Guard | None, operation: Operation, *, n: int | None
) -> dict[str, Any]:
    fingerprint = operation.fingerprint
    return _place(key, guard) | {
        "h": key.h,
        "op": _bytes_literal(operation.op_id),
        "fingerprint": "NULL" if fingerprint is None else _ascii_literal(fingerprint),
        "n": "NULL" if n is None else n,
    }


def _outcome(results: list[Sequence[Any]]) -> Outcome:
    ((here, new),) = results[-1]
    if not here:
        return Outcome.REFUSED
    return Outcome.DONE if new == 1 else Outcome.REPEATED


def _ascii_literal(value: str) -> str:
    """A UUID or a fingerprint as SQL text, whatever the connection's character set."""
    return f"CONVERT(X'{value.encode('ascii').hex()}' USING utf8mb4) COLLATE utf8mb4_bin"


def _text_literal(connection: Any, text: str) -> str:
    """An item as SQL. Where the connection's character set cannot carry it, as bytes."""
    if text.isascii() or connection.charset == "utf8mb4":
        return str(connection.escape(text))
    return f"CONVERT(X'{text.encode().hex()}' USING utf8mb4)"
