"""What was asked of a session and what it answered, and what that demands of its end state.

Every item has an id of its own. All operations of a history run on one event loop, so that one
counter tells which had ended before another began.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from shardgate import OutcomeUnknown, ShardgateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Sequence

NEVER = 2**62
"""The end of an operation that nobody has heard of: it may still take effect."""


class End(Enum):
    """How an operation ended for its caller."""

    ACKNOWLEDGED = "acknowledged"
    UNKNOWN = "unknown"
    """It may have taken effect: OutcomeUnknown."""
    CANCELLED = "cancelled"
    """It may have taken effect: its caller was cancelled."""
    FAILED = "failed"
    """It has not: any other error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One operation: ``ids`` are those that an append sent, or that a pop returned (0 or 1)."""

    kind: Literal["append", "pop", "clear"]
    end: End
    began: int
    ended: int
    ids: tuple[str, ...] = ()
    writer: str = ""
    error: str = ""

    @property
    def open(self) -> bool:
        """Whether nobody knows if it took effect."""
        return self.end in (End.UNKNOWN, End.CANCELLED)

    @property
    def over(self) -> int:
        """When it had taken effect at the latest."""
        return NEVER if self.open else self.ended


class History:
    """Runs operations on sessions and keeps what they did."""

    def __init__(self) -> None:
        self.operations: list[Done] = []
        self._clock = count()
        self._ids = count()

    async def append(self, session: Any, writer: str, size: int = 1) -> End:
        """Append ``size`` items. CancelledError is raised on, other errors are only noted."""
        ids = tuple(f"{writer}.{next(self._ids):06}" for _ in range(size))
        call = session.add_items([{"id": id_} for id_ in ids])
        return await self._note("append", call, ids=ids, writer=writer)

    async def pop(self, session: Any) -> End:
        return await self._note("pop", session.pop_item())

    async def clear(self, session: Any) -> End:
        return await self._note("clear", session.clear_session())

    async def _note(
        self,
        kind: Literal["append", "pop", "clear"],
        call: Awaitable[Any],
        *,
        ids: tuple[str, ...] = (),
        writer: str = "",
    ) -> End:
        began, end, error = next(self._clock), End.CANCELLED, ""
        try:
            answer = await call
            end = End.ACKNOWLEDGED
            if kind == "pop" and answer is not None:
                ids = (answer["id"],)
        except OutcomeUnknown as problem:
            end, error = End.UNKNOWN, repr(problem)
        except asyncio.CancelledError:
            raise
        except ShardgateError as problem:
            end, error = End.FAILED, repr(problem)
        finally:
            done = Done(
                kind=kind,
                end=end,
                began=began,
                ended=next(self._clock),
                ids=ids,
                writer=writer,
                error=error,
            )
            self.operations.append(done)
        return end

    def errors(self) -> list[str]:
        """What was raised, cancellations aside."""
        return [done.error for done in self.operations if done.error]

    def problems(self, items: Iterable[Any]) -> list[str]:
        """What is wrong with a session that holds ``items`` after all this."""
        return problems(self.operations, [item["id"] for item in items])


def problems(operations: Sequence[Done], state: Sequence[str]) -> list[str]:
    """What the end ``state`` of a session (the ids, oldest first) shows to have gone wrong.

    Every acknowledged append took effect once and in order, unless it was popped or cleared; every
    open one at most once; a failed one not at all; no item was popped twice, or came from nowhere.
    """
    sent = {id_: done for done in operations if done.kind == "append" for id_ in done.ids}
    popped = [id_ for done in operations if done.kind == "pop" for id_ in done.ids]
    return [
        *_strangers(sent, [*state, *popped]),
        *_twice(state, popped),
        *_ghosts(operations, sent, state),
        *_losses(operations, sent, state, popped),
        *_disorder(sent, state),
    ]


def _strangers(sent: dict[str, Done], met: Iterable[str]) -> list[str]:
    unknown = [f"{id_} was never sent" for id_ in met if id_ not in sent]
    failed = [
        f"{id_} is there, and its append failed"
        for id_ in met
        if id_ in sent and sent[id_].end is End.FAILED
    ]
    return unknown + failed


def _twice(state: Sequence[str], popped: Sequence[str]) -> list[str]:
    return [
        *(f"{id_} is there {times} times" for id_, times in Counter(state).items() if times > 1),
        *(f"{id_} was popped {times} times" for id_, times in Counter(popped).items() if times > 1),
        *(f"{id_} was popped and is there" for id_ in set(state) & set(popped)),
    ]


def _ghosts(operations: Sequence[Done], sent: dict[str, Done], state: Sequence[str]) -> list[str]:
    """Items that an acknowledged clear must have removed, whole appends that are there in part."""
    clears = [done for done in operations if done.kind == "clear" and done.end is End.ACKNOWLEDGED]
    last = max((done.began for done in clears), default=-1)
    there = set(state)
    found = [
        f"{id_} is there after a clear" for id_ in state if id_ in sent and sent[id_].over < last
    ]
    for done in {id_: sent[id_] for id_ in state if id_ in sent}.values():
        here = [id_ in there for id_ in done.ids]
        if here != sorted(here, reverse=True):
            found.append(f"of {done.ids} a later item is there and an earlier one is not")
    return found


def _losses(
    operations: Sequence[Done], sent: dict[str, Done], state: Sequence[str], popped: Sequence[str]
) -> list[str]:
    """Acknowledged items that are gone, beyond what clears and open pops can have taken."""
    clears = [done for done in operations if done.kind == "clear" and done.end is not End.FAILED]
    last = max((done.over for done in clears), default=-1)
    accounted = {*state, *popped}
    gone = [
        id_
        for id_, done in sent.items()
        if done.end is End.ACKNOWLEDGED and id_ not in accounted and done.began > last
    ]
    open_pops = sum(done.kind == "pop" and done.open for done in operations)
    if len(gone) <= open_pops:
        return []
    return [f"{id_} was acknowledged and is gone ({open_pops} pops are open)" for id_ in gone]


def _disorder(sent: dict[str, Done], state: Sequence[str]) -> list[str]:
    """What stands after something that began only when it had ended; items of one append too."""
    found, latest, newest = [], -1, ""
    places = {id_: place for done in sent.values() for place, id_ in enumerate(done.ids)}
    for before, id_ in zip(["", *state], state, strict=False):
        done = sent.get(id_)
        if done is None:
            continue
        place = places[id_]
        if place and before != done.ids[place - 1]:
            found.append(f"{id_} does not follow its append's item before it")
        if done.over < latest:
            found.append(f"{id_} stands after {newest}, which was sent after it had ended")
        if done.end is End.ACKNOWLEDGED and done.began > latest:
            latest, newest = done.began, id_
    return found
