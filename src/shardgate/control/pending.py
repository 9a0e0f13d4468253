"""Moves that are under way, or that somebody has left half-way; and going on with those.

What tells them apart is how long ago somebody has touched their rows: who is at a move does so
every two seconds.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardgate.control.moves import STUCK_SECONDS
from shardgate.control.rebalance import Load, PlannedMove
from shardgate.control.schedule import AT_ONCE, Outcome, carry_out
from shardgate.errors import OwnershipConflict, ShardgateError
from shardgate.handover import IMPORTING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from shardgate.control.moves import Mover
    from shardgate.control.remains import Unfinished


@dataclass(frozen=True, slots=True)
class PendingMove:
    """A slot's move that has neither been made nor been undone.

    ``source`` and ``target`` are names; None for a shard that the settings do not have. ``idle`` is
    for how many seconds nobody has touched it.
    """

    slot: int
    source: str | None
    target: str | None
    idle: float

    @property
    def is_stuck(self) -> bool:
        """Whether nobody seems to be at it any more."""
        return self.idle >= STUCK_SECONDS


def pending_moves(unfinished: Iterable[Unfinished]) -> list[PendingMove]:
    """The moves that these rows tell of, in the order of their slots; remains are none."""
    found: defaultdict[tuple[int, str | None, str | None], list[float]] = defaultdict(list)
    for one in unfinished:
        if one.is_rest:
            continue
        arrives = one.row.state == IMPORTING
        source, target = (one.peer, one.shard) if arrives else (one.shard, one.peer)
        idle = STUCK_SECONDS if one.idle is None else one.idle
        found[one.row.slot, source, target].append(idle)
    moves = [PendingMove(*key, min(idle)) for key, idle in found.items()]
    return sorted(moves, key=lambda move: move.slot)


@dataclass(slots=True)
class Resumed:
    """What became of moves that were left half-way: gone on with, ended, or neither."""

    outcome: Outcome = field(default_factory=Outcome)
    ended: list[int] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether none of them is left half-way."""
        return self.outcome.ok


async def resume(
    mover: Mover,
    moves: Sequence[PendingMove],
    *,
    unwanted: Collection[str] = (),
    at_once: int = AT_ONCE,
) -> Resumed:
    """Go on with moves that were left half-way. One to a shard in ``unwanted`` is ended instead: it
    is finished if it was decided, and undone otherwise.

    Somebody who turns out to be at one of them is left to it.
    """
    resumed = Resumed()
    onwards: list[PlannedMove] = []
    for move in moves:
        if move.source is None or move.target is None:
            resumed.outcome.failed[move.slot] = _not_named(mover, move)
        elif move.target in unwanted:
            await _end(mover, move.slot, move.source, move.target, resumed)
        else:
            onwards.append(PlannedMove(move.slot, move.source, move.target, Load()))
    made = await carry_out(mover, onwards, at_once=at_once)
    resumed.outcome.moved += made.moved
    resumed.outcome.failed |= made.failed
    resumed.outcome.left += made.left
    return resumed


async def end_moves(mover: Mover, moves: Iterable[PendingMove]) -> Resumed:
    """End moves: those that are decided are finished, any other undone."""
    resumed = Resumed()
    for move in moves:
        if move.source is None or move.target is None:
            resumed.outcome.failed[move.slot] = _not_named(mover, move)
        else:
            await _end(mover, move.slot, move.source, move.target, resumed)
    return resumed


async def _end(mover: Mover, slot: int, source: str, target: str, resumed: Resumed) -> None:
    try:
        await mover.end(slot, source, target)
    except ShardgateError as error:
        resumed.outcome.failed[slot] = error
    else:
        resumed.ended.append(slot)


def _not_named(mover: Mover, move: PendingMove) -> OwnershipConflict:
    known = move.source or move.target
    return OwnershipConflict(
        f"slot {move.slot}: the settings do not name the other shard of the move that shard "
        f"{known!r} has a part in: add it to the shards of this keyspace",
        keyspace=mover.plan.keyspace,
    )
