"""What PostgreSQL writes for an append, and how many multixacts locks together make."""

from __future__ import annotations

from contextlib import asynccontextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import asyncpg

from benchmarks.contestants.adk import ADK
from benchmarks.contestants.base import TENANTS, Stage
from benchmarks.contestants.langgraph import LangGraph
from benchmarks.contestants.ours import StandAlone, ThroughGateway
from benchmarks.contestants.raw import RawPostgreSQL
from benchmarks.contestants.sdk import SDKSQLAlchemyKept
from benchmarks.load import ANSWER, READ, run_slice
from benchmarks.parts.cast import opened
from benchmarks.servers import driver_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from benchmarks.contestants.base import Contestant, Name
    from benchmarks.parts.cast import Run
    from benchmarks.servers import Servers

KINDS = (ThroughGateway, StandAlone, RawPostgreSQL, SDKSQLAlchemyKept, ADK, LangGraph)
_SESSIONS = 50
_BATCHES = 5
"""The median is taken over them: what the server does for itself falls into one or two."""
_CALLERS = (1, 32)
_LSN = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
# The age of the first multixact there ever was: how many have been given out since.
_MULTIXACTS = "SELECT mxid_age('1'::xid)"


async def measure(run: Run, servers: Servers) -> None:
    """Both, on a server where nothing else goes on."""
    await _bytes(run, servers)
    for tenants in (1, TENANTS):
        await _multixacts(run, servers, tenants)


async def _bytes(run: Run, servers: Servers) -> None:
    stage = Stage(servers=servers, connections=1, sessions=_SESSIONS)
    async with run.cast("wal", KINDS, stage) as contestants, _watching(stage) as watch:
        for contestant in contestants:
            run.say(f"wal: {contestant.title}")
            async with opened(contestant):
                run.results.wal.append(await _wal(contestant, watch, run.options.appends))


@asynccontextmanager
async def _watching(stage: Stage) -> AsyncIterator[Any]:
    """A connection to the server beside those of the contestants."""
    watch = await asyncpg.connect(driver_url(next(iter(stage.urls.values()))))
    try:
        yield watch
    finally:
        await watch.close()


async def _wal(contestant: Contestant, watch: Any, appends: int) -> dict[str, Any]:
    """Bytes of WAL for an append of two items, one caller.

    The first touch of a page after a checkpoint writes the page whole, which is the checkpoint's
    cost and not the append's: so each session has been appended to since.
    """
    await watch.execute("CHECKPOINT")
    for name in contestant.names:
        await _append(contestant, name)
    each = []
    for _ in range(_BATCHES):
        before = int(await watch.fetchval(_LSN))
        for number in range(appends // _BATCHES):
            await _append(contestant, contestant.names[number % len(contestant.names)])
        each.append((int(await watch.fetchval(_LSN)) - before) / (appends // _BATCHES))
    return {"contestant": contestant.key, "appends": appends, "bytes_each": median(each)}


async def _append(contestant: Contestant, name: Name) -> None:
    """Append two items; some peers can append only to what they have read."""
    session = contestant.session(name)
    if contestant.key in (ADK.key, LangGraph.key):
        await session.get_items(READ)
    await session.add_items(ANSWER)


async def _multixacts(run: Run, servers: Servers, tenants: int) -> None:
    """Callers of the same tenant lock its row at the same time, though none waits for another."""
    stage = Stage(servers=servers, connections=max(_CALLERS), tenants=tenants)
    async with run.cast("wal", (ThroughGateway,), stage) as contestants, _watching(stage) as watch:
        for contestant in contestants:
            for callers in _CALLERS:
                run.say(f"wal: multixacts of {callers} callers, {tenants} tenants")
                async with opened(contestant):
                    made = await _locking(run, contestant, callers, watch)
                run.results.multixacts.append({"tenants": tenants, "callers": callers, **made})


async def _locking(run: Run, contestant: Contestant, callers: int, watch: Any) -> dict[str, float]:
    before = await watch.fetchval(_MULTIXACTS)
    seconds = run.options.seconds * run.options.rounds
    done = await run_slice(contestant, part="wal", callers=callers, seconds=seconds)
    made = await watch.fetchval(_MULTIXACTS) - before
    return {"exchanges": done.exchanges, "seconds": done.elapsed, "multixacts": made}
