"""Connections that are out of their pool, and who has them next.

To take a connection out of SQLAlchemy's pool and to return it costs as much as all else that is
done for an operation by itself. So a connection whose operation is done is kept for whoever comes
before the event loop has gone round: the same caller's next operation, or those who wait to be sent
together. What nobody takes goes back to its pool then, and all goes back after ``KEPT_SECONDS``:
pools have listeners, connections that are due to be made anew, and others who wait.
"""

from __future__ import annotations

from contextvars import Context
from typing import TYPE_CHECKING, Any

from shardgate import greenlets

if TYPE_CHECKING:
    import asyncio

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

    def end(self) -> None:
        """Return it; to be called where SQLAlchemy may wait for the event loop."""
        if self.is_current:
            self.connection.close()
        else:
            self.connection.invalidate()


class Kept:
    """The connections that an event loop keeps of a pool."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._context = Context()  # it is no request's that happens to be the first
        self._leases: list[Lease] = []
        self._goes_round = False

    def take(self) -> Lease | None:
        """The one that was used last, if there is one."""
        while self._leases:
            lease = self._leases.pop()
            if lease.is_current:
                return lease
            self._end(lease)
        return None

    def keep(self, lease: Lease) -> None:
        """Keep one for the next operation, until the event loop has gone round."""
        lease.used, lease.idle = True, 0
        self._leases.append(lease)
        if not self._goes_round:
            self._goes_round = True
            self._loop.call_soon(self._go_round, context=self._context)

    def end(self) -> None:
        """Return all of them."""
        leases, self._leases = self._leases, []
        for lease in leases:
            self._end(lease)

    def _go_round(self) -> None:
        """Return those that nobody has taken for long enough."""
        for lease in self._leases:
            lease.idle += 1
        unused = [lease for lease in self._leases if lease.idle > IDLE_TURNS]
        if unused:
            self._leases = [lease for lease in self._leases if lease.idle <= IDLE_TURNS]
        self._goes_round = bool(self._leases)
        if self._goes_round:
            self._loop.call_soon(self._go_round, context=self._context)
        for lease in unused:
            self._end(lease)

    def _end(self, lease: Lease) -> None:
        greenlets.soon(lease.end, self._loop)
