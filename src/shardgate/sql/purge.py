"""Removing old operations, some keys of the table at a time.

The table is walked along its primary key, so that it needs no index on time. What is old is the
database's own judgement, by its own clock, in the statement that deletes: whoever uses an op_id
anew meanwhile keeps it. Nothing is locked but what is deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import DateTime, Float, and_, delete, literal, or_, select, text, tuple_
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Column, ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.sql.schema import Tables

PURGED_BY_KEY = ("mysql", "mariadb")
"""The databases on which a chunk's operations are named one by one."""
_LONGEST = 3e9
"""Seconds, almost a century: what is longer is no date on some databases."""


class OpKey(NamedTuple):
    """The primary key of an operation; in its order the table is walked."""

    h: int
    tenant_id: str = ""
    session_id: str = ""
    op_id: str = ""


START = OpKey(-(2**63))
"""Before every operation: there is no op_id without characters."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """How far the walk has come (``last``; None at the table's end), and how many were removed."""

    last: OpKey | None
    removed: int


class seconds_ago(FunctionElement[Any]):  # noqa: N801 - an SQL function, named as those are
    """The moment so many seconds ago by the database's clock, as ``utc_now`` writes it."""

    type = DateTime()
    inherit_cache = True


@compiles(seconds_ago, "postgresql")
def _postgresql_ago(element: seconds_ago, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"((clock_timestamp() AT TIME ZONE 'UTC') - make_interval(secs => {seconds}))"


@compiles(seconds_ago, "mysql")
@compiles(seconds_ago, "mariadb")
def _mysql_ago(element: seconds_ago, compiler: Any, **options: Any) -> str:
    return f"(UTC_TIMESTAMP(6) - INTERVAL {compiler.process(element.clauses, **options)} SECOND)"


@compiles(seconds_ago, "sqlite")
def _sqlite_ago(element: seconds_ago, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', '-' || {seconds} || ' seconds')"


async def purge_chunk(
    connection: AsyncConnection, tables: Tables, after: OpKey, *, memory: float, keys: int
) -> Chunk:
    """Remove those of the next ``keys`` operations that are older than ``memory`` seconds."""
    ago = seconds_ago(literal(min(memory, _LONGEST), Float()))
    by_key = connection.dialect.name in PURGED_BY_KEY
    purge = _purge_by_key if by_key else _purge_range
    return await purge(connection, tables, after, tables.ops.c.created_at < ago, keys)


async def _purge_range(
    connection: AsyncConnection,
    tables: Tables,
    after: OpKey,
    is_old: ColumnElement[bool],
    keys: int,
) -> Chunk:
    """Find the last of the keys, and delete what is old up to there."""
    columns, values = _compared(tables, after)
    beyond = tuple_(*columns) > tuple_(*values)
    ordered = select(*columns).where(beyond).order_by(*columns)
    row = (await connection.execute(ordered.offset(keys - 1).limit(1))).one_or_none()
    last = None if row is None else OpKey(*row)
    here = delete(tables.ops).where(beyond, is_old)
    if last is not None:
        columns, values = _compared(tables, last)
        here = here.where(tuple_(*columns) <= tuple_(*values))
    return Chunk(last, (await connection.execute(here)).rowcount)


async def _purge_by_key(
    connection: AsyncConnection,
    tables: Tables,
    after: OpKey,
    is_old: ColumnElement[bool],
    keys: int,
) -> Chunk:
    """Read the keys, and delete the old ones one by one.

    On MySQL and MariaDB a range would lock its young operations too, though not for long, and wait
    for those that are being recorded. The keys are text, as in the hot statements: to compile as
    many parameters would hold up the event loop.
    """
    columns, _ = _compared(tables, after)
    ordered = select(*columns, is_old).where(beyond(columns, after)).order_by(*columns)
    rows = (await connection.execute(ordered.limit(keys))).all()
    last = OpKey(*rows[-1][:-1]) if len(rows) == keys else None
    these = ", ".join(_literal(OpKey(*key)) for *key, old in rows if old)
    if not these:
        return Chunk(last, 0)
    names = ", ".join(OpKey._fields)
    chosen = delete(tables.ops).where(text(f"({names}) IN ({these})"), is_old)
    once = {"compiled_cache": None}  # this text will not be seen again
    return Chunk(last, (await connection.execute(chosen, execution_options=once)).rowcount)


def _literal(key: OpKey) -> str:
    ids = (f"X'{id_.encode().hex()}'" for id_ in key[1:])
    return f"({key.h}, {', '.join(ids)})"


def _compared(tables: Tables, key: OpKey) -> tuple[list[Column[Any]], list[ColumnElement[Any]]]:
    columns = [tables.ops.c[field] for field in OpKey._fields]
    return columns, [literal(part, own.type) for part, own in zip(key, columns, strict=True)]


def beyond(columns: Sequence[Column[Any]], key: Sequence[Any]) -> ColumnElement[bool]:
    """Whether a row comes after this key, column by column: where rows are compared as such, MySQL
    and MariaDB find no range of the index."""
    column, *more = columns
    value = literal(key[0], column.type)
    if not more:
        return column > value
    return or_(column > value, and_(column == value, beyond(more, key[1:])))
