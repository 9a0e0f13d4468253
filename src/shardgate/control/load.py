"""What each slot carries, asked of the shards that own them.

A shard is asked one statement at a time, each of a few slots' sessions; all shards are asked at the
same time. Sessions are counted by their own counters: no item is read.
"""

from __future__ import annotations

from asyncio import get_running_loop, sleep
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from shardgate.control.rebalance import Load
from shardgate.errors import OwnershipConflict
from shardgate.shards import ask_all
from shardgate.slots import slot_range
from shardgate.sql.load import tally, tally_statement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardgate.agreement import Plan
    from shardgate.errors import ShardgateError
    from shardgate.shards import Shard
    from shardgate.sql.load import Tally
    from shardgate.topology import KeyspaceMap

_PLACES = 64
"""Slots of one statement at the most."""
_PARTS = 64
"""A statement reads this part of the keyspace at the most, unless one slot is more."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a slot carried, and when that was, in seconds of the event loop's clock."""

    tally: Tally
    at: float


async def measure(
    plan: Plan, shards: Mapping[str, Shard], known: KeyspaceMap, *, seconds: float = 0.0
) -> tuple[list[Load], dict[str, ShardgateError]]:
    """Measure what each slot carries; changes nothing.

    Args:
        plan: what the settings want of the keyspace.
        shards: all shards of the keyspace, by name.
        known: who owns which slot. What is stored of a slot elsewhere does not count.
        seconds: how long to watch how many changes there are. With 0 writes are not measured, and
            each session is counted once instead of twice.

    Returns:
        The loads in slot order, and why some shards could not be asked, by name: the loads of their
        slots are empty.
    """
    owned = {name: known.slots_of(name) for name in sorted(set(known.owners))}
    found, down = await ask_all(
        {
            name: _measure(shards[name], slots, plan.slots, seconds)
            for name, slots in owned.items()
            if name in shards
        }
    )
    strangers = {name: _not_named(plan, name) for name in owned if name not in shards}
    by_slot = {slot: load for loads in found.values() for slot, load in loads.items()}
    return [by_slot.get(slot, Load()) for slot in range(plan.slots)], {**down, **strangers}


def _not_named(plan: Plan, name: str) -> OwnershipConflict:
    return OwnershipConflict(
        f"shard {name!r} owns slots of keyspace {plan.keyspace!r}, but the settings do not name it",
        keyspace=plan.keyspace,
    )


async def _measure(
    shard: Shard, slots: Sequence[int], count: int, seconds: float
) -> dict[int, Load]:
    """The load of these slots of ``count``; the last reading counts for all but the writes."""
    first = last = await _read(shard, slots, count)
    if seconds > 0:
        await sleep(seconds)
        last = await _read(shard, slots, count)
    return {slot: _load(first[slot], last[slot]) for slot in slots}


def _load(first: _Reading, last: _Reading) -> Load:
    """Sessions that were deleted in between take their changes with them: not less than 0."""
    grown = last.tally.revisions - first.tally.revisions
    return Load(
        sessions=last.tally.sessions,
        items=last.tally.items,
        nbytes=last.tally.nbytes,
        writes=grown / (last.at - first.at) if grown > 0 else 0.0,
    )


async def _read(shard: Shard, slots: Sequence[int], count: int) -> dict[int, _Reading]:
    places = max(1, min(_PLACES, count // _PARTS))
    statement = tally_statement(shard.tables, places)
    readings: dict[int, _Reading] = {}
    for start in range(0, len(slots), places):
        chunk = slots[start : start + places]
        ranges = [slot_range(slot, count) for slot in chunk]
        tallies = await shard.query(partial(tally, statement=statement, ranges=ranges))
        at = get_running_loop().time()
        readings |= {slot: _Reading(one, at) for slot, one in zip(chunk, tallies, strict=True)}
    return readings
