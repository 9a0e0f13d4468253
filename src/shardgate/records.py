"""What the shards' own tables say of themselves: identity, peers, slots, tenants.

Every shard holds a row for each slot. A shard's rows about the slots that it owns are authority,
the others are hints, used for shards that cannot be asked. Ownership is by the shard's UUID; a name
is what the settings call the shard that answers with this UUID.

Nothing here judges what it reads: see ``agreement``.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import and_, bindparam, exists, insert, inspect, select, update
from sqlalchemy.exc import IntegrityError

from shardgate.errors import ShardUnavailable
from shardgate.handover import ELSEWHERE, OWNED, SlotRow
from shardgate.settling import together
from shardgate.shards import ask_all
from shardgate.sql.transactions import utc_now

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping, Sequence

    from sqlalchemy import Update
    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.errors import ShardgateError
    from shardgate.shards import Shard
    from shardgate.sql.dialect import Server
    from shardgate.sql.schema import Tables

T = TypeVar("T")

HASH = "mmh3-x64-128-low64/1"
"""How ``h`` is made; a keyspace made in another way must not be written to."""

ADMITTED = "admitted"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a shard is, by its own record."""

    shard_uuid: str
    name: str
    keyspace: str
    keyspace_uuid: str
    slots: int
    spread: int | None
    hash: str
    schema_version: int
    map_version: int


@dataclass(frozen=True, slots=True)
class Peer:
    """What a shard knows of another one: its name, and how far its slot map has come at least."""

    name: str
    map_version: int


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """All that a shard knows: of itself, of its peers (by UUID), and of every slot.

    ``server`` is the one that has said so.
    """

    identity: Identity
    peers: Mapping[str, Peer]
    rows: tuple[SlotRow, ...] = ()
    server: Server | None = None

    @property
    def uuid(self) -> str:
        """The shard's UUID."""
        return self.identity.shard_uuid


class RowChangedError(Exception):
    """A slot's row is not what it was taken for: somebody else has taken a step."""


async def read_record(shard: Shard) -> ShardRecord | None:
    """A shard's record; None where no keyspace has been created on it yet."""
    record, server = await shard.ask_where(lambda connection: _read(connection, shard.tables))
    return None if record is None else replace(record, server=server)


async def _read(connection: AsyncConnection, tables: Tables) -> ShardRecord | None:
    schema = tables.metadata.schema
    if not await connection.run_sync(
        lambda sync: inspect(sync).has_table(tables.shard.name, schema=schema)
    ):
        return None
    identity = await read_identity(connection, tables)
    if identity is None:
        return None
    columns = (tables.peers.c.shard_uuid, tables.peers.c.name, tables.peers.c.map_version)
    peers = await connection.execute(select(*columns))
    return ShardRecord(
        identity=identity,
        peers={uuid: Peer(name, version) for uuid, name, version in peers},
        rows=await read_rows(connection, tables),
    )


async def read_identity(connection: AsyncConnection, tables: Tables) -> Identity | None:
    """Who the shard is; None where nobody has told it."""
    columns = [tables.shard.c[field] for field in Identity.__dataclass_fields__]
    row = (await connection.execute(select(*columns))).one_or_none()
    return None if row is None else Identity(*row)


async def read_rows(connection: AsyncConnection, tables: Tables) -> tuple[SlotRow, ...]:
    """What the shard says of every slot, in order."""
    columns = [tables.slots.c[field] for field in SlotRow.__dataclass_fields__]
    rows = await connection.execute(select(*columns).order_by(tables.slots.c.slot))
    return tuple(SlotRow(*row) for row in rows)


async def read_records(
    shards: Mapping[str, Shard], *, seconds: float | None = None
) -> tuple[dict[str, ShardRecord | None], dict[str, ShardgateError]]:
    """All shards' records, asked at the same time, and the shards that did not answer.

    ``seconds``: how long each of them is waited for, if less than its deadline.
    """
    return await ask_all(
        {name: _in_time(shard, read_record(shard), seconds) for name, shard in shards.items()}
    )


async def _in_time(shard: Shard, answer: Coroutine[Any, Any, T], seconds: float | None) -> T:
    """The answer, or ShardUnavailable. Who does not answer takes his time to hang up, too."""
    task = shard.in_background(answer)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if done:
        return task.result()
    task.cancel()
    raise ShardUnavailable(
        f"shard {shard.name!r} did not answer within {seconds:g} seconds", shard=shard.name
    )


@dataclass(frozen=True, slots=True)
class Testimony:
    """What a shard says of a peer: how far its slot map had come, as recorded (None: it does not
    know it); and how far its own has."""

    recorded: int | None
    shard_uuid: str
    map_version: int


async def testify(shard: Shard, about: str, *, seconds: float) -> Testimony | None:
    """Ask a shard about a peer, in one statement; None if it has no record of itself."""

    async def act(connection: AsyncConnection) -> Testimony | None:
        own, peers = shard.tables.shard, shard.tables.peers
        row = await connection.execute(
            select(peers.c.map_version, own.c.shard_uuid, own.c.map_version).select_from(
                own.outerjoin(peers, peers.c.shard_uuid == about)
            )
        )
        found = row.one_or_none()
        return None if found is None else Testimony(*found)

    return await _in_time(shard, shard.ask(act), seconds)


async def lock_map(connection: AsyncConnection, tables: Tables) -> None:
    """Lock the shard's identity row: whoever changes the map here holds it."""
    await connection.execute(update(tables.shard).values(map_version=tables.shard.c.map_version))


async def bump_map(connection: AsyncConnection, tables: Tables) -> None:
    """Say that the slot map has changed: whoever remembers it has to read it again."""
    await connection.execute(_bumped(tables))


def _bumped(tables: Tables) -> Update:
    return update(tables.shard).values(map_version=tables.shard.c.map_version + 1)


async def publish(shards: Mapping[str, Shard], identities: Mapping[str, Identity]) -> None:
    """Have each of ``shards`` record how far the slot maps of its peers have come.

    To be called after a change was committed on the shard itself: its record may be ahead of what
    its peers know, never behind. This is how a copy from before the change is found out.
    """
    await together(
        shard.tell(partial(_publish, tables=shard.tables, identities=identities.values()))
        for shard in shards.values()
    )


async def record_moves(
    connection: AsyncConnection,
    *,
    tables: Tables,
    hints: Sequence[SlotRow],
    identities: Iterable[Identity],
) -> None:
    """Record who owns slots now and how far the slot maps of these shards have come.

    ``hints``: of moves that the shard is neither end of, so it has only heard of them; in order.
    """
    slots = tables.slots
    if hints:
        of = bindparam("of", type_=slots.c.slot.type)
        newer = bindparam("newer", type_=slots.c.epoch.type)
        hint = update(slots).where(
            slots.c.slot == of, slots.c.state == ELSEWHERE, slots.c.epoch < newer
        )
        owner = bindparam("by", type_=slots.c.owner.type)
        await connection.execute(
            hint.values(owner=owner, epoch=newer, changed_at=utc_now()),
            [
                {"of": row.slot, "by": row.owner, "newer": row.epoch}
                for row in sorted(hints, key=lambda row: (row.slot, row.epoch))
            ],
        )
    await _publish(connection, tables=tables, identities=identities)


async def row_age(shard: Shard, slot: int) -> float | None:
    """For how many seconds, by its own clock, a shard's row of a slot has not been touched."""
    slots = shard.tables.slots

    async def act(connection: AsyncConnection) -> float | None:
        row = await connection.execute(
            select(slots.c.changed_at, utc_now()).where(slots.c.slot == slot)
        )
        changed_at, now = row.one()
        return None if changed_at is None else float((now - changed_at).total_seconds())

    return await shard.query(act)


async def read_ages(connection: AsyncConnection, tables: Tables) -> dict[int, float | None]:
    """For how many seconds, by the shard's own clock, nobody has touched the row of each slot."""
    slots = tables.slots
    rows = await connection.execute(select(slots.c.slot, slots.c.changed_at, utc_now()))
    return {
        slot: None if changed_at is None else float((now - changed_at).total_seconds())
        for slot, changed_at, now in rows
    }


async def _publish(
    connection: AsyncConnection, *, tables: Tables, identities: Iterable[Identity]
) -> None:
    known = [{"of": one.shard_uuid, "newer": one.map_version} for one in identities]
    if not known:
        return
    await lock_map(connection, tables)
    peers = tables.peers
    of = bindparam("of", type_=peers.c.shard_uuid.type)
    newer = bindparam("newer", type_=peers.c.map_version.type)
    behind = update(peers).where(peers.c.shard_uuid == of, peers.c.map_version < newer)
    await connection.execute(behind.values(map_version=newer, updated_at=utc_now()), known)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a shard says of itself, of one slot and of one tenant: why a guard has failed there."""

    shard_uuid: str | None
    slot: SlotRow | None
    tenant: str | None


async def standing(shard: Shard, slot: int, tenant_id: str) -> Standing:
    """Ask a shard for its standing."""

    async def act(connection: AsyncConnection) -> Standing:
        tables = shard.tables
        identity = await connection.execute(select(tables.shard.c.shard_uuid))
        row = await read_row(connection, tables, slot)
        tenant = await connection.execute(
            select(tables.tenants.c.status).where(tables.tenants.c.tenant_id == tenant_id)
        )
        return Standing(
            shard_uuid=identity.scalar_one_or_none(),
            slot=row,
            tenant=tenant.scalar_one_or_none(),
        )

    return await shard.ask(act)


async def read_row(connection: AsyncConnection, tables: Tables, slot: int) -> SlotRow | None:
    """What the shard says of a slot."""
    columns = [tables.slots.c[field] for field in SlotRow.__dataclass_fields__]
    row = await connection.execute(select(*columns).where(tables.slots.c.slot == slot))
    found = row.one_or_none()
    return None if found is None else SlotRow(*found)


async def change_row(
    connection: AsyncConnection, tables: Tables, before: SlotRow, after: SlotRow
) -> bool:
    """Set a slot's row if it still is what it was; whether it is now what it was to be.

    Whoever remembers which slots the shard serves has to read them again where that has changed.
    """
    slots = tables.slots
    as_before = [slots.c[field] == value for field, value in _values(before).items()]
    change = update(slots).where(*as_before).values(**_values(after), changed_at=utc_now())
    bumps = (before.state == OWNED) != (after.state == OWNED)
    at_once = bumps and connection.dialect.name == "postgresql"
    if at_once:  # one round trip less while nobody serves the slot
        changed = exists().select_from(change.returning(slots.c.slot).cte("changed"))
        change = _bumped(tables).where(changed)
    if (await connection.execute(change)).rowcount == 0:
        return await read_row(connection, tables, after.slot) == after
    if bumps and not at_once:
        await bump_map(connection, tables)
    return True


async def hold_row(
    connection: AsyncConnection, tables: Tables, row: SlotRow, *, alone: bool = False
) -> None:
    """Have a slot's row stay what it is until the transaction ends; ``alone``: hold it alone.

    Raises:
        RowChangedError: it is not that any more.
    """
    statement = select(*(tables.slots.c[field] for field in SlotRow.__dataclass_fields__))
    held = statement.where(tables.slots.c.slot == row.slot).with_for_update(read=not alone)
    found = (await connection.execute(held)).one_or_none()
    if found is None or SlotRow(*found) != row:
        raise RowChangedError


def _values(row: SlotRow) -> dict[str, Any]:
    return {field: getattr(row, field) for field in SlotRow.__dataclass_fields__}


async def owned_slots(shard: Shard) -> tuple[int, frozenset[int]]:
    """The slots that a shard owns, with the version of its slot map that they belong to."""

    async def act(connection: AsyncConnection) -> tuple[int, frozenset[int]]:
        tables = shard.tables
        rows = await connection.execute(
            select(tables.shard.c.map_version, tables.slots.c.slot).select_from(
                tables.shard.outerjoin(
                    tables.slots,
                    and_(
                        tables.slots.c.owner == tables.shard.c.shard_uuid,
                        tables.slots.c.state == OWNED,
                    ),
                )
            )
        )
        found = rows.all()
        return found[0][0], frozenset(slot for _, slot in found if slot is not None)

    return await shard.query(act)


async def admit(shard: Shard, tenant_id: str) -> None:
    """Write the tenant's row on a shard, if there is none: an absent row cannot be locked."""

    async def act(connection: AsyncConnection) -> None:
        await connection.execute(
            insert(shard.tables.tenants).values(
                tenant_id=tenant_id, status=ADMITTED, created_at=utc_now(), updated_at=utc_now()
            )
        )

    try:
        await shard.transact(act)
    except Exception as error:
        if not is_taken(error):
            raise


def is_taken(error: Exception) -> bool:
    """Whether somebody else has inserted the row first."""
    return isinstance(error, IntegrityError) or isinstance(error.__cause__, IntegrityError)
