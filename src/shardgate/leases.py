"""Connections that are out of their pool, and who has them next.

To take a connection out of SQLAlchemy's pool and to return it costs as much as all else that is
done for an operation by itself. So a connection whose operation is done is kept for whoever comes
before the event loop has gone round: the same caller's next operation, or those who wait to be sent
together. What nobody takes goes back to its pool then, and all goes back after ``KEPT_SECONDS``:
pools have listeners, connections that are due to be made anew, and others who wait.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import ref

from shardgate import greenlets

if TYPE_CHECKING:
    from weakref import ReferenceType

    from sqlalchemy import Pool
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import PoolProxiedConnection

IDLE_TURNS = 2
"""For how many turns of the event loop a connection waits for its next operation: in the first one
those go on whom the last one has answered, in the second one what they want next is sent."""
KEPT_SECONDS = 0.1
"""How long a connection is out of its pool at most, though its operations follow one another."""


class Lease:
    """A connection that was taken out of an engine's pool at the time ``since``.

    ``driver`` is the driver's own connection, ``info`` what the pool remembers of it. ``used``: an
    operation has been done on it, and left no transaction open. ``idle``: for how many turns of the
    event loop it has been kept.
    """

    __slots__ = ("connection", "driver", "engine", "idle", "info", "pool", "since", "used")

    def __init__(
        self, connection: PoolProxiedConnection, engine: AsyncEngine, pool: Pool, since: float
    ) -> None:
        self.connection = connection
        self.driver: Any = connection.driver_connection
        self.info = connection.info
        self.engine = engine
        self.pool = pool
        self.since = since
        self.used = False
        self.idle = 0

    @property
    def is_current(self) -> bool:
        """Whether it is of the engine's pool: an engine that was closed has another one."""
        return self.engine.sync_engine.pool is self.pool

    async def end(self) -> None:
        """Return it to its pool; it is dropped where that pool is done with."""
        if self.is_current:
            await greenlets.run(self.connection.close)
        else:
            self.connection.invalidate()  # outside of a greenlet: it waits for nobody's goodbye

    def end_soon(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task[None] | None:
        """As :meth:`end`; where that has to wait, as for a connection that its pool has no room
        for, a task does."""
        if self.is_current:
            return greenlets.soon(self.connection.close, loop)
        self.connection.invalidate()
        return None


class Round(list[Lease]):
    """The leases that are kept while the event loop goes round.

    Nobody refers to them but the loop: engines are remembered for as long as their pools live, and
    a pool that is referred to from there would live for ever. So where a loop is closed in the
    middle of it, they are let go of here.
    """

    def __del__(self) -> None:
        for lease in self:
            with suppress(Exception):  # whatever is left of the loop and the pool
                lease.connection.detach()


class Kept:
    """The connections that an event loop keeps of a pool."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._context = Context()  # it is no request's that happens to be the first
        self._round: ReferenceType[Round] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def take(self) -> Lease | None:
        """The one that was used last, if there is one."""
        kept = self._kept()
        while kept:
            lease = kept.pop()
            if lease.is_current:
                return lease
            self._end_soon(lease)
        return None

    def keep(self, lease: Lease) -> None:
        """Keep one for the next operation, until the event loop has gone round."""
        lease.used, lease.idle = True, 0
        kept = self._kept()
        if kept is not None:
            kept.append(lease)
        else:
            self._go_on(Round([lease]))

    async def end(self) -> None:
        """Return all of them, and wait for those that are being returned."""
        while (lease := self.take()) is not None:
            await lease.end()
        if self._ending:
            await asyncio.wait(self._ending)

    def end_soon(self) -> None:
        """As :meth:`end`, without waiting for it."""
        while (lease := self.take()) is not None:
            self._end_soon(lease)

    def _kept(self) -> Round | None:
        """Those that are kept; None where the loop does not go round."""
        return None if self._round is None else self._round()

    def _go_on(self, kept: Round) -> None:
        self._round = ref(kept)
        self._loop.call_soon(self._go_round, kept, context=self._context)

    def _go_round(self, kept: Round) -> None:
        """Return those that nobody has taken for long enough."""
        for lease in kept:
            lease.idle += 1
        unused = [lease for lease in kept if lease.idle > IDLE_TURNS]
        for lease in unused:
            kept.remove(lease)
        if kept:
            self._go_on(kept)
        else:
            self._round = None
        for lease in unused:
            self._end_soon(lease)

    def _end_soon(self, lease: Lease) -> None:
        task = lease.end_soon(self._loop)
        if task is not None:
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
