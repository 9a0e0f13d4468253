"""Waiting for outcomes: of an operation that was sent, although its caller is cancelled, and of
several operations, although one of them has failed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

T = TypeVar("T")


async def settle(
    operation: Coroutine[Any, Any, T],
    *,
    grace: float | None = None,
    begun: Callable[[], bool] = lambda: True,
) -> T:
    """Run ``operation`` to its end even if the caller is cancelled, and only then be cancelled.

    A write that was cut short half-way would leave its outcome unknown. ``begun`` says whether it
    has come that far: before, it is cancelled at once. ``grace`` is how many seconds a cancelled
    caller waits at most (None: however long it takes), however often he is cancelled meanwhile;
    after that the operation is cancelled too.
    """
    task = asyncio.ensure_future(operation)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            if cancellation is None:
                _end_later(task, grace if begun() else 0)
            cancellation = cancellation or error
    if cancellation is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # retrieved, so that it is not reported as forgotten
    raise cancellation


def _end_later(task: asyncio.Task[Any], seconds: float | None) -> None:
    if seconds is None:
        return
    timer = asyncio.get_running_loop().call_later(seconds, task.cancel)
    task.add_done_callback(lambda _: timer.cancel())


async def together(operations: Iterable[Awaitable[T]]) -> list[T]:
    """Run all at the same time and wait for all, then raise the first error if there is one.

    Nothing goes on behind the caller's back, as it does after ``asyncio.gather`` has raised.
    """
    outcomes = await asyncio.gather(*operations, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast("list[T]", outcomes)
