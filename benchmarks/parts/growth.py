"""What an exchange costs as histories, sessions and shards grow."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from benchmarks.contestants.adk import ADK
from benchmarks.contestants.base import Contestant, Stage
from benchmarks.contestants.langgraph import LangGraph
from benchmarks.contestants.ours import ThroughGateway, ThroughGatewaySingly
from benchmarks.contestants.raw import RawPostgreSQL
from benchmarks.contestants.sdk import SDKSQLAlchemy, SDKSQLAlchemyKept
from benchmarks.rounds import Cell, run_rounds

if TYPE_CHECKING:
    from benchmarks.parts.cast import Run
    from benchmarks.servers import Servers

AGAINST_HISTORY = (ThroughGateway, RawPostgreSQL, SDKSQLAlchemyKept, ADK, LangGraph)
AGAINST_SESSIONS = (ThroughGateway, RawPostgreSQL, SDKSQLAlchemy)
OVER_SHARDS = (ThroughGateway, ThroughGatewaySingly, RawPostgreSQL)
_ITEMS = 40_000
"""About how many items all histories have together, so that none grows much by the run itself."""
_FEWEST = 8
_SHARD_CALLERS = (1, 32, 512)
_STAGE_CONNECTIONS = 8
"""Stages of several sizes are open at the same time, and their callers are few."""


async def against_history(run: Run, servers: Servers) -> None:
    """One caller; sessions of so many items at the start."""
    stages = {
        f"{history}": Stage(
            servers=servers,
            connections=_STAGE_CONNECTIONS,
            history=history,
            sessions=max(_FEWEST, min(run.options.usual_sessions, _ITEMS // history)),
        )
        for history in run.options.histories
    }
    await _compare(run, "history", AGAINST_HISTORY, stages, callers=1)


async def against_sessions(run: Run, servers: Servers) -> None:
    """Eight callers; so many sessions of twenty items."""
    stages = {
        f"{sessions}": Stage(
            servers=servers,
            connections=_STAGE_CONNECTIONS,
            sessions=sessions,
        )
        for sessions in run.options.sessions
    }
    await _compare(run, "sessions", AGAINST_SESSIONS, stages, callers=_STAGE_CONNECTIONS)


async def _compare(
    run: Run,
    part: str,
    kinds: tuple[type[Contestant], ...],
    stages: dict[str, Stage],
    *,
    callers: int,
) -> None:
    async with AsyncExitStack() as stack:
        cells = []
        for label, stage in stages.items():
            ready = await stack.enter_async_context(run.cast(part, kinds, stage))
            cells += [
                Cell(contestant=contestant, callers=callers, label=label) for contestant in ready
            ]
        # What is compared is one contestant's sizes: they are measured one right after the other.
        cells.sort(key=lambda cell: kinds.index(type(cell.contestant)))
        run.results.slices += await run_rounds(part, cells, run.options, run.say)


async def against_shards(run: Run, servers: Servers) -> None:
    """So many databases; all connections together are as many each time."""
    options = run.options
    async with AsyncExitStack() as stack:
        cells = []
        for shards in options.shards:
            stage = Stage(
                servers=servers,
                connections=options.connections,
                sessions=max(options.usual_sessions, *_SHARD_CALLERS),
                shards=shards,
                spread_over=options.servers,
            )
            cells += [
                Cell(contestant=contestant, callers=callers, label=f"{shards}")
                for contestant in await stack.enter_async_context(
                    run.cast("shards", OVER_SHARDS, stage)
                )
                for callers in _SHARD_CALLERS
            ]
        run.results.slices += await run_rounds("shards", cells, options, run.say)
