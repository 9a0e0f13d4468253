"""The slot map of a keyspace, put together from what its shards say of their slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardgate.agreement import contradictions
from shardgate.errors import KeyspaceNotCreated, OwnershipConflict
from shardgate.records import CLAIMING, read_records
from shardgate.topology import KeyspaceMap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardgate.agreement import Contradiction, Memory, Plan
    from shardgate.errors import ShardgateError
    from shardgate.records import ShardRecord
    from shardgate.shards import Shard


@dataclass(frozen=True, slots=True)
class Reading:
    """What the shards have said: their records, who did not answer, and what is wrong with whom.

    A shard in ``wrong`` has contradicted the others twice.
    """

    records: Mapping[str, ShardRecord | None]
    down: Mapping[str, ShardgateError]
    wrong: Mapping[str, Contradiction]

    @property
    def created(self) -> dict[str, ShardRecord]:
        """The records of the shards that have one."""
        return {name: record for name, record in self.records.items() if record is not None}

    @property
    def usable(self) -> dict[str, ShardRecord]:
        """The records that say something of this keyspace, though it may be old news."""
        return {
            name: record
            for name, record in self.created.items()
            if name not in self.wrong or self.wrong[name].reads
        }


async def consult(
    plan: Plan,
    shards: Mapping[str, Shard],
    memory: Memory | None = None,
    *,
    seconds: float | None = None,
) -> Reading:
    """Read the shards' records and compare them with each other and with what was seen before.

    They are not read in one moment: a change in between looks like a contradiction. So whoever
    contradicts is asked again, and what has happened meanwhile is no longer held against him.
    ``seconds``: how long each shard is waited for, if less than its deadline.
    """
    before = None if memory is None else memory.copy()
    answers, down = await read_records(shards, seconds=seconds)
    wrong = contradictions(plan, answers, before)
    if wrong:
        suspects = {name: shards[name] for name in wrong}
        again, _ = await read_records(suspects, seconds=seconds)
        answers |= again
        still = contradictions(plan, answers, before)
        wrong = {name: still[name] for name in wrong if name in still}
    return Reading(answers, down, wrong)


def map_of(plan: Plan, reading: Reading) -> KeyspaceMap:
    """The keyspace's map, from the shards that have answered.

    Raises:
        ShardUnavailable: no shard answers.
        KeyspaceNotCreated: shards answer, and none holds a map.
        OwnershipConflict: no shard that answers is one of this keyspace.
    """
    if reading.usable:
        return build_map(plan, reading.usable)
    if reading.wrong:
        reasons = "; ".join(wrong.reason for wrong in reading.wrong.values())
        raise conflict(plan, reasons)
    if reading.down:
        raise next(iter(reading.down.values()))
    raise KeyspaceNotCreated(
        f"keyspace {plan.keyspace!r} has not been created on its shards: run "
        "'shardgate create-tables', or call gateway.create_tables()",
        keyspace=plan.keyspace,
    )


def build_map(plan: Plan, records: Mapping[str, ShardRecord]) -> KeyspaceMap:
    """The map that these records make.

    A slot's owner is who claims it in its own record; for shards without a record, whom the others
    name at the highest epoch. That may be a shard that the settings do not have.

    Raises:
        OwnershipConflict: nothing is said of a slot.
    """
    names = {uuid: peer.name for record in records.values() for uuid, peer in record.peers.items()}
    names |= {record.uuid: name for name, record in records.items()}
    best: dict[int, tuple[tuple[int, bool], str]] = {}
    for record in records.values():
        for row in record.rows:
            own = row.owner == record.uuid
            rank = (row.epoch, own and row.state in CLAIMING)
            if row.slot not in best or rank > best[row.slot][0]:
                best[row.slot] = (rank, row.owner)
    return KeyspaceMap(
        name=plan.keyspace,
        slots=plan.slots,
        spread=plan.spread,
        owners=tuple(_owner(plan, slot, best, names) for slot in range(plan.slots)),
        epochs=tuple(best[slot][0][0] for slot in range(plan.slots)),
        uuids={name: uuid for uuid, name in names.items()},
    )


def _owner(
    plan: Plan, slot: int, best: Mapping[int, tuple[Any, str]], names: Mapping[str, str]
) -> str:
    if slot not in best:
        raise conflict(plan, f"no shard has a record of slot {slot}")
    uuid = best[slot][1]
    return names.get(uuid, uuid)


def unnamed_owners(plan: Plan, known: KeyspaceMap) -> dict[str, str]:
    """The shards that own slots and that the settings do not have, each with what that means."""
    missing = sorted(set(known.owners) - plan.weights.keys())
    return {name: not_named(name, len(known.slots_of(name))) for name in missing}


def not_named(owner: str, slots: int) -> str:
    """What to say of an owner that the settings do not have."""
    return (
        f"{slots} slots belong to shard {owner!r}, which the settings do not name: add it to the "
        "shards of this keyspace"
    )


def conflict(plan: Plan, what: str) -> OwnershipConflict:
    """The error that says what does not fit in this keyspace."""
    return OwnershipConflict(f"keyspace {plan.keyspace!r}: {what}", keyspace=plan.keyspace)
