"""What moves leave behind: rows of slots that a shard does not own, or owns no more.

They are never seen, as every statement asks for ownership; they only take room. A source keeps
what it has released for a while, a target what it had copied before a move was ended.

Each portion is removed under the slot's row, if that is still exactly what it was when this began:
so a slot that comes back, while an old removal is still under way, loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from shardgate import handover
from shardgate.control.copying import MOST_ITEMS, PAGE, batches, is_large
from shardgate.control.recording import Recorder
from shardgate.control.standbys import wait_for_standbys
from shardgate.errors import ShardgateError
from shardgate.handover import CANCELLED, DRAINING, IMPORTING, OWNED, RELEASED
from shardgate.records import (
    RowChangedError,
    change_row,
    hold_row,
    read_ages,
    read_row,
    read_rows,
)
from shardgate.recovery import Ends, look, who_serves
from shardgate.settling import together
from shardgate.slots import slot_range
from shardgate.sql.moving import (
    Span,
    read_op_times,
    read_versions,
    remove_ops,
    remove_sessions,
    shorten_session,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.agreement import Plan
    from shardgate.handover import SlotRow
    from shardgate.shards import Shard
    from shardgate.sql.schema import Tables

GRACE_SECONDS = 3600.0
"""For how long a source keeps what it has released, where nothing else is said."""
_STANDBY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A slot's row that is neither in service nor a mere hint: a move is under way, has stopped, or
    has left something behind.

    ``shard`` says so; ``idle`` is for how many seconds, by its own clock, nobody has touched the
    row. ``peer`` is the other shard of the move, if the settings have it.
    """

    shard: str
    row: SlotRow
    idle: float | None
    peer: str | None

    @property
    def is_rest(self) -> bool:
        """Whether it is only something to be removed."""
        return self.row.state in (RELEASED, CANCELLED)


async def find_unfinished(shards: Mapping[str, Shard]) -> list[Unfinished]:
    """What moves have left, or have not come to yet, on all shards.

    Raises:
        ShardUnavailable: a shard does not answer.
    """
    found = await together(find_unfinished_on(shard, shards) for shard in shards.values())
    return [one for part in found for one in part]


async def find_unfinished_on(shard: Shard, shards: Mapping[str, Shard]) -> list[Unfinished]:
    """What moves have left, or have not come to yet, on one of the shards; ShardUnavailable."""
    names: dict[str | None, str] = {one.uuid: name for name, one in shards.items()}
    rows, ages = await shard.query(partial(_read_with_ages, tables=shard.tables))
    return [
        Unfinished(shard.name, row, ages[row.slot], names.get(row.peer))
        for row in rows
        if row.state in (DRAINING, IMPORTING, RELEASED, CANCELLED)
        or (row.state == OWNED and row.move_id is not None)
    ]


async def _read_with_ages(
    connection: AsyncConnection, tables: Tables
) -> tuple[tuple[SlotRow, ...], dict[int, float | None]]:
    return await read_rows(connection, tables), await read_ages(connection, tables)


async def remove_remains(
    plan: Plan,
    shards: Mapping[str, Shard],
    rest: Unfinished,
    *,
    grace_seconds: float = GRACE_SECONDS,
    accept_async_standbys: bool = False,
) -> str | None:
    """Remove what is left of a slot on a shard that does not own it; why not, if it was kept.

    What a source has released is kept until the target says that it has decided, most shards have
    recorded that, the target's standbys have it too, and the grace is over. What a target has
    copied is kept until its claim is undone.

    Raises:
        ShardUnavailable: a shard that has to be asked does not answer; what was removed so far
            stays removed, and the rest can be removed later.
    """
    shard = shards[rest.shard]
    if rest.row.state == RELEASED:
        # The other shard may have given the slot to a third one since, and be gone.
        peer = shards[rest.peer] if rest.peer else await who_serves(shards, rest.row.slot)
        if peer is None:
            return "the settings do not name the other shard, and nobody else serves the slot"
        owner = rest.row.owner
        reason = await _why_kept(shards, shard, peer, rest, grace_seconds)
        if reason is None and not accept_async_standbys:
            await wait_for_standbys(peer, seconds=_STANDBY_SECONDS)
            # One that was promoted meanwhile may not have had the decision.
            reason = await _why_kept(shards, shard, peer, rest, grace_seconds)
    else:
        server = await who_serves(shards, rest.row.slot)
        if server is None or not (await look(Ends(server, shard, rest.row.slot))).is_undone:
            return "its move has not ended: finish or end it first"
        reason, owner = None, server.uuid or ""
    return reason or await _remove(plan, shard, rest.row, owner)


async def _why_kept(
    shards: Mapping[str, Shard], source: Shard, target: Shard, rest: Unfinished, grace: float
) -> str | None:
    if rest.idle is not None and rest.idle < grace:
        return f"it was released {rest.idle:.0f} seconds ago, and is kept for {grace:g}"
    ends = Ends(source, target, rest.row.slot)
    pair = await look(ends)
    later = pair.target.epoch > rest.row.epoch and pair.target.state == OWNED
    if pair.source != rest.row or not (pair.is_decided if rest.peer else later):
        return f"shard {target.name!r} does not say that it has got the slot"
    if not await _most_know(shards, rest.row):
        recorder = Recorder(shards)  # who made the move may have died before he could tell
        recorder.add(pair.target if rest.peer is None else rest.row, ends)
        await recorder.flush()
        if not await _most_know(shards, rest.row):
            return "not even half of the shards have recorded the move"
    return None


async def _most_know(shards: Mapping[str, Shard], released: SlotRow) -> bool:
    """Whether most shards have recorded the move, or one after it."""

    async def epoch(shard: Shard) -> int:
        try:
            row = await shard.query(partial(read_row, tables=shard.tables, slot=released.slot))
        except ShardgateError:
            return -1
        return -1 if row is None else row.epoch

    epochs = await together(epoch(shard) for shard in shards.values())
    return 2 * sum(epoch >= released.epoch for epoch in epochs) > len(shards)


async def _remove(plan: Plan, shard: Shard, row: SlotRow, owner: str) -> str | None:
    """Remove them; why some were kept, if so."""
    tables = shard.tables
    span = Span(*slot_range(row.slot, plan.slots))

    async def portion(connection: AsyncConnection) -> bool:
        """Remove some, and whether that was all; then the row says so."""
        await hold_row(connection, tables, row, alone=True)
        if await _remove_some(connection, shard, span):
            return False
        return await change_row(connection, tables, row, handover.forget(row, owner))

    try:
        while not await shard.transact(portion):
            pass
    except RowChangedError:
        return "its row has changed meanwhile: somebody else removes it, or moves the slot again"
    return None


async def _remove_some(connection: AsyncConnection, shard: Shard, span: Span) -> bool:
    """Remove about as much as one transaction should; whether there was anything."""
    tables = shard.tables
    versions = await read_versions(connection, tables, span, limit=PAGE)
    first = next(iter(versions), None)
    if first is not None and is_large(versions[first]):
        if not await shorten_session(connection, tables, first, items=MOST_ITEMS):
            await remove_sessions(connection, tables, [first])
        return True
    if versions:
        await remove_sessions(connection, tables, next(batches(versions, versions)))
        return True
    ops = await read_op_times(connection, tables, span, limit=MOST_ITEMS)
    await remove_ops(connection, tables, ops)
    return bool(ops)
