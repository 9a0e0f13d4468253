"""The slot map in the shards' tables: creating a keyspace, and reading who owns what.

Every shard holds a row for each slot. A shard's rows about the slots that it owns are authority,
the others are hints, used for shards that cannot be asked. Ownership is by the shard's UUID; a name
is what the settings call the shard that answers with this UUID.

Creating a keyspace is idempotent and may be run by many processes at once. One shard, one that
holds slots already or else the first by name, decides: whoever writes the keyspace's identity and
its slots there first has decided for everybody, and every other shard gets a copy of what it holds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import and_, func, insert, inspect, select, update
from sqlalchemy.exc import IntegrityError

from shardgate.errors import (
    KeyspaceNotCreated,
    OutcomeUnknown,
    OwnershipConflict,
    ShardUnavailable,
)
from shardgate.settling import together
from shardgate.shards import ask_all
from shardgate.sql.schema import SCHEMA_VERSION
from shardgate.sql.transactions import utc_now
from shardgate.topology import KeyspaceMap, assign

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.shards import Shard
    from shardgate.sql.schema import Tables

HASH = "mmh3-x64-128-low64/1"
"""How ``h`` is made; a keyspace made in another way must not be written to."""

OWNED, DRAINING, ELSEWHERE = "owned", "draining", "elsewhere"
"""A slot's states in a shard's record: owned or draining are claims, elsewhere is a hint."""
ADMITTED = "admitted"
_CLAIMING = (OWNED, DRAINING)
_FIRST_EPOCH = 1


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
class SlotRow:
    """What a shard's record says about one slot."""

    slot: int
    owner: str
    state: str
    epoch: int


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """All that a shard knows: of itself, of its peers (name by UUID), and of every slot."""

    identity: Identity
    peers: Mapping[str, str]
    rows: tuple[SlotRow, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the settings want of a keyspace."""

    keyspace: str
    slots: int
    spread: int | None
    weights: Mapping[str, float]


async def read_record(shard: Shard) -> ShardRecord | None:
    """A shard's record; None where no keyspace has been created on it yet."""
    return await shard.query(lambda connection: _read(connection, shard.tables))


async def _read(connection: AsyncConnection, tables: Tables) -> ShardRecord | None:
    schema = tables.metadata.schema
    if not await connection.run_sync(
        lambda sync: inspect(sync).has_table(tables.shard.name, schema=schema)
    ):
        return None
    identity = await _identity(connection, tables)
    if identity is None:
        return None
    peers = await connection.execute(select(tables.peers.c.shard_uuid, tables.peers.c.name))
    return ShardRecord(
        identity=identity,
        peers={row.shard_uuid: row.name for row in peers},
        rows=await _rows(connection, tables),
    )


async def _identity(connection: AsyncConnection, tables: Tables) -> Identity | None:
    columns = [tables.shard.c[field] for field in Identity.__dataclass_fields__]
    row = (await connection.execute(select(*columns))).one_or_none()
    return None if row is None else Identity(*row)


async def _rows(connection: AsyncConnection, tables: Tables) -> tuple[SlotRow, ...]:
    columns = [tables.slots.c[field] for field in SlotRow.__dataclass_fields__]
    rows = await connection.execute(select(*columns).order_by(tables.slots.c.slot))
    return tuple(SlotRow(*row) for row in rows)


async def read_records(
    shards: Mapping[str, Shard],
) -> tuple[dict[str, ShardRecord | None], dict[str, ShardUnavailable]]:
    """All shards' records, asked at the same time, and the shards that did not answer."""
    return await ask_all({name: read_record(shard) for name, shard in shards.items()})


async def load(plan: Plan, shards: Mapping[str, Shard]) -> KeyspaceMap:
    """The keyspace's map, from the shards that answer.

    Raises:
        ShardUnavailable: no shard answers.
        KeyspaceNotCreated: shards answer, and none holds a map.
        OwnershipConflict: they contradict each other or the settings.
    """
    answers, down = await read_records(shards)
    records = {name: record for name, record in answers.items() if record is not None}
    if not records:
        if down:
            raise next(iter(down.values()))
        raise KeyspaceNotCreated(
            f"keyspace {plan.keyspace!r} has not been created on its shards: run "
            "'shardgate create-tables', or call gateway.create_tables()",
            keyspace=plan.keyspace,
        )
    await _refuse_lost(plan, {name: shards[name] for name in answers}, records)
    return build_map(plan, records)


def build_map(plan: Plan, records: Mapping[str, ShardRecord]) -> KeyspaceMap:
    """The map that these records make, checked against each other and the settings.

    A slot's owner is who claims it in its own record; for shards without a record, whom the others
    name at the highest epoch.
    """
    check_identities(plan, records)
    names = {uuid: name for record in records.values() for uuid, name in record.peers.items()}
    names |= {record.identity.shard_uuid: name for name, record in records.items()}
    best: dict[int, tuple[tuple[int, bool], str]] = {}
    for record in records.values():
        for row in record.rows:
            own = row.owner == record.identity.shard_uuid
            rank = (row.epoch, own and row.state in _CLAIMING)
            if row.slot not in best or rank > best[row.slot][0]:
                best[row.slot] = (rank, row.owner)
    return KeyspaceMap(
        name=plan.keyspace,
        slots=plan.slots,
        spread=plan.spread,
        owners=tuple(_named(plan, slot, best, names) for slot in range(plan.slots)),
        epochs=tuple(best[slot][0][0] for slot in range(plan.slots)),
        uuids={name: uuid for uuid, name in names.items()},
    )


def _named(
    plan: Plan, slot: int, best: Mapping[int, tuple[Any, str]], names: Mapping[str, str]
) -> str:
    if slot not in best:
        raise _conflict(plan, f"no shard has a record of slot {slot}")
    owner = best[slot][1]
    name = names.get(owner)
    if name not in plan.weights:
        known = f"{name!r}, which" if name else f"a shard with the UUID {owner}, which"
        raise _conflict(plan, f"slot {slot} belongs to {known} the settings do not name")
    return str(name)


def check_identities(plan: Plan, records: Mapping[str, ShardRecord]) -> None:
    """Refuse shards that are not those that the settings, or their peers, take them for."""
    for problem in mistaken(plan, records).values():
        raise _conflict(plan, problem)


def mistaken(plan: Plan, records: Mapping[str, ShardRecord]) -> dict[str, str]:
    """What is wrong with each shard that is not the one it is taken for, by name."""
    uuids = _known_uuids(records)
    families = Counter(record.identity.keyspace_uuid for record in records.values())
    wanted = {
        "keyspace": plan.keyspace,
        "keyspace_uuid": families.most_common(1)[0][0] if families else "",
        "slots": plan.slots,
        "spread": plan.spread,
        "hash": HASH,
        "schema_version": SCHEMA_VERSION,
    }
    problems = {}
    for name, record in records.items():
        known = {"shard_uuid": uuids[name]} if name in uuids else {}
        problem = _difference(record.identity, {"name": name} | wanted | known)
        if problem is not None:
            problems[name] = f"shard {name!r} {problem}"
    return problems


def _difference(identity: Identity, wanted: Mapping[str, object]) -> str | None:
    for what, value in wanted.items():
        found = getattr(identity, what)
        if found != value:
            return f"says that its {what} is {found!r}, but it should be {value!r}: {_hint(what)}"
    return None


def _hint(what: str) -> str:
    if what in ("slots", "spread"):
        return "this was fixed when the keyspace was created; set it back"
    if what in ("hash", "schema_version"):
        return "it was made by another version of Shardgate"
    return "is its URL the right one?"


async def _refuse_lost(
    plan: Plan, shards: Mapping[str, Shard], records: Mapping[str, ShardRecord]
) -> None:
    """Refuse shards that their peers know and that have no record of their own.

    Shards are not read in one moment: one that looked empty may have been created meanwhile, so it
    is asked again.
    """
    for name, problem in lost(records, shards).items():
        if await read_record(shards[name]) is None:
            raise _conflict(plan, problem)


def lost(records: Mapping[str, ShardRecord], names: Iterable[str]) -> dict[str, str]:
    """What is wrong with those of the named shards that have no record and that peers know."""
    uuids = _known_uuids(records)
    return {
        name: f"shard {name!r} has no record of its own, but its peers know it as {uuids[name]}: "
        "is its URL the right one, or was its database emptied?"
        for name in sorted(names)
        if name in uuids and name not in records
    }


def _known_uuids(records: Mapping[str, ShardRecord]) -> dict[str, str]:
    return {peer: uuid for record in records.values() for uuid, peer in record.peers.items()}


def _conflict(plan: Plan, what: str) -> OwnershipConflict:
    return OwnershipConflict(f"keyspace {plan.keyspace!r}: {what}", keyspace=plan.keyspace)


async def create(plan: Plan, shards: Mapping[str, Shard]) -> None:
    """Create the keyspace on all its shards, or what is still missing of it.

    A shard that is new to an existing keyspace joins without slots. Nothing is written anywhere
    until all shards have answered and none is refused.

    Raises:
        ShardUnavailable: a shard does not answer. Run it again; nothing is decided twice.
        OwnershipConflict: a shard is of another keyspace, or has lost its record.
    """
    answers, down = await read_records(shards)
    for unavailable in down.values():
        raise unavailable
    found = {name: record for name, record in answers.items() if record is not None}
    check_identities(plan, found)
    await _refuse_lost(plan, shards, found)
    try:
        await together(shard.ready(create=True, afresh=True) for shard in shards.values())
        if not _is_complete(found, shards):
            await _establish(plan, shards, found)
    except OutcomeUnknown as error:
        raise ShardUnavailable(
            f"shard {error.shard!r} was lost while keyspace {plan.keyspace!r} was being created: "
            "run it again",
            shard=error.shard,
        ) from error


def _is_complete(found: Mapping[str, ShardRecord], shards: Mapping[str, Shard]) -> bool:
    """Whether every shard has a record with all slots, and knows the others."""
    return found.keys() == shards.keys() and all(
        record.rows and shards.keys() - {name} <= set(record.peers.values())
        for name, record in found.items()
    )


async def _establish(
    plan: Plan, shards: Mapping[str, Shard], found: Mapping[str, ShardRecord]
) -> None:
    """Found what is missing. A shard that holds slots decides, whatever the others are called."""
    anchor = min([name for name in found if found[name].rows] or shards)
    keyspaces = [record.identity.keyspace_uuid for record in found.values()]
    founder = await _found(plan, shards[anchor], *(keyspaces[:1] or [str(uuid4())]))
    others = [name for name in sorted(shards) if name != anchor]
    joined = await together(_found(plan, shards[name], founder.keyspace_uuid) for name in others)
    identities = {anchor: founder, **dict(zip(others, joined, strict=True))}
    check_identities(
        plan, {name: ShardRecord(identity, {}, ()) for name, identity in identities.items()}
    )
    rows = await _first_rows(plan, shards[anchor], identities)
    await together(_copy_rows(shards[name], rows, identities[name].shard_uuid) for name in others)
    await together(_introduce(shards[name], name, identities) for name in shards)


async def _found(plan: Plan, shard: Shard, keyspace_uuid: str) -> Identity:
    """Give the shard an identity, unless it has one; the one that it has in the end."""

    async def act(connection: AsyncConnection) -> Identity | None:
        known = await _identity(connection, shard.tables)
        if known is None:
            await connection.execute(insert(shard.tables.shard).values(**values))
        return known or await _identity(connection, shard.tables)

    values = {
        "one": 1,
        "shard_uuid": str(uuid4()),
        "name": shard.name,
        "keyspace": plan.keyspace,
        "keyspace_uuid": keyspace_uuid,
        "slots": plan.slots,
        "spread": plan.spread,
        "hash": HASH,
        "schema_version": SCHEMA_VERSION,
        "map_version": 1,
        "created_at": utc_now(),
    }
    try:
        identity = await shard.transact(act)
    except Exception as error:
        if not _is_taken(error):
            raise
        identity = await shard.transact(act)  # somebody else was first, and has committed
    if identity is None:
        raise _conflict(plan, f"shard {shard.name!r} has lost its identity while it was created")
    return identity


def _is_taken(error: Exception) -> bool:
    return isinstance(error, IntegrityError) or isinstance(error.__cause__, IntegrityError)


async def _first_rows(
    plan: Plan, shard: Shard, identities: Mapping[str, Identity]
) -> tuple[SlotRow, ...]:
    """The slots as the deciding shard has them; assigned now if it has none."""

    async def act(connection: AsyncConnection) -> tuple[SlotRow, ...]:
        await _lock_map(connection, shard.tables)
        known = await _rows(connection, shard.tables)
        if known:
            return known
        owners = assign(plan.slots, plan.weights)
        rows = tuple(
            SlotRow(slot, identities[owner].shard_uuid, OWNED, _FIRST_EPOCH)
            for slot, owner in enumerate(owners)
        )
        await _insert_rows(connection, shard.tables, rows, own)
        return rows

    own = identities[shard.name].shard_uuid
    return await shard.transact(act)


async def _copy_rows(shard: Shard, rows: tuple[SlotRow, ...], own: str) -> None:
    async def act(connection: AsyncConnection) -> None:
        await _lock_map(connection, shard.tables)
        count = select(func.count()).select_from(shard.tables.slots)
        if not (await connection.execute(count)).scalar_one():
            await _insert_rows(connection, shard.tables, rows, own)

    await shard.transact(act)


async def _lock_map(connection: AsyncConnection, tables: Tables) -> None:
    """Lock the shard's identity row: whoever changes the map here holds it."""
    await connection.execute(update(tables.shard).values(map_version=tables.shard.c.map_version))


async def _insert_rows(
    connection: AsyncConnection, tables: Tables, rows: tuple[SlotRow, ...], own: str
) -> None:
    """Insert the rows as the shard ``own`` has them: those about others are hints."""
    await connection.execute(
        insert(tables.slots),
        [
            {
                "slot": row.slot,
                "owner": row.owner,
                "state": OWNED if row.owner == own else ELSEWHERE,
                "epoch": row.epoch,
            }
            for row in rows
        ],
    )


async def _introduce(shard: Shard, name: str, identities: Mapping[str, Identity]) -> None:
    """Record the peers that this shard does not know yet."""

    async def act(connection: AsyncConnection) -> None:
        await _lock_map(connection, shard.tables)
        peers = shard.tables.peers
        known = set((await connection.execute(select(peers.c.shard_uuid))).scalars())
        for peer, identity in identities.items():
            if peer != name and identity.shard_uuid not in known:
                await connection.execute(
                    insert(peers).values(
                        shard_uuid=identity.shard_uuid,
                        name=peer,
                        map_version=identity.map_version,
                        updated_at=utc_now(),
                    )
                )

    await shard.transact(act)


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
        columns = [tables.slots.c[field] for field in SlotRow.__dataclass_fields__]
        row = (
            await connection.execute(select(*columns).where(tables.slots.c.slot == slot))
        ).one_or_none()
        tenant = await connection.execute(
            select(tables.tenants.c.status).where(tables.tenants.c.tenant_id == tenant_id)
        )
        return Standing(
            shard_uuid=identity.scalar_one_or_none(),
            slot=None if row is None else SlotRow(*row),
            tenant=tenant.scalar_one_or_none(),
        )

    return await shard.query(act)


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
        if not _is_taken(error):
            raise
