"""Engines: how our own are made and shared, and what is remembered of anybody's."""

from __future__ import annotations

import asyncio
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from shardgate.errors import UsageError
from shardgate.sql.mysql import MySQL
from shardgate.sql.postgresql import PostgreSQL
from shardgate.sql.sqlite import SQLite

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from sqlalchemy import URL, Engine, Pool

    from shardgate.sql.dialect import Dialect
    from shardgate.sql.schema import TableNames, Tables

T = TypeVar("T")

DIALECTS: dict[str, type[Dialect]] = {
    dialect.driver: dialect for dialect in (PostgreSQL, MySQL, SQLite)
}

_BUSY_MILLISECONDS = 5000


class LoopState:
    """What an event loop has of an engine: its locks, its lanes, by name. It does not refer to the
    loop, which may go before the engine does."""

    def __init__(self) -> None:
        self._own: dict[Hashable, Any] = {}

    def own(self, name: Hashable, make: Callable[[], T]) -> T:
        """What there is of this name; made when first asked."""
        if name not in self._own:
            self._own[name] = make()
        mine: T = self._own[name]
        return mine

    def lock(self, purpose: str) -> asyncio.Lock:
        """A lock of this engine, of this event loop's own."""
        return self.own(f"lock: {purpose}", asyncio.Lock)


class EngineState:
    """What is remembered of an engine as long as it lives."""

    def __init__(self, *, keeps: bool = False) -> None:
        self.verified: set[tuple[str | None, TableNames]] = set()
        self.first_use = threading.Lock()
        self.single_connection = threading.Lock()
        self.answered = float("-inf")  # when the database last answered, by the event loop's clock
        self.keeps = keeps  # whether a connection may stay out of the pool between two operations
        self._dialects: dict[tuple[str | None, TableNames], Dialect] = {}
        self._of_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopState] = (
            weakref.WeakKeyDictionary()
        )

    def of_loop(self) -> LoopState:
        """What the running event loop has."""
        loop = asyncio.get_running_loop()
        state = self._of_loops.get(loop)
        if state is None:
            for closed in [one for one in self._of_loops if one.is_closed()]:
                del self._of_loops[closed]  # a lock that was waited for holds its loop
            state = self._of_loops.setdefault(loop, LoopState())
        return state

    def dialect(self, engine: AsyncEngine, tables: Tables) -> Dialect:
        """The statements for ``tables`` on this engine, written once."""
        which = tables.metadata.schema, tables.names
        if which not in self._dialects:
            self._dialects[which] = _dialect_for(engine, tables)
        return self._dialects[which]


_states: weakref.WeakKeyDictionary[Pool, EngineState] = weakref.WeakKeyDictionary()
_states_guard = threading.Lock()
_keeping: weakref.WeakSet[Engine] = weakref.WeakSet()
"""Engines whose connections may be kept. An engine of somebody else's may have users who count its
connections, and a pool of any kind."""


def state_of(engine: AsyncEngine) -> EngineState:
    """The one state of all engines on this pool: ``execution_options`` makes more than one.

    Raises:
        UsageError: it is no AsyncEngine.
    """
    if not isinstance(engine, AsyncEngine):
        raise UsageError(
            f"the engine is of type {type(engine).__name__}: use an AsyncEngine, as "
            "create_async_engine makes it"
        )
    with _states_guard:
        pool = engine.sync_engine.pool
        state = _states.get(pool)
        if state is None:
            state = _states[pool] = EngineState(keeps=engine.sync_engine in _keeping)
        return state


def _dialect_for(engine: AsyncEngine, tables: Tables) -> Dialect:
    driver = engine.dialect.driver
    if driver not in DIALECTS:
        raise UsageError(
            f"the engine's driver {driver!r} is not supported: use postgresql+asyncpg, "
            "mysql+aiomysql, mariadb+aiomysql or sqlite+aiosqlite"
        )
    if engine.get_execution_options().get("schema_translate_map"):
        raise UsageError(
            "the engine has a schema_translate_map, which the statements do not follow: use an "
            "engine without it (a gateway's shard on PostgreSQL has the setting schema)"
        )
    return DIALECTS[driver](tables, engine.dialect)


def make_engine(url: str | URL, engine_kwargs: dict[str, Any]) -> AsyncEngine:
    """An engine tuned for our statements; what ``engine_kwargs`` says goes first.

    aiomysql: autocommit, so that a connection goes back to the pool without a round trip (our
    packets hold their own transactions). aiosqlite: WAL, so that readers do not wait for a writer.
    """
    url = make_url(url)
    driver = url.get_driver_name()
    options = {"hide_parameters": True} | engine_kwargs  # they are users' words
    if driver == MySQL.driver and "isolation_level" not in options:
        options |= {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
    if driver == MySQL.driver and "charset" not in url.query:
        options["connect_args"] = {"charset": "utf8mb4"} | options.get("connect_args", {})
    if driver != SQLite.driver and not {"pool", "poolclass"} & options.keys():
        options.setdefault("pool_use_lifo", True)  # what was used last has its statements prepared
    if driver == SQLite.driver:
        options.setdefault("pool_reset_on_return", None)
    engine = create_async_engine(url, **options)
    if driver == PostgreSQL.driver and not {"pool", "poolclass"} & options.keys():
        _keeping.add(engine.sync_engine)
    if driver == SQLite.driver:
        event.listen(engine.sync_engine, "connect", _tune_sqlite)
    return engine


def _tune_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
        with suppress(connection.dbapi.OperationalError):
            # Somebody else may be switching right now; the mode is the file's, not ours alone.
            cursor.execute("PRAGMA journal_mode = WAL")
    finally:
        cursor.close()


@dataclass
class _Shared:
    """The engines of one URL: one for each event loop, and one made before there was a loop."""

    by_loop: dict[asyncio.AbstractEventLoop | None, AsyncEngine] = field(default_factory=dict)


_shared: dict[tuple[str, object], _Shared] = {}
_shared_guard = threading.Lock()


def shared_engine(url: str, engine_kwargs: dict[str, Any]) -> AsyncEngine:
    """The engine for this URL and these options on the running event loop.

    Without a running loop, the engine that the next loop to ask will have. Engines of loops that
    were closed are dropped here.
    """
    loop = _running_loop()
    with _shared_guard:
        _drop_closed_loops()
        engines = _shared.setdefault(_shared_key(url, engine_kwargs), _Shared()).by_loop
        if loop not in engines:
            early = engines.pop(None) if None in engines else None
            engines[loop] = make_engine(url, engine_kwargs) if early is None else early
        return engines[loop]


async def close_shared_engine(url: str, engine_kwargs: dict[str, Any]) -> None:
    """Close the running loop's engine for this URL; the next one to ask has a new one."""
    with _shared_guard:
        engines = _shared.get(_shared_key(url, engine_kwargs), _Shared()).by_loop
        engine = engines.pop(asyncio.get_running_loop(), None)
    if engine is not None:
        await engine.dispose()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _shared_key(url: str, engine_kwargs: dict[str, Any]) -> tuple[str, object]:
    return url, _frozen(engine_kwargs)


def _frozen(value: object) -> object:
    """A hashable stand-in: equal for equal options, and for the same object where that is all."""
    if isinstance(value, dict):
        return frozenset((name, _frozen(option)) for name, option in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def _drop_closed_loops() -> None:
    for engines in list(_shared.values()):
        for loop in [loop for loop in engines.by_loop if loop is not None and loop.is_closed()]:
            _abandon(engines.by_loop.pop(loop))


def _abandon(engine: AsyncEngine) -> None:
    """Let go of an engine whose event loop is gone; nothing can be waited for there any more.

    aiosqlite's threads have to be told, or the interpreter waits for them at its end. A network
    connection cannot be closed without its loop: its socket is closed when it is collected.
    """
    pool = engine.sync_engine.pool
    if engine.dialect.driver == SQLite.driver:
        with suppress(Exception):
            while pool.checkedin() > 0:  # type: ignore[attr-defined]  # pools that count have it
                pool.connect().invalidate()
    engine.sync_engine.dispose(close=False)
