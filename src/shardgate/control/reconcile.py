"""Getting a shard out of quarantine: what would be done to it, in words, and doing just that.

A shard that was restored from an older copy, or emptied, is made to agree with its peers:

- slots that another shard has come to own are given up to it; nothing is lost by that;
- slots that had come to this shard after the copy was made are taken again, without the sessions
  that were stored in them since; that has to be accepted by name.

Either way its slot map gets a version that no copy can have. A shard that is another one than the
settings say cannot be mended here: the settings have to be.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import update

from shardgate.agreement import known_uuids, recorded_version
from shardgate.errors import UsageError
from shardgate.founding import found, insert_rows, introduce, new_identity
from shardgate.records import (
    CLAIMING,
    ELSEWHERE,
    OWNED,
    SlotRow,
    lock_map,
    publish,
    read_identity,
    read_rows,
)
from shardgate.settling import together
from shardgate.slotmap import conflict, consult

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.agreement import Plan
    from shardgate.records import Identity, ShardRecord
    from shardgate.shards import Shard
    from shardgate.slotmap import Reading
    from shardgate.sql.schema import Tables


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one slot in the shard's record; ``before`` is None where there is no row."""

    before: SlotRow | None
    after: SlotRow

    @property
    def takes(self) -> bool:
        """Whether the shard comes to own the slot by it."""
        return self.after.state == OWNED


@dataclass(frozen=True, slots=True)
class Remedy:
    """What is wrong with a shard, and what would be done about it.

    ``steps`` says it in words; there are none where nothing is to be done, or nothing can be done
    here. ``map_version`` is what the shard's slot map would get. ``lost`` is the identity of a
    shard that has no record any more.
    """

    shard: str
    problem: str | None
    steps: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    map_version: int = 0
    lost: Identity | None = None

    @property
    def loses(self) -> bool:
        """Whether sessions are given up for good that a newer copy may have."""
        return any(change.takes for change in self.changes)


async def examine(plan: Plan, shards: Mapping[str, Shard], name: str) -> Remedy:
    """Find out what is wrong with a shard and what can be done; changes nothing.

    Args:
        plan: what the settings want of the keyspace.
        shards: all shards of the keyspace, by name.
        name: the shard in question.

    Raises:
        UsageError: the keyspace has no shard of this name.
        ShardUnavailable: a shard does not answer; all of the keyspace are needed to tell.
    """
    if name not in shards:
        known = ", ".join(sorted(shards))
        raise UsageError(f"keyspace {plan.keyspace!r} has no shard {name!r}; it has {known}")
    reading = await consult(plan, shards, seen={})
    for unavailable in reading.down.values():
        raise unavailable
    return find_remedy(plan, reading, name)


def find_remedy(plan: Plan, reading: Reading, name: str) -> Remedy:
    """What the shards' records say is to be done about one of them."""
    wrong, record = reading.wrong.get(name), reading.records[name]
    if wrong is None:
        return Remedy(name, None)
    peers = {peer: known for peer, known in reading.usable.items() if peer != name}
    if record is not None and not wrong.reads:
        return Remedy(name, wrong.reason)  # it is another shard: the settings have to be mended
    if record is None:
        own, rows = _lost_identity(plan, peers, name), {}
    else:
        own, rows = record.identity, {row.slot: row for row in record.rows}
    lost = own if record is None else None
    changes = tuple(_changes(plan, own.shard_uuid, rows, peers.values()))
    version = max(recorded_version(peers, own.shard_uuid), own.map_version) + 1
    owners = {peer.uuid: peer_name for peer_name, peer in peers.items()}
    steps = (
        *_steps(name, changes, owners, lost),
        f"raise the version of its slot map to {version}, and introduce it to its peers",
    )
    return Remedy(name, wrong.reason, steps, changes, version, lost)


def _lost_identity(plan: Plan, peers: Mapping[str, ShardRecord], name: str) -> Identity:
    relative = next(iter(peers.values())).identity
    return new_identity(plan, name, relative.keyspace_uuid, known_uuids(peers)[name])


def _changes(
    plan: Plan, own: str, rows: Mapping[int, SlotRow], peers: Iterable[ShardRecord]
) -> Iterator[Change]:
    said: defaultdict[int, list[tuple[int, bool, str]]] = defaultdict(list)
    for record in peers:
        for row in record.rows:
            claims = row.owner == record.uuid and row.state in CLAIMING
            said[row.slot].append((row.epoch, claims, row.owner))
    for slot in range(plan.slots):
        before = rows.get(slot)
        epoch, claimed, owner = max(said[slot])
        owns = before is not None and before.owner == own and before.state in CLAIMING
        known = -1 if before is None else before.epoch
        if owner == own and not owns and epoch >= known:
            yield Change(before, SlotRow(slot, own, OWNED, epoch + 1))
        elif owner != own and (epoch > known or (owns and claimed and epoch == known)):
            yield Change(before, SlotRow(slot, owner, ELSEWHERE, epoch))


def _steps(
    name: str, changes: Iterable[Change], owners: Mapping[str, str], lost: Identity | None
) -> Iterator[str]:
    if lost is not None:
        yield f"create the tables of shard {name!r}, and make it {lost.shard_uuid} again"
    taken = [change.after.slot for change in changes if change.takes]
    if taken:
        since = (
            "without their sessions" if lost else "without what they got since the copy was made"
        )
        yield f"have it own slots {_ranges(taken)} again, {since}"
    given: defaultdict[str, list[int]] = defaultdict(list)
    for change in changes:
        if not change.takes and change.before is not None and change.before.state in CLAIMING:
            given[owners.get(change.after.owner, change.after.owner)].append(change.after.slot)
    for owner, slots in sorted(given.items()):
        yield f"give slots {_ranges(slots)} up to shard {owner!r}, which owns them"


def _ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as text: 1-3, 7."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return ", ".join(str(one) if one == last else f"{one}-{last}" for one, last in runs)


async def apply(
    plan: Plan, shards: Mapping[str, Shard], remedy: Remedy, *, accept_loss: bool = False
) -> None:
    """Do what the remedy says, if the shard is still as it was when the remedy was found.

    Raises:
        UsageError: there is nothing to do; or sessions would be lost, and that was not accepted.
        OwnershipConflict: the shard has been changed meanwhile; nothing was done.
    """
    if not remedy.steps:
        raise UsageError(f"there is nothing to be done to shard {remedy.shard!r} here")
    if remedy.loses and not accept_loss:
        raise UsageError(
            f"sessions of shard {remedy.shard!r} would be lost for good: restore a newer copy of "
            "its database, or accept the loss"
        )
    shard = shards[remedy.shard]
    if remedy.lost is not None:
        await shard.ready(create=True, afresh=True)
        await found(plan, shard, remedy.lost)
    await shard.tell(partial(_mend, plan=plan, shard=shard, remedy=remedy))
    peers = {name: peer for name, peer in shards.items() if name != remedy.shard}
    await together(
        peer.tell(partial(_hint, tables=peer.tables, remedy=remedy)) for peer in peers.values()
    )
    known = (await consult(plan, shards, seen={})).usable
    identity = await introduce(shard, {name: record.identity for name, record in known.items()})
    await publish(peers, {remedy.shard: identity})


async def _mend(connection: AsyncConnection, *, plan: Plan, shard: Shard, remedy: Remedy) -> None:
    tables = shard.tables
    await lock_map(connection, tables)
    identity = await read_identity(connection, tables)
    rows = {row.slot: row for row in await read_rows(connection, tables)}
    as_before = all(rows.get(change.after.slot) == change.before for change in remedy.changes)
    if identity is None or identity.map_version >= remedy.map_version or not as_before:
        raise conflict(
            plan, f"shard {shard.name!r} has been changed meanwhile: look again what is to be done"
        )
    new = [change.after for change in remedy.changes if change.before is None]
    if new:
        await insert_rows(connection, tables, new, identity.shard_uuid)
    for change in remedy.changes:
        if change.before is not None:
            await _set_row(connection, tables, change.after)
    await connection.execute(update(tables.shard).values(map_version=remedy.map_version))


async def _set_row(connection: AsyncConnection, tables: Tables, row: SlotRow) -> None:
    values = {"owner": row.owner, "state": row.state, "epoch": row.epoch}
    here = tables.slots.c.slot == row.slot
    await connection.execute(
        update(tables.slots).where(here).values(**values, move_id=None, peer=None)
    )


async def _hint(connection: AsyncConnection, *, tables: Tables, remedy: Remedy) -> None:
    """Tell a peer of the slots that the shard has taken."""
    slots = tables.slots
    for row in (change.after for change in remedy.changes if change.takes):
        await connection.execute(
            update(slots)
            .where(slots.c.slot == row.slot, slots.c.state == ELSEWHERE, slots.c.epoch < row.epoch)
            .values(owner=row.owner, epoch=row.epoch)
        )
