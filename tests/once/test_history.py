"""The checker itself: it finds what it is there to find, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from once.history import Done, End, History, problems
from shardgate import OutcomeUnknown, ShardUnavailable


def _append(at: int, *ids: str, end: End = End.ACKNOWLEDGED) -> Done:
    return Done(kind="append", end=end, began=at, ended=at + 1, ids=ids, writer="w")


def _pop(at: int, *ids: str, end: End = End.ACKNOWLEDGED) -> Done:
    return Done(kind="pop", end=end, began=at, ended=at + 1, ids=ids)


def _clear(at: int, end: End = End.ACKNOWLEDGED) -> Done:
    return Done(kind="clear", end=end, began=at, ended=at + 1)


AB = [_append(0, "a1", "a2"), _append(2, "b")]


@pytest.mark.parametrize(
    ("operations", "state"),
    [
        (AB, ["a1", "a2", "b"]),
        ([*AB, _pop(4, "b")], ["a1", "a2"]),
        ([*AB, _pop(4, "b"), _pop(6, end=End.CANCELLED)], ["a1"]),
        ([*AB, _pop(4, end=End.UNKNOWN)], ["a1", "a2", "b"]),
        ([*AB, _clear(4)], []),
        ([*AB, _clear(4, End.UNKNOWN)], []),
        ([*AB, _clear(4, End.UNKNOWN)], ["a1", "a2", "b"]),
        ([*AB, _append(4, "c", end=End.UNKNOWN)], ["a1", "a2", "b", "c"]),
        ([*AB, _append(4, "c", end=End.CANCELLED)], ["a1", "a2", "b"]),
        ([_append(0, "a", end=End.UNKNOWN), _append(2, "b")], ["b", "a"]),
        ([*AB, _append(4, "c", end=End.FAILED), _pop(6)], ["a1", "a2", "b"]),
    ],
)
def test_what_may_be(operations: list[Done], state: list[str]) -> None:
    assert problems(operations, state) == []


@pytest.mark.parametrize(
    ("operations", "state", "found"),
    [
        (AB, ["a1", "a2", "b", "b"], "b is there 2 times"),
        (AB, ["a1", "a2"], "b was acknowledged and is gone"),
        (AB, ["b", "a1", "a2"], "a1 stands after b"),
        (AB, ["a2", "a1", "b"], "a2 does not follow"),
        (AB, ["a1", "b", "a2"], "a2 does not follow"),
        (AB, ["a1", "a2", "b", "x"], "x was never sent"),
        ([*AB, _pop(4, "b"), _pop(6, "b")], ["a1", "a2"], "b was popped 2 times"),
        ([*AB, _pop(4, "b")], ["a1", "a2", "b"], "b was popped and is there"),
        ([*AB, _pop(4, "y")], ["a1", "a2", "b"], "y was never sent"),
        ([*AB, _pop(4)], ["a1", "a2"], "b was acknowledged and is gone"),
        ([*AB, _pop(4, end=End.UNKNOWN)], ["a1"], "b was acknowledged and is gone (1 pops"),
        ([*AB, _pop(4, end=End.FAILED)], ["a1", "a2"], "b was acknowledged and is gone"),
        ([_clear(0), _append(2, "a")], [], "a was acknowledged and is gone"),
        ([*AB, _clear(4, End.FAILED)], [], "b was acknowledged and is gone"),
        ([*AB, _clear(4)], ["b"], "b is there after a clear"),
        ([*AB, _pop(4, end=End.UNKNOWN)], ["a2", "b"], "an earlier one is not"),
        ([_append(0, "a", end=End.FAILED)], ["a"], "its append failed"),
        ([_append(0, "a", end=End.UNKNOWN)], ["a", "a"], "a is there 2 times"),
    ],
)
def test_what_must_not_be(operations: list[Done], state: list[str], found: str) -> None:
    assert any(found in problem for problem in problems(operations, state)), problems(
        operations, state
    )


class _Scripted:
    """A session that answers what it was told to."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def add_items(self, _items: list[Any]) -> None:
        await self.pop_item()

    async def pop_item(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def test_ends_are_told_apart() -> None:
    history = History()
    assert await history.append(_Scripted(None), "w") is End.ACKNOWLEDGED
    assert await history.pop(_Scripted({"id": "w.000000"})) is End.ACKNOWLEDGED
    assert await history.pop(_Scripted(None)) is End.ACKNOWLEDGED
    assert await history.append(_Scripted(OutcomeUnknown("?", shard="a")), "w") is End.UNKNOWN
    assert await history.append(_Scripted(ShardUnavailable("!", shard="a")), "w") is End.FAILED
    assert len(history.errors()) == 2
    assert history.problems([]) == []
    assert history.problems([{"id": "w.000001"}]) == []
    assert history.problems([{"id": "w.000002"}]) == ["w.000002 is there, and its append failed"]
    stamps = [(done.began, done.ended) for done in history.operations]
    assert stamps == sorted(stamps)
