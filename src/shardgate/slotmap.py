"""The slot map of a keyspace, put together from what its shards say of their slots."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, TypeAlias

from shardgate.agreement import contradictions
from shardgate.errors import KeyspaceNotCreated, OwnershipConflict
from shardgate.handover import DRAINING, OWNED
from shardgate.records import read_records
from shardgate.topology import KeyspaceMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shardgate.agreement import Contradiction, Memory, Plan
    from shardgate.errors import ShardgateError
    from shardgate.handover import SlotRow
    from shardgate.records import ShardRecord
    from shardgate.shards import Shard

_Rank: TypeAlias = tuple[bool, int, int, str]
"""Of a row: whether it tells who owns the slot, its epoch, how much of a claim it is, its owner."""
_CLAIMS = {OWNED: 2, DRAINING: 1}


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
    def right(self) -> dict[str, ShardRecord]:
        """The records with which nothing is wrong."""
        return {name: record for name, record in self.created.items() if name not in self.wrong}

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
    if any(record.rows for record in reading.usable.values()):
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


def names_by_uuid(records: Mapping[str, ShardRecord]) -> dict[str, str]:
    """What to call the shards, by UUID, those too that are only known to others."""
    names = {uuid: peer.name for record in records.values() for uuid, peer in record.peers.items()}
    return names | {record.uuid: name for name, record in records.items()}


def build_map(plan: Plan, records: Mapping[str, ShardRecord]) -> KeyspaceMap:
    """The map that these records make.

    A slot's owner is whoever is said to be at the highest epoch: at one epoch by a claim of its own
    before a hint of others, and by a claim to own it before that of a source that drains (its mover
    may have died after the target's decision). That may be a shard that the settings do not have.

    Raises:
        OwnershipConflict: nothing is said of a slot.
    """
    names = names_by_uuid(records)
    best: dict[int, _Rank] = {}
    for record in records.values():
        for row in record.rows:
            rank = _rank(record.uuid, row)
            if row.slot not in best or rank > best[row.slot]:
                best[row.slot] = rank
    if missing := set(range(plan.slots)) - best.keys():
        raise conflict(plan, f"no shard has a record of slot {min(missing)}")
    return KeyspaceMap(
        name=plan.keyspace,
        slots=plan.slots,
        spread=plan.spread,
        owners=tuple(names.get(best[slot][3], best[slot][3]) for slot in range(plan.slots)),
        epochs=tuple(best[slot][1] for slot in range(plan.slots)),
        uuids={name: uuid for uuid, name in names.items()},
    )


def _rank(speaker: str, row: SlotRow) -> _Rank:
    """What counts more is greater. The UUID comes last, so that everybody takes the same one.

    A shard that names itself without claiming is importing, or has cancelled that: this is no news
    of who owns the slot, whatever its epoch.
    """
    own = row.owner == speaker
    claim = _CLAIMS.get(row.state, 0) if own else 0
    return (claim > 0 or not own, row.epoch, claim, row.owner)


@dataclass(frozen=True, slots=True)
class Said:
    """What the shards say of one slot.

    ``top`` is the highest epoch that anybody has. ``claims`` are the rows of the shards that claim
    it for themselves, and ``hint`` is the row that counts most of those that claim nothing; see
    ``build_map`` for what counts more. The best claim comes first.
    """

    top: int
    claims: tuple[SlotRow, ...]
    hint: SlotRow | None

    @property
    def claimant(self) -> SlotRow | None:
        """The claim that serves; None where there is none, or a hint knows a newer owner."""
        if not self.claims or (self.hint is not None and self.hint.epoch > self.claims[0].epoch):
            return None
        return self.claims[0]


def all_said(plan: Plan, records: Iterable[ShardRecord]) -> list[Said]:
    """What the records say of every slot, in order.

    Raises:
        OwnershipConflict: nothing is said of a slot.
    """
    ranked: list[list[tuple[_Rank, SlotRow]]] = [[] for _ in range(plan.slots)]
    for record in records:
        for row in record.rows:
            ranked[row.slot].append((_rank(record.uuid, row), row))
    return [_said(plan, slot, rows) for slot, rows in enumerate(ranked)]


def _said(plan: Plan, slot: int, ranked: list[tuple[_Rank, SlotRow]]) -> Said:
    if not ranked:
        raise conflict(plan, f"no shard has a record of slot {slot}")
    ranked.sort(key=itemgetter(0), reverse=True)
    claims = tuple(row for (_, _, claim, _), row in ranked if claim)
    hints = [row for (tells, _, claim, _), row in ranked if not claim and (tells or not claims)]
    return Said(
        top=max(row.epoch for _, row in ranked), claims=claims, hint=hints[0] if hints else None
    )


def unserved(plan: Plan, records: Mapping[str, ShardRecord]) -> dict[str, str]:
    """The shards that are to be reconciled because slots are served by nobody, each with why.

    Either nobody claims a slot, and it concerns the shard that the best hint names; or a hint names
    another shard at a higher epoch than the best claim has, and it concerns who claims it. Nothing
    is said where a shard is named that has no record here: it may claim the slot.
    """
    names = {record.uuid: name for name, record in records.items()}
    unclaimed: defaultdict[str, list[int]] = defaultdict(list)
    overtaken: defaultdict[str, list[int]] = defaultdict(list)
    for slot, said in enumerate(all_said(plan, records.values())):
        if said.claimant is not None or said.hint is None or said.hint.owner not in names:
            continue
        if said.claims:
            overtaken[names[said.claims[0].owner]].append(slot)
        else:
            unclaimed[names[said.hint.owner]].append(slot)
    return {
        name: _not_served(name, unclaimed.get(name, []), overtaken.get(name, []))
        for name in sorted(unclaimed.keys() | overtaken.keys())
    }


def _not_served(name: str, unclaimed: list[int], overtaken: list[int]) -> str:
    parts = []
    if unclaimed:
        parts.append(
            f"slots {ranges(unclaimed)} are claimed by no shard; shard {name!r} is the last that "
            "they are said to belong to"
        )
    if overtaken:
        parts.append(
            f"slots {ranges(overtaken)} are claimed by shard {name!r}, and others have "
            "recorded owners at higher epochs"
        )
    return "; ".join(parts)


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as text: 1-3, 7."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return ", ".join(str(one) if one == last else f"{one}-{last}" for one, last in runs)


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
