"""An operator's order to move slots, from going on with what was left half-way to the last move."""

from __future__ import annotations

import asyncio
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from shardgate.cli.amounts import count
from shardgate.cli.console import errors, output
from shardgate.cli.keyspaces import read_map, shards_of
from shardgate.cli.progress import Watch
from shardgate.control.load import measure
from shardgate.control.moves import Mover
from shardgate.control.pending import Resumed, pending_moves, resume
from shardgate.control.rebalance import Load, PlannedMove
from shardgate.control.remains import find_unfinished, find_unfinished_on
from shardgate.control.schedule import Outcome, carry_out
from shardgate.errors import ShardgateError
from shardgate.handover import DRAINING
from shardgate.shards import ask_all
from shardgate.slotmap import consult, map_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from rich.console import Console

    from shardgate.agreement import Plan
    from shardgate.control.moves import Limits, MoveEvent
    from shardgate.control.pending import PendingMove
    from shardgate.control.rebalance import MovePlan
    from shardgate.gateway import Gateway
    from shardgate.shards import Shard
    from shardgate.topology import KeyspaceMap

    Choose = Callable[[KeyspaceMap, Mapping[str, float], Sequence[Load]], MovePlan]
    """Chooses the moves, from who owns what, the shards' weights and what the slots carry."""


@dataclass(frozen=True, slots=True)
class Order:
    """What an operator has asked for.

    ``unwanted``: shards that are to get nothing, nor keep what is on its way there.
    """

    plan: Plan
    choose: Choose
    unwanted: frozenset[str]
    applies: bool
    as_json: bool
    watch_seconds: float
    at_once: int
    limits: Limits


@dataclass(slots=True)
class Report:
    """What has come of it.

    ``otherwise``: how many slots somebody else has moved there meanwhile. ``frozen``: the slots
    that nobody serves, since their moves could not even step back.
    """

    order: Order
    plan: MovePlan | None = None
    busy: list[PendingMove] = field(default_factory=list)
    resumed: Resumed = field(default_factory=Resumed)
    moved: list[MoveEvent] = field(default_factory=list)
    failed: dict[int, ShardgateError] = field(default_factory=dict)
    left: list[PlannedMove] = field(default_factory=list)
    otherwise: int = 0
    frozen: list[int] = field(default_factory=list)
    stopped: bool = False
    seconds: float = 0.0

    @property
    def console(self) -> Console:
        """Where progress is shown: programs get nothing but JSON from the other one."""
        return errors if self.order.as_json else output

    def say(self, line: str) -> None:
        """Tell what is being done."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @property
    def ok(self) -> bool:
        """Whether nothing is left to do."""
        if self.plan is None or self.plan.unreachable:
            return False
        if not self.order.applies:
            return not self.plan.moves
        return not (self.failed or self.left or self.stopped)


async def carry_out_order(gateway: Gateway, order: Order) -> Report:
    """Go on with what somebody has left half-way, plan, and make the moves."""
    await gateway.open()
    shards = shards_of(gateway, order.plan.keyspace)
    report, began = Report(order), monotonic()
    await read_map(order.plan, shards)
    with _told_to_stop():
        if order.applies and not await _go_on(shards, report):
            return report
        report.plan = await _plan(shards, order)
        if order.applies and report.plan.moves and not report.plan.unreachable:
            await _make_moves(shards, report, report.plan)
    report.seconds = monotonic() - began
    return report


async def _plan(shards: Mapping[str, Shard], order: Order) -> MovePlan:
    known = await read_map(order.plan, shards)
    loads, down = await measure(order.plan, shards, known, seconds=order.watch_seconds)
    for name, error in down.items():
        if name in shards:
            raise error
    return order.choose(known, order.plan.weights, loads)


async def _go_on(shards: Mapping[str, Shard], report: Report) -> bool:
    """Go on with moves that somebody has left half-way; whether there is nothing in the way."""
    order = report.order
    pending = pending_moves(await find_unfinished(shards))
    report.busy = [move for move in pending if not move.is_stuck]
    if report.busy or not pending:
        return not report.busy
    report.say(f"going on with {count(len(pending), 'move')} that somebody has left half-way")
    watch = Watch(report.console, [_as_planned(move) for move in pending])

    async def act() -> Outcome:
        report.resumed = await resume(
            _mover(shards, order, watch), pending, unwanted=order.unwanted, at_once=order.at_once
        )
        return report.resumed.outcome

    wanted = [_as_planned(move) for move in pending if move.target not in order.unwanted]
    await _watched(shards, report, watch, wanted, act)
    return not (report.stopped or report.failed or report.left)


def _as_planned(move: PendingMove) -> PlannedMove:
    return PlannedMove(move.slot, move.source or "", move.target or "", Load())


async def _make_moves(shards: Mapping[str, Shard], report: Report, plan: MovePlan) -> None:
    order = report.order
    report.say(f"moving {count(len(plan.moves), 'slot')}, {order.at_once} at a time")
    watch = Watch(report.console, plan.moves)

    async def act() -> Outcome:
        mover = _mover(shards, order, watch)
        return await carry_out(mover, plan.moves, at_once=order.at_once)

    await _watched(shards, report, watch, plan.moves, act)


async def _watched(
    shards: Mapping[str, Shard],
    report: Report,
    watch: Watch,
    moves: Sequence[PlannedMove],
    act: Callable[[], Awaitable[Outcome]],
) -> None:
    """Show how ``act`` makes the moves, and report what has come of them.

    Stopped, it returns as well: what was under way has stepped back then.
    """
    outcome = Outcome()
    try:
        async with watch.shown():
            outcome = await act()
    except asyncio.CancelledError:
        report.stopped = True
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
    report.moved += watch.moved
    report.failed |= outcome.failed
    if report.stopped or not outcome.ok:
        made = {event.slot for event in watch.moved}
        await _see_what_is_left(shards, report, [one for one in moves if one.slot not in made])


def _mover(shards: Mapping[str, Shard], order: Order, watch: Watch) -> Mover:
    return Mover(order.plan, shards, limits=order.limits, observe=watch.see)


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Have SIGTERM do what Ctrl-C does: what is under way steps back."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101 - for mypy
    with suppress(NotImplementedError):  # asyncio has none on Windows
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        with suppress(NotImplementedError):  # asyncio has none on Windows
            loop.remove_signal_handler(signal.SIGTERM)


async def _see_what_is_left(
    shards: Mapping[str, Shard], report: Report, moves: Sequence[PlannedMove]
) -> None:
    """Ask the shards: somebody else may have made a move, or one that was decided was finished."""
    plan, left = report.order.plan, {move.slot: move for move in moves}
    with suppress(ShardgateError):
        known = map_of(plan, await consult(plan, shards))
        left = {slot: move for slot, move in left.items() if known.owner(slot) != move.target}
    report.otherwise += len(moves) - len(left)
    report.failed = {slot: error for slot, error in report.failed.items() if slot in left}
    report.left += [move for slot, move in left.items() if slot not in report.failed]
    found, _ = await ask_all(
        {name: find_unfinished_on(shard, shards) for name, shard in shards.items()}
    )
    rows = [one.row for part in found.values() for one in part]
    report.frozen = sorted({row.slot for row in rows if row.state == DRAINING and row.slot in left})
