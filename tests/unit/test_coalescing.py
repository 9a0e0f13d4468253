"""Lanes: who goes alone, who goes together, and that a seat always comes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardgate import coalescing
from shardgate.coalescing import MOST_BYTES, MOST_TOGETHER, Crowd, Lane, Ticket, worth

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence

    from shardgate.coalescing import Seat


@dataclass
class Load:
    identity: str
    weight: int = 1
    turn: str | None = None


class Sent(Ticket[Load, str]):
    """A ticket that is sent by a function; to be awaited, and cancelled, as its answer is."""

    def __init__(self, load: Load, send: Callable[..., Awaitable[None]]) -> None:
        self.load = load
        self._send = send

    def __await__(self) -> Generator[Any, None, Any]:
        assert self.answer is not None
        return self.answer.__await__()

    def cancel(self) -> None:
        assert self.answer is not None
        self.answer.cancel()
        self.leave()

    async def send(self, lane: Any, together: Sequence[Ticket[Load, str]]) -> None:
        await self._send(together)


@dataclass
class Sender:
    """Notes what is sent together, and holds it until it is told to let it arrive."""

    sent: list[list[str]] = field(default_factory=list)
    arrive: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    cancelled: int = 0

    async def send(self, tickets: Sequence[Sent]) -> None:
        """What any of the tickets does."""
        self.sent.append([ticket.load.identity for ticket in tickets])
        try:
            await self.arrive.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        for ticket in tickets:
            ticket.give(ticket.load.identity)

    def ticket(self, identity: str, weight: int = 1, turn: str | None = None) -> Sent:
        return Sent(Load(identity, weight, turn), self.send)


@pytest.fixture
async def sender() -> Sender:
    return Sender()


@pytest.fixture
async def lane() -> Lane[Load, str]:
    return Lane(Crowd(), seats=1)


@pytest.fixture(autouse=True)
def no_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is under way, the others wait, however few they are."""
    monkeypatch.setattr(coalescing, "VERY_FEW", 1)
    monkeypatch.setattr(coalescing, "FEW", 0)


async def turn() -> None:
    """Let everything that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def all_free(lane: Lane[Load, str]) -> bool:
    return (
        not lane._taken and not lane._flights and not any(ticket.waits for ticket in lane._waiting)
    )


def queue(lane: Lane[Load, str], sender: Sender, *names: str) -> list[Sent]:
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
    assert await asyncio.gather(*tickets) == ["a", "b", "c"]
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
    await asyncio.gather(*tickets)
    assert sender.sent == [many[:MOST_TOGETHER], many[MOST_TOGETHER:], ["x"], ["y"]]


async def test_answers_are_bounded_as_well(lane: Lane[Load, str], sender: Sender) -> None:
    sender.arrive.set()
    lane.answer_bytes = MOST_BYTES // 2 - 1
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    tickets = queue(lane, sender, "a", "b", "c")
    lane.give_back(seat)
    await asyncio.gather(*tickets)
    assert sender.sent == [["a", "b"], ["c"]]


async def test_the_same_identity_twice_is_not_in_one_statement(
    lane: Lane[Load, str], sender: Sender
) -> None:
    sender.arrive.set()
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    tickets = queue(lane, sender, "a", "b", "a", "c")
    lane.give_back(seat)
    await asyncio.gather(*tickets)
    assert sender.sent == [["a", "b"], ["a", "c"]]


async def test_who_gives_up_while_waiting_is_not_sent(
    lane: Lane[Load, str], sender: Sender
) -> None:
    sender.arrive.set()
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    first, second = queue(lane, sender, "a", "b")
    first.cancel()
    lane.give_back(seat)
    assert await second == "b"
    await turn()
    assert sender.sent == [["b"]]
    assert all_free(lane)


async def test_where_all_have_given_up_the_seat_is_free(
    lane: Lane[Load, str], sender: Sender
) -> None:
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    for ticket in queue(lane, sender, "a", "b"):
        ticket.cancel()
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
    first.cancel()
    await turn()
    sender.arrive.set()
    assert await second == "b"
    assert sender.cancelled == 0


async def test_a_flight_that_all_have_left_is_ended(lane: Lane[Load, str], sender: Sender) -> None:
    seat = lane.take_seat(Load("somebody"))
    assert seat is not None
    passengers = queue(lane, sender, "a", "b")
    lane.give_back(seat)
    await turn()
    (next_,) = queue(lane, sender, "c")
    for ticket in passengers:
        ticket.cancel()
    await turn()
    assert sender.cancelled == 1
    sender.arrive.set()
    assert await next_ == "c"
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
            await ticket
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
        await ticket
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
    assert await asyncio.wait_for(first, 10) == "a"
    await turn()
    assert lane.take_seat(Load("somebody")) is not None
    lane.give_back(held)  # it has been given away: nothing is free by it
    assert lane.take_seat(Load("somebody")) is None


async def test_the_first_outcome_counts(lane: Lane[Load, str], sender: Sender) -> None:
    ticket = sender.ticket("a")
    lane.wait(ticket)
    ticket.give("a")
    ticket.give("b")
    ticket.fail(OSError())
    assert await ticket == "a"


class Parted(Sent):
    """Where several are sent together, those of the chat "a" are to go alone; a statement arrives
    when it is told to."""

    arrivals: ClassVar[dict[str, asyncio.Event]]

    async def send(self, lane: Any, together: Sequence[Ticket[Load, str]]) -> None:
        names = [ticket.load.identity for ticket in together]
        self.arrivals[" ".join(names)] = asyncio.Event()
        await self.arrivals[" ".join(names)].wait()
        alone = [one for one in together if one.load.turn == "a"] if len(together) > 1 else []
        assert together[0].flight is not None
        if alone:
            lane.send_alone(together[0].flight, alone)
        if not together[0].flight.then:
            lane.give_back(together[0].flight.seat)
        for ticket in together:
            if ticket not in alone:
                ticket.give(ticket.load.identity)


async def _parted(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Parted]:
    monkeypatch.setattr(Parted, "arrivals", {}, raising=False)
    monkeypatch.setattr(coalescing, "WORTH_A_SEAT", 1)
    monkeypatch.setattr(coalescing, "CROWD_SHARE", 100)
    return [Parted(Load(name, turn=name[0]), _unused) for name in names]


async def _unused(_: object) -> None:
    raise AssertionError


async def _arrives(name: str) -> None:
    Parted.arrivals.pop(name).set()
    await turn()


async def test_those_who_are_to_go_alone_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their turn, but no seat: others go past them."""
    lane: Lane[Load, str] = Lane(Crowd(), seats=1)
    tickets = await _parted(monkeypatch, "a1", "b1", "a2", "a3", "b2", "a4")
    a1, b1, a2, a3, b2, a4 = tickets
    for ticket in (a1, b1, a2):
        lane.wait(ticket)
    await turn()
    assert list(Parted.arrivals) == ["a1 b1 a2"]
    for ticket in (a3, b2):
        lane.wait(ticket)
    await _arrives("a1 b1 a2")
    assert not b1.waits
    assert list(Parted.arrivals) == ["a1", "b2"]
    await _arrives("b2")
    lane.wait(a4)
    await turn()
    assert list(Parted.arrivals) == ["a1"]
    await _arrives("a1")
    assert not a1.waits
    assert list(Parted.arrivals) == ["a2"]
    await _arrives("a2")
    assert list(Parted.arrivals) == ["a3 a4"]
    await _arrives("a3 a4")
    await _arrives("a3")
    await _arrives("a4")
    assert [ticket.waits for ticket in tickets] == [False] * 6
    assert all_free(lane)
    assert not lane._turns


@pytest.mark.parametrize("leaves", ["a1", "a2", "both"])
async def test_who_is_to_go_alone_may_leave(monkeypatch: pytest.MonkeyPatch, leaves: str) -> None:
    """What he was sent with is over for him, and he is not sent any more, or ended."""
    lane: Lane[Load, str] = Lane(Crowd(), seats=1)
    tickets = await _parted(monkeypatch, "a1", "b1", "a2", "a3")
    a1, _, a2, a3 = tickets
    for ticket in tickets[:3]:
        lane.wait(ticket)
    await turn()
    lane.wait(a3)
    await _arrives("a1 b1 a2")
    if leaves != "a1":
        a2.cancel()
    if leaves == "a2":
        await _arrives("a1")
    else:
        a1.cancel()
        Parted.arrivals.pop("a1")
        await turn()
    if leaves == "a1":
        await _arrives("a2")
    assert list(Parted.arrivals) == ["a3"]
    await _arrives("a3")
    assert not a3.waits
    assert all_free(lane)
    assert not lane._turns


async def test_who_was_cancelled_just_now_is_still_aboard(
    lane: Lane[Load, str], sender: Sender
) -> None:
    """Until he says himself whether he leaves: the write may have to be waited for."""
    first, second = queue(lane, sender, "a", "b")
    await turn()
    assert first.answer is not None
    first.answer.cancel()
    second.cancel()  # leaves
    await turn()
    assert sender.cancelled == 0
    first.leave()
    await turn()
    assert sender.cancelled == 1


class Chats:
    """Two seats, and appends of chats: "a1" is the first of the chat "a"."""

    def __init__(self, sender: Sender) -> None:
        self.lane: Lane[Load, str] = Lane(Crowd(), seats=2)
        self.sender = sender

    def goes(self, name: str) -> Seat | None:
        return self.lane.take_seat(Load(name, turn=name[0]))

    def waits(self, *names: str) -> list[Sent]:
        tickets = [self.sender.ticket(name, turn=name[0]) for name in names]
        for ticket in tickets:
            self.lane.wait(ticket)
        return tickets


async def test_a_second_seat_is_taken_when_enough_wait(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "WORTH_A_SEAT", 3)
    chats = Chats(sender)
    first = chats.goes("a1")
    assert first is not None
    assert chats.goes("b1") is None
    chats.waits("b1", "c1")
    await turn()
    assert sender.sent == []
    chats.waits("d1")
    await turn()
    chats.waits("e1", "f1", "g1")
    await turn()
    assert sender.sent == [["b1", "c1", "d1"]], "both seats are taken"
    chats.lane.give_back(first)
    await turn()
    assert sender.sent == [["b1", "c1", "d1"], ["e1", "f1", "g1"]]
    sender.arrive.set()
    await turn()
    assert all_free(chats.lane)


async def test_half_of_those_who_wait_go_while_another_seat_is_free(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "WORTH_A_SEAT", 2)
    monkeypatch.setattr(coalescing, "CROWD_SHARE", 9)
    lane: Lane[Load, str] = Lane(Crowd(), seats=3)
    queue(lane, sender, *"abcdefghi")
    await turn()
    assert sender.sent == [[*"abcde"], [*"fg"], [*"hi"]]
    sender.arrive.set()
    await turn()
    queue(lane, sender, "x", "y")
    await turn()
    assert sender.sent[3:] == [["x", "y"]], "so few are not worth two statements"
    await turn()
    assert all_free(lane)


async def test_the_more_there_are_the_more_go_together(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be they under way on another lane to the same database: they will be here next."""
    monkeypatch.setattr(coalescing, "WORTH_A_SEAT", 2)
    crowd = Crowd()
    lane: Lane[Load, str] = Lane(crowd, seats=3)
    other: Lane[Load, str] = Lane(crowd, seats=1)
    assert [worth(n) for n in (0, 6, 8, 9, 11, 12)] == [2, 2, 2, 3, 3, 4]
    assert worth(10_000) == MOST_TOGETHER // 2
    assert lane.take_seat(Load("first")) is not None
    queue(other, sender, *"abcdef")  # all of them leave
    await turn()
    assert len(sender.sent) == 1
    assert crowd.size == 7
    queue(lane, sender, "j", "k")
    await turn()
    assert len(sender.sent) == 1, "of eight two would have been enough, of nine three are"
    queue(lane, sender, "l")
    await turn()
    assert sender.sent[1:] == [["j", "k", "l"]]
    sender.arrive.set()
    await turn()
    assert all_free(other)
    assert crowd.size == 1


async def test_very_few_go_at_once_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalescing, "VERY_FEW", 2)
    lane: Lane[Load, str] = Lane(Crowd(), seats=3)
    first = lane.take_seat(Load("a", turn="chat"))
    assert first is not None
    assert lane.take_seat(Load("b", turn="chat")) is None, "it has to keep its order"
    assert lane.take_seat(Load("c")) is not None
    assert lane.take_seat(Load("d")) is None
    lane.give_back(first)
    assert lane.take_seat(Load("d")) is not None


async def test_nobody_overtakes_those_who_wait(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "VERY_FEW", 9)
    chats = Chats(sender)
    held = chats.goes("a1")
    assert held is not None
    chats.waits("a2")
    assert chats.goes("b1") is None
    sender.arrive.set()
    chats.lane.give_back(held)
    await turn()
    assert sender.sent == [["a2"]]


async def test_while_few_are_under_way_those_who_come_together_go_together(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "FEW", 4)
    lane: Lane[Load, str] = Lane(Crowd(), seats=3)
    assert lane.take_seat(Load("first")) is not None
    queue(lane, sender, "a", "b")
    assert sender.sent == []
    await turn()
    assert sender.sent == [["a", "b"]]
    queue(lane, sender, "c", "d")
    await turn()
    assert sender.sent == [["a", "b"], ["c", "d"]]
    queue(lane, sender, "e")
    await turn()
    assert len(sender.sent) == 2, "there is no seat"
    sender.arrive.set()
    await turn()
    assert sender.sent[2:] == [["e"]]


async def test_where_more_are_under_way_the_others_wait(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "FEW", 3)
    lane: Lane[Load, str] = Lane(Crowd(), seats=3)
    assert lane.take_seat(Load("first")) is not None
    queue(lane, sender, "a", "b")
    await turn()
    queue(lane, sender, "c")
    await turn()
    assert sender.sent == [["a", "b"]]
    sender.arrive.set()
    await turn()
    assert sender.sent[1:] == [["c"]]


async def test_each_further_seat_is_taken_when_enough_wait(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "WORTH_A_SEAT", 2)
    monkeypatch.setattr(coalescing, "MOST_TOGETHER", 2)
    lane: Lane[Load, str] = Lane(Crowd(), seats=3)
    assert lane.take_seat(Load("first")) is not None
    for number, sent in enumerate([0, 1, 1, 2, 2, 2], 1):
        lane.wait(sender.ticket(f"n{number}"))
        await turn()
        assert len(sender.sent) == sent, number
    sender.arrive.set()
    await turn()


async def test_those_whose_turn_it_is_not_stay_behind_in_their_order(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "WORTH_A_SEAT", 3)
    chats = Chats(sender)
    first = chats.goes("a1")
    assert first is not None
    chats.waits("a2", "b1", "c1")
    await turn()
    chats.waits("b2", "a3", "c2")
    await turn()
    assert sender.sent == [["b1", "c1"]], "the others have to wait for a1, b1 and c1"
    chats.lane.give_back(first)
    await turn()
    assert sender.sent[1:] == [["a2", "a3"]]
    chats.waits("b3", "a4")
    sender.arrive.set()
    await turn()
    assert sender.sent[2:] in ([["b2", "c2", "b3", "a4"]], [["b2", "c2", "b3"], ["a4"]])
    await turn()
    assert all_free(chats.lane)
    assert not chats.lane._turns


async def test_a_seat_given_away_keeps_its_turn(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is overdue may still be under way: what comes after it in its chat waits for it."""
    monkeypatch.setattr(coalescing, "OVERDUE_SECONDS", 0.001)
    chats = Chats(sender)
    sender.arrive.set()
    held = chats.goes("a1")
    assert held is not None
    later, other = chats.waits("a2", "b1")
    assert await asyncio.wait_for(other, 10) == "b1"
    assert later.waits
    chats.lane.give_back(held)
    assert await asyncio.wait_for(later, 10) == "a2"
    await turn()
    assert all_free(chats.lane)


async def test_a_seat_that_was_given_back_early_takes_no_turn_from_the_next(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a statement does whose answer is there, before it has landed."""
    monkeypatch.setattr(coalescing, "WORTH_A_SEAT", 1)
    chats = Chats(sender)
    (first,) = chats.waits("a1")
    await turn()
    landing, sender.arrive = sender.arrive, asyncio.Event()
    chats.waits("a2")
    await turn()
    assert sender.sent == [["a1"]], "it has to keep its order"
    assert first.flight is not None
    chats.lane.give_back(first.flight.seat)
    await turn()
    assert sender.sent == [["a1"], ["a2"]]
    landing.set()
    await turn()
    assert not first.waits
    chats.waits("a3")
    await turn()
    assert sender.sent == [["a1"], ["a2"]], "the second one is under way still"
    sender.arrive.set()
    await turn()
    assert sender.sent[2:] == [["a3"]]
    await turn()
    assert all_free(chats.lane)
    assert not chats.lane._turns


@given(
    seats=st.integers(1, 3),
    worth=st.integers(1, 4),
    few=st.tuples(st.integers(1, 3), st.integers(0, 6)),
    arrivals=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), max_size=40),
)
@settings(deadline=None)
def test_whatever_comes_a_chats_appends_are_sent_in_order_and_one_after_the_other(
    seats: int, worth: int, few: tuple[int, int], arrivals: list[tuple[str, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("VERY_FEW", "FEW"), few, strict=True):
            patch.setattr(coalescing, name, value)
        patch.setattr(coalescing, "WORTH_A_SEAT", worth)
        asyncio.run(_in_order(seats, arrivals))


async def _in_order(seats: int, arrivals: list[tuple[str, int]]) -> None:
    """Each arrival is of a chat, so many turns of the loop after the one before."""
    lane: Lane[Load, str] = Lane(Crowd(), seats=seats)
    under_way: set[str] = set()
    ended: dict[str, list[int]] = {}

    async def fly(loads: list[Load]) -> None:
        chats = {load.identity[0] for load in loads}
        assert not chats & under_way
        under_way.update(chats)
        for _ in range(len(loads) + 1):
            await asyncio.sleep(0)
        under_way.difference_update(chats)
        for load in loads:
            ended.setdefault(load.identity[0], []).append(int(load.identity[1:]))

    async def send(tickets: Sequence[Sent]) -> None:
        await fly([ticket.load for ticket in tickets])
        for ticket in tickets:
            ticket.give("done")

    async def append(load: Load) -> None:
        seat = lane.take_seat(load)
        if seat is None:
            ticket = Sent(load, send)
            lane.wait(ticket)
            await ticket
            return
        await fly([load])
        lane.give_back(seat)

    calls = []
    for number, (chat, pause) in enumerate(arrivals):
        calls.append(asyncio.create_task(append(Load(f"{chat}{number}", turn=chat))))
        for _ in range(pause):
            await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(*calls), 10)
    assert all(numbers == sorted(numbers) for numbers in ended.values()), ended
    assert sum(map(len, ended.values())) == len(arrivals)
    await turn()
    assert all_free(lane)
    assert not lane._turns
