"""PostgreSQL, through asyncpg: each operation is one statement in autocommit at READ COMMITTED.

READ COMMITTED is what makes one statement enough: ``ON CONFLICT DO UPDATE`` waits for the row's
lock and then goes on with the row's newest version. At REPEATABLE READ or SERIALIZABLE the same
statement fails under concurrency, so a connection whose default is stricter gets an explicit
transaction (see ``admit``).

Every change runs down one chain of CTEs, each of which joins the one before it, so that nothing
happens below a link that gave no row: guard (the slot's row and the tenant's, locked FOR KEY SHARE:
a mover's fence does not wait for it, its barrier does), op, session, items.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

import asyncpg

from shardgate.items import MARKED, MAX_DEPTH, joined
from shardgate.sql.dialect import (
    LISTED_AT_SECONDS,
    LONGEST_TAIL,
    Admission,
    GatheringDialect,
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

_NOW = "(clock_timestamp() AT TIME ZONE 'UTC')"

# In every statement: $1 tenant, $2 session, $3 slot, $4 the owner's UUID.
_HELD = """
    SELECT 1 FROM {slots} AS slot, {tenants} AS tenant
    WHERE slot.slot = $3 AND slot.owner = $4 AND slot.state = 'owned'
        AND tenant.tenant_id = $1 AND tenant.status = 'admitted'
"""
_GUARD = _HELD + " FOR KEY SHARE"
_NO_GUARD = "SELECT 1 WHERE $3::int IS NULL AND $4::text IS NULL"

# $5 h, $6 op_id, $7 fingerprint. An op of the same id in flight is waited for, by the unique index.
_OP = """
    INSERT INTO {ops} (h, tenant_id, session_id, op_id, kind, fingerprint, n, created_at)
    SELECT $5, $1, $2, $6, '{kind}', $7, {n}, {now} FROM guard
    ON CONFLICT DO NOTHING RETURNING 1
"""

# $8 incarnation, $9 items, $10 their sizes in bytes, $11 how many they are, $12 all of their bytes.
# The upsert locks the session's row until the commit, so seq follows the order of commits.
_APPEND = """
    WITH guard AS MATERIALIZED ({guard}), op AS ({op}), locked AS (
        INSERT INTO {sessions} AS s
            (tenant_id, session_id, h, incarnation, next_seq, floor_seq, revision,
             item_count, byte_count, created_at, updated_at, listed_at)
        SELECT $1, $2, $5, $8, $11::bigint + 1, 1, 1, $11, $12, {now}, {now}, {now} FROM op
        ON CONFLICT (tenant_id, session_id) DO UPDATE SET
            next_seq = s.next_seq + excluded.item_count,
            revision = s.revision + 1,
            item_count = s.item_count + excluded.item_count,
            byte_count = s.byte_count + excluded.byte_count,
            updated_at = excluded.updated_at,
            listed_at = CASE WHEN s.listed_at < excluded.listed_at - interval '{coarse} seconds'
                             THEN excluded.listed_at ELSE s.listed_at END
        RETURNING s.next_seq, s.updated_at
    ), added AS (
        INSERT INTO {messages}
            (tenant_id, session_id, seq, message_data, op_id, nbytes, created_at)
        SELECT $1, $2, locked.next_seq - $11 + item.place - 1, item.data, $6, item.size,
               locked.updated_at
        FROM locked,
             unnest($9::text[], $10::bigint[]) WITH ORDINALITY AS item (data, size, place)
    )
    SELECT EXISTS (SELECT FROM guard), EXISTS (SELECT FROM op)
"""

# One row where the guard holds, none where it does not. All items in one text, with the mark $6
# between: to take twenty rows apart costs the driver a third of the reading, and an array of twenty
# costs both sides more than a text does. The limit as a subquery, which hides it: else a reading of
# few of many items would be planned anew each time.
_TAIL = """
    SELECT tail.n, tail.data FROM ({held}) AS held, LATERAL (
        SELECT count(*) AS n, string_agg(newest.message_data, $6::text) AS data FROM (
            SELECT message_data FROM {messages}
            WHERE tenant_id = $1 AND session_id = $2 AND seq >= (
                SELECT floor_seq FROM {sessions} WHERE tenant_id = $1 AND session_id = $2)
            ORDER BY seq DESC LIMIT (SELECT $5::bigint)) AS newest
    ) AS tail
"""

# As rows: a text has to fit into a server's memory, in one piece of 1 GB at most.
_LONG_TAIL = """
    SELECT newest.seq, newest.message_data
    FROM ({held}) AS held LEFT JOIN LATERAL (
        SELECT seq, message_data FROM {messages}
        WHERE tenant_id = $1 AND session_id = $2 AND seq >= (
            SELECT floor_seq FROM {sessions} WHERE tenant_id = $1 AND session_id = $2)
        ORDER BY seq DESC LIMIT $5
    ) AS newest ON true
"""

# The row's lock is waited for, and then the revision compared: if it has changed since this
# statement's snapshot, the newest row may be another one by now, and nothing is removed. The cast
# to json fails on a row that is not JSON; nothing is removed then either. One with so many brackets
# that it may be nested deeper than Python reads is left to the transaction that decodes it first.
_POP = """
    WITH guard AS MATERIALIZED ({guard}), seen AS MATERIALIZED (
        SELECT revision, floor_seq FROM {sessions}, guard
        WHERE tenant_id = $1 AND session_id = $2
    ), newest AS MATERIALIZED (
        SELECT seq, message_data, nbytes FROM {messages}
        WHERE tenant_id = $1 AND session_id = $2 AND seq >= (SELECT floor_seq FROM seen)
        ORDER BY seq DESC LIMIT 1
    ), held AS MATERIALIZED (
        SELECT s.revision FROM {sessions} AS s, guard
        WHERE s.tenant_id = $1 AND s.session_id = $2 AND EXISTS (SELECT FROM newest)
        FOR UPDATE OF s
    ), op AS (
        INSERT INTO {ops}
            (h, tenant_id, session_id, op_id, kind, fingerprint, first_seq, n, result, created_at)
        SELECT $5, $1, $2, $6, 'pop', $7, newest.seq, 1, newest.message_data, {now}
        FROM held, seen, newest
        WHERE held.revision = seen.revision AND CASE
            WHEN length(newest.message_data)
                - length(translate(newest.message_data, '[{{', '')) > {depth} THEN false
            ELSE newest.message_data::json IS NOT NULL END
        ON CONFLICT DO NOTHING RETURNING first_seq
    ), counted AS (
        UPDATE {sessions} AS s SET
            revision = s.revision + 1,
            item_count = s.item_count - 1,
            byte_count = s.byte_count - newest.nbytes,
            updated_at = {now}
        FROM op, newest WHERE s.tenant_id = $1 AND s.session_id = $2
    ), removed AS (
        DELETE FROM {messages} AS m USING op
        WHERE m.tenant_id = $1 AND m.session_id = $2 AND m.seq = op.first_seq
        RETURNING m.message_data
    )
    SELECT EXISTS (SELECT FROM guard), EXISTS (SELECT FROM newest),
           (SELECT message_data FROM removed)
"""

# A row that was appended between this statement's snapshot and its lock stays behind, below the
# floor, unseen; the next clear takes it along.
_CLEAR = """
    WITH guard AS MATERIALIZED ({guard}), op AS ({op}), cleared AS (
        UPDATE {sessions} AS s SET
            floor_seq = s.next_seq,
            revision = s.revision + 1,
            item_count = 0,
            byte_count = 0,
            updated_at = {now}
        FROM op WHERE s.tenant_id = $1 AND s.session_id = $2
        RETURNING s.floor_seq
    ), removed AS (
        DELETE FROM {messages} AS m USING cleared
        WHERE m.tenant_id = $1 AND m.session_id = $2 AND m.seq < cleared.floor_seq
    )
    SELECT EXISTS (SELECT FROM guard), EXISTS (SELECT FROM op)
"""

# To the microsecond: no two runs of servers were started at one moment. A database that is dropped
# and made again in a running server has another oid.
_SERVER = """
    SELECT pg_postmaster_start_time()::text || ' ' || (
               SELECT oid FROM pg_database WHERE datname = current_database())::text,
           pg_is_in_recovery(), current_setting('default_transaction_isolation')
"""
_ADMIT = """
    SELECT server.*, shard.shard_uuid, shard.map_version
    FROM ({server}) AS server LEFT JOIN {shard} AS shard ON true
"""

# Many appends as one, each of them guarded and recorded by itself. Sessions are locked before the
# ops are recorded, and those that somebody holds are left out instead of waited for. So a statement
# waits for another one's rows only where both make the same new session, or are twins, and makes
# sessions and ops in key order. (Two may still wait for each other, where a third has made another
# session between their snapshots, or a twin is sent by itself: one of them is then refused as
# contended, and its appends are sent one by one.) Appends of one session are numbered in their
# order ("no"). No two of a statement have the same op_id, and no two sessions the same h.
#
# What a step needs of another one is looked up in arrays: the planner takes each step for one row,
# and would join them by comparing all with all.
_JOBS = """
    job AS MATERIALIZED (
        SELECT * FROM unnest($1::text::text[], $2::text::text[], $3::text::int[],
            $4::text::text[], $5::text::bigint[], $6::text::text[], $7::text::text[],
            $9::text::int[], $10::text::bigint[]) WITH ORDINALITY
        AS job (tenant_id, session_id, slot, owner, h, op_id, fingerprint, n, size, no)
    )
"""
_HERE = """
    slot_held AS MATERIALIZED (
        SELECT slot, owner FROM {slots}
        WHERE slot = ANY (ARRAY(SELECT slot FROM job)) AND state = 'owned'
        ORDER BY slot FOR KEY SHARE
    ), tenant_held AS MATERIALIZED (
        SELECT tenant_id FROM {tenants}
        WHERE tenant_id = ANY (ARRAY(SELECT tenant_id FROM job)) AND status = 'admitted'
        ORDER BY tenant_id FOR KEY SHARE
    ), here AS MATERIALIZED (
        SELECT job.* FROM job JOIN slot_held USING (slot, owner) JOIN tenant_held USING (tenant_id)
    )
"""
_ALL_HERE = "here AS (SELECT * FROM job)"

# $8 a random number, of which each new session's incarnation is made with its hash, $11 the number
# of an item's append, $12 its place there from 1, $13 the item, $14 its size.
_APPEND_MANY = """
    WITH {jobs}, {here}, free AS MATERIALIZED (
        SELECT here.no FROM here JOIN {sessions} AS s USING (tenant_id, session_id)
        FOR NO KEY UPDATE OF s SKIP LOCKED
    ), ready AS MATERIALIZED (
        SELECT here.* FROM here WHERE no = ANY (ARRAY(SELECT no FROM free)) OR NOT EXISTS (
            SELECT FROM {sessions} AS s
            WHERE s.tenant_id = here.tenant_id AND s.session_id = here.session_id)
    ), op AS (
        INSERT INTO {ops} (h, tenant_id, session_id, op_id, kind, fingerprint, n, created_at)
        SELECT h, tenant_id, session_id, op_id, 'append', NULLIF(fingerprint, ''), n, {now}
        FROM ready
        ORDER BY h, tenant_id, session_id, op_id
        ON CONFLICT DO NOTHING RETURNING op_id
    ), fresh AS MATERIALIZED (
        SELECT ready.*,
            sum(n) OVER (PARTITION BY h) - sum(n) OVER (PARTITION BY h ORDER BY no) + n AS behind
        FROM ready WHERE op_id = ANY (ARRAY(SELECT op_id::text FROM op))
    ), locked AS (
        INSERT INTO {sessions} AS s
            (tenant_id, session_id, h, incarnation, next_seq, floor_seq, revision,
             item_count, byte_count, created_at, updated_at, listed_at)
        SELECT tenant_id, session_id, h, ($8::bigint # h) & 9223372036854775807, sum(n) + 1, 1,
               count(*), sum(n), sum(size), {now}, {now}, {now}
        FROM fresh GROUP BY tenant_id, session_id, h ORDER BY tenant_id, session_id
        ON CONFLICT (tenant_id, session_id) DO UPDATE SET
            next_seq = s.next_seq + excluded.item_count,
            revision = s.revision + excluded.revision,
            item_count = s.item_count + excluded.item_count,
            byte_count = s.byte_count + excluded.byte_count,
            updated_at = excluded.updated_at,
            listed_at = CASE WHEN s.listed_at < excluded.listed_at - interval '{coarse} seconds'
                             THEN excluded.listed_at ELSE s.listed_at END
        RETURNING s.h, s.next_seq, s.updated_at
    ), placed AS MATERIALIZED (
        SELECT fresh.*, array_position(ARRAY(SELECT h FROM locked), h) AS at FROM fresh
    ), added AS (
        INSERT INTO {messages}
            (tenant_id, session_id, seq, message_data, op_id, nbytes, created_at)
        SELECT tenant_id, session_id,
               (ARRAY(SELECT next_seq FROM locked))[at] - behind + item.place - 1, item.data,
               op_id, item.size, (ARRAY(SELECT updated_at FROM locked))[at]
        FROM placed
            JOIN unnest($11::text::int[], $12::text::int[], $13::text[], $14::text::bigint[])
            AS item (no, place, data, size) USING (no)
    )
    SELECT string_agg(steps::text, '') FROM (
        SELECT (no = ANY (ARRAY(SELECT no FROM here)))::int
            + (no = ANY (ARRAY(SELECT no FROM ready)))::int
            + (no = ANY (ARRAY(SELECT no FROM fresh)))::int
        FROM job ORDER BY no) AS come (steps)
"""
# What is answered of each append: how many of the steps "here", "ready" and "fresh" it has taken.
_HOW_FAR = {"0": Outcome.REFUSED, "1": None, "2": Outcome.REPEATED, "3": Outcome.DONE}

# The guard as a value, not as EXISTS: that might be looked up in a hash of all slots. The arrays as
# subqueries, which hide their lengths: else a few would be planned anew each time, as cheaper than
# the ten that a plan for any number counts on.
_TAIL_MANY = """
    SELECT tail.n, tail.data
    FROM unnest((SELECT $1::text::text[]), (SELECT $2::text::text[]), (SELECT $3::text::int[]),
            (SELECT $4::text::text[]), (SELECT $5::text::int[])) WITH ORDINALITY
        AS job (tenant_id, session_id, slot, owner, wanted, no),
        LATERAL (SELECT {held_many} AS here OFFSET 0) AS held
    LEFT JOIN LATERAL (
        SELECT count(*) AS n, string_agg(newest.message_data, $6::text) AS data FROM (
            SELECT m.message_data FROM {messages} AS m
            WHERE held.here AND m.tenant_id = job.tenant_id AND m.session_id = job.session_id
                AND m.seq >= (
                    SELECT s.floor_seq FROM {sessions} AS s
                    WHERE s.tenant_id = job.tenant_id AND s.session_id = job.session_id)
            ORDER BY m.seq DESC LIMIT job.wanted) AS newest
    ) AS tail ON held.here
    ORDER BY job.no
"""
_HELD_MANY = """
    COALESCE((SELECT true FROM {slots} AS slot, {tenants} AS tenant
    WHERE slot.slot = job.slot AND slot.owner = job.owner AND slot.state = 'owned'
        AND tenant.tenant_id = job.tenant_id AND tenant.status = 'admitted'), false)
"""

_ESCAPED = re.compile(r'["\\]')
_CONTENTION = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
)


_FINAL = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)
_TOO_LARGE = (
    asyncpg.ProgramLimitExceededError,
    asyncpg.OutOfMemoryError,
    asyncpg.InternalServerError,  # "invalid memory alloc request size"
)
_PASSING = (
    asyncpg.QueryCanceledError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
)


class PostgreSQL(GatheringDialect):
    """asyncpg."""

    driver: ClassVar[str] = "asyncpg"
    begins: ClassVar[bool] = True

    def _prepare(self) -> None:
        names = self.names() | {
            "now": _NOW,
            "coarse": str(LISTED_AT_SECONDS),
            "depth": str(MAX_DEPTH),
        }
        guarded = self.tables.of_gateway
        names["guard"] = (_GUARD if guarded else _NO_GUARD).format_map(names)
        names["held"] = (_HELD if guarded else _NO_GUARD).format_map(names)

        def write(statement: str, kind: str = "", n: str = "") -> str:
            op = _OP.format_map(names | {"kind": kind, "n": n})
            return one_line(statement.format_map(names | {"op": op}))

        names["server"] = _SERVER
        self.admit_sql = write(_ADMIT) if guarded else one_line(f"{_SERVER}, NULL, NULL")
        names["jobs"] = _JOBS
        names["here"] = (_HERE if guarded else _ALL_HERE).format_map(names)
        names["held_many"] = _HELD_MANY.format_map(names) if guarded else "true"
        self.append_many_sql = write(_APPEND_MANY)
        self.tail_many_sql = write(_TAIL_MANY)
        self.append_sql = write(_APPEND, "append", "$11::bigint")
        self.tail_sql = write(_TAIL)
        self.long_tail_sql = write(_LONG_TAIL)
        self.pop_sql = write(_POP)
        self.clear_sql = write(_CLEAR, "clear", "NULL")

    async def append(self, connection: Any, append: Append) -> Outcome:
        items = append.items
        sizes = [nbytes(item) for item in items]
        row = await connection.fetchrow(
            self.append_sql,
            *_change(append.key, append.guard, append.operation),
            new_incarnation(),
            items,
            sizes,
            len(sizes),
            sum(sizes),
        )
        return _outcome(row)

    async def tail(self, connection: Any, read: TailRead) -> Texts | None:
        values = *_place(read.key, read.guard), read.limit
        is_short = read.limit is not None and read.limit <= LONGEST_TAIL
        if is_short and not connection.is_in_transaction():  # there, what fails ends all of it
            try:
                row = await connection.fetchrow(self.tail_sql, *values, MARKED)
            except _TOO_LARGE:  # for one text
                pass
            else:
                return None if row is None else (row[0], row[1] or "")
        rows = await connection.fetch(self.long_tail_sql, *values)
        return joined([data for seq, data in rows if seq is not None]) if rows else None

    async def append_many(self, connection: Any, appends: Sequence[Append]) -> list[Outcome | None]:
        if len({append.key for append in appends}) != len({append.key.h for append in appends}):
            raise ValueError("two sessions of the same hash cannot be in one statement")
        # Column by column: a tuple for each append would be more to make, and to collect.
        operations, contents = [append.operation for append in appends], [a.items for a in appends]
        sizes = [[nbytes(item) for item in items] for items in contents]
        how_far = await connection.fetchval(
            self.append_many_sql,
            *_places(appends),
            _numbers([append.key.h for append in appends]),
            _texts([operation.op_id for operation in operations]),
            _texts([operation.fingerprint or "" for operation in operations]),
            new_incarnation(),
            _numbers([len(items) for items in contents]),
            _numbers([sum(size) for size in sizes]),
            _numbers([number for number, items in enumerate(contents, 1) for _ in items]),
            _numbers([place for items in contents for place in range(1, len(items) + 1)]),
            [item for items in contents for item in items],
            _numbers([one for size in sizes for one in size]),
        )
        return [_HOW_FAR[steps] for steps in how_far]

    async def tail_many(
        self, connection: Any, reads: Sequence[TailRead]
    ) -> list[tuple[int, str] | None]:
        limits = [read.limit for read in reads if read.limit is not None]
        if len(limits) != len(reads):
            raise ValueError("a reading of all rows cannot be in one statement with others")
        values = *_places(reads), _numbers(limits), MARKED
        rows = await connection.fetch(self.tail_many_sql, *values)
        return [None if n is None else (n, data or "") for n, data in rows]

    async def pop(
        self, connection: Any, key: Key, guard: Guard | None, operation: Operation
    ) -> tuple[Outcome, str | None]:
        try:
            here, found, data = await connection.fetchrow(
                self.pop_sql, *_change(key, guard, operation)
            )
        except asyncpg.InvalidTextRepresentationError:
            return Outcome.UNDECODABLE, None
        if data is not None:
            return Outcome.DONE, data
        if not here:
            return Outcome.REFUSED, None
        return (Outcome.CONTENDED if found else Outcome.EMPTY), None

    async def clear(
        self, connection: Any, key: Key, guard: Guard | None, operation: Operation
    ) -> Outcome:
        return _outcome(await connection.fetchrow(self.clear_sql, *_change(key, guard, operation)))

    async def abandon(self, connection: Any) -> None:
        """A failed statement in autocommit leaves nothing open."""

    def is_contention(self, error: BaseException) -> bool:
        return isinstance(error, _CONTENTION)

    def is_passing(self, error: BaseException) -> bool:
        return isinstance(error, _PASSING)

    def is_final(self, error: BaseException) -> bool:
        return isinstance(error, _FINAL)

    def is_lost(self, error: BaseException) -> bool:
        """While a connection is being made, SQLAlchemy does not take its loss for one."""
        return isinstance(error, asyncpg.PostgresConnectionError)

    def in_transaction(self, connection: Any) -> bool:
        return bool(connection.is_in_transaction())

    async def admit(self, connection: Any) -> Admission:
        try:
            row = await connection.fetchrow(self.admit_sql)
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            row = (*await connection.fetchrow(_SERVER), None, None)
        name, standby, level, uuid, version = row
        server = Server(name, standby=standby)
        return Admission(server, level == "read committed", uuid, version or 0)


def _place(key: Key, guard: Guard | None) -> tuple[Any, ...]:
    slot, owner = (None, None) if guard is None else (guard.slot, guard.owner)
    return key.tenant_id, key.session_id, slot, owner


def _places(loads: Sequence[Append] | Sequence[TailRead]) -> tuple[str | None, ...]:
    """As :func:`_place` of each of them: an array for each column, NULL where there are no guards.

    Arrays are sent as text: of each element of a list asyncpg asks whether it is a list itself,
    which takes it longer than all else that it does for it.
    """
    keys = [load.key for load in loads]
    guards = [load.guard for load in loads if load.guard is not None]
    guarded = len(guards) == len(loads)  # all are, or none
    return (
        _texts([key.tenant_id for key in keys]),
        _texts([key.session_id for key in keys]),
        _numbers([guard.slot for guard in guards]) if guarded else None,
        _texts([guard.owner for guard in guards]) if guarded else None,
    )


def _numbers(values: list[int]) -> str:
    """An array of numbers as PostgreSQL reads it."""
    return f"{{{str(values)[1:-1]}}}"


def _texts(values: list[str]) -> str:
    """An array of texts as PostgreSQL reads it, whatever they hold."""
    quoted = '","'.join(values)
    if "\\" in quoted or quoted.count('"') != 2 * (len(values) - 1):
        quoted = '","'.join([_ESCAPED.sub(r"\\\g<0>", value) for value in values])
    return f'{{"{quoted}"}}'


def _change(key: Key, guard: Guard | None, operation: Operation) -> tuple[Any, ...]:
    return *_place(key, guard), key.h, operation.op_id, operation.fingerprint


def _outcome(row: tuple[bool, bool]) -> Outcome:
    here, new = row
    if not here:
        return Outcome.REFUSED
    return Outcome.DONE if new else Outcome.REPEATED
