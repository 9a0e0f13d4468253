"""Synchronous calls that may wait: as SQLAlchemy's own way to make them, but greenlets are kept."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
from sqlalchemy.util import await_only

from shardgate import greenlets

WHOSE: ContextVar[str] = ContextVar("WHOSE", default="nobody's")


def idle() -> int:
    return len(greenlets._idle.clerks)


class Thing:
    """Something that can be found again, or not."""


async def test_one_greenlet_makes_all_calls_that_do_not_wait() -> None:
    await greenlets.run(Thing)
    before = list(greenlets._idle.clerks)
    for number in range(100):
        assert await greenlets.run(partial(int, number)) == number
    assert greenlets._idle.clerks == before


async def test_calls_that_wait_do_so_side_by_side() -> None:
    gate, arrived = asyncio.Event(), []

    def call(number: int) -> int:
        arrived.append(number)
        await_only(gate.wait())
        return number

    calls = [asyncio.create_task(greenlets.run(partial(call, n))) for n in range(5)]
    await asyncio.sleep(0)
    assert arrived == list(range(5))
    gate.set()
    assert await asyncio.gather(*calls) == list(range(5))
    assert idle() >= 5


@pytest.mark.parametrize("waits", [False, True])
async def test_errors_are_the_calls_own_and_leave_the_greenlet_usable(waits: bool) -> None:
    async def fail() -> None:
        raise LookupError("inner")

    def call() -> None:
        if waits:
            await_only(fail())
        raise LookupError("outer")

    await greenlets.run(Thing)
    before = idle()
    for _ in range(3):
        with pytest.raises(LookupError, match="inner" if waits else "outer"):
            await greenlets.run(call)
    assert idle() == before


async def test_a_cancellation_is_raised_where_the_call_waits() -> None:
    seen = []

    def call() -> None:
        try:
            await_only(asyncio.get_running_loop().create_future())
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    caller = asyncio.create_task(greenlets.run(call))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert seen == ["cancelled"]


async def test_nothing_of_a_call_is_kept() -> None:
    gc.disable()
    try:
        thing = Thing()
        kept = weakref.ref(thing)
        assert await greenlets.run(partial(_same, thing)) is thing
        with pytest.raises(LookupError):
            await greenlets.run(partial(_fail, thing))
        del thing
        assert kept() is None
    finally:
        gc.enable()


def _same(thing: Thing) -> Thing:
    return thing


def _fail(_thing: Thing) -> Any:
    raise LookupError


async def test_a_call_has_its_callers_context() -> None:
    async def caller(name: str) -> str:
        WHOSE.set(name)
        return await greenlets.run(WHOSE.get)

    names = ["a", "b", "c"]
    assert await asyncio.gather(*map(caller, names)) == names
    assert await greenlets.run(WHOSE.get) == "nobody's"


@pytest.mark.parametrize("waits", [False, True])
async def test_a_call_of_which_nobody_waits_for_the_end(waits: bool) -> None:
    done = []

    def call() -> None:
        if waits:
            await_only(asyncio.sleep(0.001))
        done.append("done")

    await greenlets.run(Thing)
    before = idle()
    task = greenlets.soon(call, asyncio.get_running_loop())
    assert done == ([] if waits else ["done"])
    if task is not None:
        await task
    assert done == ["done"]
    assert idle() == before


@pytest.mark.parametrize("waits", [False, True])
async def test_what_it_raises_is_reported(waits: bool) -> None:
    told: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))

    def call() -> None:
        if waits:
            await_only(asyncio.sleep(0))
        raise LookupError("nobody waits")

    task = greenlets.soon(call, loop)
    if task is not None:
        await asyncio.wait([task])
        del task
    gc.collect()
    loop.set_exception_handler(None)
    assert [str(error) for error in told] == ["nobody waits"]
