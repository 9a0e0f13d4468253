"""Who owns which slot: an immutable snapshot of the slot map, and how slots are shared out.

A process keeps one ``Topology`` and swaps it by reference, so readers take no lock. ``assign``
makes a keyspace's first assignment, ``reassign`` its next one.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, repeat
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from shardgate.errors import UsageError
from shardgate.slots import check_slot, check_slot_count

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyspaceMap:
    """The slot map of one keyspace.

    ``owners`` and ``epochs`` have one entry for each slot, in slot order: the name of the shard
    that owns it, and the epoch of that claim (0 or more, it only grows). ``spread`` is the number
    of slots that one tenant may use at most, or None for all. ``uuids`` has the UUID of each shard
    that is known. Raises UsageError if they disagree.
    """

    name: str
    slots: int
    spread: int | None
    owners: tuple[str, ...]
    epochs: tuple[int, ...]
    uuids: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "owners", tuple(self.owners))
        object.__setattr__(self, "epochs", tuple(self.epochs))
        object.__setattr__(self, "uuids", MappingProxyType(dict(self.uuids)))
        check_slot_count(self.slots)
        if problem := self._problem():
            raise UsageError(f"keyspace {self.name!r}: {problem}")

    def _problem(self) -> str | None:
        if self.spread is not None and not 1 <= self.spread <= self.slots:
            return f"spread is {self.spread}; use 1 to {self.slots}, or none for all slots"
        if len(self.owners) != self.slots:
            return f"{len(self.owners)} owners for {self.slots} slots; each slot needs one"
        if len(self.epochs) != self.slots:
            return f"{len(self.epochs)} epochs for {self.slots} slots; each slot needs one"
        if "" in self.owners:
            return f"slot {self.owners.index('')} has no owner"
        if min(self.epochs) < 0:
            return f"slot {self.epochs.index(min(self.epochs))} has a negative epoch"
        return None

    def owner(self, slot: int) -> str:
        """Return the name of the shard that owns ``slot``. Raises UsageError: no such slot."""
        return self.owners[check_slot(slot, self.slots)]

    def slots_of(self, shard: str) -> tuple[int, ...]:
        """Return the slots that a shard owns, in order; none for a shard that is not known."""
        return tuple(slot for slot, owner in enumerate(self.owners) if owner == shard)

    def with_slot(self, slot: int, owner: str, epoch: int) -> Self:
        """Return the map with what was learned about one slot; the same map if that is old news.

        A lower epoch is ignored. An equal one counts: a move gives the source that drains and the
        target that takes over the same epoch. Raises UsageError if there is no such slot.
        """
        known = (self.epochs[check_slot(slot, self.slots)], self.owners[slot])
        if epoch < known[0] or (epoch, owner) == known:
            return self
        return replace(
            self,
            owners=(*self.owners[:slot], owner, *self.owners[slot + 1 :]),
            epochs=(*self.epochs[:slot], epoch, *self.epochs[slot + 1 :]),
        )


def assign(slots: int, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Share ``slots`` slots out to shards by weight; return the owner of each slot.

    Each shard gets one run of slots, in name order. Its size is within one slot of the shard's
    exact share (quotas by largest remainder, equal remainders by name), whatever the order of
    ``weights``. A weight of 0 gets nothing; so may a tiny one. Raises UsageError.
    """
    return tuple(_spell(_quotas(check_slot_count(slots), weights, held={})))


def reassign(owners: tuple[str, ...], weights: Mapping[str, float]) -> tuple[str, ...]:
    """Share the slots out anew, moving as few as possible; return the owner of each slot.

    Each shard ends within one slot of its exact share, and no assignment that does so moves fewer
    slots. A shard that is missing from ``weights`` or weighs 0 is emptied. Where the shards so far
    weigh the same, a new shard takes slots and a leaving one gives them, and no other two trade
    any; among unequal weights the one-slot limit may cost a few more. Raises UsageError.
    """
    room = _quotas(check_slot_count(len(owners)), weights, held=Counter(owners))
    kept = [_take(room, owner) for owner in owners]
    receivers = _spell(room)
    return tuple(
        owner if keeps else next(receivers) for owner, keeps in zip(owners, kept, strict=True)
    )


def _take(room: dict[str, int], owner: str) -> bool:
    """Use up one slot of a shard's quota; say whether there was one left."""
    if room.get(owner, 0) == 0:
        return False
    room[owner] -= 1
    return True


def _spell(counts: Mapping[str, int]) -> chain[str]:
    return chain.from_iterable(repeat(name, count) for name, count in sorted(counts.items()))


def _quotas(slots: int, weights: Mapping[str, float], *, held: Mapping[str, int]) -> dict[str, int]:
    """Round each shard's exact share down, or up for as many as it takes to use all slots.

    Shards that hold more than their rounded-down share come first, since each of them saves a
    move; then the largest remainder. Fractions, because a sum of floats depends on its order and
    may overflow.
    """
    shares = _shares(slots, weights)
    quotas = {name: math.floor(share) for name, share in shares.items()}

    def claim(name: str) -> tuple[bool, Fraction, str]:
        return held.get(name, 0) <= quotas[name], quotas[name] - shares[name], name

    uneven = sorted((name for name in shares if shares[name] > quotas[name]), key=claim)
    for name in uneven[: slots - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _shares(slots: int, weights: Mapping[str, float]) -> dict[str, Fraction]:
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"shard {name!r} weighs {weight}; use a finite number of 0 or more")
    total = sum(map(Fraction, weights.values()))
    if not total:
        raise UsageError("no shard can take slots: at least one needs a weight above 0")
    return {name: slots * Fraction(weight) / total for name, weight in weights.items()}
