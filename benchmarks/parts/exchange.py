"""The exchange, at rising numbers of callers, on each kind of database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.contestants.adk import ADK
from benchmarks.contestants.base import Contestant, Stage
from benchmarks.contestants.langgraph import LangGraph
from benchmarks.contestants.ours import StandAlone, ThroughGateway
from benchmarks.contestants.raw import RawMariaDB, RawPostgreSQL, RawTogether
from benchmarks.contestants.sdk import (
    SDKRedis,
    SDKRedisDurable,
    SDKSQLAlchemy,
    SDKSQLAlchemyKept,
)
from benchmarks.rounds import Cell, run_rounds

if TYPE_CHECKING:
    from benchmarks.parts.cast import Run
    from benchmarks.servers import Servers

ON_POSTGRESQL: tuple[type[Contestant], ...] = (
    ThroughGateway,
    StandAlone,
    RawPostgreSQL,
    RawTogether,
    SDKSQLAlchemy,
    SDKSQLAlchemyKept,
    SDKRedisDurable,
    SDKRedis,
    ADK,
    LangGraph,
)
ON_MARIADB: tuple[type[Contestant], ...] = (ThroughGateway, StandAlone, RawMariaDB, SDKSQLAlchemy)
ON_SQLITE: tuple[type[Contestant], ...] = (
    ThroughGateway,
    StandAlone,
    SDKSQLAlchemy,
    SDKSQLAlchemyKept,
)
_FEW_SESSIONS = 200
_FILE_CONNECTIONS = 5
"""For SQLite, whose connections are threads in line for one lock: SQLAlchemy's own default."""


async def on_postgresql(run: Run, servers: Servers) -> None:
    """All contestants, at all numbers of callers."""
    stage = Stage(servers=servers, connections=run.options.connections)
    stage.sessions = max(run.options.usual_sessions, *run.options.callers)
    await _measure(run, "exchange", ON_POSTGRESQL, stage, run.options.callers)


async def on_mariadb(run: Run, servers: Servers) -> None:
    """Shardgate beside its own packet, sent by aiomysql itself."""
    stage = Stage(servers=servers, family="mariadb", connections=run.options.connections)
    stage.sessions = _FEW_SESSIONS
    await _measure(run, "mariadb", ON_MARIADB, stage, run.options.few_callers)


async def on_sqlite(run: Run, servers: Servers) -> None:
    """Shardgate beside the SDK, each with a file of its own."""
    stage = Stage(servers=servers, family="sqlite", connections=_FILE_CONNECTIONS)
    stage.sessions = _FEW_SESSIONS
    await _measure(run, "sqlite", ON_SQLITE, stage, run.options.few_callers)


async def _measure(
    run: Run,
    part: str,
    kinds: tuple[type[Contestant], ...],
    stage: Stage,
    callers: tuple[int, ...],
) -> None:
    async with run.cast(part, kinds, stage) as contestants:
        cells = [
            Cell(contestant=contestant, callers=number)
            for number in callers
            for contestant in contestants
        ]
        run.results.slices += await run_rounds(part, cells, run.options, run.say)
