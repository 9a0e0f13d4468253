"""Creating a keyspace on its shards.

It is idempotent and may be run by many processes at once. One shard, one that holds slots already
or else the first by name, decides: whoever writes the keyspace's identity and its slots there first
has decided for everybody, and every other shard gets a copy of what it holds.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING
from uuid import uuid4

from sqlalchemy import func, insert, select

from shardgate.agreement import contradictions
from shardgate.errors import OutcomeUnknown, ShardUnavailable
from shardgate.handover import CANCELLED, ELSEWHERE, IMPORTING, OWNED, SlotRow
from shardgate.records import (
    HASH,
    Identity,
    ShardRecord,
    bump_map,
    is_taken,
    lock_map,
    publish,
    read_identity,
    read_rows,
)
from shardgate.settling import together
from shardgate.slotmap import conflict, consult
from shardgate.sql.schema import SCHEMA_VERSION
from shardgate.sql.transactions import utc_now
from shardgate.topology import assign

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.agreement import Contradiction, Plan
    from shardgate.shards import Shard
    from shardgate.sql.schema import Tables

_FIRST_EPOCH = 1


async def create(plan: Plan, shards: Mapping[str, Shard]) -> None:
    """Create the keyspace on all its shards, or what is still missing of it.

    A shard that is new to an existing keyspace joins without slots. Nothing is written anywhere
    until all shards have answered and none is refused.

    Raises:
        ShardUnavailable: a shard does not answer. Run it again; nothing is decided twice.
        OwnershipConflict: a shard is of another keyspace, or has lost its record.
    """
    reading = await consult(plan, shards)
    for unavailable in reading.down.values():
        raise unavailable
    _refuse(plan, reading.wrong)
    records = reading.created
    try:
        await together(shard.ready(create=True, afresh=True) for shard in shards.values())
        if not is_complete(records, shards):
            await _establish(plan, shards, records)
    except OutcomeUnknown as error:
        raise ShardUnavailable(
            f"shard {error.shard!r} was lost while keyspace {plan.keyspace!r} was being created: "
            "run it again",
            shard=error.shard,
        ) from error


def is_complete(records: Mapping[str, ShardRecord], shards: Mapping[str, Shard]) -> bool:
    """Whether every shard has a record with all slots, and knows how far the others are."""
    return records.keys() == shards.keys() and all(is_introduced(name, records) for name in records)


def is_introduced(name: str, records: Mapping[str, ShardRecord]) -> bool:
    """Whether a shard has slots' rows, knows the others, and is known to them as far as it is."""
    record = records[name]
    peers = [peer for other, peer in records.items() if other != name]
    return bool(record.rows) and all(
        peer.uuid in record.peers
        and record.uuid in peer.peers
        and peer.peers[record.uuid].map_version == record.identity.map_version
        for peer in peers
    )


def _refuse(plan: Plan, wrong: Mapping[str, Contradiction]) -> None:
    for contradiction in wrong.values():
        raise conflict(plan, contradiction.reason)


async def _establish(
    plan: Plan, shards: Mapping[str, Shard], records: Mapping[str, ShardRecord]
) -> None:
    """Found what is missing. A shard that holds slots decides, whatever the others are called."""
    anchor = min([name for name in records if records[name].rows] or shards)
    keyspaces = [record.identity.keyspace_uuid for record in records.values()]
    keyspace = keyspaces[0] if keyspaces else str(uuid4())
    founder = await found(plan, shards[anchor], new_identity(plan, anchor, keyspace, str(uuid4())))
    others = [name for name in sorted(shards) if name != anchor]
    joined = await together(
        found(
            plan,
            shards[name],
            new_identity(plan, name, founder.keyspace_uuid, str(uuid4())),
        )
        for name in others
    )
    identities = {anchor: founder, **dict(zip(others, joined, strict=True))}
    _refuse(
        plan, contradictions(plan, {name: ShardRecord(identities[name], {}) for name in shards})
    )
    rows = await _first_rows(plan, shards[anchor], identities)
    await together(_copy_rows(shards[name], rows, identities[name].shard_uuid) for name in others)
    introduced = await together(introduce(shards[name], identities) for name in shards)
    await publish(shards, dict(zip(shards, introduced, strict=True)))


def new_identity(plan: Plan, name: str, keyspace_uuid: str, shard_uuid: str) -> Identity:
    """Who a shard of this keyspace is at first."""
    return Identity(
        shard_uuid=shard_uuid,
        name=name,
        keyspace=plan.keyspace,
        keyspace_uuid=keyspace_uuid,
        slots=plan.slots,
        spread=plan.spread,
        hash=HASH,
        schema_version=SCHEMA_VERSION,
        map_version=1,
    )


async def found(plan: Plan, shard: Shard, identity: Identity) -> Identity:
    """Give the shard an identity, unless it has one; the one that it has in the end."""

    async def act(connection: AsyncConnection) -> Identity | None:
        known = await read_identity(connection, shard.tables)
        if known is None:
            values = asdict(identity) | {"one": 1, "created_at": utc_now()}
            await connection.execute(insert(shard.tables.shard).values(**values))
        return known or await read_identity(connection, shard.tables)

    try:
        known = await shard.tell(act)
    except Exception as error:
        if not is_taken(error):
            raise
        known = await shard.tell(act)  # somebody else was first, and has committed
    if known is None:
        raise conflict(plan, f"shard {shard.name!r} has lost its identity while it was created")
    return known


async def _first_rows(
    plan: Plan, shard: Shard, identities: Mapping[str, Identity]
) -> tuple[SlotRow, ...]:
    """The slots as the deciding shard has them; assigned now if it has none."""

    async def act(connection: AsyncConnection) -> tuple[SlotRow, ...]:
        await lock_map(connection, shard.tables)
        known = await read_rows(connection, shard.tables)
        if known:
            return known
        owners = assign(plan.slots, plan.weights)
        rows = tuple(
            SlotRow(slot, identities[owner].shard_uuid, OWNED, _FIRST_EPOCH)
            for slot, owner in enumerate(owners)
        )
        await insert_rows(connection, shard.tables, rows, own)
        return rows

    own = identities[shard.name].shard_uuid
    return await shard.tell(act)


async def _copy_rows(shard: Shard, rows: tuple[SlotRow, ...], own: str) -> None:
    async def act(connection: AsyncConnection) -> None:
        await lock_map(connection, shard.tables)
        count = select(func.count()).select_from(shard.tables.slots)
        if not (await connection.execute(count)).scalar_one():
            await insert_rows(connection, shard.tables, rows, own)

    await shard.tell(act)


async def insert_rows(
    connection: AsyncConnection, tables: Tables, rows: Sequence[SlotRow], own: str
) -> None:
    """Insert the rows as the shard ``own`` has them: those about others are hints.

    Who is about to import a slot, or was, names himself without owning it: all that this tells is
    who did own it once.
    """
    values = []
    for row in rows:
        tells = row.state not in (IMPORTING, CANCELLED)
        owner, epoch = (row.owner, row.epoch) if tells else (row.peer, 0)
        state = OWNED if owner == own else ELSEWHERE
        values.append({"slot": row.slot, "owner": owner, "state": state, "epoch": epoch})
    await connection.execute(insert(tables.slots), values)


async def introduce(shard: Shard, identities: Mapping[str, Identity]) -> Identity:
    """Record the peers that this shard does not know yet; its identity after that."""

    async def act(connection: AsyncConnection) -> Identity:
        await lock_map(connection, shard.tables)
        peers = shard.tables.peers
        known = set((await connection.execute(select(peers.c.shard_uuid))).scalars())
        strangers = {
            name: identity
            for name, identity in identities.items()
            if name != shard.name and identity.shard_uuid not in known
        }
        for name, identity in strangers.items():
            await connection.execute(
                insert(peers).values(
                    shard_uuid=identity.shard_uuid,
                    name=name,
                    map_version=identity.map_version,
                    updated_at=utc_now(),
                )
            )
        if strangers:
            await bump_map(connection, shard.tables)
        return await read_identity(connection, shard.tables) or identities[shard.name]

    return await shard.tell(act)
