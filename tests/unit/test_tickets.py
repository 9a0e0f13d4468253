"""An operation that is sent with others, as its caller sees it: what cancellations and deadlines do
before it is sent and after."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from shardgate import shards
from shardgate.errors import UsageError
from shardgate.settling import Deadlines
from shardgate.shards import Attempt, Database

if TYPE_CHECKING:
    from collections.abc import Callable

SENT = pytest.mark.parametrize("sent", [False, True])


class Call:
    """A caller of one operation, for which a ticket waits."""

    def __init__(
        self, *, sent: bool, writes: bool = True, holds: bool = True, seconds: float | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        attempt = Attempt(loop.time(), writes=writes)
        attempt.sent = sent
        self.deadlines = None if seconds is None else Deadlines(seconds)
        database = cast("Database", SimpleNamespace(loop=loop))
        self.ticket = shards._Ticket(attempt, database, self.deadlines, holds=holds)
        self.left = 0
        self.ticket.leave = self._leave  # type: ignore[method-assign]
        self.task = asyncio.create_task(self._wait())

    def _leave(self) -> None:
        self.left += 1

    async def _wait(self) -> Any:
        """As ``Database._at_once`` waits."""
        try:
            return await self.ticket
        finally:
            cancelled = self.ticket.end()
            if cancelled is not None:
                raise asyncio.CancelledError(*cancelled)


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_before_it_is_sent_it_is_cancelled_at_once() -> None:
    call = Call(sent=False)
    await turn()
    call.task.cancel("enough")
    await turn()
    with pytest.raises(asyncio.CancelledError, match="enough"):
        call.task.result()
    assert call.left == 1


async def test_a_reading_is_cancelled_at_once() -> None:
    call = Call(sent=True, writes=False)
    await turn()
    call.task.cancel()
    await turn()
    assert call.task.cancelled()
    assert call.left == 1


async def test_who_waits_in_a_task_of_its_own_is_not_held() -> None:
    """There it is ``settle`` that sees to it."""
    call = Call(sent=True, holds=False)
    await turn()
    call.task.cancel()
    await turn()
    assert call.task.cancelled()


@pytest.mark.parametrize("end", [lambda t: t.give("done"), lambda t: t.fail(UsageError("no"))])
async def test_a_sent_write_is_waited_for_and_then_its_caller_is_cancelled(
    end: Callable[[Any], None],
) -> None:
    call = Call(sent=True)
    await turn()
    for word in ("first", "again", "and again"):
        call.task.cancel(word)
        await turn()
        assert not call.task.done()
    end(call.ticket)
    with pytest.raises(asyncio.CancelledError, match="first"):
        await call.task
    assert call.left == 0


async def test_but_not_for_longer_than_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CANCELLED_SECONDS", 0.01)
    call = Call(sent=True)
    await turn()
    call.task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await call.task
    assert call.left == 1


async def test_the_grace_ends_with_the_operation() -> None:
    call = Call(sent=True)
    await turn()
    call.task.cancel()
    await turn()
    timer = call.ticket._grace_timer
    assert timer is not None
    call.ticket.give("done")
    await asyncio.wait([call.task])
    assert timer.cancelled()


@SENT
async def test_at_its_deadline_it_has_failed(sent: bool) -> None:
    call = Call(sent=sent, seconds=0.01)
    with pytest.raises(TimeoutError):
        await call.task
    assert call.left == 1


@SENT
async def test_a_caller_who_is_cancelled_is_cancelled_whatever_the_deadline(sent: bool) -> None:
    call = Call(sent=sent, seconds=0.01)
    await turn()
    call.task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await call.task
    assert call.left == 1


async def test_a_deadline_that_has_passed_ends_nothing_that_is_done() -> None:
    call = Call(sent=True)
    await turn()
    call.ticket.give("done")
    call.ticket.expire()
    assert await call.task == "done"
    assert call.left == 0


@SENT
async def test_a_timeout_of_the_callers_own(sent: bool) -> None:
    """It waits for the outcome of what was sent, and is a TimeoutError all the same."""
    call = Call(sent=sent)
    asyncio.get_running_loop().call_later(0.03, call.ticket.give, "done")

    async def wait() -> None:
        async with asyncio.timeout(0.01):
            await call._wait()

    call.task.cancel()  # another one waits
    with pytest.raises(TimeoutError):
        await wait()
    assert call.ticket.cancelled() is not sent
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_nothing_is_kept_of_it() -> None:
    call = Call(sent=True, seconds=60)
    await turn()
    assert call.deadlines is not None
    assert list(call.deadlines._ends) == [call.ticket]
    call.ticket.give("done")
    assert await call.task == "done"
    assert not call.deadlines._ends
