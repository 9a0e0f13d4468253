"""The steps of a move that change a slot's row, and how to end a move that nobody goes on with.

A slot whose move has stopped half-way is served by nobody. Whoever waits for it may end the move,
with nothing but the two shards' rows: a client need not know whether the mover is dead, as it is
safe in any case (see ``handover``); a mover that lives finds that it has lost its mark.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING
from uuid import uuid4

from shardgate import handover
from shardgate.errors import Contended, OwnershipConflict, ShardgateError
from shardgate.handover import DRAINING, OWNED, Act, Pair, Progress, next_act_of_abort
from shardgate.records import change_row, read_row
from shardgate.settling import together
from shardgate.sql.moving import limit_lock_wait

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.handover import SlotRow
    from shardgate.shards import Shard

POLL_SECONDS = 0.02
"""Between two looks at a slot that is being moved."""
ORPHANED_SECONDS = 3.0
"""After how long without a step a frozen slot's move is ended by those who wait for it."""

LOCK_SECONDS = 1.0
"""How long a step waits for statements that use the slot."""


class _LockedError(Exception):
    """A statement has the slot's row locked."""


@dataclass(frozen=True, slots=True)
class Ends:
    """The two shards of a slot's move."""

    source: Shard
    target: Shard
    slot: int


def new_mark() -> Progress:
    """The memory of one who begins: with a mark that nobody else has."""
    return Progress(str(uuid4()))


async def look(ends: Ends) -> Pair:
    """What the two shards say of the slot: the source first, as ``Pair`` asks for.

    Raises:
        OwnershipConflict: a shard has no record of the slot, or of itself.
    """
    source = await read_slot(ends.source, ends.slot)
    target = await read_slot(ends.target, ends.slot)
    return Pair(_uuid(ends.source), _uuid(ends.target), source, target)


async def read_slot(shard: Shard, slot: int) -> SlotRow:
    """What a shard says of a slot; raises OwnershipConflict where it says nothing."""
    row = await shard.query(partial(read_row, tables=shard.tables, slot=slot))
    if row is None:
        raise _without_record(shard, f"of slot {slot}")
    return row


def _uuid(shard: Shard) -> str:
    if shard.uuid is None:
        raise _without_record(shard, "of itself")
    return shard.uuid


def _without_record(shard: Shard, what: str) -> OwnershipConflict:
    message = f"shard {shard.name!r} has no record {what}: run 'shardgate create-tables'"
    return OwnershipConflict(message, keyspace="")


def after(act: Act, pair: Pair, move_id: str) -> Pair:
    """The two rows after a step that changes one of them."""
    match act:
        case Act.MARK:
            return replace(pair, source=handover.mark(pair, move_id))
        case Act.CLAIM:
            return replace(pair, target=handover.claim(pair, move_id))
        case Act.FENCE:
            return replace(pair, source=handover.fence(pair))
        case Act.DECIDE:
            return replace(pair, target=handover.decide(pair.target))
        case Act.RELEASE:
            return replace(pair, source=handover.release(pair))
        case Act.CANCEL:
            return replace(pair, target=handover.cancel(pair, move_id))
        case Act.REOPEN:
            return replace(pair, source=handover.reopen(pair))
        case _:
            raise ValueError(f"{act} changes no row")


async def take_step(act: Act, pair: Pair, mine: Progress, ends: Ends) -> Pair | None:
    """Take a step that changes a row and nothing else; None where that is no longer what it was.

    Raises:
        Contended: a statement has the row of a slot that is served locked for long; whoever waits
            for that, has all others wait on MySQL and MariaDB.
    """
    mine.marked |= pair.source.move_id == mine.move_id  # the answer to that may have been lost
    wanted = after(act, pair, mine.move_id)
    at_source = wanted.source != pair.source
    shard = ends.source if at_source else ends.target
    before, row = (pair.source, wanted.source) if at_source else (pair.target, wanted.target)

    async def change(connection: AsyncConnection) -> bool:
        served = connection.dialect.name in ("mysql", "mariadb") and before.state == OWNED
        limit = limit_lock_wait(connection, LOCK_SECONDS, _LockedError) if served else nullcontext()
        async with limit:
            return await change_row(connection, shard.tables, before, row)

    try:
        if not await shard.transact(change):
            return None
    except _LockedError as error:
        raise Contended(
            f"a statement on shard {shard.name!r} has locked slot {ends.slot} for too long"
        ) from error
    mine.marked |= act is Act.MARK
    mine.claimed |= act is Act.CLAIM
    return wanted


async def end_move(ends: Ends) -> Pair:
    """End a move: finish one that is decided, undo any other; the rows as they are then.

    Raises:
        ShardUnavailable: a shard does not answer. Without the target, nobody can tell whether it
            has decided: the slot stays as it is until the target answers.
    """
    mine, pair = new_mark(), await look(ends)
    while (act := next_act_of_abort(pair, mine)) not in (Act.DONE, Act.LOST):
        pair = await take_step(act, pair, mine, ends) or await look(ends)
    return pair


async def who_serves(shards: Mapping[str, Shard], slot: int) -> Shard | None:
    """The shard that owns a slot and serves it, if one does; asks all that have been created."""
    created = [shard for shard in shards.values() if shard.uuid is not None]
    rows = await together(read_slot(shard, slot) for shard in created)
    serving = [
        (row.epoch, shard)
        for row, shard in zip(rows, created, strict=True)
        if row.owner == shard.uuid and row.state == OWNED
    ]
    return max(serving, key=itemgetter(0))[1] if serving else None


async def wait_for_move(source: Shard, slot: int, shards: Mapping[str, Shard]) -> SlotRow:
    """Wait until a frozen slot is served again; the row that tells by whom.

    A move that takes no step for a while is ended. ``shards``: those that the target may be one of,
    by UUID.

    Raises:
        ShardUnavailable: a shard does not answer.
    """
    clock = asyncio.get_running_loop().time
    seen, since = None, clock()
    while True:
        row = await read_slot(source, slot)
        if row.state != DRAINING or row.owner != source.uuid:
            return row
        if row != seen:
            seen, since = row, clock()
        target = shards.get(row.peer or "")
        if target is not None:
            pair = Pair(_uuid(source), _uuid(target), row, await read_slot(target, slot))
            if pair.is_decided:
                return handover.release(pair)
            if clock() - since > ORPHANED_SECONDS:
                since = clock()
                with suppress(ShardgateError):
                    await end_move(Ends(source, target, slot))
        await asyncio.sleep(POLL_SECONDS)
