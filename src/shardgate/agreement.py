"""Whether the shards of a keyspace are those that the settings, and their peers, take them for.

Pure: it compares records. What it finds is about one shard each, so that the others can serve.

A restored backup cannot be found out from itself, since everything inside it was restored with it.
Its peers know: each records how far the others' slot maps had come when they last changed. So a
copy is found out if the keyspace has changed since it was made (a slot was moved, a shard joined),
and if one of its peers can be asked. Not found out are a keyspace of one shard, and a copy that is
younger than the last recorded change: ownership is then the same in both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from shardgate.records import HASH, OWNED
from shardgate.sql.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from shardgate.records import Identity, ShardRecord
    from shardgate.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class Plan:
    """What the settings want of a keyspace."""

    keyspace: str
    slots: int
    spread: int | None
    weights: Mapping[str, float]

    @classmethod
    def of(cls, settings: GatewaySettings, keyspace: str) -> Plan:
        """What these settings want; raises UsageError for an unknown keyspace."""
        shape = settings.keyspace(keyspace)
        weights = {name: shard.weight for name, shard in settings.shards_of(keyspace).items()}
        return cls(keyspace, shape.slots, shape.spread, weights)


@dataclass(frozen=True, slots=True)
class Contradiction:
    """What is wrong with a shard, in words; ``reads``: whether it may still be read from.

    That is so where it is the right shard, but behind: the slots that are still its own.
    """

    reason: str
    reads: bool = False


def contradictions(
    plan: Plan,
    answers: Mapping[str, ShardRecord | None],
    *,
    seen: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Contradiction]:
    """What is wrong with each of the shards that have answered, by name.

    Args:
        plan: what the settings want.
        answers: the shards' records; None for one that has no record.
        seen: how far the slot maps had come when this process last looked, by UUID.
    """
    records = {name: record for name, record in answers.items() if record is not None}
    strangers = _mistaken(plan, records)
    known = {name: record for name, record in records.items() if name not in strangers}
    without = [name for name in answers if name not in records]
    return {
        **{name: Contradiction(reason) for name, reason in strangers.items()},
        **{name: Contradiction(reason) for name, reason in _lost(known, without).items()},
        **{name: Contradiction(reason, reads=True) for name, reason in _usurped(known).items()},
        **{name: Contradiction(reason, reads=True) for name, reason in _behind(known, seen)},
    }


def _mistaken(plan: Plan, records: Mapping[str, ShardRecord]) -> dict[str, str]:
    """The shards that are not the ones that they are taken for."""
    shape = {"slots": plan.slots, "spread": plan.spread}
    version = {"hash": HASH, "schema_version": SCHEMA_VERSION}
    problems: dict[str, str] = {}
    for name, record in records.items():
        wanted = {"name": name, "keyspace": plan.keyspace, **shape, **version}
        if problem := _difference(name, record.identity, wanted):
            problems[name] = problem
    alike = {name: record for name, record in records.items() if name not in problems}
    family = _family(alike)
    for name, record in alike.items():
        if record.identity.keyspace_uuid != family:
            problems[name] = _not_related(name, record.identity, family)
    witnesses = {name: record for name, record in alike.items() if name not in problems}
    for name, uuid in known_uuids(witnesses).items():
        if name in witnesses:
            problem = _difference(name, witnesses[name].identity, {"shard_uuid": uuid})
            problems |= {name: problem} if problem else {}
    return problems


def _family(records: Mapping[str, ShardRecord]) -> str | None:
    """The keyspace that most of the shards are of; None where as many are of another one."""
    counts = Counter(record.identity.keyspace_uuid for record in records.values()).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return None
    return counts[0][0]


def _not_related(name: str, identity: Identity, family: str | None) -> str:
    if family is not None:
        return str(_difference(name, identity, {"keyspace_uuid": family}))
    return (
        f"shard {name!r} says that its keyspace_uuid is {identity.keyspace_uuid!r}, and just as "
        "many shards say otherwise: is its URL the right one, or are theirs wrong?"
    )


def _difference(name: str, identity: Identity, wanted: Mapping[str, object]) -> str | None:
    for what, value in wanted.items():
        found = getattr(identity, what)
        if found != value:
            return (
                f"shard {name!r} says that its {what} is {found!r}, but it should be {value!r}: "
                f"{_hint(what)}"
            )
    return None


def _hint(what: str) -> str:
    if what in ("slots", "spread"):
        return "this was fixed when the keyspace was created; set it back"
    if what in ("hash", "schema_version"):
        return "it was made by another version of Shardgate"
    return "is its URL the right one?"


def known_uuids(records: Mapping[str, ShardRecord]) -> dict[str, str]:
    """The UUID under which its peers know each shard."""
    votes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records.values():
        for uuid, peer in record.peers.items():
            votes[peer.name][uuid] += 1
    return {name: uuids.most_common(1)[0][0] for name, uuids in votes.items()}


def _lost(records: Mapping[str, ShardRecord], names: Iterable[str]) -> dict[str, str]:
    """Those of the named shards, which have no record, that their peers know."""
    uuids = known_uuids(records)
    return {
        name: f"shard {name!r} has no record of its own, but its peers know it as {uuids[name]}: "
        "is its URL the right one, or was its database emptied?"
        for name in sorted(names)
        if name in uuids
    }


def _usurped(records: Mapping[str, ShardRecord]) -> dict[str, str]:
    """The shards that claim a slot that another one claims at the same or a higher epoch."""
    claims: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
    for name, record in records.items():
        for row in record.rows:
            if row.owner == record.uuid and row.state == OWNED:
                claims[row.slot].append((row.epoch, name))
    problems: dict[str, str] = {}
    for slot, claimants in claims.items():
        best, winner = max(claimants)
        for epoch, name in claimants if len(claimants) > 1 else ():
            if epoch < best or len([one for one, _ in claimants if one == best]) > 1:
                other = winner if name != winner else min(claimants)[1]
                problems.setdefault(name, _claimed_twice(slot, name, epoch, other, best))
    return problems


def _claimed_twice(slot: int, name: str, epoch: int, other: str, best: int) -> str:
    return (
        f"shard {name!r} claims slot {slot} at epoch {epoch}, and shard {other!r} claims it at "
        f"epoch {best}: was it restored from an older copy?"
    )


def _behind(
    records: Mapping[str, ShardRecord], seen: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """The shards whose slot map has come less far than others remember it."""
    for name, record in records.items():
        has = record.identity.map_version
        recorded = recorded_version(records, record.uuid)
        if has < max(recorded, seen.get(record.uuid, 0)):
            yield (
                name,
                f"shard {name!r} has version {has} of its slot map, and version "
                f"{max(recorded, seen.get(record.uuid, 0))} was seen: it was restored from an "
                "older copy",
            )


def recorded_version(records: Mapping[str, ShardRecord], uuid: str) -> int:
    """How far a shard's slot map had come at least, by its peers' records."""
    versions = [
        record.peers[uuid].map_version for record in records.values() if uuid in record.peers
    ]
    return max(versions, default=0)
