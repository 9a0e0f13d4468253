"""The rare operations, written once for every database with SQLAlchemy Core.

Those that change a session begin by locking its row (an UPDATE that changes nothing: that locks on
every database), so that what they read next cannot change before they commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import DateTime, and_, delete, insert, or_, select, true, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from shardgate.sql.dialect import Operation, Row, nbytes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    from sqlalchemy import ColumnElement, Table
    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.sql.dialect import Guard, Key
    from shardgate.sql.schema import Tables

    Decode = Callable[[str], Awaitable[object]]
    """Gives the item, or raises :class:`UndecodableError`."""

_BATCH = 100
VOID: Literal["void"] = "void"
"""The kind of an operation that was burnt before it took effect."""


class RefusedError(Exception):
    """The guard did not hold: the session lives elsewhere, or its tenant is not admitted here."""


class RepeatedError(Exception):
    """A twin of this operation, or the burning of it, was committed after it was looked for."""


class UndecodableError(ValueError):
    """A stored row is not an item: it was damaged, or written by something else."""


class utc_now(FunctionElement[Any]):  # noqa: N801 - an SQL function, named as those are
    """The database's clock: UTC, to the microsecond, without a zone."""

    type = DateTime()
    inherit_cache = True


@compiles(utc_now, "postgresql")
def _postgresql_now(element: utc_now, compiler: Any, **options: Any) -> str:
    return "(clock_timestamp() AT TIME ZONE 'UTC')"


@compiles(utc_now, "mysql")
@compiles(utc_now, "mariadb")
def _mysql_now(element: utc_now, compiler: Any, **options: Any) -> str:
    return "UTC_TIMESTAMP(6)"


@compiles(utc_now, "sqlite")
def _sqlite_now(element: utc_now, compiler: Any, **options: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"


@dataclass(frozen=True, slots=True)
class RecordedOp:
    """An operation that took effect, or was burnt (kind "void")."""

    kind: str
    fingerprint: str | None
    n: int | None
    result: str | None


@dataclass(frozen=True, slots=True)
class Tail:
    """The newest rows of a session, oldest first, as one statement saw them."""

    incarnation: int | None
    rows: tuple[Row, ...]
    complete: bool
    """Whether these are all of the session's rows."""


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A stored session as a listing shows it. Times are UTC, without a zone, by the shard's clock.

    ``updated_at`` is exact; the order of a listing follows a copy of it that is up to a minute old.
    """

    session_id: str
    item_count: int
    byte_count: int
    created_at: datetime
    updated_at: datetime
    listed_at: datetime


@dataclass(frozen=True, slots=True)
class Listed:
    """A shard's part of a listing: sessions with their ``h``, and whose slot map they belong to.

    Not all of them need be the shard's: rows of slots that it does not own are still to be left
    out.
    """

    shard_uuid: str | None
    map_version: int
    sessions: tuple[tuple[int, SessionInfo], ...]


def _of(table: Table, key: Key) -> ColumnElement[bool]:
    return and_(table.c.tenant_id == key.tenant_id, table.c.session_id == key.session_id)


async def check_guard(
    connection: AsyncConnection, tables: Tables, tenant_id: str, guard: Guard | None
) -> None:
    """Hold the guard until the transaction ends; raises RefusedError where it fails."""
    if guard is None:
        return
    slots, tenants = tables.slots, tables.tenants
    for statement in (
        select(slots.c.slot).where(
            slots.c.slot == guard.slot, slots.c.owner == guard.owner, slots.c.state == "owned"
        ),
        select(tenants.c.tenant_id).where(
            tenants.c.tenant_id == tenant_id, tenants.c.status == "admitted"
        ),
    ):
        shared = statement.with_for_update(read=True, key_share=True)
        if (await connection.execute(shared)).one_or_none() is None:
            raise RefusedError


async def find_op(
    connection: AsyncConnection, tables: Tables, key: Key, op_id: str
) -> RecordedOp | None:
    """What is recorded of an operation; None where it has not taken effect."""
    ops = tables.ops
    row = await connection.execute(
        select(ops.c.kind, ops.c.fingerprint, ops.c.n, ops.c.result).where(
            ops.c.h == key.h, _of(ops, key), ops.c.op_id == op_id
        )
    )
    found = row.one_or_none()
    return None if found is None else RecordedOp(*found)


async def burn_op(
    connection: AsyncConnection, tables: Tables, key: Key, guard: Guard | None, op_id: str
) -> RecordedOp | None:
    """Record that the operation will not take effect, unless it has.

    Its unique key is what decides between this and the operation itself, should it still come.
    """
    await check_guard(connection, tables, key.tenant_id, guard)
    known = await find_op(connection, tables, key, op_id)
    if known is None:
        await _record_op(connection, tables, key, Operation(op_id, VOID))
    return None if known is None or known.kind == VOID else known


async def _record_op(
    connection: AsyncConnection,
    tables: Tables,
    key: Key,
    operation: Operation,
    *,
    n: int | None = None,
    result: str | None = None,
) -> None:
    """Record an operation that is taking effect in this transaction.

    Where the session's row is locked before, a twin of the same op_id has committed, or waits.
    """
    record = insert(tables.ops).values(
        h=key.h,
        tenant_id=key.tenant_id,
        session_id=key.session_id,
        op_id=operation.op_id,
        kind=operation.kind,
        fingerprint=operation.fingerprint,
        n=n,
        result=result,
        created_at=utc_now(),
    )
    try:
        await connection.execute(record)
    except IntegrityError as error:
        raise RepeatedError(operation.op_id) from error


async def _lock(connection: AsyncConnection, tables: Tables, key: Key) -> Any | None:
    """Lock the session's row and read it; None where there is no such session.

    Where nothing was locked, nothing may be read either: a session that was made in between is
    somebody else's, who goes on appending to it.
    """
    sessions = tables.sessions
    touch = update(sessions).where(_of(sessions, key)).values(revision=sessions.c.revision)
    locked = await connection.execute(touch)
    if locked.rowcount == 0:
        return None
    return (await connection.execute(select(sessions).where(_of(sessions, key)))).one_or_none()


async def _account(
    connection: AsyncConnection, tables: Tables, key: Key, *, items: int, size: int, added: int = 0
) -> None:
    """Move the session's counters: ``items`` and ``size`` by what came less what went."""
    sessions = tables.sessions
    await connection.execute(
        update(sessions)
        .where(_of(sessions, key))
        .values(
            revision=sessions.c.revision + 1,
            next_seq=sessions.c.next_seq + added,
            item_count=sessions.c.item_count + items,
            byte_count=sessions.c.byte_count + size,
            updated_at=utc_now(),
        )
    )


async def _remove(
    connection: AsyncConnection, tables: Tables, key: Key, seqs: Sequence[int]
) -> None:
    messages = tables.messages
    await connection.execute(
        delete(messages).where(_of(messages, key), messages.c.seq.in_(list(seqs)))
    )


async def pop_decodable(
    connection: AsyncConnection,
    tables: Tables,
    key: Key,
    guard: Guard | None,
    operation: Operation,
    decode: Decode,
) -> tuple[object | None, int]:
    """Remove the newest row that ``decode`` can read; the rows that it cannot read stay.

    Where this operation took effect before, the item that it removed then.

    Returns:
        The item (None: there is none), and how many newer rows were passed over.
    """
    await check_guard(connection, tables, key.tenant_id, guard)
    session = await _lock(connection, tables, key)
    known = await find_op(connection, tables, key, operation.op_id)
    if known is not None:
        return None if known.result is None else await decode(known.result), 0
    messages, passed = tables.messages, 0
    before = 0 if session is None else session.next_seq
    while session is not None:
        rows = await connection.execute(
            select(messages.c.seq, messages.c.message_data, messages.c.nbytes)
            .where(_of(messages, key), messages.c.seq >= session.floor_seq, messages.c.seq < before)
            .order_by(messages.c.seq.desc())
            .limit(_BATCH)
        )
        batch = rows.all()
        for seq, data, size in batch:
            try:
                item = await decode(data)
            except UndecodableError:
                passed += 1
                continue
            await _record_op(connection, tables, key, operation, n=1, result=data)
            await _remove(connection, tables, key, [seq])
            await _account(connection, tables, key, items=-1, size=-size)
            return item, passed
        if len(batch) < _BATCH:
            break
        before = batch[-1].seq
    # An earlier attempt that arrives only now must not take what comes after this answer.
    await _record_op(connection, tables, key, operation, n=0)
    return None, passed


async def read_tail(
    connection: AsyncConnection, tables: Tables, key: Key, guard: Guard | None, limit: int
) -> Tail:
    """The newest ``limit`` rows with the incarnation that they belong to, in one statement."""
    await check_guard(connection, tables, key.tenant_id, guard)
    sessions, messages = tables.sessions, tables.messages
    rows = await connection.execute(
        select(sessions.c.incarnation, messages.c.seq, messages.c.message_data)
        .join(
            messages,
            and_(
                messages.c.tenant_id == sessions.c.tenant_id,
                messages.c.session_id == sessions.c.session_id,
                messages.c.seq >= sessions.c.floor_seq,
            ),
        )
        .where(_of(sessions, key), _of(messages, key))
        .order_by(messages.c.seq.desc())
        .limit(limit + 1)
    )
    found = rows.all()
    return Tail(
        incarnation=found[0].incarnation if found else None,
        rows=tuple(Row(row.seq, row.message_data) for row in reversed(found[:limit])),
        complete=len(found) <= limit,
    )


async def replace_tail(
    connection: AsyncConnection,
    tables: Tables,
    key: Key,
    guard: Guard | None,
    operation: Operation,
    *,
    incarnation: int | None,
    expected: Sequence[int],
    items: Sequence[str],
    prune: Decode | None,
) -> bool:
    """Put ``items`` in the place of the rows ``expected``, if these are still the newest.

    ``prune`` decides about the rows before them, oldest first: while it gives something true, the
    row goes; the first that stays ends it.

    Returns:
        False, with nothing changed, where the session was changed or made anew meanwhile:
        (incarnation, seq) never changes its content, so equal numbers are equal rows.
    """
    await check_guard(connection, tables, key.tenant_id, guard)
    session = await _lock(connection, tables, key)
    known = await find_op(connection, tables, key, operation.op_id)
    if known is not None:
        return known.kind != VOID
    if session is None or session.incarnation != incarnation:
        return False
    messages = tables.messages
    present = and_(_of(messages, key), messages.c.seq >= session.floor_seq)
    rows = await connection.execute(
        select(messages.c.seq, messages.c.nbytes)
        .where(present)
        .order_by(messages.c.seq.desc())
        .limit(len(expected))
    )
    current = rows.all()[::-1]
    if [row.seq for row in current] != list(expected):
        return False
    removed = [(row.seq, row.nbytes) for row in current]
    if prune is not None:
        removed += await _prunable(connection, tables, present, expected[0], prune)
    for start in range(0, len(removed), _BATCH):
        await _remove(connection, tables, key, [seq for seq, _ in removed[start : start + _BATCH]])
    await _record_op(connection, tables, key, operation, n=len(items))
    await _insert(connection, tables, key, session.next_seq, items)
    size = sum(map(nbytes, items)) - sum(size for _, size in removed)
    await _account(
        connection, tables, key, items=len(items) - len(removed), size=size, added=len(items)
    )
    return True


async def replace_all(
    connection: AsyncConnection,
    tables: Tables,
    key: Key,
    guard: Guard | None,
    operation: Operation,
    *,
    items: Sequence[str],
) -> bool:
    """Put ``items`` in the place of everything; False where there is no such session."""
    await check_guard(connection, tables, key.tenant_id, guard)
    session = await _lock(connection, tables, key)
    known = await find_op(connection, tables, key, operation.op_id)
    if known is not None:
        return known.kind != VOID
    if session is None:
        return False
    sessions, messages = tables.sessions, tables.messages
    await connection.execute(delete(messages).where(_of(messages, key)))
    emptied = {"floor_seq": session.next_seq, "item_count": 0, "byte_count": 0}
    await connection.execute(update(sessions).where(_of(sessions, key)).values(emptied))
    await _record_op(connection, tables, key, operation, n=len(items))
    await _insert(connection, tables, key, session.next_seq, items)
    size = sum(map(nbytes, items))
    await _account(connection, tables, key, items=len(items), size=size, added=len(items))
    return True


async def _prunable(
    connection: AsyncConnection,
    tables: Tables,
    present: ColumnElement[bool],
    before: int,
    prune: Decode,
) -> list[tuple[int, int]]:
    messages, after = tables.messages, 0
    chosen: list[tuple[int, int]] = []
    while True:
        rows = await connection.execute(
            select(messages.c.seq, messages.c.message_data, messages.c.nbytes)
            .where(present, messages.c.seq < before, messages.c.seq > after)
            .order_by(messages.c.seq)
            .limit(_BATCH)
        )
        batch = rows.all()
        for seq, data, size in batch:
            try:
                if not await prune(data):
                    return chosen
            except UndecodableError:
                return chosen
            chosen.append((seq, size))
        if len(batch) < _BATCH:
            return chosen
        after = batch[-1].seq


async def _insert(
    connection: AsyncConnection, tables: Tables, key: Key, first: int, items: Sequence[str]
) -> None:
    if not items:
        return
    await connection.execute(
        insert(tables.messages).values(created_at=utc_now()),
        [
            {
                "tenant_id": key.tenant_id,
                "session_id": key.session_id,
                "seq": first + place,
                "message_data": item,
                "nbytes": nbytes(item),
            }
            for place, item in enumerate(items)
        ],
    )


async def delete_session(
    connection: AsyncConnection,
    tables: Tables,
    key: Key,
    guard: Guard | None,
    operation: Operation,
) -> bool:
    """Remove the session with everything in it; its ops stay until their time is over.

    The row's lock comes first: an append that holds it commits before, and its items are removed
    too; one that waits for it finds no session and makes a new incarnation.

    Returns:
        Whether there was a session: now, or when this operation took effect before.
    """
    await check_guard(connection, tables, key.tenant_id, guard)
    session = await _lock(connection, tables, key)
    known = await find_op(connection, tables, key, operation.op_id)
    if known is not None:
        return known.n == 1
    # Also where there is no session: an earlier attempt that arrives only now must not delete one
    # that is made after this answer.
    await _record_op(connection, tables, key, operation, n=0 if session is None else 1)
    if session is not None:
        for table in (tables.messages, tables.sessions):
            await connection.execute(delete(table).where(_of(table, key)))
    return session is not None


async def list_sessions(
    connection: AsyncConnection,
    tables: Tables,
    tenant_id: str,
    *,
    limit: int,
    after: tuple[datetime, str] | None,
) -> Listed:
    """A page of a tenant's sessions, newest ``listed_at`` first, then by id downwards.

    One statement, so that the rows and the version of the slot map belong together.
    """
    sessions = tables.sessions
    page = select(sessions).where(sessions.c.tenant_id == tenant_id)
    if after is not None:
        listed_at, session_id = after
        page = page.where(
            sessions.c.listed_at <= listed_at,
            or_(sessions.c.listed_at < listed_at, sessions.c.session_id < session_id),
        )
    order = sessions.c.listed_at.desc(), sessions.c.session_id.desc()
    listed = page.order_by(*order).limit(limit).subquery()
    fields = [listed.c[field] for field in SessionInfo.__dataclass_fields__]
    rows = await connection.execute(
        select(tables.shard.c.shard_uuid, tables.shard.c.map_version, listed.c.h, *fields)
        .select_from(tables.shard.outerjoin(listed, true()))
        .order_by(listed.c.listed_at.desc(), listed.c.session_id.desc())
    )
    found = rows.all()
    shard_uuid, map_version = found[0][:2] if found else (None, 0)
    return Listed(
        shard_uuid=shard_uuid,
        map_version=map_version,
        sessions=tuple((h, SessionInfo(*info)) for _, _, h, *info in found if h is not None),
    )
