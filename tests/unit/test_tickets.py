"""An operation that is sent with others, as its caller sees it: what cancellations and deadlines do
before it is sent and after."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from shardgate import shards
from shardgate.coalescing import Flight, Seat
from shardgate.errors import UsageError
from shardgate.shards import Appends, Attempt, Database
from shardgate.sql.dialect import Append, Key, Operation
from shardgate.sql.schema import TableNames, build_tables

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SENT = pytest.mark.parametrize("sent", [False, True])
TABLES = build_tables(TableNames.standalone("agent_sessions", "agent_messages"))


class Call:
    """A caller of one operation, which waits for a seat, or is under way with others."""

    under_way: ClassVar[list[asyncio.Task[Any]]]

    def __init__(self, *, sent: bool, writes: bool = True, seconds: float | None = None) -> None:
        self.database = Database(create_async_engine("postgresql+asyncpg://u@localhost/d"), TABLES)
        self.database.deadline = seconds
        self.database._lane(Appends)._seats = 0  # whoever comes has to wait
        append = Append(Key("", "chat", 1), None, Operation("op", "append"), ["1"])
        self.attempt = Attempt(self.database.loop.time(), append, Appends, writes=writes)
        self._sent = sent
        self.flying: asyncio.Task[Any] = asyncio.create_task(asyncio.Event().wait())
        self.under_way.append(self.flying)
        self.task = asyncio.create_task(self.wait())

    def wait(self) -> Any:
        return self.database._at_once(self.attempt)

    async def begin(self) -> None:
        """It waits, and is sent if it is to be."""
        await turn()
        assert self.attempt.waits
        if self._sent:
            flight = Flight(Seat(0, ()), [self.attempt])
            flight.task = self.flying
            self.attempt.sent = True

    @property
    def is_left(self) -> bool:
        """Whether what it was sent with is ended for want of anybody who waits."""
        return self.flying.cancelling() > 0


async def call(**how: Any) -> Call:
    made = Call(**how)
    await made.begin()
    return made


@pytest.fixture(autouse=True)
async def flights(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Whatever is under way is ended."""
    under_way: list[asyncio.Task[Any]] = []
    monkeypatch.setattr(Call, "under_way", under_way, raising=False)
    yield
    for flight in under_way:
        flight.cancel()
    await asyncio.gather(*under_way, return_exceptions=True)


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_before_it_is_sent_it_is_cancelled_at_once() -> None:
    waiting = await call(sent=False)
    waiting.task.cancel("enough")
    await turn()
    with pytest.raises(asyncio.CancelledError, match="enough"):
        waiting.task.result()
    assert not waiting.attempt.waits


async def test_a_reading_is_cancelled_at_once() -> None:
    reading = await call(sent=True, writes=False)
    reading.task.cancel()
    await turn()
    assert reading.task.cancelled()
    assert reading.is_left


@pytest.mark.parametrize(
    "end",
    [
        lambda attempt: attempt.give("done"),
        lambda attempt: attempt.fail(UsageError("no")),
        lambda attempt: attempt.flight.land(ConnectionAbortedError()),
    ],
)
async def test_a_sent_write_is_waited_for_and_then_its_caller_is_cancelled(
    end: Callable[[Any], None],
) -> None:
    writing = await call(sent=True)
    for word in ("first", "again", "and again"):
        writing.task.cancel(word)
        await turn()
        assert not writing.task.done()
    end(writing.attempt)
    with pytest.raises(asyncio.CancelledError, match="first"):
        await writing.task
    assert not writing.is_left


@pytest.mark.parametrize("first", ["cancelled", "told"])
async def test_a_cancellation_in_the_turn_in_which_it_comes_to_its_end(first: str) -> None:
    """Nothing tells of the outcome any more: it is not waited for."""
    writing = await call(sent=True)
    flight = writing.attempt.flight
    assert flight is not None
    if first == "cancelled":
        writing.task.cancel()
    writing.attempt.give("done")
    if first == "told":
        writing.task.cancel()
    asyncio.get_running_loop().call_soon(flight.land, RuntimeError("no outcome"))
    await turn()
    await turn()
    assert writing.task.cancelled()


async def test_but_not_for_longer_than_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CANCELLED_SECONDS", 0.01)
    writing = await call(sent=True)
    writing.task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await writing.task
    assert writing.is_left


@SENT
async def test_at_its_deadline_it_has_failed(sent: bool) -> None:
    late = await call(sent=sent, seconds=0.01)
    with pytest.raises(OperationalError) as raised:
        await late.task
    assert isinstance(raised.value.orig, TimeoutError)
    assert late.is_left is sent


@SENT
async def test_a_caller_who_is_cancelled_is_cancelled_whatever_the_deadline(sent: bool) -> None:
    late = await call(sent=sent, seconds=0.01)
    late.task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await late.task
    assert late.is_left is sent


async def test_a_deadline_that_has_passed_ends_nothing_that_is_done() -> None:
    done = await call(sent=True)
    done.attempt.give("done")
    done.attempt.expire()
    assert await done.task == "done"
    assert not done.is_left


@SENT
async def test_a_timeout_of_the_callers_own(sent: bool) -> None:
    """It waits for the outcome of what was sent, and is a TimeoutError all the same."""
    timed = Call(sent=sent)
    timed.task.cancel()  # another one waits
    loop = asyncio.get_running_loop()
    began = loop.create_task(timed.begin())
    loop.call_later(0.03, timed.attempt.give, "done")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await timed.wait()
    assert began.done()
    assert timed.is_left is False
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@SENT
async def test_a_caller_that_is_closed_leaves(sent: bool) -> None:
    """As a task's coroutine is that is collected; be it that it was cancelled before."""
    for cancelled in (False, True):
        gone = Call(sent=sent)
        gone.task.cancel()
        await turn()
        caller = gone.wait()
        caller.send(None)
        await gone.begin()
        if cancelled and sent:
            assert gone.attempt.answer is not None
            gone.attempt.answer.cancel()
            caller.throw(asyncio.CancelledError())
        caller.close()
        assert not gone.attempt.waits
        assert gone.is_left is sent


async def test_nothing_is_kept_of_it() -> None:
    known = await call(sent=True, seconds=60)
    deadlines = known.database._deadlines
    assert deadlines is not None
    assert list(deadlines._ends) == [known.attempt]
    known.attempt.give("done")
    assert await known.task == "done"
    assert not deadlines._ends
    assert known.attempt.answer is None
