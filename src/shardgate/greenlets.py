"""Running SQLAlchemy's synchronous code, which may have to wait for the event loop.

SQLAlchemy makes a greenlet for each such call (``greenlet_spawn``), so that the call can be left
while it waits. A connection is hardly ever waited for, and to make a greenlet costs several times
what it costs to take a connection out of its pool. So greenlets are kept here: a call that has
come to its end leaves its own for the next one.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast

from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

T = TypeVar("T")


class Clerk(greenlet):  # type: ignore[misc]  # greenlet has no types
    """A greenlet that makes one call after the other.

    It is switched to with a call, and switches back with itself once that is done. Before that, it
    may switch back with something to be awaited, and wants the outcome of it.
    """

    __sqlalchemy_greenlet_provider__ = True  # by this SQLAlchemy knows where it may wait

    answer: Any = None
    error: BaseException | None = None

    def run(self, call: Callable[[], Any]) -> None:
        """Make calls for as long as there is somebody to make them for."""
        while True:
            try:
                self.answer = call()
            except BaseException as error:  # noqa: BLE001 - it is raised where the call is wanted
                self.error = error
            del call  # it would keep a connection from being collected
            call = self.parent.switch(self)

    def hand_over(self) -> Any:
        """What has become of the call; nothing of it is kept."""
        answer, error = self.answer, self.error
        self.answer = self.error = self.gr_context = None
        if error is None:
            return answer
        try:
            raise error
        finally:
            del error  # its traceback leads here


class _Idle(threading.local):
    """Those of a thread that have nothing to do: a greenlet belongs to its thread."""

    def __init__(self) -> None:
        self.clerks: list[Clerk] = []


_idle = _Idle()


async def run(call: Callable[[], T]) -> T:
    """As SQLAlchemy's ``greenlet_spawn``: make a call that may wait for the event loop."""
    clerk, said = _begin(call)
    if said is not clerk:
        await _go_on(clerk, said)
    _idle.clerks.append(clerk)
    return cast("T", clerk.hand_over())


def soon(call: Callable[[], None], loop: asyncio.AbstractEventLoop) -> asyncio.Task[None] | None:
    """Make a call of which nobody waits for the end: what it waits for, a task of its own does.

    The task has to be referred to, or it may be collected. What the call raises is reported to the
    event loop.
    """
    clerk, said = _begin(call)
    if said is not clerk:
        return loop.create_task(_finish(clerk, said))
    _idle.clerks.append(clerk)
    try:
        clerk.hand_over()
    except Exception as error:  # noqa: BLE001 - there is nobody else to tell
        loop.call_exception_handler({"message": f"{call} has failed", "exception": error})
    return None


def _begin(call: Callable[[], Any]) -> tuple[Clerk, Any]:
    """Make a call as far as it goes without waiting: by whom, and what he says."""
    caller, idle = getcurrent(), _idle.clerks
    clerk = idle.pop() if idle else Clerk()
    clerk.parent, clerk.gr_context = caller, caller.gr_context
    return clerk, clerk.switch(call)


async def _go_on(clerk: Clerk, said: Any) -> None:
    """Wait for what is to be waited for, until the call is done."""
    while said is not clerk:
        try:
            outcome = await said
        except BaseException:  # noqa: BLE001 - it is raised where the call waits
            said = clerk.throw(*sys.exc_info())
        else:
            said = clerk.switch(outcome)


async def _finish(clerk: Clerk, said: Any) -> None:
    await _go_on(clerk, said)
    _idle.clerks.append(clerk)
    clerk.hand_over()
