"""Carrying out a list of moves, several at a time; it can be stopped and begun again anywhere."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardgate.errors import ShardgateError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from shardgate.control.moves import MoveEvent, Mover
    from shardgate.control.rebalance import PlannedMove

AT_ONCE = 2
"""Slots that are moved at a time, where nothing else is said: while one is frozen, no other one is
copied, so more of them gain little, and their freezes are longer."""
_TELL_SECONDS = 0.5
"""How often the shards are told which slots have moved, all of them at once."""
_FAILURES = 5
"""After so many failures without a success in between, the rest is not tried."""


@dataclass(slots=True)
class Outcome:
    """What became of the moves: those that were made, why others were not, and what was not tried.

    A move that has failed has left its slot in service, unless its error is that a shard does not
    answer.
    """

    moved: list[MoveEvent] = field(default_factory=list)
    failed: dict[int, ShardgateError] = field(default_factory=dict)
    left: list[PlannedMove] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every slot is where it was to be."""
        return not (self.failed or self.left)


async def carry_out(
    mover: Mover, moves: Iterable[PlannedMove], *, at_once: int = AT_ONCE, takes_over: bool = False
) -> Outcome:
    """Make the moves, in their order, ``at_once`` at a time.

    Cancelled, it has those that are under way step back, and what was moved stays moved. That takes
    as long as a shard that does not answer is waited for.

    Args:
        mover: who makes them; its limits are for all of them together.
        moves: the moves, of different slots.
        at_once: how many at a time.
        takes_over: also where somebody else was at it a moment ago.
    """
    waiting, outcome, failures = deque(moves), Outcome(), 0

    def cancelled() -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    async def work() -> None:
        nonlocal failures
        while waiting and failures < _FAILURES:
            move = waiting.popleft()
            try:
                made = await mover.move(
                    move.slot, move.source, move.target, takes_over=takes_over, tells=False
                )
            except ShardgateError as error:
                outcome.failed[move.slot] = error
                failures += 1
                if cancelled():  # and it could not even step back
                    raise asyncio.CancelledError from error
            else:
                outcome.moved.append(made)
                failures = 0

    async with _telling(mover), asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())
    outcome.left.extend(waiting)
    return outcome


@asynccontextmanager
async def _telling(mover: Mover) -> AsyncIterator[None]:
    """Have what has moved recorded every now and then, and at the end."""

    async def tell() -> None:
        while True:
            await asyncio.sleep(_TELL_SECONDS)
            await mover.tell()

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.wait([telling])
        if not telling.cancelled():
            telling.exception()  # retrieved: what it could not tell is told now
        await mover.tell()
