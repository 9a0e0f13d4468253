"""The check of histories: it lets pass what can be, and finds what cannot."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from moves.history import NEVER, UNTOLD, End, Op, load, problems, recorder

if TYPE_CHECKING:
    from pathlib import Path

ACKNOWLEDGED, FAILED, UNKNOWN = End.DONE, End.FAILED, End.UNKNOWN


def _op(kind: Any, at: int | tuple[int, int], end: End = ACKNOWLEDGED, **fields: Any) -> Op:
    """One from ``at`` to the next moment, or from one to another."""
    began, ended = at if isinstance(at, tuple) else (at, at + 1)
    fields = {"tenant": "acme", "session": "chat", "client": "c"} | fields
    ended = NEVER if end is UNKNOWN else ended
    return Op(kind=kind, began=began, ended=ended, end=end, **fields)


def _add(at: int | tuple[int, int], *ids: str, end: End = ACKNOWLEDGED, **fields: Any) -> Op:
    return _op("append", at, end, ids=ids, **fields)


def _read(at: int | tuple[int, int], *ids: str, **fields: Any) -> Op:
    return _op("read", at, answer=list(ids), **fields)


def _pop(at: int | tuple[int, int], answer: Any, end: End = ACKNOWLEDGED) -> Op:
    return _op("pop", at, end, answer=answer)


def _clear(at: int | tuple[int, int], end: End = ACKNOWLEDGED) -> Op:
    return _op("clear", at, end)


def _delete(at: int | tuple[int, int], answer: Any, end: End = ACKNOWLEDGED) -> Op:
    return _op("delete", at, end, answer=answer)


def _list(at: int | tuple[int, int], **counts: int) -> Op:
    return _op("list", at, answer=counts, session="")


AB = [_add(0, "a1", "a2"), _add(2, "b")]
TOGETHER = [_add((0, 9), "a"), _add((0, 9), "b")]


@pytest.mark.parametrize(
    "ops",
    [
        [*AB, _read(4, "a1", "a2", "b")],
        [*AB, _read(4, "a2", "b", limit=2), _read(6, "a1", "a2", "b", limit=9)],
        [_read(0), _pop(2, None), _clear(4), _delete(6, answer=False), _list(8)],
        [*AB, _pop(4, "b"), _read(6, "a1", "a2")],
        [*AB, _clear(4), _read(6), _list(8, chat=0), _add(10, "c"), _read(12, "c")],
        [*AB, _delete(4, answer=True), _list(6), _add(8, "c"), _read(10, "c"), _list(12, chat=1)],
        # At the same time, in any order; but all have seen the same one.
        [*TOGETHER, _read(9, "a", "b"), _read(11, "a", "b")],
        [*TOGETHER, _read(9, "b", "a"), _read((3, 5), "b"), _read((3, 5))],
        [_add((0, 9), "a"), _read((3, 5), "a"), _read((6, 8), "a")],
        [_add((0, 9), "a"), _pop((3, 20), "a"), _read(30)],
        [*AB, _pop((4, 9), "a2"), _pop((4, 9), "b"), _read(9, "a1")],
        # Nobody knows whether, or when.
        [_add(0, "a", end=UNKNOWN), _read(2), _read(4, "a")],
        [_add(0, "a", end=UNKNOWN), _read(2), _read(99)],
        [*AB, _pop(4, UNTOLD, end=UNKNOWN), _read(6, "a1", "a2", "b"), _read(8, "a1", "a2")],
        [*AB, _clear(4, UNKNOWN), _add(6, "c"), _read(8, "a1", "a2", "b", "c"), _read(10)],
        [*AB, _pop(4, UNTOLD), _read(6, "a1", "a2")],
        [_add(0, "a"), _delete(2, UNTOLD), _add(4, "b"), _read(6, "b")],
        # What has failed has not been.
        [_add(0, "a", end=FAILED), _read(2), _clear(4, FAILED), _add(6, "b"), _read(8, "b")],
        # Another tenant's session of the same name.
        [*AB, _add(4, "x", tenant="other"), _read(6, "x", tenant="other"), _list(8, chat=3)],
        [_add((0, 9), "a"), _list((3, 5)), _list((3, 5), chat=1), _list((6, 8), chat=1)],
    ],
)
def test_what_may_be(ops: list[Op]) -> None:
    assert problems(ops) == []
    assert problems(ops[::-1]) == []


@pytest.mark.parametrize(
    ("ops", "found"),
    [
        ([*AB, _read(4, "a1", "a2")], "b was acknowledged and is gone"),
        ([*AB, _read(4, "a1", "a2", "b", "b")], "b is there 2 times"),
        ([*AB, _read(4, "a1", "b", "a2")], "before it: ['a1', 'a2', 'b']"),
        ([*AB, _read(4, "b", "a1", "a2")], "before it: ['a1', 'a2', 'b']"),
        ([*AB, _read(4, "a1", limit=2)], "before it"),
        ([*AB, _read(4, "b", limit=2)], "before it"),
        ([_add(0, "a1", "a2"), _read((0, 9), "a1")], "read"),
        # What was there is there later, for everybody.
        ([_add((0, 9), "a"), _read(2, "a"), _read(5)], "before it: ['a']"),
        ([*TOGETHER, _read((3, 4), "a"), _read(9, "b", "a")], "before it"),
        ([*TOGETHER, _read(9, "a", "b"), _read(11, "b", "a")], "before it: ['a', 'b']"),
        ([*TOGETHER, _read((1, 8), "a"), _read((1, 8), "b")], "before it"),
        # Once only.
        ([*AB, _pop(4, "b"), _pop(6, "b")], "b is not to be there"),
        ([*AB, _pop((4, 9), "b"), _pop((4, 9), "b")], "pop b"),
        ([*AB, _pop(4, "b"), _read(6, "a1", "a2", "b")], "b is not to be there"),
        ([*AB, _pop(4, "a2")], "before it: ['a1', 'a2', 'b']"),
        ([*AB, _pop(4, None)], "before it"),
        ([*AB, _clear(4), _read(6, "b")], "b is not to be there"),
        ([*AB, _clear(4), _pop(6, "b")], "b is not to be there"),
        ([_add(0, "a"), _delete(2, answer=True), _read(4, "a")], "a is not to be there"),
        ([_add(0, "a"), _delete(2, answer=False)], "delete False"),
        ([_delete(0, answer=True)], "before it: no session"),
        (
            [_add(0, "a"), _delete(2, answer=True), _add(4, "b"), _read(6, "a", "b")],
            "a is not to be there",
        ),
        # One that nobody knows of happens once at the most.
        ([*AB, _pop(4, UNTOLD, end=UNKNOWN), _read(6, "a1")], "a2 was acknowledged and is gone"),
        ([_add(0, "a", end=UNKNOWN), _read(2, "a", "a")], "a is there 2 times"),
        ([_add(0, "a", end=UNKNOWN), _read(2, "a"), _read(4)], "a was acknowledged and is gone"),
        ([_add(5, "a", end=UNKNOWN), _read(2, "a")], "a is not to be there"),
        ([*AB, _pop(4, UNTOLD), _read(6, "a1", "a2", "b")], "before it: ['a1', 'a2']"),
        # Neither what has failed, nor what is somebody else's, nor what nobody has sent.
        ([_add(0, "a", end=FAILED), _read(2, "a")], "a is of an append that has failed"),
        ([_add(0, "a"), _clear(2, FAILED), _read(4)], "a was acknowledged and is gone"),
        ([*AB, _read(4, "a1", "a2", "b", tenant="other")], "a1 was sent to acme/chat"),
        ([_read(4, "x")], "x was never sent"),
        # Listings.
        ([*AB, _list(4)], "count None"),
        ([*AB, _list(4, chat=2)], "count 2"),
        ([*AB, _delete(4, answer=True), _list(6, chat=3)], "count 3"),
        ([*AB, _list(4, chat=3, other=1)], "acme/other is listed, and nobody has made it"),
        ([_add((0, 9), "a"), _list((2, 3), chat=1), _list((4, 5))], "count None"),
    ],
)
def test_what_cannot_be(ops: list[Op], found: str) -> None:
    assert any(found in problem for problem in problems(ops)), problems(ops)
    assert problems(ops[::-1]) == problems(ops)


def test_a_session_is_judged_by_itself() -> None:
    bad = [_add(0, "x", session="other"), _read(2, session="other")]
    (problem,) = problems([*AB, _read(4, "a1", "a2", "b"), *bad])
    assert problem.startswith("acme/other: ")


def test_many_at_once_are_told_apart_soon() -> None:
    """Four clients, each operation overlapping with those of all others, and some without end."""
    ops = [_add((10 * n, 10 * n + 39), f"i{n}") for n in range(400)]
    ops += [_add(10 * n, f"u{n}", end=UNKNOWN) for n in range(0, 400, 100)]
    final = [f"i{n}" for n in range(400)]
    assert problems([*ops, _read(99_999, *final)]) == []
    for place, other in pairwise(range(50, 400, 90)):
        swapped = [*final]
        swapped[place], swapped[other] = swapped[other], swapped[place]
        assert problems([*ops, _read(99_999, *swapped)]) != []


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "one"
    with recorder(path) as one:
        fields = {"kind": "append", "tenant": "acme", "session": "chat", "client": "c"}
        first = one.begin(**fields, ids=["a", "b"])
        killed = one.begin(**fields, ids=["c"])
        one.end(first, End.DONE)
        lost = one.begin(kind="pop", tenant="acme", session="chat", client="c")
        one.end(lost, End.UNKNOWN, error="!")
    with path.open("ab") as torn:
        torn.write(b'{"number": 2, "en')
    done, unknown, pop = load([path])
    assert (done.ids, done.end, unknown.ids, unknown.end) == (("a", "b"), End.DONE, ("c",), UNKNOWN)
    assert done.began < unknown.began < done.ended < pop.began < pop.ended == NEVER == unknown.ended
    assert (killed, pop.answer, pop.error) == (2, UNTOLD, "!")
