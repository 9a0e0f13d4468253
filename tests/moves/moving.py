"""What the tests of moves share: a mover, who owns a slot, what is stored of it, lost answers."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, select

from shardgate import OutcomeUnknown
from shardgate.agreement import Plan
from shardgate.control.moves import Limits, Mover
from shardgate.handover import CLAIMING, OWNED
from shardgate.slots import slot_range

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate import Gateway
    from shardgate.control.moves import MoveEvent
    from shardgate.shards import Shard

SECONDS = 30
"""Bounds a wait that has gone wrong."""
AMPLE = {"freeze_seconds": 20.0, "bytes_per_second": None}
"""Limits that a busy machine does not come near."""

Row = dict[str, Any]


class Told:
    """What a mover reports, and a wait for it."""

    def __init__(self) -> None:
        self.events: list[MoveEvent] = []

    def __call__(self, event: MoveEvent) -> None:
        self.events.append(event)

    @property
    def phases(self) -> list[str]:
        """The phases in their order, each once."""
        return list(dict.fromkeys(event.phase.value for event in self.events))


def mover_of(gateway: Gateway, observe: Callable[[MoveEvent], None] | None = None, **limits: Any):
    """A mover of the gateway's one keyspace."""
    chosen = Limits(**(AMPLE | limits))
    plan = Plan.of(gateway.settings, "main")
    return Mover(plan, gateway.shards, limits=chosen, observe=observe or Told())


async def rows_of_slots(shard: Shard) -> list[Row]:
    slots = shard.tables.slots

    async def act(connection: AsyncConnection) -> list[Row]:
        rows = await connection.execute(select(slots).order_by(slots.c.slot))
        return [dict(row) for row in rows.mappings()]

    return await shard.query(act)


async def places(shards: Mapping[str, Shard]) -> dict[int, str]:
    """Who serves each slot; AssertionError unless exactly one shard claims it, and serves it."""
    claims: dict[int, list[tuple[str, str]]] = {}
    for name, shard in shards.items():
        for row in await rows_of_slots(shard):
            claims.setdefault(row["slot"], [])
            if row["owner"] == shard.uuid and row["state"] in CLAIMING:
                claims[row["slot"]].append((name, row["state"]))
    for slot, found in claims.items():
        assert [state for _, state in found] == [OWNED], f"slot {slot}: {found}"
    return {slot: found[0][0] for slot, found in claims.items()}


async def stored(shard: Shard, slots: int, slot: int) -> dict[str, list[Row]]:
    """The rows of a slot in all tables that a slot owns, whoever owns the slot, as they are.

    Items that were cleared away before are nobody's, and left out.
    """
    tables = shard.tables
    span = slot_range(slot, slots)

    async def act(connection: AsyncConnection) -> dict[str, list[Row]]:
        return {
            table.name.removeprefix("shardgate_"): await _rows(connection, table, tables, span)
            for table in tables.slot_owned
        }

    return await shard.query(act)


async def _rows(
    connection: AsyncConnection, table: Table, tables: Any, span: tuple[int, int]
) -> list[Row]:
    keys = list(table.primary_key.columns)
    statement = select(table).order_by(*keys)
    if "h" in table.c:
        statement = statement.where(table.c.h.between(*span))
    else:
        of = tables.sessions
        same = and_(of.c.tenant_id == table.c.tenant_id, of.c.session_id == table.c.session_id)
        statement = statement.join(of, same).where(of.c.h.between(*span))
        if "seq" in table.c:
            statement = statement.where(table.c.seq >= of.c.floor_seq)
    rows = [dict(row) for row in (await connection.execute(statement)).mappings()]
    return sorted(rows, key=lambda row: [str(row[column.name]) for column in keys])


async def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(SECONDS):
        while not holds():  # noqa: ASYNC110 - whatever it is, it has no event
            await asyncio.sleep(0.002)


class LostAnswers:
    """Loses the answers to transactions on some shards: they took effect, or did not.

    ``lose``: says of each, by its number, what becomes of it: "answer" lost after it took effect,
    "request" lost before, None.
    """

    def __init__(self, lose: Callable[[int], str | None]) -> None:
        self._lose = lose
        self.number = 0

    @asynccontextmanager
    async def on(self, *shards: Shard) -> AsyncIterator[None]:
        before = [(shard, shard.transact) for shard in shards]
        for shard, transact in before:
            shard.transact = self._with_losses(shard.name, transact)  # type: ignore[method-assign]  # the shard's own stays beneath
        try:
            yield
        finally:
            for shard, _ in before:
                del shard.transact

    def _with_losses(self, name: str, transact: Any) -> Any:
        async def lossy(act: Any) -> Any:
            lost, self.number = self._lose(self.number), self.number + 1
            if lost != "request":
                answer = await transact(act)
                if lost is None:
                    return answer
            raise OutcomeUnknown("the answer was lost", shard=name)

        return lossy
