"""The least that moves a slot between two shards, for races against writers: fence, barrier, copy.

Everything of a slot is copied while it is frozen; the real mover does better. The order of the
steps is the design's: the source stops first, in a commit of its own; the barrier waits for the
statements that were under way; the commit on the target is the move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, insert, select, update

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
    epoch = await fence(source, slot)
    if barrier:
        await pass_barrier(source, slot)
    rows = await read_slot(source, slot, slots)
    await decide(target, slot, other, epoch, rows, slots)
    await release(source, slot, other, epoch)
    assert own != other


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
        return int((await connection.execute(select(slots.c.epoch).where(here))).scalar_one())

    return await shard.transact(act)


async def pass_barrier(shard: Shard, slot: int) -> None:
    slots = shard.tables.slots

    async def act(connection: AsyncConnection) -> None:
        await connection.execute(select(slots.c.slot).where(slots.c.slot == slot).with_for_update())

    await shard.transact(act)


async def read_slot(shard: Shard, slot: int, slots: int) -> dict[str, list[dict[str, Any]]]:
    first, last = slot_range(slot, slots)
    tables = shard.tables

    async def act(connection: AsyncConnection) -> dict[str, list[dict[str, Any]]]:
        sessions = await _all(connection, tables.sessions, first, last)
        ops = await _all(connection, tables.ops, first, last)
        keys = {(row["tenant_id"], row["session_id"]) for row in sessions}
        everything = (await connection.execute(select(tables.messages))).mappings().all()
        messages = [
            dict(row) for row in everything if (row["tenant_id"], row["session_id"]) in keys
        ]
        return {"sessions": sessions, "ops": ops, "messages": messages}

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
        await connection.execute(
            update(tables.shard).values(map_version=tables.shard.c.map_version + 1)
        )

    await shard.transact(act)


async def release(shard: Shard, slot: int, owner: str, epoch: int) -> None:
    slots = shard.tables.slots

    async def act(connection: AsyncConnection) -> None:
        await connection.execute(
            update(slots)
            .where(slots.c.slot == slot)
            .values(owner=owner, state="released", epoch=epoch)
        )
        await connection.execute(
            update(shard.tables.shard).values(map_version=shard.tables.shard.c.map_version + 1)
        )

    await shard.transact(act)
