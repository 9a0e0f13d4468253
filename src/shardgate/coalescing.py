"""Operations that wait for a database are sent together.

A lane has a few seats. Whoever finds one free goes at once, alone. While all are taken, what
arrives waits in order, and each seat that becomes free takes as many along as may go together. So
nobody waits for a timer, nothing is held back while the database is idle, and the more there is to
do, the less each operation costs.

The idea is that of a group commit, and of what libpq's pipelines and Redis clients do on the wire;
here the operations become one statement, so that the database parses, executes and commits once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Sequence

MOST_TOGETHER = 64
"""Operations of one statement."""
MOST_BYTES = 1 << 20
"""Bytes of one statement, unless a single operation has more."""


class Alone(Enum):
    """Said of an operation that was sent with others and has to be sent by itself: nothing has
    become of it."""

    ALONE = "alone"


ALONE = Alone.ALONE


class Load(Protocol):
    """An operation as a lane sees it."""

    @property
    def weight(self) -> int:
        """About how many bytes it sends."""

    @property
    def identity(self) -> Hashable:
        """Two of the same identity never go together."""


J = TypeVar("J", bound=Load)
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Ticket(Generic[J, R]):
    """An operation that waits to be sent together with others. ``board`` is called when it is."""

    load: J
    board: Callable[[], None]
    outcome: asyncio.Future[R | Alone] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Lane(Generic[J, R]):
    """Operations of one kind, of one event loop, on their way to one database."""

    def __init__(self, *, seats: int) -> None:
        self._free = seats
        self._waiting: deque[Ticket[J, R]] = deque()
        self._flights: set[asyncio.Task[None]] = set()

    def take_seat(self) -> bool:
        """Take a seat, if one is free, to go at once and alone; :meth:`land` gives it back."""
        if self._free == 0:
            return False
        self._free -= 1
        return True

    def land(self, send: Callable[[Sequence[Ticket[J, R]]], Awaitable[None]]) -> None:
        """Give a seat back, or let those who wait take it with ``send``."""
        if not self._waiting:
            self._free += 1
            return
        flight = asyncio.create_task(self._fly(send))
        self._flights.add(flight)  # a task that nobody refers to may be collected
        flight.add_done_callback(self._flights.discard)

    def wait(self, ticket: Ticket[J, R]) -> None:
        """Wait in order; only where no seat is free."""
        self._waiting.append(ticket)

    async def _fly(self, send: Callable[[Sequence[Ticket[J, R]]], Awaitable[None]]) -> None:
        try:
            while together := self._gather():
                for ticket in together:
                    ticket.board()
                await send(together)
        finally:
            self.land(send)

    def _gather(self) -> list[Ticket[J, R]]:
        """The first who wait, as many as may go together; not those who have given up."""
        together: list[Ticket[J, R]] = []
        identities: set[Hashable] = set()
        weight = 0
        while self._waiting and len(together) < MOST_TOGETHER:
            ticket = self._waiting[0]
            if not ticket.outcome.done():
                weight += ticket.load.weight
                identity = ticket.load.identity
                if together and (weight > MOST_BYTES or identity in identities):
                    break
                together.append(ticket)
                identities.add(identity)
            self._waiting.popleft()
        return together
