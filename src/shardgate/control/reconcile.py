"""Getting a shard to agree with its peers: what would be done to it, in words, and doing just that.

What a shard claims of itself counts; what it says of others is a hint. For each slot, with the
highest epoch that anybody has of it:

- another shard's claim counts more: it is given up to that one. Nothing is lost, unless both claim
  it at the same epoch: then each may have something that the other lacks;
- the shard's own claim counts most, but a hint has a higher epoch: it keeps the slot above that,
  without what was stored where the hint says;
- nobody claims it, and the best hint names this shard: it takes it again, without what was stored
  since the copy was made.

What loses something has to be accepted by name. Either way the slot map gets a version that no copy
and no process has seen. While any other shard cannot be read, it might have a claim that counts
more: nothing is done then. A shard that is another one than the settings say cannot be mended here:
the settings have to be.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

from sqlalchemy import update

from shardgate.agreement import known_uuids, recorded_version
from shardgate.errors import KeyspaceNotCreated, UsageError
from shardgate.founding import found, insert_rows, introduce, is_introduced, new_identity
from shardgate.handover import CANCELLED, CLAIMING, ELSEWHERE, IMPORTING, OWNED, SlotRow
from shardgate.records import change_row, lock_map, publish, read_identity, read_rows
from shardgate.settling import together
from shardgate.slotmap import all_said, conflict, consult, names_by_uuid, ranges, unserved

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.agreement import Plan
    from shardgate.records import Identity, ShardRecord
    from shardgate.shards import Shard
    from shardgate.slotmap import Reading, Said
    from shardgate.sql.schema import Tables

_VERSIONS_AHEAD = 1000
"""How far a slot map's version jumps: a copy may have changed more often than anybody recorded."""


class Act(Enum):
    """What becomes of a slot. The last one changes only what the shard says of other shards."""

    TAKE = "take"
    KEEP = "keep"
    GIVE = "give"
    CONCEDE = "concede"
    CORRECT = "correct"


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one slot in the shard's record; ``before`` is None where there is no row."""

    act: Act
    before: SlotRow | None
    after: SlotRow

    @property
    def owns(self) -> bool:
        """Whether the shard owns the slot after it."""
        return self.after.state == OWNED

    @property
    def loses(self) -> bool:
        """Whether what is stored of the slot somewhere is given up for good."""
        return self.act in (Act.TAKE, Act.KEEP, Act.CONCEDE)


@dataclass(frozen=True, slots=True)
class Remedy:
    """What is wrong with a shard, and what would be done about it.

    ``steps`` says it in words; there are none where nothing is to be done, or nothing can be done
    here. ``notes`` is what to know besides. ``map_version`` is what the shard's slot map would get,
    or None where it is only introduced to its peers. ``lost`` is the identity of a shard that has
    no record any more.
    """

    shard: str
    problem: str | None
    steps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    map_version: int | None = None
    lost: Identity | None = None

    @property
    def loses(self) -> bool:
        """Whether sessions are given up for good that a newer copy, or another shard, may have."""
        return any(change.loses for change in self.changes)

    @property
    def digest(self) -> str:
        """The same for the same remedy: what was explained is what will be done."""
        return sha256(repr(self).encode()).hexdigest()[:12]


async def examine(plan: Plan, shards: Mapping[str, Shard], name: str) -> Remedy:
    """Find out what is wrong with a shard and what can be done; changes nothing.

    Args:
        plan: what the settings want of the keyspace.
        shards: all shards of the keyspace, by name.
        name: the shard in question.

    Raises:
        UsageError: the keyspace has no shard of this name.
        ShardUnavailable: the shard does not answer.
        KeyspaceNotCreated: the shard has no slots' rows yet.
        OwnershipConflict: another shard does not answer or is wrong itself, and is needed to tell.
    """
    if name not in shards:
        known = ", ".join(sorted(shards))
        raise UsageError(f"keyspace {plan.keyspace!r} has no shard {name!r}; it has {known}")
    return find_remedy(plan, await consult(plan, shards), name)


def find_remedy(plan: Plan, reading: Reading, name: str) -> Remedy:
    """What the shards' records say is to be done about one of them; raises as ``examine``."""
    if name in reading.down:
        raise reading.down[name]
    wrong, record = reading.wrong.get(name), reading.records[name]
    if wrong is None:
        return _remedy_of_healthy(plan, reading, name)
    if record is not None and not wrong.reads:
        return Remedy(name, wrong.reason)  # it is another shard: the settings have to be mended
    return _remedy(plan, reading, name, wrong.reason)


def _remedy_of_healthy(plan: Plan, reading: Reading, name: str) -> Remedy:
    """It may be named for slots that nobody claims, or not be introduced to its peers."""
    record = reading.records[name]
    if record is None or not record.rows:
        raise KeyspaceNotCreated(
            f"keyspace {plan.keyspace!r} has not been created on shard {name!r}: run "
            "'shardgate create-tables'",
            keyspace=plan.keyspace,
        )
    _refuse_unanswered(plan, reading)
    if problem := unserved(plan, reading.usable).get(name):
        return _remedy(plan, reading, name, problem)
    if is_introduced(name, reading.right):
        return Remedy(name, None)
    return Remedy(
        name,
        f"shard {name!r} and its peers do not know of each other, or not how far its slot map has "
        "come",
        (f"introduce it to its peers, with version {record.identity.map_version} of its slot map",),
    )


def _refuse_unanswered(plan: Plan, reading: Reading) -> None:
    if reading.down:
        raise conflict(
            plan,
            "all shards are needed to tell what is to be done: "
            + "; ".join(str(reading.down[name]) for name in sorted(reading.down)),
        )


def _refuse_wrong(plan: Plan, reading: Reading, name: str) -> None:
    """Others that cannot be read might claim a slot.

    Of several that are empty, one has to be made first: there those do not count.
    """
    empty = reading.records[name] is None
    first = [
        wrong.reason
        for other, wrong in sorted(reading.wrong.items())
        if other != name and not wrong.reads and not (empty and reading.records.get(other) is None)
    ]
    if first:
        raise conflict(plan, f"before shard {name!r}, mend these: {'; '.join(first)}")


def _remedy(plan: Plan, reading: Reading, name: str, problem: str) -> Remedy:
    _refuse_unanswered(plan, reading)
    _refuse_wrong(plan, reading, name)
    usable, record = reading.usable, reading.records[name]
    own = _lost_identity(plan, usable, name) if record is None else record.identity
    rows = {} if record is None else {row.slot: row for row in record.rows}
    lost = own if record is None else None
    said = all_said(plan, usable.values())
    changes = tuple(_changes(own.shard_uuid, rows, said))
    names = names_by_uuid(usable) | {own.shard_uuid: name}
    _refuse_unknown(plan, changes, said, {peer.uuid for peer in usable.values()})
    version = max(recorded_version(usable, own.shard_uuid), own.map_version) + _VERSIONS_AHEAD
    steps = (
        *_steps(name, changes, names, lost),
        f"raise the version of its slot map to {version}, and introduce it to its peers",
    )
    notes = (*_wrong_too(reading, name), *_left(own.shard_uuid, said, names))
    return Remedy(name, problem, steps, notes, changes, version, lost)


def _lost_identity(plan: Plan, peers: Mapping[str, ShardRecord], name: str) -> Identity:
    relative = next(iter(peers.values())).identity
    return new_identity(plan, name, relative.keyspace_uuid, known_uuids(peers)[name])


def _refuse_unknown(
    plan: Plan, changes: Iterable[Change], said: list[Said], asked: set[str]
) -> None:
    """A slot is not kept against a shard that was not asked, since the settings lack it."""
    for change in changes:
        hint = said[change.after.slot].hint
        if change.act is Act.KEEP and hint is not None and hint.owner not in asked:
            raise conflict(
                plan,
                f"slot {hint.slot} is said to belong to a shard {hint.owner} that the settings do "
                "not name: add it to the shards of this keyspace first",
            )


def _changes(own: str, rows: Mapping[int, SlotRow], said: Iterable[Said]) -> Iterator[Change]:
    for slot, words in enumerate(said):
        change = _change(slot, own, rows.get(slot), words)
        if change is not None:
            yield change


def _change(slot: int, own: str, before: SlotRow | None, said: Said) -> Change | None:
    """The rules; see the module's words on them."""
    claims = before is not None and before.owner == own and before.state in CLAIMING
    rival = next((claim for claim in said.claims if claim.owner != own), None)
    if rival is not None and not (claims and before and _weight(before) > _weight(rival)):
        return _yield_to(rival, before, claims=claims)
    if claims:
        kept = said.claimant is not None and said.claimant.owner == own
        return None if kept else Change(Act.KEEP, before, SlotRow(slot, own, OWNED, said.top + 1))
    if said.hint is not None and said.hint.owner == own:
        return Change(Act.TAKE, before, SlotRow(slot, own, OWNED, said.top + 1))
    if said.hint is not None and before is None:
        hinted = SlotRow(slot, said.hint.owner, ELSEWHERE, said.hint.epoch)
        return Change(Act.CORRECT, before, hinted)
    return None


def _yield_to(rival: SlotRow, before: SlotRow | None, *, claims: bool) -> Change | None:
    after = SlotRow(rival.slot, rival.owner, ELSEWHERE, rival.epoch)
    if before is not None and claims:
        equal = _weight(before) == _weight(rival)
        return Change(Act.CONCEDE if equal else Act.GIVE, before, after)
    if before is None or before.epoch < rival.epoch:
        return Change(Act.CORRECT, before, after)
    return None


def _weight(claim: SlotRow) -> tuple[int, bool]:
    return claim.epoch, claim.state == OWNED


def _steps(
    name: str, changes: Iterable[Change], names: Mapping[str, str], lost: Identity | None
) -> Iterator[str]:
    slots: defaultdict[tuple[Act, str], list[int]] = defaultdict(list)
    for change in changes:
        owner = names.get(change.after.owner, change.after.owner)
        slots[change.act, owner].append(change.after.slot)
    if lost is not None:
        yield f"create the tables of shard {name!r}, and make it {lost.shard_uuid} again"
    for wanted in (Act.TAKE, Act.KEEP, Act.GIVE, Act.CONCEDE):
        for owner in sorted(owner for act, owner in slots if act is wanted):
            yield _step(wanted, owner, ranges(slots[wanted, owner]), emptied=lost is not None)
    if corrected := sum(len(some) for (act, _), some in slots.items() if act is Act.CORRECT):
        yield f"correct what it says of {corrected} slots of other shards"


def _step(act: Act, owner: str, slots: str, *, emptied: bool) -> str:
    since = "without their sessions" if emptied else "without what they got since the copy was made"
    return {
        Act.TAKE: f"have it own slots {slots} again, {since}",
        Act.KEEP: f"have it keep slots {slots}, which it alone claims, without what was stored in "
        "them at the higher epochs that others have recorded",
        Act.GIVE: f"give slots {slots} up to shard {owner!r}, which owns them",
        Act.CONCEDE: f"give slots {slots} up to shard {owner!r}, which claims them at the same "
        "epoch, without what only this shard has stored in them",
    }[act]


def _wrong_too(reading: Reading, name: str) -> Iterator[str]:
    for other, wrong in sorted(reading.wrong.items()):
        if other != name:
            yield f"another shard is to be reconciled, too: {wrong.reason}"


def _left(own: str, said: Iterable[Said], names: Mapping[str, str]) -> Iterator[str]:
    left: defaultdict[str, list[int]] = defaultdict(list)
    for slot, words in enumerate(said):
        if not words.claims and words.hint is not None and words.hint.owner != own:
            left[names.get(words.hint.owner, words.hint.owner)].append(slot)
    for owner, slots in sorted(left.items()):
        yield f"slots {ranges(slots)} are claimed by no shard; reconcile shard {owner!r} for them"


async def apply(
    plan: Plan, shards: Mapping[str, Shard], remedy: Remedy, *, accept_loss: bool = False
) -> None:
    """Do what the remedy says, if all shards still say what they said when it was found.

    It may be ended at any point and be begun anew with another look: no step is done twice.

    Raises:
        UsageError: there is nothing to do; or sessions would be lost, and that was not accepted.
        OwnershipConflict: something has been changed meanwhile; nothing was done.
    """
    if not remedy.steps:
        raise UsageError(f"there is nothing to be done to shard {remedy.shard!r} here")
    if remedy.loses and not accept_loss:
        raise UsageError(
            f"sessions of shard {remedy.shard!r} would be lost for good: restore a newer copy of "
            "its database, or accept the loss"
        )
    reading = await consult(plan, shards)
    if find_remedy(plan, reading, remedy.shard) != remedy:
        raise _changed_meanwhile(plan, remedy)
    await _cancel_imports(plan, shards, remedy, reading)
    shard = shards[remedy.shard]
    if remedy.lost is not None:
        await shard.ready(create=True, afresh=True)
        await found(plan, shard, remedy.lost)
    if remedy.map_version is not None:
        await shard.tell(partial(_mend, plan=plan, shard=shard, remedy=remedy))
    await _tell_peers(plan, shards, remedy)


async def _cancel_imports(
    plan: Plan, shards: Mapping[str, Shard], remedy: Remedy, reading: Reading
) -> None:
    """Have nobody decide to own what this shard is going to own: a mover may be about to."""
    owned = {change.after.slot for change in remedy.changes if change.owns}
    for name, record in reading.created.items():
        for row in record.rows:
            if row.slot not in owned or row.state != IMPORTING:
                continue
            peer, cancelled = shards[name], replace(row, state=CANCELLED)
            cancel = partial(change_row, tables=peer.tables, before=row, after=cancelled)
            if not await peer.tell(cancel):
                raise _changed_meanwhile(plan, remedy)


def _changed_meanwhile(plan: Plan, remedy: Remedy) -> Exception:
    what = f"shard {remedy.shard!r}, or what others say of it, has been changed meanwhile"
    return conflict(plan, f"{what}: look again what is to be done")


async def _tell_peers(plan: Plan, shards: Mapping[str, Shard], remedy: Remedy) -> None:
    """Introduce the shard and its peers to each other, and record how far their slot maps are.

    A peer that is behind gets no higher version here: that would hide that it is.
    """
    reading = await consult(plan, shards)
    peers = {name: shards[name] for name in reading.usable if name != remedy.shard}
    await together(
        peer.tell(partial(_hint, tables=peer.tables, remedy=remedy)) for peer in peers.values()
    )
    known = {name: record.identity for name, record in reading.usable.items()}
    right = [name for name in known if name == remedy.shard or name not in reading.wrong]
    introduced = await together(introduce(shards[name], known) for name in right)
    await publish({name: shards[name] for name in known}, dict(zip(right, introduced, strict=True)))


async def _mend(connection: AsyncConnection, *, plan: Plan, shard: Shard, remedy: Remedy) -> None:
    tables = shard.tables
    await lock_map(connection, tables)
    identity = await read_identity(connection, tables)
    rows = {row.slot: row for row in await read_rows(connection, tables)}
    as_before = all(rows.get(change.after.slot) == change.before for change in remedy.changes)
    version = remedy.map_version or 0
    if identity is None or identity.map_version >= version or not as_before:
        raise _changed_meanwhile(plan, remedy)
    new = [change.after for change in remedy.changes if change.before is None]
    if new:
        await insert_rows(connection, tables, new, identity.shard_uuid)
    for change in remedy.changes:
        if change.before is not None:
            await _set_row(connection, tables, change.after)
    await connection.execute(update(tables.shard).values(map_version=version))


async def _set_row(connection: AsyncConnection, tables: Tables, row: SlotRow) -> None:
    values = {"owner": row.owner, "state": row.state, "epoch": row.epoch}
    here = tables.slots.c.slot == row.slot
    await connection.execute(
        update(tables.slots).where(here).values(**values, move_id=None, peer=None)
    )


async def _hint(connection: AsyncConnection, *, tables: Tables, remedy: Remedy) -> None:
    """Tell a peer of the slots that the shard has taken or kept."""
    slots = tables.slots
    for row in (change.after for change in remedy.changes if change.owns):
        await connection.execute(
            update(slots)
            .where(slots.c.slot == row.slot, slots.c.state == ELSEWHERE, slots.c.epoch < row.epoch)
            .values(owner=row.owner, epoch=row.epoch)
        )
