"""Engines under watch: at a test's end no connection is out and no task is left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from shardgate.leases import IDLE_TURNS

if TYPE_CHECKING:
    from sqlalchemy.pool import Pool

# What a driver does after a cancelled call (closing a connection in a task of its own) may take
# this long; what is still there afterwards is a leak.
SECONDS_TO_SETTLE = 2.0


class DriverConnections:
    """The drivers' connections of an engine, to close those that a dispose has left open.

    SQLAlchemy closes a pooled aiomysql connection by a polite goodbye; if the peer is gone, that
    fails, the socket stays open, and the collector warns in whichever test comes next.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._all: list[Any] = []
        event.listen(
            engine.sync_engine,
            "connect",
            lambda adapted, _: self._all.append(adapted.driver_connection),
        )

    def close_lost(self) -> None:
        for connection in self._all:
            if getattr(connection, "closed", True) is False:
                connection.close()
        self._all.clear()


class EngineMaker:
    """Makes AsyncEngines and watches their connections; call it like ``create_async_engine``."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._out: dict[AsyncEngine, int] = {}
        self._drivers: list[DriverConnections] = []

    def __call__(self, url: str | None = None, **engine_kwargs: Any) -> AsyncEngine:
        """Make an engine for ``url``, by default that of the test's fresh database."""
        return self.watch(create_async_engine(url or self._url, **engine_kwargs))

    def watch(self, engine: AsyncEngine) -> AsyncEngine:
        """Include an engine that something else made; it is disposed at the end, too."""
        self._out[engine] = 0
        self._drivers.append(DriverConnections(engine))
        pool: Pool = engine.sync_engine.pool

        def count(change: int) -> None:
            self._out[engine] += change

        event.listen(pool, "checkout", lambda *_: count(+1))
        event.listen(pool, "checkin", lambda *_: count(-1))
        event.listen(pool, "detach", lambda *_: count(-1))
        return engine

    def checked_out(self) -> int:
        """Return how many connections of all watched engines are out now.

        Where the pool keeps a count of its own, the higher one counts.
        """
        return sum(max(out, _pool_count(engine)) for engine, out in self._out.items())

    async def still_out(self) -> int:
        """As :meth:`checked_out`, once the event loop has gone round: until then, a connection that
        was just used is kept for who comes next; and those that the pool has no room for are closed
        by tasks of their own."""
        await go_round()
        await settle()
        return self.checked_out()

    async def finish(self) -> None:
        """Dispose all engines; AssertionError if a connection is still out."""
        leaked = await self.still_out()
        for engine in self._out:
            await engine.dispose()
        for drivers in self._drivers:
            drivers.close_lost()
        assert not leaked, f"{leaked} connection(s) still checked out at the end of the test"


async def go_round() -> None:
    """Let the event loop go round: a connection that nobody has taken by then is in its pool."""
    for _ in range(IDLE_TURNS + 2):
        await asyncio.sleep(0)


def _pool_count(engine: AsyncEngine) -> int:
    count = getattr(engine.sync_engine.pool, "checkedout", None)
    return int(count()) if count is not None else 0


def other_tasks() -> list[asyncio.Task[Any]]:
    """Return the unfinished tasks of the running loop, without the current one."""
    return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def settle() -> list[asyncio.Task[Any]]:
    """Let tasks that are about to end do so; return those that do not."""
    tasks = other_tasks()
    if tasks:
        await asyncio.wait(tasks, timeout=SECONDS_TO_SETTLE)
    return other_tasks()
