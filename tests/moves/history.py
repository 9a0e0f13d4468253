"""What was asked of many sessions by clients in several processes, and whether it can be true.

Each process writes its operations to a file, when they begin and when they end, by a clock that all
processes of a machine share; what has no end (its process was killed) is unknown. The check is done
afterwards, and is exact: for each session it looks for an order of the operations in which each
takes effect in one moment between its beginning and its end, and in which every answer is what the
operations before it have left (they are linearizable). So what is acknowledged is there once and in
order, what has failed is not, and each reading is of what was there at one moment.

Every item has an id of its own, so there are few such orders: only operations that overlap in time
are tried in several, and what stands before an item once stands there for as long as it is there,
so one reading tells after what it was appended. A listing is a reading of the number of items of
every session of its tenant.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

Kind = Literal["append", "pop", "clear", "delete", "read", "count", "list"]
Name: TypeAlias = tuple[str, str]
"""Tenant and session."""

NEVER = 2**63
"""The end of an operation that nobody has heard of: it may still take effect."""
UNTOLD = "untold"
"""The answer of an operation that took effect and whose answer was lost."""
MOST_ORDERS = 50_000
"""States in which a session may be at one moment, before the check gives up."""
READINGS = ("read", "count")
_TOO_MANY = "too many operations at once to tell"


class End(Enum):
    """How an operation ended."""

    DONE = "done"
    FAILED = "failed"
    """It has not taken effect, and never will."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation of one client.

    ``ids``: of the items that an append sends. ``answer``: the ids that a reading has returned
    (``limit``: the newest so many were asked for), the id that a pop has, whether a delete has
    found a session, the number of a session's items (None: there is none), or those of all sessions
    by id.
    """

    kind: Kind
    tenant: str
    session: str = ""
    client: str = ""
    began: int
    ended: int = NEVER
    end: End = End.UNKNOWN
    ids: tuple[str, ...] = ()
    limit: int | None = None
    answer: Any = UNTOLD
    error: str = ""

    @property
    def name(self) -> Name:
        return self.tenant, self.session

    def __str__(self) -> str:
        what = self.ids if self.kind == "append" else self.answer
        return f"{self.client} {self.kind} {what} at {self.began}..{self.ended} ({self.end.value})"


class Recorder:
    """Writes a process's operations to a file, each line at once: the process may be killed."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._count = 0

    def begin(self, **fields: Any) -> int:
        """Note that an operation begins, with the fields of ``Op``; its number."""
        self._count += 1
        self._write({"number": self._count, "began": time.monotonic_ns(), **fields})
        return self._count

    def end(self, number: int, end: End, **fields: Any) -> None:
        """Note how an operation has ended."""
        self._write({"number": number, "ended": time.monotonic_ns(), "end": end.value, **fields})

    def close(self) -> None:
        os.close(self._file)

    def _write(self, line: Mapping[str, Any]) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")


@contextmanager
def recorder(path: Path) -> Iterator[Recorder]:
    one = Recorder(path)
    try:
        yield one
    finally:
        one.close()


def load(paths: Iterable[Path]) -> list[Op]:
    """The operations of all processes."""
    return list(chain.from_iterable(map(_load, paths)))


def _load(path: Path) -> Iterable[Op]:
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):  # else it was written while its process was killed
            fields = json.loads(line)
            found.setdefault(fields.pop("number"), {}).update(fields)
    for fields in found.values():
        fields["ids"] = tuple(fields.get("ids", ()))
        fields["end"] = End(fields.get("end", End.UNKNOWN.value))
        if fields["end"] is End.UNKNOWN:
            fields["ended"] = NEVER
        yield Op(**fields)


def problems(ops: Sequence[Op]) -> list[str]:
    """What cannot have been, a line for each session that it shows in, or none."""
    sessions: defaultdict[Name, list[Op]] = defaultdict(list)
    for op in ops:
        if op.kind != "list":
            sessions[op.name].append(op)
    listings = [op for op in ops if op.kind == "list" and op.end is End.DONE]
    sent = {id_: op for op in ops if op.kind == "append" for id_ in op.ids}
    found = list(chain.from_iterable(_unheard_of(op, sessions) for op in listings))
    for name, own in sessions.items():
        counts = [_count(op, name) for op in listings if op.tenant == name[0]]
        problem = _problem(name, [*own, *counts], sent)
        if problem is not None:
            found.append(problem)
    return found


def _problem(name: Name, ops: Sequence[Op], sent: Mapping[str, Op]) -> str | None:
    """What is wrong with a session; where it shows first, if that can be found out."""
    told = sorted(filter(_tells, ops), key=lambda op: (op.began, op.ended, str(op)))
    problem = _Session(name, told, sent, _places(told)).problem()
    if problem is None:
        return None
    first = _Session(name, told, sent, {}).problem()
    return problem if first is None or first.endswith(_TOO_MANY) else first


def _places(ops: Iterable[Op]) -> dict[str, str | None]:
    """What each item stands after, by the first reading that shows it; None: it is the oldest."""
    found: dict[str, str | None] = {}
    for op in ops:
        if op.kind == "read":
            if op.answer and (op.limit is None or len(op.answer) < op.limit):
                found.setdefault(op.answer[0], None)
            for before, id_ in pairwise(op.answer):
                found.setdefault(id_, before)
    return found


def _unheard_of(listing: Op, sessions: Mapping[Name, Any]) -> Iterable[str]:
    for session in listing.answer:
        if (listing.tenant, session) not in sessions:
            yield f"{listing.tenant}/{session} is listed, and nobody has made it: {listing.client}"


def _count(listing: Op, name: Name) -> Op:
    return replace(listing, kind="count", session=name[1], answer=listing.answer.get(name[1]))


class Histories:
    """All that a session has had in it, as a tree: a state is a node, or none.

    A node's items are those on the way to it.
    """

    NONE, EMPTY = -1, 0

    def __init__(self) -> None:
        self._children: dict[tuple[int, str], int] = {}
        self._nodes: list[tuple[int, str, int]] = [(self.EMPTY, "", 0)]

    def push(self, node: int, id_: str) -> int:
        node = max(node, self.EMPTY)
        new = len(self._nodes)
        child = self._children.setdefault((node, id_), new)
        if child == new:
            self._nodes.append((node, id_, self.size(node) + 1))
        return child

    def pop(self, node: int) -> int:
        return node if node <= self.EMPTY else self._nodes[node][0]

    def top(self, node: int) -> str | None:
        return None if node <= self.EMPTY else self._nodes[node][1]

    def size(self, node: int) -> int:
        return 0 if node <= self.EMPTY else self._nodes[node][2]

    def ends_with(self, node: int, ids: Sequence[str]) -> bool:
        for id_ in reversed(ids):
            if self.top(node) != id_:
                return False
            node = self.pop(node)
        return True

    def items(self, node: int) -> list[str]:
        found = []
        while node > self.EMPTY:
            found.append(str(self.top(node)))
            node = self.pop(node)
        return found[::-1]


Point: TypeAlias = tuple[int, frozenset[int]]
"""A state that a session may be in, and which of the operations under way have taken effect."""


class _Session:
    """The check of one session."""

    def __init__(
        self,
        name: Name,
        ops: Sequence[Op],
        sent: Mapping[str, Op],
        places: Mapping[str, str | None],
    ) -> None:
        self._name = name
        self._ops = ops
        self._sent = sent
        self._places = places
        self._histories = Histories()
        self._under_way: set[int] = set()
        self._points: set[Point] = {(Histories.NONE, frozenset())}

    def problem(self) -> str | None:
        """The first answer that cannot be, in words."""
        for _, ends, number in self._events():
            if not ends:
                self._begin(number)
                continue
            before = self._points
            self._points = self._after(number)
            self._under_way.discard(number)
            if not self._points:
                return self._explain(self._ops[number], before)
            if len(self._points) > MOST_ORDERS:
                return f"{'/'.join(self._name)}: {_TOO_MANY}"
        return None

    def _events(self) -> list[tuple[int, bool, int]]:
        began = [(op.began, False, number) for number, op in enumerate(self._ops)]
        ended = [(op.ended, True, number) for number, op in enumerate(self._ops)]
        return sorted(began + [event for event in ended if event[0] != NEVER])

    def _begin(self, number: int) -> None:
        self._under_way.add(number)
        if self._ops[number].kind in READINGS:
            self._points = {
                (state, done | {number} if self._shows(number, state) else done)
                for state, done in self._points
            }

    def _after(self, number: int) -> set[Point]:
        """The points at which an operation has taken effect, with as few others as possible: these
        can do so later."""
        reached: set[Point] = set()
        seen, ahead = set(self._points), list(self._points)
        while ahead:
            state, done = ahead.pop()
            if number in done:
                reached.add((state, done - {number}))
                continue
            for point in self._next(state, done):
                if point not in seen:
                    seen.add(point)
                    ahead.append(point)
        return reached

    def _next(self, state: int, done: frozenset[int]) -> Iterator[Point]:
        for number in self._under_way - done:
            if self._ops[number].kind in READINGS:
                continue
            after = self._effect(self._ops[number], state)
            if after is not None:
                # A reading changes nothing, so it is best taken as soon as it fits.
                shown = (
                    other
                    for other in self._under_way - done
                    if self._ops[other].kind in READINGS and self._shows(other, after)
                )
                yield after, done.union((number,), shown)

    def _effect(self, op: Op, state: int) -> int | None:
        """The state that a change leaves; None if its answer is another one in this state."""
        histories, told = self._histories, op.answer != UNTOLD
        if op.kind == "append":
            if self._places.get(op.ids[0], histories.top(state)) != histories.top(state):
                return None
            for id_ in op.ids:
                state = histories.push(state, id_)
            return state
        if op.kind == "pop":
            return None if told and op.answer != histories.top(state) else histories.pop(state)
        if op.kind == "clear":
            return min(state, Histories.EMPTY)
        existed = state != Histories.NONE
        return None if told and op.answer != existed else Histories.NONE

    def _shows(self, number: int, state: int) -> bool:
        """Whether a reading's answer is this state."""
        op, size = self._ops[number], self._histories.size(state)
        if op.kind == "count":
            return bool(op.answer == (None if state == Histories.NONE else size))
        expected = size if op.limit is None else min(size, op.limit)
        return len(op.answer) == expected and self._histories.ends_with(state, op.answer)

    def _explain(self, op: Op, before: Iterable[Point]) -> str:
        states = {state for state, _ in before}
        could = [
            "no session" if state == Histories.NONE else self._histories.items(state)
            for state in sorted(states)[:4]
        ]
        others = [str(self._ops[number]) for number in sorted(self._under_way)][:6]
        return "\n  ".join(
            (
                f"{'/'.join(self._name)}: {op}",
                *self._hints(op, states),
                f"before it: {' or '.join(map(str, could))}",
                *(f"at the same time: {other}" for other in others),
            )
        )

    def _hints(self, op: Op, states: Iterable[int]) -> Iterator[str]:
        if op.kind not in ("read", "pop") or op.answer in (UNTOLD, None):
            return
        ids = op.answer if op.kind == "read" else [op.answer]
        for id_, times in Counter(ids).items():
            if times > 1:
                yield f"{id_} is there {times} times"
            yield from self._stranger(id_)
        known = {id_ for state in states for id_ in self._histories.items(state)}
        yield from (f"{id_} is not to be there (any more)" for id_ in ids if id_ not in known)
        if op.kind == "read" and op.limit is None:
            always = [set(self._histories.items(state)) for state in states]
            gone = set.intersection(*always) - set(ids) if always else set()
            yield from (f"{id_} was acknowledged and is gone" for id_ in sorted(gone))

    def _stranger(self, id_: str) -> Iterator[str]:
        sender = self._sent.get(id_)
        if sender is None:
            yield f"{id_} was never sent"
        elif sender.name != self._name:
            yield f"{id_} was sent to {'/'.join(sender.name)}"
        elif sender.end is End.FAILED:
            yield f"{id_} is of an append that has failed"


def _tells(op: Op) -> bool:
    """Whether an operation tells anything: no change that failed, no reading without answer."""
    return op.end is End.DONE or (op.end is End.UNKNOWN and op.kind not in READINGS)
