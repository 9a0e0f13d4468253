"""Which slots should move where: a short list of moves, from what the slots carry.

Pure: a plan is computed from the slot map, the shards' weights and the slots' measured load; the
same input gives the same plan. What a plan aims at is that no shard carries much more than its
weight's share.

**What a slot costs.** Three shares of the keyspace's, weighed alike: of its items, of its bytes and
of its writes per second. Each is held against what to expect where little was measured:

- items and bytes: each slot counts as if it had 16 items of 1 KiB more than it has. So an empty
  keyspace is balanced by slots, and in a full one this does not count;
- writes: to what was measured come 0.02 writes per second and slot, spread over the slots as their
  items and bytes are. So a few writes seen by chance do not count, and where writes were not
  measured, what is stored decides alone.

All slots together cost 1.

**When something is done.** While no shard carries more than its wanted share by the threshold,
nothing is: moves cost something, too. But a shard that weighs 0 gives all its slots away, and one
that has just joined is filled (one that carries less than half of its share). Who is beyond that
line is brought to the share itself, so that he does not soon cross it again; within the threshold
though, only slots that cost at least half as much as the average are worth a move.

**Which moves.** First the slots of shards that weigh 0, the most expensive first, each to where it
leaves the lowest ratio of carried to wanted. Then, from the shard of the highest ratio that can be
helped, the slot that takes most from what is too much, at both ends, to the shard with the most
room. The higher one of the two shards' ratios gets lower by each move (of a shard that weighs 0:
its slots fewer), so a plan can be stopped anywhere. No slot moves twice.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from math import fsum, inf
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from shardgate.errors import UsageError
from shardgate.slots import check_slot
from shardgate.topology import assign

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from shardgate.topology import KeyspaceMap

THRESHOLD = 0.05
"""How much more than its share a shard may carry before something is done, as a part of it."""
_JOINING = 0.5
_ITEMS, _BYTES, _WRITES = 16.0, 16384.0, 0.02
_NOTICEABLE = 1e-9
"""A smaller difference of ratios is one of rounding."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a slot carries. ``writes`` are changes per second; 0 where they were not measured."""

    sessions: int = 0
    items: int = 0
    nbytes: int = 0
    writes: float = 0.0


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """One slot, from the shard that owns it to another one, with what there is to copy."""

    slot: int
    source: str
    target: str
    load: Load


@dataclass(frozen=True, slots=True)
class ShardLoad:
    """What a shard carries, all its slots together.

    ``share`` is its part of all that the keyspace's slots cost, and ``wanted`` what its part should
    be by its weight: None for a shard that the settings do not name, of which nothing is known.
    """

    slots: int
    load: Load
    share: float
    wanted: float | None

    @property
    def ratio(self) -> float:
        """Share to wanted share: 1 is just right, and infinite what should have nothing."""
        if self.slots == 0 or self.wanted is None:
            return 0.0
        return _ratio(self.share, self.wanted)


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Moves, in the order in which to make them: each improves, so any of them may be the last.

    ``before`` and ``after`` say what each shard carries, by name, in name order.
    """

    keyspace: str
    moves: tuple[PlannedMove, ...]
    before: Mapping[str, ShardLoad]
    after: Mapping[str, ShardLoad]

    @property
    def imbalance_before(self) -> float:
        """The highest ratio of share to wanted share that any shard has now."""
        return _imbalance(self.before)

    @property
    def imbalance_after(self) -> float:
        """The highest ratio of share to wanted share that any shard has at the end."""
        return _imbalance(self.after)

    @property
    def unreachable(self) -> tuple[str, ...]:
        """Shards that own slots but are not in the settings: nothing can be moved from there."""
        return tuple(name for name, shard in self.before.items() if shard.wanted is None)

    @property
    def load(self) -> Load:
        """What is to be copied, all moves together."""
        return _sum(move.load for move in self.moves)

    def seconds(self, rate: float) -> float:
        """How long copying takes at ``rate`` bytes per second; what a move takes besides is not in
        it."""
        return self.load.nbytes / rate


def plan_moves(
    known: KeyspaceMap,
    weights: Mapping[str, float],
    loads: Sequence[Load],
    *,
    threshold: float = THRESHOLD,
    most: int | None = None,
) -> MovePlan:
    """Plan the moves that bring each shard to its share; see the module's words on how.

    Args:
        known: who owns which slot.
        weights: of the shards that the settings name; 0 empties a shard. A shard that owns slots
            and is missing here keeps them, as ``unreachable`` says.
        loads: what each slot carries, in slot order.
        threshold: how much more than its share a shard may carry, as a part of it.
        most: how many moves there may be at the most; None: as many as it takes.

    Raises:
        UsageError: weights that nobody can share out by; not one load for each slot; a threshold or
            a number of moves below 0.
    """
    if not threshold >= 0:
        raise UsageError(f"the threshold is {threshold}; use 0 or more, such as {THRESHOLD}")
    if most is not None and most < 0:
        raise UsageError(f"{most} moves at the most: use 0 or more")
    balance = _Balance(known, weights, _costs(known, loads), threshold)
    return _summarise(known, weights, loads, islice(balance.moves(), most))


def plan_of_slots(
    known: KeyspaceMap,
    slots: Iterable[int],
    target: str,
    loads: Sequence[Load],
    *,
    weights: Mapping[str, float],
) -> MovePlan:
    """Plan to move just these slots to a shard, whatever that does to the balance.

    Slots that the target owns already are left out. Raises UsageError as ``plan_moves``, and where
    there is no such slot, or the settings lack the target or the slot's owner.
    """
    chosen = sorted({check_slot(slot, known.slots) for slot in slots})
    moves = [(slot, target) for slot in chosen if known.owners[slot] != target]
    for name in sorted({target, *(known.owners[slot] for slot, _ in moves)} - weights.keys()):
        raise UsageError(f"the settings have no shard {name!r} in keyspace {known.name!r}")
    return _summarise(known, weights, loads, moves)


def drained(weights: Mapping[str, float], name: str) -> dict[str, float]:
    """The weights with which a plan empties a shard.

    Raises UsageError where there is no such shard, or no other one that could take its slots.
    """
    if name not in weights:
        raise UsageError(f"there is no shard {name!r}; there are {', '.join(sorted(weights))}")
    rest = {**weights, name: 0.0}
    if not any(rest.values()):
        raise UsageError(f"shard {name!r} cannot be drained: no other one has a weight above 0")
    return rest


def _costs(known: KeyspaceMap, loads: Sequence[Load]) -> list[float]:
    """What each slot costs; the module's words give the formula."""
    if len(loads) != known.slots:
        raise UsageError(f"{len(loads)} loads for {known.slots} slots; each slot needs one")
    even = [1 / known.slots] * known.slots
    items = _shares([load.items for load in loads], even, _ITEMS * known.slots)
    nbytes = _shares([load.nbytes for load in loads], even, _BYTES * known.slots)
    stored = [(one + other) / 2 for one, other in zip(items, nbytes, strict=True)]
    writes = _shares([load.writes for load in loads], stored, _WRITES * known.slots)
    return [(2 * one + other) / 3 for one, other in zip(stored, writes, strict=True)]


def _shares(amounts: Sequence[float], expected: Sequence[float], weight: float) -> list[float]:
    """Each amount's part of all, with an amount of ``weight`` added that is spread as expected."""
    total = fsum(amounts) + weight
    return [
        (amount + weight * part) / total for amount, part in zip(amounts, expected, strict=True)
    ]


def _wanted(weights: Mapping[str, float], reach: float) -> dict[str, float]:
    """Each shard's part of ``reach``, by its weight. Raises UsageError.

    Weights are compared with the heaviest one first: their sum may be too large for a float.
    """
    assign(1, weights)  # refuses what nobody can share out by
    heaviest = max(weights.values())
    parts = {name: weight / heaviest for name, weight in weights.items()}
    total = fsum(parts.values())
    return {name: reach * (part / total) for name, part in sorted(parts.items())}


def _ratio(share: float, wanted: float) -> float:
    return share / wanted if wanted else inf


class _Priced(NamedTuple):
    """A slot in the order of cost."""

    cost: float
    slot: int


_cost = attrgetter("cost")


class _Balance:
    """What the shards carry while a plan is being made."""

    def __init__(
        self,
        known: KeyspaceMap,
        weights: Mapping[str, float],
        costs: Sequence[float],
        threshold: float,
    ) -> None:
        owned: dict[str, list[_Priced]] = {name: [] for name in sorted(weights)}
        for slot, owner in enumerate(known.owners):
            if owner in owned:
                owned[owner].append(_Priced(costs[slot], slot))
        self._movable = {name: sorted(slots) for name, slots in owned.items()}
        self._share = {name: fsum(cost for cost, _ in slots) for name, slots in owned.items()}
        self._wanted = _wanted(weights, fsum(self._share.values()))
        self._takers = [name for name, wanted in self._wanted.items() if wanted]
        self._edge = threshold
        self._worth = 0.5 / known.slots
        self._joining = {name for name in self._takers if self._is_joining(name)}
        self._over: set[str] = set()

    def moves(self) -> Iterator[tuple[int, str]]:
        """The slots to move, each with where to, in order."""
        yield from self._empty()
        yield from self._level()

    def _is_joining(self, name: str) -> bool:
        return self._ratio_of(name) < _JOINING

    def _ratio_of(self, name: str, change: float = 0.0) -> float:
        return _ratio(self._share[name] + change, self._wanted[name])

    def _excess(self, name: str) -> float:
        return self._share[name] - self._wanted[name]

    def _empty(self) -> Iterator[tuple[int, str]]:
        """Give away what belongs to shards that should have nothing."""
        leaving = [name for name, wanted in self._wanted.items() if not wanted]
        slots = [(priced, name) for name in leaving for priced in self._movable.pop(name)]
        for priced, source in sorted(slots, reverse=True):
            cost = priced.cost
            target = min(self._takers, key=lambda name: (self._ratio_of(name, cost), name))
            yield self._move(priced, source, target)

    def _move(self, priced: _Priced, source: str, target: str) -> tuple[int, str]:
        self._share[source] -= priced.cost
        self._share[target] += priced.cost
        return priced.slot, target

    def _level(self) -> Iterator[tuple[int, str]]:
        """Take from those that have too much, as long as it helps."""
        givers = set(self._takers)
        while givers:
            source = max(sorted(givers), key=self._ratio_of)
            if self._ratio_of(source) > 1 + self._edge + _NOTICEABLE:
                self._over.add(source)
            chosen = self._choose(source) if self._excess(source) > 0 else None
            if chosen is None:
                givers.remove(source)
                continue
            priced, target = chosen
            del self._movable[source][bisect_left(self._movable[source], priced)]
            yield self._move(priced, source, target)

    def _choose(self, source: str) -> tuple[_Priced, str] | None:
        """The best slot to take from a shard, and where to; None where nothing helps."""
        targets = self._takers if source in self._over else sorted(self._joining)
        others = [name for name in targets if name != source]
        if not others or not self._movable[source]:
            return None
        roomiest = min(others, key=self._excess)
        if chosen := self._choose_for(source, roomiest):
            return chosen
        for target in sorted(others, key=self._ratio_of):
            if chosen := self._choose_for(source, target):
                return chosen
        return None

    def _choose_for(self, source: str, target: str) -> tuple[_Priced, str] | None:
        """Of the slots next to what would be just right, the better one that helps."""
        slots = self._movable[source]
        right = min(self._excess(source), -self._excess(target))
        place = bisect_right(slots, right, key=_cost)
        near = slots[max(place - 1, 0) : place + 1]
        helpful = [priced for priced in near if self._helps(priced.cost, source, target)]
        if not helpful:
            return None
        return max(helpful, key=lambda priced: self._gain(priced.cost, source, target)), target

    def _helps(self, cost: float, source: str, target: str) -> bool:
        """Whether the move makes the higher one of both ratios lower, and is worth it."""
        before = self._ratio_of(source)
        after = max(self._ratio_of(source, -cost), self._ratio_of(target, cost))
        beyond = before > 1 + self._edge or (
            target in self._joining and self._ratio_of(target) < 1 - self._edge
        )
        return after < before - _NOTICEABLE and (beyond or cost >= self._worth)

    def _gain(self, cost: float, source: str, target: str) -> float:
        """By how much both shards together come closer to their wanted shares."""
        excess, room = self._excess(source), -self._excess(target)
        return abs(excess) - abs(excess - cost) + abs(room) - abs(room - cost)


def _summarise(
    known: KeyspaceMap,
    weights: Mapping[str, float],
    loads: Sequence[Load],
    moves: Iterable[tuple[int, str]],
) -> MovePlan:
    costs = _costs(known, loads)
    owners = list(known.owners)
    before = _shard_loads(owners, weights, loads, costs)
    planned = []
    for slot, target in moves:
        planned.append(PlannedMove(slot, owners[slot], target, loads[slot]))
        owners[slot] = target
    after = _shard_loads(owners, weights, loads, costs)
    return MovePlan(known.name, tuple(planned), before, after)


def _shard_loads(
    owners: Sequence[str],
    weights: Mapping[str, float],
    loads: Sequence[Load],
    costs: Sequence[float],
) -> dict[str, ShardLoad]:
    held: defaultdict[str, list[int]] = defaultdict(list)
    for slot, owner in enumerate(owners):
        held[owner].append(slot)
    reach = fsum(cost for cost, owner in zip(costs, owners, strict=True) if owner in weights)
    wanted = _wanted(weights, reach)
    return {
        name: ShardLoad(
            slots=len(held[name]),
            load=_sum(loads[slot] for slot in held[name]),
            share=fsum(costs[slot] for slot in held[name]),
            wanted=wanted.get(name),
        )
        for name in sorted({*held, *weights})
    }


def _sum(loads: Iterable[Load]) -> Load:
    loads = list(loads)
    return Load(
        sessions=sum(load.sessions for load in loads),
        items=sum(load.items for load in loads),
        nbytes=sum(load.nbytes for load in loads),
        writes=fsum(load.writes for load in loads),
    )


def _imbalance(shards: Mapping[str, ShardLoad]) -> float:
    return max((shard.ratio for shard in shards.values()), default=0.0)
