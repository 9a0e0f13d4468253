"""Cancelling an operation that has been sent: it runs to its end, and only then is it cancelled."""

from __future__ import annotations

import asyncio
import gc

import pytest

from shardgate.settling import settle


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


async def test_the_result_and_the_error_pass_through() -> None:
    operation = Operation()
    operation.go.set()
    assert await settle(operation.run()) == "result"
    failing = Operation(ValueError("its own"))
    failing.go.set()
    with pytest.raises(ValueError, match="its own"):
        await settle(failing.run())


@pytest.mark.parametrize("grace", [None, 60.0])
async def test_a_cancelled_caller_waits_for_the_end(grace: float | None) -> None:
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


async def test_the_error_of_a_cancelled_operation_is_not_forgotten_noisily() -> None:
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


async def test_grace_ends() -> None:
    operation = Operation()
    caller = asyncio.ensure_future(settle(operation.run(), grace=0.01))
    await operation.started.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert operation.ended == "cancelled"


async def test_grace_counts_from_the_cancellation() -> None:
    operation = Operation()
    caller = asyncio.ensure_future(settle(operation.run(), grace=0.0))
    await operation.started.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not caller.done()
    operation.go.set()
    assert await caller == "result"


async def test_an_operation_that_resists_is_waited_for() -> None:
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


async def test_a_timeout_around_it_is_a_timeout() -> None:
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
