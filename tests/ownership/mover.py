"""The least that moves a slot between two shards, for races against writers: fence, barrier, copy.

Everything of a slot is copied while it is frozen; the real mover does better. The order of the
steps is the design's: the source stops first, in a commit of its own; the barrier waits for the
statements that were under way; the commit on the target is the move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, delete, insert, select, update

from shardgate.slots import slot_range

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.shards import Shard


_BATCH = 200


async def move(
    source: Shard, target: Shard, slot: int, slots: int, *, barrier: bool = True
) -> None:
    """Move one slot, or fail with the source still claiming it (draining)."""
    own, other = await uuid_of(source), await uuid_of(target)
    assert own != other
    epoch = await fence(source, slot)
    if barrier:
        await pass_barrier(source, slot)
    await finish(source, target, slot, slots, other, epoch)


async def finish(
    source: Shard, target: Shard, slot: int, slots: int, owner: str, epoch: int
) -> None:
    """What comes after the fence and the barrier: copy, decide, release."""
    rows = await read_slot(source, slot, slots)
    await decide(target, slot, owner, epoch, rows, slots)
    await release(source, slot, owner, epoch)


async def uuid_of(shard: Shard) -> str:
    async def act(connection: AsyncConnection) -> str:
        return str((await connection.execute(select(shard.tables.shard.c.shard_uuid))).scalar_one())

    return await shard.query(act)


async def fence(shard: Shard, slot: int) -> int:
    slots = shard.tables.slots

    async def act(connection: AsyncConnection) -> int:
        here = slots.c.slot == slot
        await connection.execute(
            update(slots)
            .where(here, slots.c.state == "owned")
            .values(state="draining", epoch=slots.c.epoch + 1)
        )
        await bump(connection, shard)
        return int((await connection.execute(select(slots.c.epoch).where(here))).scalar_one())

    return await shard.transact(act)


async def bump(connection: AsyncConnection, shard: Shard) -> None:
    """Whoever has remembered which slots this shard owns has to read them again."""
    table = shard.tables.shard
    await connection.execute(update(table).values(map_version=table.c.map_version + 1))


async def pass_barrier(shard: Shard, slot: int) -> None:
    """Wait for every statement that has passed its guard, and refuse those still at it.

    To lock the row is not enough on PostgreSQL: a statement that found the fence's update not yet
    committed, and is held up before it has locked the row's new version, would go on with the old
    one afterwards. It only looks again where the new version was updated, too, by somebody who held
    FOR UPDATE.
    """
    slots = shard.tables.slots

    async def act(connection: AsyncConnection) -> None:
        here = slots.c.slot == slot
        await connection.execute(select(slots.c.slot).where(here).with_for_update())
        await connection.execute(update(slots).where(here).values(epoch=slots.c.epoch))

    await shard.transact(act)


async def read_slot(shard: Shard, slot: int, slots: int) -> dict[str, list[dict[str, Any]]]:
    first, last = slot_range(slot, slots)
    tables = shard.tables

    async def act(connection: AsyncConnection) -> dict[str, list[dict[str, Any]]]:
        sessions = await _all(connection, tables.sessions, first, last)
        ops = await _all(connection, tables.ops, first, last)
        messages, of = tables.messages, tables.sessions
        rows = await connection.execute(
            select(messages)
            .join(
                of,
                and_(
                    of.c.tenant_id == messages.c.tenant_id,
                    of.c.session_id == messages.c.session_id,
                ),
            )
            .where(of.c.h.between(first, last))
        )
        found = [dict(row) for row in rows.mappings()]
        return {"sessions": sessions, "ops": ops, "messages": found}

    return await shard.query(act)


async def _all(
    connection: AsyncConnection, table: Table, first: int, last: int
) -> list[dict[str, Any]]:
    rows = await connection.execute(select(table).where(table.c.h.between(first, last)))
    return [dict(row) for row in rows.mappings()]


async def decide(
    shard: Shard,
    slot: int,
    own: str,
    epoch: int,
    rows: dict[str, list[dict[str, Any]]],
    slots: int,
) -> None:
    """On the target, in one transaction: replace what is there by the copy, and own the slot."""
    tables = shard.tables
    first, last = slot_range(slot, slots)

    async def act(connection: AsyncConnection) -> None:
        keys = [
            (row.tenant_id, row.session_id)
            for row in await connection.execute(
                select(tables.sessions.c.tenant_id, tables.sessions.c.session_id).where(
                    tables.sessions.c.h.between(first, last)
                )
            )
        ]
        for tenant_id, session_id in keys:
            await connection.execute(
                delete(tables.messages).where(
                    tables.messages.c.tenant_id == tenant_id,
                    tables.messages.c.session_id == session_id,
                )
            )
        for table in (tables.sessions, tables.ops):
            await connection.execute(delete(table).where(table.c.h.between(first, last)))
        for name, values in rows.items():
            for start in range(0, len(values), _BATCH):
                batch = values[start : start + _BATCH]
                await connection.execute(insert(getattr(tables, name)).values(batch))
        await connection.execute(
            update(tables.slots)
            .where(tables.slots.c.slot == slot)
            .values(owner=own, state="owned", epoch=epoch)
        )
        await bump(connection, shard)

    await shard.transact(act)


async def release(shard: Shard, slot: int, owner: str, epoch: int) -> None:
    slots = shard.tables.slots

    async def act(connection: AsyncConnection) -> None:
        await connection.execute(
            update(slots)
            .where(slots.c.slot == slot)
            .values(owner=owner, state="released", epoch=epoch)
        )
        await bump(connection, shard)

    await shard.transact(act)
