"""Lanes: who goes alone, who goes together, and that a seat always comes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from shardgate import coalescing
from shardgate.coalescing import ALONE, MOST_BYTES, MOST_TOGETHER, Lane, Ticket

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class Load:
    identity: str
    weight: int = 1
    turn: str | None = None


@dataclass
class Sender:
    """Notes what is sent together, and holds it until it is told to let it arrive."""

    sent: list[list[str]] = field(default_factory=list)
    arrive: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    cancelled: int = 0

    async def send(self, tickets: Sequence[Ticket[Load, str]]) -> None:
        self.sent.append([ticket.load.identity for ticket in tickets])
        for ticket in tickets:
            ticket.board()
        try:
            await self.arrive.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        for ticket in tickets:
            ticket.give(ticket.load.identity)

    def ticket(self, identity: str, weight: int = 1) -> Ticket[Load, str]:
        return Ticket(Load(identity, weight), lambda: None, self.send)


@pytest.fixture
async def sender() -> Sender:
    return Sender()


@pytest.fixture
async def lane() -> Lane[Load, str]:
    return Lane(seats=1)


async def turn() -> None:
    """Let everything that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def all_free(lane: Lane[Load, str]) -> bool:
    return not lane._taken and not lane._flights and not any(t.waits for t in lane._waiting)


def queue(lane: Lane[Load, str], sender: Sender, *names: str) -> list[Ticket[Load, str]]:
    tickets = [sender.ticket(name) for name in names]
    for ticket in tickets:
        lane.wait(ticket)
    return tickets


async def test_whoever_finds_a_seat_goes_at_once_and_the_others_together(
    lane: Lane[Load, str], sender: Sender
) -> None:
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    assert lane.take_seat(Load("somebody")) is None
    tickets = queue(lane, sender, "a", "b", "c")
    await turn()
    assert sender.sent == []
    lane.give_back(seat)
    sender.arrive.set()
    assert await asyncio.gather(*(ticket.outcome for ticket in tickets)) == ["a", "b", "c"]
    await turn()
    assert sender.sent == [["a", "b", "c"]]
    assert all_free(lane)


async def test_a_statement_is_bounded(lane: Lane[Load, str], sender: Sender) -> None:
    sender.arrive.set()
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    many = [str(number) for number in range(MOST_TOGETHER + 1)]
    tickets = queue(lane, sender, *many)
    for name in ("x", "y"):
        tickets.append(sender.ticket(name, MOST_BYTES))
        lane.wait(tickets[-1])
    lane.give_back(seat)
    await asyncio.gather(*(ticket.outcome for ticket in tickets))
    assert sender.sent == [many[:MOST_TOGETHER], many[MOST_TOGETHER:], ["x"], ["y"]]


async def test_answers_are_bounded_as_well(lane: Lane[Load, str], sender: Sender) -> None:
    sender.arrive.set()
    lane.answer_bytes = MOST_BYTES // 2 - 1
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    tickets = queue(lane, sender, "a", "b", "c")
    lane.give_back(seat)
    await asyncio.gather(*(ticket.outcome for ticket in tickets))
    assert sender.sent == [["a", "b"], ["c"]]


async def test_the_same_identity_twice_is_not_in_one_statement(
    lane: Lane[Load, str], sender: Sender
) -> None:
    sender.arrive.set()
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    tickets = queue(lane, sender, "a", "b", "a", "c")
    lane.give_back(seat)
    await asyncio.gather(*(ticket.outcome for ticket in tickets))
    assert sender.sent == [["a", "b"], ["a", "c"]]


async def test_who_gives_up_while_waiting_is_not_sent(
    lane: Lane[Load, str], sender: Sender
) -> None:
    sender.arrive.set()
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    first, second = queue(lane, sender, "a", "b")
    first.outcome.cancel()
    lane.give_back(seat)
    assert await second.outcome == "b"
    await turn()
    assert sender.sent == [["b"]]
    assert all_free(lane)


async def test_where_all_have_given_up_the_seat_is_free(
    lane: Lane[Load, str], sender: Sender
) -> None:
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    for ticket in queue(lane, sender, "a", "b"):
        ticket.outcome.cancel()
    lane.give_back(seat)
    assert sender.sent == []
    assert all_free(lane)


async def test_a_flight_goes_on_for_those_who_still_wait(
    lane: Lane[Load, str], sender: Sender
) -> None:
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    first, second = queue(lane, sender, "a", "b")
    lane.give_back(seat)
    await turn()
    first.outcome.cancel()
    await turn()
    sender.arrive.set()
    assert await second.outcome == "b"
    assert sender.cancelled == 0


async def test_a_flight_that_all_have_left_is_ended(lane: Lane[Load, str], sender: Sender) -> None:
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    passengers = queue(lane, sender, "a", "b")
    lane.give_back(seat)
    await turn()
    (next_,) = queue(lane, sender, "c")
    for ticket in passengers:
        ticket.outcome.cancel()
    await turn()
    assert sender.cancelled == 1
    sender.arrive.set()
    assert await next_.outcome == "c"
    await turn()
    assert sender.sent == [["a", "b"], ["c"]]
    assert all_free(lane)


async def test_an_error_is_everybodys_and_the_next_are_sent(
    lane: Lane[Load, str], sender: Sender
) -> None:
    sender.error = OSError("cut")
    sender.arrive.set()
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    tickets = queue(lane, sender, "a", "b")
    lane.give_back(seat)
    for ticket in tickets:
        with pytest.raises(OSError, match="cut"):
            await ticket.outcome
    await turn()
    assert all_free(lane)


async def test_a_flight_cancelled_from_outside_is_an_error_to_its_passengers(
    lane: Lane[Load, str], sender: Sender
) -> None:
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    (ticket,) = queue(lane, sender, "a")
    lane.give_back(seat)
    (flight,) = lane._flights
    flight.cancel()  # before its first step, too
    with pytest.raises(ConnectionAbortedError):
        await ticket.outcome
    await turn()
    assert all_free(lane)


async def test_a_seat_that_does_not_come_back_is_given_to_those_who_wait(
    lane: Lane[Load, str], sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "OVERDUE_SECONDS", 0.001)
    sender.arrive.set()
    held = lane.take_seat(Load("somebody"))
    assert held is not None
    (first,) = queue(lane, sender, "a")
    assert await asyncio.wait_for(first.outcome, 10) == "a"
    await turn()
    assert lane.take_seat(Load("somebody")) is not None
    lane.give_back(held)  # it has been given away: nothing is free by it
    assert lane.take_seat(Load("somebody")) is None


async def test_what_has_to_go_alone_is_said_so(lane: Lane[Load, str], sender: Sender) -> None:
    ticket = sender.ticket("a")
    ticket.give(ALONE)
    ticket.give("b")
    ticket.fail(OSError())
    assert await ticket.outcome is ALONE
