"""Operations that wait for a database are sent together.

A lane has a few seats. Whoever finds hardly anybody under way goes at once, alone. Where a few
are, all who come within one turn of the event loop go together. Where more are, what arrives waits
in order, and a seat that becomes free takes half of those who wait along, the last one all who may
go together; a further one leaves as soon as enough wait to be worth a statement: sixteen, or a
third of all there are. So nothing is held
back while the database has little to do, and the more there is to do, the less each operation
costs. What must keep its order has a turn: it waits while another of the same turn is under way,
free seats or not.

A seat whose holder does not come back soon, be it that somebody has locked what it wants, is given
to those who wait: nobody is held up by another one's trouble for longer than ``OVERDUE_SECONDS``.

The idea is that of a group commit, and of what libpq's pipelines and Redis clients do on the wire;
here the operations become one statement, so that the database parses, executes and commits once.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from contextvars import Context
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Hashable, Sequence

MOST_TOGETHER = 128
"""Operations of one statement."""
MOST_BYTES = 1 << 20
"""Bytes of one statement, or of its answer as far as it is foreseen, unless a single operation has
more."""
WORTH_A_SEAT = 16
"""So many have to wait, at least, for a further seat to be taken. Who waits is not parted into
less."""
CROWD_SHARE = 3
"""And at least one in so many of the operations of all kinds that wait or are under way: the more
there are, the more go together."""
VERY_FEW = 2
"""While fewer operations are under way, whoever comes goes at once and alone."""
FEW = 8
"""While fewer operations are under way, those go who come within a turn of the event loop."""
OVERDUE_SECONDS = 0.05
"""How long the holder of a seat keeps it from those who wait."""


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
        """Two of the same identity never go together; None: any two may."""

    @property
    def turn(self) -> Hashable:
        """Two of the same turn are never under way in two statements; None: it has no turn."""


J = TypeVar("J", bound=Load)
R = TypeVar("R")


class Ticket(ABC, Generic[J, R]):
    """An operation that waits to be sent together with others.

    From when it waits in a lane, its ``answer`` is what is awaited. Where that is done, or gone
    (None), nobody waits any more, and it is not sent; who stops waiting says so by :meth:`leave`.
    """

    load: J
    answer: asyncio.Future[R] | None = None
    flight: Flight | None = None

    @abstractmethod
    def send(self, lane: Lane[J, R], together: Sequence[Ticket[J, R]]) -> Coroutine[Any, Any, None]:
        """Send these together and give each its outcome, as any one of them can."""

    @property
    def waits(self) -> bool:
        """Whether somebody waits for the outcome."""
        return self.answer is not None and not self.answer.done()

    @property
    def is_aboard(self) -> bool:
        """Whether nobody has told an outcome, nor left: who was cancelled just now may yet stay."""
        answer = self.answer
        return answer is not None and (not answer.done() or answer.cancelled())

    def leave(self) -> None:
        """Nobody waits for the outcome any more."""
        self.answer = None
        if self.flight is not None:
            self.flight.end_if_left()

    def give(self, outcome: R) -> None:
        """Tell the outcome, if anybody still waits for one."""
        answer = self.answer
        if answer is not None and not answer.done():
            answer.set_result(outcome)

    def fail(self, error: Exception) -> None:
        """Tell that there is none, if anybody still waits for one."""
        answer = self.answer
        if answer is not None and not answer.done():
            answer.set_exception(error)
            answer.exception()  # retrieved, in case that the caller is cancelled just now


class Flight:
    """A statement that is under way with these tickets, and the seat that it has; and those who are
    sent after it, one by one, before anybody else of their turn."""

    __slots__ = ("seat", "task", "then", "together")

    def __init__(
        self,
        seat: Seat,
        together: Sequence[Ticket[Any, Any]],
        then: deque[Ticket[Any, Any]] | None = None,
    ) -> None:
        self.seat = seat
        self.task: asyncio.Task[None] | None = None
        self.together = together
        self.then = then
        for ticket in together:
            ticket.flight = self

    def end_if_left(self) -> None:
        """Cancel it, if it is without passengers: it would keep its connection from others."""
        if self.task is not None and not any(ticket.is_aboard for ticket in self.together):
            self.task.cancel()

    def land(self, error: Exception) -> None:
        """It is over. For those without an outcome there was this error."""
        for ticket in self.together:
            if ticket.flight is self:
                ticket.fail(error)
        # Else it and its tickets would refer to each other.
        self.task, self.together = None, ()


def share(waiting: int, *, crowd: int, free: int) -> int:
    """How many of those who wait go as one: while another seat is free, half, or what is worth one.

    If all who have got their answers in one statement went in one again, the process and the
    database would take turns, each with nothing to do meanwhile.
    """
    half = -(-waiting // 2)
    return min(MOST_TOGETHER, max(worth(crowd), half)) if free > 1 else MOST_TOGETHER


def worth(crowd: int) -> int:
    """How many have to wait for a further seat to be taken, where there are ``crowd`` in all.

    Those who are answered together come again together: without this, statements would stay as
    small as they once were, however many there are. Half of what a statement takes is always
    enough: else the few of one kind would wait because of the many of another.
    """
    return max(WORTH_A_SEAT, min(MOST_TOGETHER // 2, crowd // CROWD_SHARE))


class Seat:
    """The right to be under way, since when, and whose turn it is by that."""

    __slots__ = ("since", "turns")

    def __init__(self, since: float, turns: Sequence[Hashable]) -> None:
        self.since = since
        self.turns = turns


class Crowd:
    """The lanes to one database, of operations of each kind."""

    def __init__(self) -> None:
        self._lanes: list[Lane[Any, Any]] = []

    def join(self, lane: Lane[Any, Any]) -> None:
        self._lanes.append(lane)

    @property
    def size(self) -> int:
        """How many operations wait or are under way."""
        return sum([lane.size for lane in self._lanes])


class Lane(Generic[J, R]):
    """Operations of one kind, of one event loop, on their way to one database.

    It refers to nothing but those who wait, those who are under way, and the ``crowd`` of lanes
    that it is one of. ``answer_bytes`` is what an operation's answer has lately been, so that
    answers are bounded, too.
    """

    def __init__(self, crowd: Crowd, *, seats: int, answer_bytes: int = 0) -> None:
        self.answer_bytes = answer_bytes
        self._crowd = crowd
        crowd.join(self)
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._seats = seats
        self._taken: dict[Seat, int] = {}  # in the order of their times; how many each has
        self._is_open = False  # somebody has come within this turn of the event loop
        self._turns: set[Hashable] = set()  # of what is under way
        self._waiting: deque[Ticket[J, R]] = deque()
        self._flights: set[asyncio.Task[None]] = set()
        self._watch: asyncio.TimerHandle | None = None

    def take_seat(self, load: J) -> Seat | None:
        """Take a seat, while few are, to go at once and alone; :meth:`give_back` returns it."""
        if self._waiting or not self._has_room(VERY_FEW):
            return None
        turn = load.turn
        return None if turn in self._turns else self._seat(() if turn is None else (turn,), 1)

    def _has_room(self, most: int) -> bool:
        """Whether a seat is free, and fewer operations are under way."""
        return len(self._taken) < self._seats and sum(self._taken.values()) < most

    @property
    def size(self) -> int:
        """How many operations wait or are under way."""
        return len(self._waiting) + sum(self._taken.values())

    def _may_depart(self) -> bool:
        """Whether a seat is free, and few are under way, or enough wait to be worth a statement."""
        if not self._taken or len(self._waiting) >= worth(self._crowd.size):
            return len(self._taken) < self._seats
        return self._has_room(FEW)

    def _seat(self, turns: Sequence[Hashable], operations: int) -> Seat:
        seat = Seat(self._clock(), turns)
        self._taken[seat] = operations
        self._turns.update(turns)
        return seat

    def give_back(self, seat: Seat) -> None:
        """Let those who wait have the seat, unless they have it already."""
        self._turns.difference_update(seat.turns)
        seat.turns = ()
        self._taken.pop(seat, None)
        if self._waiting:
            self._depart()

    def wait(self, ticket: Ticket[J, R]) -> asyncio.Future[R]:
        """Wait in order, for an answer; only after :meth:`take_seat` gave none."""
        answer = ticket.answer = self._loop.create_future()
        ticket.flight = None
        self._waiting.append(ticket)
        if not self._is_open:
            self._is_open = True
            self._loop.call_soon(self._close_turn)
        if self._watch is None:
            self._watch_seats()
        return answer

    def _close_turn(self) -> None:
        """All who came within this turn of the event loop are there."""
        self._is_open = False
        self._depart()

    def _depart(self) -> None:
        """Send those who wait, as many at a time as may go together, as far as there are seats."""
        while self._waiting and self._may_depart():
            together, turns = self._gather()
            if not together:
                return
            self._send(Flight(self._seat(turns, len(together)), together))

    def _send(self, flight: Flight) -> None:
        together = flight.together
        # In a context of its own: it is nothing of the request's that happens to start it.
        task = self._loop.create_task(together[0].send(self, together), context=Context())
        flight.task = task
        self._flights.add(task)  # a task that nobody refers to may be collected
        task.add_done_callback(partial(self._land, flight))

    def send_alone(self, flight: Flight, tickets: Sequence[Ticket[J, R]]) -> None:
        """Send by themselves who were sent together in vain: without a seat, since they may wait
        for long, and those of a turn one after the other, before all who come after them."""
        chains: dict[Hashable, deque[Ticket[J, R]]] = {}
        for ticket in tickets:
            turn = ticket.load.turn
            chains.setdefault(ticket if turn is None else turn, deque()).append(ticket)
            ticket.flight = None
        flight.seat.turns = [turn for turn in flight.seat.turns if turn not in chains]
        for chain in chains.values():
            self._send_next(chain)

    def _send_next(self, chain: deque[Ticket[J, R]]) -> None:
        turn = chain[0].load.turn
        seat = Seat(self._clock(), () if turn is None else (turn,))
        while chain:
            ticket = chain.popleft()
            if ticket.waits:
                self._send(Flight(seat, [ticket], chain))
                return
        self.give_back(seat)

    def _land(self, flight: Flight, task: asyncio.Task[None]) -> None:
        self._flights.discard(task)
        error = ConnectionAbortedError("cancelled") if task.cancelled() else task.exception()
        flight.land(error if isinstance(error, Exception) else RuntimeError("no outcome"))
        if flight.then:
            self._send_next(flight.then)
        else:
            self.give_back(flight.seat)

    def _gather(self) -> tuple[list[Ticket[J, R]], list[Hashable]]:
        """The first who wait, as many as may go together, and whose turn it is by that; not those
        who have given up.

        Those whose turn it is not stay behind, in front.
        """
        together: list[Ticket[J, R]] = []
        turns: list[Hashable] = []
        behind: list[Ticket[J, R]] = []
        identities: set[Hashable] = set()
        weight, answer_bytes = 0, self.answer_bytes
        waiting, under_way = self._waiting, self._turns
        free = self._seats - len(self._taken)
        most = share(len(waiting), crowd=self._crowd.size, free=free)
        while waiting and len(together) < most:
            ticket = waiting.popleft()
            answer = ticket.answer
            if answer is None or answer.done():
                continue
            load = ticket.load
            turn = load.turn
            if turn is not None and turn in under_way:
                behind.append(ticket)
                continue
            weight += load.weight + answer_bytes
            identity = load.identity
            if together and (weight > MOST_BYTES or identity in identities):
                behind.append(ticket)
                break
            together.append(ticket)
            if turn is not None:
                turns.append(turn)
            if identity is not None:
                identities.add(identity)
        waiting.extendleft(reversed(behind))
        return together, turns

    def _watch_seats(self) -> None:
        """Look after those who wait when the oldest seat becomes overdue."""
        oldest = next(iter(self._taken), None)
        since = self._clock() if oldest is None else oldest.since
        self._watch = self._loop.call_at(since + OVERDUE_SECONDS, self._look, context=Context())

    def _look(self) -> None:
        self._watch = None
        overdue = self._clock() - OVERDUE_SECONDS
        for seat in [seat for seat in self._taken if seat.since <= overdue]:
            del self._taken[seat]
        self._depart()
        if self._waiting:
            self._watch_seats()
