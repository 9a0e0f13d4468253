"""PostgreSQL, through asyncpg: each operation is one statement in autocommit at READ COMMITTED.

READ COMMITTED is what makes one statement enough: ``ON CONFLICT DO UPDATE`` waits for the row's
lock and then goes on with the row's newest version. At REPEATABLE READ or SERIALIZABLE the same
statement fails under concurrency, so a connection whose default is stricter gets an explicit
transaction (see ``admit``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import asyncpg

from shardgate.sql.dialect import LISTED_AT_SECONDS, Dialect, Key, Popped, Row, nbytes, one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOW = "(clock_timestamp() AT TIME ZONE 'UTC')"

# $1 tenant, $2 session, $3 h, $4 incarnation, $5 items, $6 their sizes in bytes.
# The upsert locks the session's row until the commit, so seq follows the order of commits.
_APPEND = """
    WITH batch AS (
        SELECT count(*) AS n, sum(size) AS size FROM unnest($6::bigint[]) AS size
    ), locked AS (
        INSERT INTO {sessions} AS s
            (tenant_id, session_id, h, incarnation, next_seq, floor_seq, revision,
             item_count, byte_count, created_at, updated_at, listed_at)
        SELECT $1, $2, $3, $4, n + 1, 1, 1, n, size, {now}, {now}, {now} FROM batch
        ON CONFLICT (tenant_id, session_id) DO UPDATE SET
            next_seq = s.next_seq + excluded.item_count,
            revision = s.revision + 1,
            item_count = s.item_count + excluded.item_count,
            byte_count = s.byte_count + excluded.byte_count,
            updated_at = excluded.updated_at,
            listed_at = CASE WHEN s.listed_at < excluded.listed_at - interval '{coarse} seconds'
                             THEN excluded.listed_at ELSE s.listed_at END
        RETURNING s.next_seq, s.updated_at
    )
    INSERT INTO {messages} (tenant_id, session_id, seq, message_data, nbytes, created_at)
    SELECT $1, $2, locked.next_seq - batch.n + item.place - 1, item.data, item.size,
           locked.updated_at
    FROM locked, batch, unnest($5::text[], $6::bigint[]) WITH ORDINALITY AS item (data, size, place)
"""

_TAIL = """
    SELECT seq, message_data FROM {messages}
    WHERE tenant_id = $1 AND session_id = $2 AND seq >= (
        SELECT floor_seq FROM {sessions} WHERE tenant_id = $1 AND session_id = $2)
    ORDER BY seq DESC LIMIT $3
"""

# The UPDATE waits for the row's lock and then compares the revision: if it has changed since this
# statement's snapshot, the newest row may be another one by now, and nothing is removed. The cast
# to json fails on a row that is not JSON; nothing is removed then either.
_POP = """
    WITH seen AS MATERIALIZED (
        SELECT revision, floor_seq FROM {sessions} WHERE tenant_id = $1 AND session_id = $2
    ), newest AS MATERIALIZED (
        SELECT seq, message_data, nbytes FROM {messages}
        WHERE tenant_id = $1 AND session_id = $2 AND seq >= (SELECT floor_seq FROM seen)
        ORDER BY seq DESC LIMIT 1
    ), locked AS (
        UPDATE {sessions} AS s SET
            revision = s.revision + 1,
            item_count = s.item_count - 1,
            byte_count = s.byte_count - newest.nbytes,
            updated_at = {now}
        FROM seen, newest
        WHERE s.tenant_id = $1 AND s.session_id = $2 AND s.revision = seen.revision
            AND newest.message_data::json IS NOT NULL
        RETURNING newest.seq
    ), removed AS (
        DELETE FROM {messages} AS m USING locked
        WHERE m.tenant_id = $1 AND m.session_id = $2 AND m.seq = locked.seq
        RETURNING m.message_data
    )
    SELECT EXISTS (SELECT FROM newest) AS found, (SELECT message_data FROM removed) AS data
"""

# A row that was appended between this statement's snapshot and its lock stays behind, below the
# floor, unseen; the next clear takes it along.
_CLEAR = """
    WITH cleared AS (
        UPDATE {sessions} AS s SET
            floor_seq = s.next_seq,
            revision = s.revision + 1,
            item_count = 0,
            byte_count = 0,
            updated_at = {now}
        WHERE s.tenant_id = $1 AND s.session_id = $2
        RETURNING s.floor_seq
    )
    DELETE FROM {messages} AS m USING cleared
    WHERE m.tenant_id = $1 AND m.session_id = $2 AND m.seq < cleared.floor_seq
"""

_CONTENTION = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
)


class PostgreSQL(Dialect):
    """asyncpg."""

    driver: ClassVar[str] = "asyncpg"

    def _prepare(self) -> None:
        names = self.names() | {"now": _NOW, "coarse": str(LISTED_AT_SECONDS)}
        self.append_sql = one_line(_APPEND.format_map(names))
        self.tail_sql = one_line(_TAIL.format_map(names))
        self.pop_sql = one_line(_POP.format_map(names))
        self.clear_sql = one_line(_CLEAR.format_map(names))

    async def append(
        self, connection: Any, key: Key, items: Sequence[str], incarnation: int
    ) -> None:
        sizes = [nbytes(item) for item in items]
        await connection.fetch(
            self.append_sql, key.tenant_id, key.session_id, key.h, incarnation, items, sizes
        )

    async def tail(self, connection: Any, key: Key, limit: int | None) -> list[Row]:
        rows = await connection.fetch(self.tail_sql, key.tenant_id, key.session_id, limit)
        return [Row(row[0], row[1]) for row in rows]

    async def pop(self, connection: Any, key: Key) -> Popped:
        try:
            row = await connection.fetchrow(self.pop_sql, key.tenant_id, key.session_id)
        except asyncpg.InvalidTextRepresentationError:
            return Popped("undecodable")
        if not row["found"]:
            return Popped("empty")
        return Popped("contended") if row["data"] is None else Popped("popped", row["data"])

    async def clear(self, connection: Any, key: Key) -> None:
        await connection.fetch(self.clear_sql, key.tenant_id, key.session_id)

    def in_transaction(self, connection: Any) -> bool:
        return bool(connection.is_in_transaction())

    async def abandon(self, connection: Any) -> None:
        """A failed statement in autocommit leaves nothing open."""

    def is_contention(self, error: BaseException) -> bool:
        return isinstance(error, _CONTENTION)

    async def admit(self, connection: Any) -> bool:
        level = await connection.fetchval("SELECT current_setting('default_transaction_isolation')")
        return bool(level == "read committed")
