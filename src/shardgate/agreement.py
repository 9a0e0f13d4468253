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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardgate.handover import OWNED
from shardgate.records import HASH
from shardgate.sql.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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


@dataclass(slots=True)
class Memory:
    """What a process has seen of a keyspace: a witness like the shards' peers, and for good.

    ``keyspace_uuid``; the shards' UUIDs by name; and how far their slot maps had come, by UUID.
    """

    keyspace_uuid: str | None = None
    uuids: dict[str, str] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Memory:
        """As it is now."""
        return Memory(self.keyspace_uuid, dict(self.uuids), dict(self.versions))

    def take(self, records: Mapping[str, ShardRecord]) -> None:
        """Remember what shards say that fit; what is known already of who is who, stays."""
        for name, record in records.items():
            self.keyspace_uuid = self.keyspace_uuid or record.identity.keyspace_uuid
            self.uuids.setdefault(name, record.uuid)
            self.see(record.uuid, record.identity.map_version)
            for uuid, peer in record.peers.items():
                self.uuids.setdefault(peer.name, uuid)
                self.see(uuid, peer.map_version)

    def see(self, uuid: str, map_version: int) -> None:
        """Remember that a shard's slot map had come so far."""
        self.versions[uuid] = max(map_version, self.versions.get(uuid, 0))


def contradictions(
    plan: Plan, answers: Mapping[str, ShardRecord | None], memory: Memory | None = None
) -> dict[str, Contradiction]:
    """What is wrong with each of the shards that have answered, by name.

    Args:
        plan: what the settings want.
        answers: the shards' records; None for one that has no record.
        memory: what this process has seen before.
    """
    memory = memory or Memory()
    records = {name: record for name, record in answers.items() if record is not None}
    strangers = _mistaken(plan, records, memory)
    known = {name: record for name, record in records.items() if name not in strangers}
    uuids = known_uuids(known) | memory.uuids
    without = [name for name in sorted(answers) if name not in records and name in uuids]
    lost = {name: Contradiction(lost_record(name, uuids[name])) for name in without}
    behind = dict(_behind(known, memory.versions))
    return {
        **{name: Contradiction(reason) for name, reason in strangers.items()},
        **lost,
        **{name: Contradiction(reason, reads=True) for name, reason in _usurped(known).items()},
        **{name: Contradiction(reason, reads=True) for name, reason in behind.items()},
    }


def _mistaken(plan: Plan, records: Mapping[str, ShardRecord], memory: Memory) -> dict[str, str]:
    """The shards that are not the ones that they are taken for."""
    shape = {"slots": plan.slots, "spread": plan.spread}
    version = {"hash": HASH, "schema_version": SCHEMA_VERSION}
    problems: dict[str, str] = {}
    for name, record in records.items():
        wanted = {"name": name, "keyspace": plan.keyspace, **shape, **version}
        if problem := _difference(name, record.identity, wanted):
            problems[name] = problem
    alike = {name: record for name, record in records.items() if name not in problems}
    family = memory.keyspace_uuid or _family(alike)
    for name, record in alike.items():
        if record.identity.keyspace_uuid != family:
            problems[name] = _not_related(name, record.identity, family)
    witnesses = {name: record for name, record in alike.items() if name not in problems}
    for name, uuid in (known_uuids(witnesses) | memory.uuids).items():
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


def lost_record(name: str, uuid: str) -> str:
    """What to say of a shard that is known and has no record."""
    return (
        f"shard {name!r} has no record of its own, but its peers know it as {uuid}: is its URL the "
        "right one, or was its database emptied?"
    )


def other_shard(name: str, uuid: str | None, wanted: str) -> str:
    """What to say of a shard that has become another one."""
    return (
        f"shard {name!r} says that its shard_uuid is {uuid!r}, but it should be {wanted!r}: is its "
        "URL the right one?"
    )


def older_copy(name: str, has: int, seen: int) -> str:
    """What to say of a shard whose slot map has come less far than it had."""
    return (
        f"shard {name!r} has version {has} of its slot map, and version {seen} was seen: it was "
        "restored from an older copy"
    )


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
        known = max(recorded_version(records, record.uuid), seen.get(record.uuid, 0))
        if has < known:
            yield name, older_copy(name, has, known)


def recorded_version(records: Mapping[str, ShardRecord], uuid: str) -> int:
    """How far a shard's slot map had come at least, by its peers' records."""
    versions = [
        record.peers[uuid].map_version for record in records.values() if uuid in record.peers
    ]
    return max(versions, default=0)
