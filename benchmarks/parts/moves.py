"""A fourth shard joins, and is filled while callers go on: what it takes, and what they feel."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.contestants.base import Stage, names
from benchmarks.contestants.bulk import load_shardgate, settle
from benchmarks.contestants.ours import settings_at
from benchmarks.load import APPENDED, percentile
from harness.processes import Children
from shardgate import Gateway
from shardgate.agreement import Plan
from shardgate.control.load import measure as measure_loads
from shardgate.control.moves import Mover, Phase
from shardgate.control.rebalance import plan_moves
from shardgate.control.schedule import carry_out
from shardgate.slotmap import consult, map_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.parts.cast import Run
    from benchmarks.servers import Servers
    from harness.processes import Child
    from shardgate.control.moves import MoveEvent
    from shardgate.control.rebalance import MovePlan
    from shardgate.control.schedule import Outcome

CALLERS = 32
SHARDS = 3
"""Before the one that joins."""
_WARM_UP = 2.0
_MOST_SECONDS = 150.0
"""The moves are stopped after that."""
_CHILD_SECONDS = 60.0

Call = tuple[float, float]
"""When it began, and how long it took."""


@dataclass(slots=True)
class Watch:
    """What the mover reports, and when its work began and ended."""

    began: float = 0.0
    ended: float = 0.0
    moved: list[MoveEvent] = field(default_factory=list)
    stepped_back: int = 0
    failed: dict[str, int] = field(default_factory=dict)

    def observe(self, event: MoveEvent) -> None:
        if event.phase is Phase.MOVED:
            self.moved.append(event)
        self.stepped_back += event.phase is Phase.STEPPED_BACK

    def take(self, outcome: Outcome) -> None:
        for error in outcome.failed.values():
            said = f"{type(error).__name__}: {error}"
            self.failed[said] = self.failed.get(said, 0) + 1
        if outcome.left:
            self.failed["not tried"] = len(outcome.left)


async def measure(run: Run, servers: Servers) -> None:
    """Everything about one filling of a new shard goes to ``results.moves``."""
    options = run.options
    stage = Stage(servers=servers, sessions=options.moved_sessions, history=options.moved_history)
    try:
        run.say(f"moves: loading {stage.sessions * stage.history:,} items")
        urls = await _load(stage)
        async with aclosing(Gateway(settings_at(urls, options.connections))) as gateway:
            await gateway.create_tables()
            async with Children(seconds=_CHILD_SECONDS) as children:
                callers = await _start_callers(children, urls, stage)
                watch, calls = await _move_under(run, gateway, callers)
            found = sum(load.items for load in await _loads(gateway))
        run.results.moves = _figures(run, stage, watch, calls, found)
    finally:
        await stage.clear()


async def _load(stage: Stage) -> dict[str, str]:
    """Fill the first shards; where all shards are, the one that is still to join included."""
    labels = [f"shard_{number}" for number in range(SHARDS + 1)]
    urls = {label: (await stage.database(label))[0] for label in labels}
    first = {label: urls[label] for label in labels[:SHARDS]}
    async with aclosing(Gateway(settings_at(first, stage.connections))) as gateway:
        await gateway.create_tables()
        await load_shardgate(gateway, first, names(stage.sessions), stage.history)
    await settle(list(first.values()))
    return urls


async def _start_callers(children: Children, urls: dict[str, str], stage: Stage) -> Child:
    child = await children.start("benchmarks.callers:run")
    await child.go(
        {
            "urls": urls,
            "sessions": stage.sessions,
            "callers": CALLERS,
            "connections": stage.connections,
            "seconds": _WARM_UP,
        }
    )
    await child.told()
    return child


async def _move_under(run: Run, gateway: Gateway, callers: Child) -> tuple[Watch, Any]:
    """Let the callers be for a while, fill the new shard, let them be again."""
    quiet = run.options.quiet_seconds
    run.say("moves: callers alone")
    await asyncio.sleep(quiet)
    watch = Watch()
    plan = await _plan(gateway)
    mover = Mover(_plan_of(gateway), gateway.shards, observe=watch.observe)
    run.say(f"moves: {len(plan.moves)} slots under {CALLERS} callers")
    watch.began = time.monotonic()
    try:
        async with asyncio.timeout(_MOST_SECONDS):
            watch.take(await carry_out(mover, plan.moves))
    except TimeoutError:
        watch.failed[f"stopped after {_MOST_SECONDS:g} s"] = len(plan.moves) - len(watch.moved)
    watch.ended = time.monotonic()
    run.say("moves: callers alone again")
    await asyncio.sleep(quiet)
    await callers.go("stop")
    return watch, await callers.result()


def _plan_of(gateway: Gateway) -> Plan:
    return Plan.of(gateway.settings, "main")


async def _plan(gateway: Gateway) -> MovePlan:
    plan = _plan_of(gateway)
    known = map_of(plan, await consult(plan, gateway.shards))
    return plan_moves(known, plan.weights, await _loads(gateway))


async def _loads(gateway: Gateway) -> list[Any]:
    plan = _plan_of(gateway)
    known = map_of(plan, await consult(plan, gateway.shards))
    loads, _ = await measure_loads(plan, gateway.shards, known)
    return loads


def _figures(run: Run, stage: Stage, watch: Watch, calls: Any, found: int) -> dict[str, Any]:
    seconds = watch.ended - watch.began
    items = sum(event.items for event in watch.moved)
    freezes = sorted(1e3 * event.frozen for event in watch.moved if event.frozen is not None)
    began, ended = watch.began, watch.ended
    made: list[Call] = [(at, took) for at, took in calls["made"]]
    quiet = run.options.quiet_seconds
    spans = {
        "before": (began - quiet, began),
        "during": (began, ended),
        "after": (ended, ended + quiet),
    }
    return {
        "sessions": stage.sessions,
        "items": stage.sessions * stage.history,
        "shards": SHARDS,
        "callers": CALLERS,
        "slots": len(watch.moved),
        "seconds": seconds,
        "items_copied": items,
        "items_each_second": items / seconds,
        "bytes_copied": sum(event.nbytes for event in watch.moved),
        "items_verified": sum(event.verified for event in watch.moved),
        "freezes_ms": [round(freeze, 1) for freeze in freezes],
        "stepped_back": watch.stepped_back,
        "not_moved": watch.failed,
        "phases": {name: _phase(made, *span) for name, span in spans.items()},
        "failed": calls["failed"],
        "items_expected": stage.sessions * stage.history + APPENDED * len(made),
        "items_found": found,
        "timeline": _timeline(made, began - quiet, began, ended + quiet),
    }


def _phase(made: Sequence[Call], began: float, ended: float) -> dict[str, float]:
    """The calls that began in a time."""
    took = sorted(each for at, each in made if began <= at < ended)
    return {
        "seconds": ended - began,
        "rate": len(took) / (ended - began),
        "p50": 1e3 * percentile(took, 0.50),
        "p99": 1e3 * percentile(took, 0.99),
        "longest": 1e3 * (took[-1] if took else 0.0),
    }


def _timeline(
    made: Sequence[Call], since: float, zero: float, until: float
) -> list[dict[str, float]]:
    """The same for each second; ``at``: seconds after the first move began."""
    buckets: dict[int, list[Call]] = {}
    for call in made:
        buckets.setdefault(int((call[0] - since) // 1), []).append(call)
    return [
        {"at": since + second - zero}
        | _phase(buckets.get(second, []), since + second, since + second + 1)
        for second in range(int(until - since))
    ]
