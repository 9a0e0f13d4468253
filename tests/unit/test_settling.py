"""Cancelling an operation that has been sent: it runs to its end, and only then is it cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import socket
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from shardgate.settling import Deadlines, Underway, settle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    Settle = Callable[..., Awaitable[Any]]

FOREVER = 1e6


async def in_place(operation: Coroutine[Any, Any, Any], *, grace: float | None = None) -> Any:
    """As settle, without a task."""
    grace = FOREVER if grace is None else grace
    loop = asyncio.get_running_loop()
    return await Underway(operation, Held(sent=True), loop, grace=grace)


@pytest.fixture(params=[settle, in_place], ids=["in a task", "in place"], name="settle")
def either(request: pytest.FixtureRequest) -> Settle:
    """Both ways to wait for an operation's end."""
    way: Settle = request.param
    return way


class Operation:
    """Goes on when told to, and tells how it ended."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go = asyncio.Event()
        self.started = asyncio.Event()
        self.ended: str | None = None
        self.error = error

    async def run(self) -> str:
        self.started.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        self.ended = "done"
        if self.error is not None:
            raise self.error
        return "result"


async def test_the_result_and_the_error_pass_through(settle: Settle) -> None:
    operation = Operation()
    operation.go.set()
    assert await settle(operation.run()) == "result"
    failing = Operation(ValueError("its own"))
    failing.go.set()
    with pytest.raises(ValueError, match="its own"):
        await settle(failing.run())


@pytest.mark.parametrize("grace", [None, 60.0])
async def test_a_cancelled_caller_waits_for_the_end(settle: Settle, grace: float | None) -> None:
    operation = Operation()
    caller = asyncio.ensure_future(settle(operation.run(), grace=grace))
    await operation.started.wait()
    for _ in range(5):
        caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
    operation.go.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert operation.ended == "done"


async def test_the_error_of_a_cancelled_operation_is_not_forgotten_noisily(settle: Settle) -> None:
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    operation = Operation(ValueError("nobody asks"))
    caller = asyncio.ensure_future(settle(operation.run()))
    await operation.started.wait()
    caller.cancel()
    operation.go.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    del caller
    gc.collect()
    assert told == []


async def test_grace_ends(settle: Settle) -> None:
    operation = Operation()
    caller = asyncio.ensure_future(settle(operation.run(), grace=0.01))
    await operation.started.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert operation.ended == "cancelled"


async def test_grace_counts_from_the_cancellation(settle: Settle) -> None:
    operation = Operation()
    caller = asyncio.ensure_future(settle(operation.run(), grace=0.0))
    await operation.started.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not caller.done()
    operation.go.set()
    assert await caller == "result"


async def test_an_operation_that_resists_is_waited_for(settle: Settle) -> None:
    """What has been told to end and cleans up is not left running behind the caller's back."""
    cleaned = asyncio.Event()

    async def resist() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            cleaned.set()

    caller = asyncio.ensure_future(settle(resist(), grace=0.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert cleaned.is_set()


async def test_a_timeout_around_it_is_a_timeout(settle: Settle) -> None:
    operation = Operation()

    async def let_go() -> None:
        await asyncio.sleep(0.05)
        operation.go.set()

    later = asyncio.ensure_future(let_go())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await settle(operation.run())
    assert operation.ended == "done"
    await later


class Held:
    """An operation in place, of which a cancellation waits for the end once it is ``sent``."""

    def __init__(self, *, sent: bool = False, deadlines: Deadlines | None = None) -> None:
        self.sent = sent
        self._deadlines = deadlines

    def has_to_end(self) -> bool:
        return self.sent

    async def run(self, operation: Coroutine[Any, Any, Any], *, grace: float = FOREVER) -> Any:
        loop = asyncio.get_running_loop()
        return await Underway(
            operation, self, loop, grace=grace, deadlines=self._deadlines, began=loop.time()
        )


async def test_before_it_is_sent_it_is_cancelled_at_once() -> None:
    operation = Operation()
    caller = asyncio.ensure_future(Held().run(operation.run()))
    await operation.started.wait()
    caller.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await caller
    assert operation.ended == "cancelled"


async def test_before_it_is_sent_it_may_have_timeouts_of_its_own() -> None:
    held = Held()

    async def run() -> str:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await asyncio.Event().wait()
        held.sent = True
        await asyncio.sleep(0.001)
        return "result"

    assert await held.run(run()) == "result"
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize("sent", [False, True])
async def test_at_its_deadline_it_is_cancelled(sent: bool) -> None:
    operation, held = Operation(), Held(deadlines=Deadlines(0.01))
    held.sent = sent
    with pytest.raises(TimeoutError):
        await held.run(operation.run())
    assert operation.ended == "cancelled"


@pytest.mark.parametrize("sent", [False, True])
async def test_a_caller_who_is_cancelled_is_cancelled_whatever_the_deadline(sent: bool) -> None:
    operation, held = Operation(), Held(deadlines=Deadlines(0.01))
    held.sent = sent
    caller = asyncio.ensure_future(held.run(operation.run()))
    await operation.started.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert operation.ended == "cancelled"


async def test_a_deadline_that_has_passed_ends_nothing_that_is_done() -> None:
    async def run() -> str:
        return "result"

    assert await Held(deadlines=Deadlines(-1)).run(run()) == "result"


@pytest.mark.parametrize("sent", [False, True])
async def test_a_cancellation_when_what_it_waited_for_has_come(sent: bool) -> None:
    """The task has not been woken yet: the operation is not cut short for that, if it was sent."""
    future, held, done = asyncio.get_running_loop().create_future(), Held(), []
    held.sent = sent

    async def run() -> None:
        await future
        done.append("first")
        await asyncio.sleep(0)
        done.append("second")

    caller = asyncio.ensure_future(held.run(run()))
    await asyncio.sleep(0)
    future.set_result(None)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done == (["first", "second"] if sent else [])


@pytest.mark.parametrize("sent", [False, True])
async def test_a_cancellation_between_two_turns_of_the_loop(sent: bool) -> None:
    held, turns = Held(), []
    held.sent = sent

    async def run() -> None:
        for turn in range(5):
            await asyncio.sleep(0)
            turns.append(turn)

    caller = asyncio.ensure_future(held.run(run()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert len(turns) == (5 if sent else 0)


async def test_what_it_waits_for_may_be_cancelled_by_others() -> None:
    future, held = asyncio.get_running_loop().create_future(), Held()
    held.sent = True

    async def run() -> str:
        with pytest.raises(asyncio.CancelledError):
            await future
        return "result"

    caller = asyncio.ensure_future(held.run(run()))
    await asyncio.sleep(0)
    future.cancel()
    assert await caller == "result"


async def test_errors_of_what_it_waits_for_are_raised_in_it() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("inner")

    async def run() -> str:
        with pytest.raises(KeyError, match="inner"):
            await asyncio.create_task(fail())
        return "result"

    assert await Held().run(run()) == "result"


async def test_a_caller_that_is_closed_closes_it() -> None:
    ended = []

    async def run() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("closed")

    caller = Held(deadlines=Deadlines(FOREVER)).run(run())
    caller.send(None)
    caller.close()
    assert ended == ["closed"]


async def test_one_timer_ends_everybody_at_their_own_time() -> None:
    loop, ended = asyncio.get_running_loop(), []
    deadlines = Deadlines(0.03)

    async def wait(name: str) -> None:
        with pytest.raises(TimeoutError):
            await Held(sent=True, deadlines=deadlines).run(asyncio.Event().wait())
        ended.append((name, loop.time()))

    began, waiting = [], []
    for name in "abc":
        began.append(loop.time())
        waiting.append(asyncio.create_task(wait(name)))
        await asyncio.sleep(0.01)
    await asyncio.gather(*waiting)
    assert [name for name, _ in ended] == ["a", "b", "c"]
    assert all(at >= start + 0.03 for (_, at), start in zip(ended, began, strict=True))
    assert not deadlines._ends


async def test_what_has_ended_is_not_kept_for_its_deadline() -> None:
    deadlines = Deadlines(FOREVER)
    for _ in range(3):
        operation = Operation()
        operation.go.set()
        await Held(sent=True, deadlines=deadlines).run(operation.run())
    assert not deadlines._ends


async def test_an_answer_that_has_come_while_the_event_loop_was_held_up_counts() -> None:
    loop = asyncio.get_running_loop()
    deadlines, (ours, theirs) = Deadlines(0.05), socket.socketpair()
    ours.setblocking(False)
    held = Held(deadlines=deadlines)

    def hold_up() -> None:
        theirs.send(b"answer")
        time.sleep(0.1)

    with ours, theirs:
        set_for = loop.time() + 0.05
        await held.run(asyncio.sleep(0))  # for this one the timer is set
        await asyncio.sleep(0.03)
        answer = asyncio.create_task(held.run(loop.sock_recv(ours, 9)))
        await asyncio.sleep(0.01)
        loop.call_at(set_for - 0.001, hold_up)
        time.sleep(0.02)  # noqa: ASYNC251 - so that both come due in one turn
        assert await answer == b"answer"


async def test_a_deadline_keeps_nothing_of_the_request_that_set_it() -> None:
    said: contextvars.ContextVar[Any] = contextvars.ContextVar("said")
    deadlines = Deadlines(FOREVER)

    async def ask() -> weakref.ref[Operation]:
        value = Operation()
        said.set(value)
        await Held(deadlines=deadlines).run(asyncio.sleep(0))
        return weakref.ref(value)

    kept = await asyncio.create_task(ask())
    await asyncio.sleep(0)
    gc.collect()
    assert kept() is None
