"""An operator's order to move slots, from going on with what was left half-way to the last move."""

from __future__ import annotations

import asyncio
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from shardgate.cli.amounts import count
from shardgate.cli.console import errors, output, print_lines
from shardgate.cli.keyspaces import read_map, shards_of
from shardgate.cli.progress import Watch
from shardgate.control.load import measure
from shardgate.control.moves import Mover
from shardgate.control.pending import Resumed, pending_moves, resume
from shardgate.control.rebalance import Load, PlannedMove
from shardgate.control.remains import find_unfinished
from shardgate.control.schedule import Outcome, carry_out
from shardgate.errors import ShardgateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

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
    """What has come of it. ``half_way``: slots whose moves could not even step back."""

    order: Order
    plan: MovePlan | None = None
    busy: list[PendingMove] = field(default_factory=list)
    resumed: Resumed = field(default_factory=Resumed)
    moved: list[MoveEvent] = field(default_factory=list)
    failed: dict[int, ShardgateError] = field(default_factory=dict)
    left: list[PlannedMove] = field(default_factory=list)
    half_way: list[int] = field(default_factory=list)
    stopped: bool = False
    seconds: float = 0.0

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
    pending = pending_moves(await find_unfinished(shards))
    report.busy = [move for move in pending if not move.is_stuck]
    if report.busy or not pending:
        return not report.busy
    if not report.order.as_json:
        print_lines(
            [f"going on with {count(len(pending), 'move')} that somebody has left half-way"]
        )
    watch = Watch(errors if report.order.as_json else output, [_as_planned(one) for one in pending])
    mover = _mover(shards, report.order, watch)

    async def act() -> None:
        order = report.order
        report.resumed = await resume(
            mover, pending, unwanted=order.unwanted, at_once=order.at_once
        )

    report.stopped = not await _unless_stopped(watch, act)
    report.moved += watch.moved
    report.failed |= report.resumed.outcome.failed
    report.left += report.resumed.outcome.left
    return not (report.stopped or report.failed or report.left)


def _as_planned(move: PendingMove) -> PlannedMove:
    return PlannedMove(move.slot, move.source or "", move.target or "", Load())


async def _make_moves(shards: Mapping[str, Shard], report: Report, plan: MovePlan) -> None:
    order, outcome = report.order, Outcome()
    if not order.as_json:
        print_lines([f"moving {count(len(plan.moves), 'slot')}, {order.at_once} at a time"])
    watch = Watch(errors if order.as_json else output, plan.moves)
    mover = _mover(shards, order, watch)

    async def act() -> None:
        nonlocal outcome
        outcome = await carry_out(mover, plan.moves, at_once=order.at_once)

    report.stopped = not await _unless_stopped(watch, act)
    report.moved += watch.moved
    report.failed |= outcome.failed
    report.left += outcome.left
    if report.stopped:
        await _see_what_is_left(shards, report, plan)


def _mover(shards: Mapping[str, Shard], order: Order, watch: Watch) -> Mover:
    return Mover(order.plan, shards, limits=order.limits, observe=watch.see)


async def _unless_stopped(watch: Watch, act: Callable[[], Awaitable[None]]) -> bool:
    """Whether it was done, and nobody has stopped it: then what was under way has stepped back."""
    try:
        async with watch.shown():
            await act()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        return False
    return True


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Have SIGTERM do what Ctrl-C does: what is under way steps back."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101 - for mypy
    with suppress(NotImplementedError):  # Windows
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        with suppress(NotImplementedError):
            loop.remove_signal_handler(signal.SIGTERM)


async def _see_what_is_left(shards: Mapping[str, Shard], report: Report, plan: MovePlan) -> None:
    """Ask the shards: a move that was decided when it was stopped was finished."""
    left = {move.slot: move for move in plan.moves}
    for event in report.moved:
        left.pop(event.slot, None)
    with suppress(ShardgateError):
        known = await read_map(report.order.plan, shards)
        left = {slot: move for slot, move in left.items() if known.owner(slot) != move.target}
        pending = pending_moves(await find_unfinished(shards))
        report.half_way = [move.slot for move in pending if move.slot in left]
    report.left = list(left.values())
