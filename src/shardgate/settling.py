"""Waiting for outcomes: of an operation that was sent, although its caller is cancelled, and of
several operations, although one of them has failed."""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable

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


class Expires(Protocol):
    """What a deadline is for."""

    def expire(self) -> None:
        """Its time is up."""


class Deadlines:
    """Ends what has been under way for too long; all have the same time for it.

    So whoever began first is late first, and one timer does for all: a timer for each would cost
    more than most of what is timed.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._ends: dict[Expires, float] = {}  # in their order
        self._timer: asyncio.TimerHandle | None = None

    def add(self, one: Expires, began: float) -> None:
        """See to one that began then, by the event loop's clock."""
        end = self._ends[one] = began + self.seconds
        if self._timer is None:
            self._look_at(end)

    def remove(self, one: Expires) -> None:
        """It has come to its end."""
        self._ends.pop(one, None)

    def _look_at(self, end: float) -> None:
        # In a context of its own: it would keep the request's that happens to start it.
        self._timer = self._loop.call_at(end, self._look, end, context=Context())

    def _look(self, now: float) -> None:
        """End those whose time was up when this was due, and not whose has come since: the event
        loop may have been held up, and the answers may be there, unread."""
        self._timer, late = None, []
        for one, end in self._ends.items():
            if end > now:
                self._look_at(end)
                break
            late.append(one)
        for one in late:
            self.remove(one)
            one.expire()


class Held(Protocol):
    """What knows how far an operation has come."""

    def has_to_end(self) -> bool:
        """Whether to cancel it now would leave its outcome unknown."""


class Underway(Generic[T]):
    """As :func:`settle`, of an operation that runs in its caller's own task: to be awaited, once.

    A task for each operation costs several rounds of the event ``loop``. Here the caller's task
    runs the operation itself, and waits, as far as it knows, for this object: so it is this object
    that is asked when the task is cancelled, and it cancels what the operation waits for, or does
    not.

    ``held`` says whether a cancellation has to wait for the operation's end now, ``grace`` how many
    seconds at most. Where ``deadlines`` say so, by when it ``began``, the operation is
    cancelled, and TimeoutError raised. While it has to end, the operation must not wait for
    anything that cancels the task that it runs in, as ``asyncio.timeout`` does.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_began",
        "_deadlines",
        "_ends",
        "_grace",
        "_grace_timer",
        "_held",
        "_late",
        "_left",
        "_loop",
        "_message",
        "_operation",
        "_waits_for",
    )

    def __init__(
        self,
        operation: Coroutine[Any, Any, T],
        held: Held,
        loop: asyncio.AbstractEventLoop,
        *,
        grace: float,
        deadlines: Deadlines | None = None,
        began: float = 0,
    ) -> None:
        self._operation = operation
        self._held = held
        self._grace = grace
        self._deadlines = deadlines
        self._began = began
        self._loop = loop
        self._grace_timer: asyncio.TimerHandle | None = None
        self._waits_for: Any = None
        self._asyncio_future_blocking = False
        self._message: object = None
        self._left = self._late = self._ends = False

    def __await__(self) -> Generator[Any, None, T]:
        task = asyncio.current_task(self._loop)
        cancelling = 0 if task is None else task.cancelling()
        if self._deadlines is not None:
            self._deadlines.add(self, self._began)
        operation = self._operation
        error: BaseException | None = None
        try:
            while True:  # run the operation as its task does, between whom this stands
                try:
                    future = operation.send(None) if error is None else operation.throw(error)
                except StopIteration as end:
                    answer: T = end.value
                    break
                self._waits_for, error = future, None
                if future is not None:
                    future._asyncio_future_blocking = False
                    self._asyncio_future_blocking = True
                    if self._ends:
                        self._end()
                try:
                    yield None if future is None else self
                except asyncio.CancelledError as cancellation:
                    # The future's own; or the task's, cancelled when the future was done.
                    own = future is not None and future.cancelled()
                    error = cancellation if own or not self._leave() else None
                except Exception as its_own:  # noqa: BLE001 - raised where the operation waits
                    error = its_own
        except asyncio.CancelledError as cancelled:
            alone = task is None or task.cancelling() <= cancelling
            if self._late and alone and not self._left:
                raise TimeoutError from cancelled
            raise
        except Exception:
            if self._left:
                raise self._cancelled() from None
            raise
        finally:
            if self._deadlines is not None:
                self._deadlines.remove(self)
            if self._grace_timer is not None:
                self._grace_timer.cancel()
            operation.close()
            error = None  # its traceback leads here
        if self._left:
            raise self._cancelled()
        return answer

    def _cancelled(self) -> asyncio.CancelledError:
        return asyncio.CancelledError(*([] if self._message is None else [self._message]))

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Of whom the task has to be, as of a future."""
        return self._loop

    def add_done_callback(self, wake: Callable[[Any], None], *, context: Context) -> None:
        """The task is to be woken when there is something to do, as by a future."""
        self._waits_for.add_done_callback(wake, context=context)

    def cancel(self, msg: object = None) -> bool:
        """The task is cancelled, and asks what it waits for, as it asks a future."""
        if self._waits_for.done():
            return False
        if not self._leave():
            return bool(self._waits_for.cancel(msg=msg))
        self._message = self._message or msg
        return True

    def _leave(self) -> bool:
        """Whether the operation goes on although its caller is cancelled."""
        if not self._left and self._held.has_to_end():
            self._left = True
            self._grace_timer = self._loop.call_later(self._grace, self._end)
        return self._left

    def expire(self) -> None:
        """Its time is up."""
        self._late = True
        self._end()

    def _end(self) -> None:
        """Cancel the operation: what it waits for, or what it is going to wait for next."""
        future = self._waits_for
        self._ends = future is None or not future.cancel()


async def together(operations: Iterable[Awaitable[T]]) -> list[T]:
    """Run all at the same time and wait for all, then raise the first error if there is one.

    Nothing goes on behind the caller's back, as it does after ``asyncio.gather`` has raised.
    """
    outcomes = await asyncio.gather(*operations, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast("list[T]", outcomes)
