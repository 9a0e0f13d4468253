"""What slots carry, counted from their sessions' rows: each slot is a range of ``h``.

A statement has always the same number of ranges, so that there is one of it. Nothing is locked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Integer, bindparam, func, literal_column, select, union_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import CompoundSelect, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.sql.schema import Tables

_NOTHING = (0, -1)
"""A range of ``h`` in which nothing is, for the places that are left over."""


@dataclass(frozen=True, slots=True)
class Tally:
    """The sessions of a range of ``h``: how many, and the sums of their own counters."""

    sessions: int
    items: int
    nbytes: int
    revisions: int


def tally_statement(tables: Tables, places: int) -> CompoundSelect[Any]:
    """The statement that counts in up to ``places`` ranges at once; to be made once, and kept."""
    return union_all(*(_tally_one(tables, place) for place in range(places)))


async def tally(
    connection: AsyncConnection, statement: CompoundSelect[Any], ranges: Sequence[tuple[int, int]]
) -> list[Tally]:
    """Count what there is in each of the ranges: the first and the last ``h``, both inclusive.

    There must not be more ranges than the statement has places.
    """
    values = parameters(ranges, places=len(statement.selects))
    rows = await connection.execute(statement, values)
    tallies = {place: Tally(*(int(total or 0) for total in totals)) for place, *totals in rows}
    return [tallies[place] for place in range(len(ranges))]


def _tally_one(tables: Tables, place: int) -> Select[Any]:
    sessions = tables.sessions
    first, last = (bindparam(f"{name}_{place}", type_=BigInteger()) for name in ("first", "last"))
    counters = sessions.c.item_count, sessions.c.byte_count, sessions.c.revision
    return select(
        literal_column(str(place), Integer()),
        func.count(),
        *map(func.sum, counters),
    ).where(sessions.c.h.between(first, last))


def parameters(ranges: Sequence[tuple[int, int]], *, places: int) -> dict[str, int]:
    """The statement's parameters for these ranges."""
    values: dict[str, int] = {}
    for place in range(places):
        first, last = ranges[place] if place < len(ranges) else _NOTHING
        values |= {f"first_{place}": first, f"last_{place}": last}
    return values
