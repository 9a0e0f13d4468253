"""A handle and its route, without a database: how long, and what is kept of it."""

from __future__ import annotations

import gc
import time
import tracemalloc
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.contestants.base import names
from shardgate import Gateway, GatewaySettings
from shardgate.router import route
from shardgate.topology import KeyspaceMap, assign

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.contestants.base import Name
    from benchmarks.parts.cast import Run

SHARDS = (1, 16, 256)
HANDLES = 100_000
_BATCH = 20_000
_SLOTS = 4096


def measure(run: Run) -> None:
    """Microseconds for each number of shards, in turns; bytes for 100 000 handles."""
    acts = {shards: _act(shards) for shards in SHARDS}
    wanted = names(_BATCH)
    timed: dict[int, list[float]] = {shards: [] for shards in SHARDS}
    for _ in range(run.options.rounds):
        for shards, act in acts.items():
            run.say(f"routing: {shards} shards")
            timed[shards].append(_time(act, wanted))
    run.results.routing = [
        {
            "shards": shards,
            "microseconds": median(times),
            "low": min(times),
            "high": max(times),
        }
        for shards, times in timed.items()
    ]
    run.say(f"routing: {HANDLES} handles")
    run.results.handles = _retained(acts[SHARDS[0]])


def _act(shards: int) -> Callable[[Name], Any]:
    """Make a handle of a session and find its shard, as an operation does. No shard is opened."""
    urls = {f"shard_{n}": {"url": f"sqlite+aiosqlite:///{n}.db"} for n in range(shards)}
    settings = GatewaySettings.from_dict({"shards": urls, "keyspaces": {"main": {}}})
    gateway = Gateway(settings)
    owners = assign(_SLOTS, dict.fromkeys(urls, 1.0))
    known = KeyspaceMap(name="main", slots=_SLOTS, spread=None, owners=owners, epochs=(1,) * _SLOTS)

    def act(name: Name) -> Any:
        handle = gateway.tenant(name.tenant).session(name.session)
        route(known, handle._tenant_id, handle._own_id)
        return handle

    return act


def _time(act: Callable[[Name], Any], wanted: list[Name]) -> float:
    """Microseconds each."""
    began = time.perf_counter()
    for name in wanted:
        act(name)
    return (time.perf_counter() - began) / len(wanted) * 1e6


def _retained(act: Callable[[Name], Any]) -> dict[str, float]:
    """Bytes that are held after 100 000 handles are gone, and while they are kept."""
    wanted = names(HANDLES)
    act(wanted[0])
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for name in wanted:
            act(name)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
        kept = [act(name) for name in wanted]
        held = tracemalloc.get_traced_memory()[0] - after
    finally:
        tracemalloc.stop()
    return {"retained": after - before, "each_while_kept": held / len(kept)}
