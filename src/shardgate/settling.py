"""Cancellation of an operation that has been sent: wait for its outcome, then be cancelled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


async def settle(operation: Coroutine[Any, Any, T], *, grace: float | None = None) -> T:
    """Run ``operation`` to its end even if the caller is cancelled, and only then be cancelled.

    A write that was cut short half-way would leave its outcome unknown. ``grace`` is how many
    seconds a cancelled caller waits at most (None: however long it takes); after that the
    operation is cancelled too.
    """
    task = asyncio.ensure_future(operation)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task}, timeout=None if cancellation is None else grace)
        except asyncio.CancelledError as error:
            cancellation = cancellation or error
            continue
        if not task.done():
            task.cancel()
            grace = None
    if cancellation is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # retrieved, so that it is not reported as forgotten
    raise cancellation
