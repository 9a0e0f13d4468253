"""Every way in which moves, clients and faults can meet, within bounds: nothing is ever lost.

What each test may come to is in its case. The number of states is printed (``pytest -rA``), and has
a bound, so that the whole stays within a minute. Then one rule at a time is broken: the model has
to notice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from shardgate.handover import OWNED, Act, Progress, reopen

from . import model
from .model import BACK, PURGED, Case, Rules, actor
from .search import LITTER, MISSING, STUCK, TWO, Found, Search

if TYPE_CHECKING:
    from shardgate.handover import Pair, SlotRow

DURABLE = Rules().durable


def _case(*actors: str, **bounds: object) -> Case:
    """``actors``: each as "move AB m1", who is moving from A to B with the mark m1."""
    return Case(actors=tuple(actor(*one.split()) for one in actors), **bounds)  # type: ignore[arg-type]  # they are the case's own


def _explore(case: Case, most: int, overlook: str | None = None) -> Found:
    found = Search(case).run(at_most=most, overlook=overlook)
    print(found)  # noqa: T201 - what a test has seen is told with it
    return found


HOLDS = {
    "one mover, two sessions that come and go": (
        _case("move AB m1", sessions=2, writes=3),
        5_000,
        ["a statement deletes session 1 on A", "a statement appends to session 1 on B"],
    ),
    "two statements at a time": (
        _case("move AB m1", writes=4, at_once=2),
        5_000,
        ["a statement deletes session 0 on B"],
    ),
    "two movers, one target": (
        _case("move AB m1", "move AB m2", writes=1),
        40_000,
        ["m1: decides", "m2: decides", "m1: writes what was read in vain"],
    ),
    "two movers, one target, a lost answer": (
        _case("move AB m1", "move AB m2", lost=1),
        40_000,
        ["m2: decides, and gets no answer", "the stray request arrives"],
    ),
    "two movers, two targets": (
        _case("move AB m1", "move AC m2", shards=3, writes=1),
        40_000,
        ["m1: decides", "m2: hints"],
    ),
    "a mover and who ends it": (
        _case("move AB m1", "abort AB x1", writes=1, lost=1),
        80_000,
        ["x1: reopens", "x1: releases", "m1: decides in vain"],
    ),
    "a mover died after the fence; another goes on, somebody ends it": (
        _case("move AB m1", "abort AB x1", before=("AB-",), lost=2),
        80_000,
        ["m1: decides", "x1: reopens", "x1: reopens, and gets no answer"],
    ),
    "there and back, and purged meanwhile": (
        _case("move AB m1", "move BA m2", "purge AB p1", writes=2),
        10_000,
        ["m2: decides", "p1: stops purging", "p1: forgets the slot"],
    ),
    "there, back and there within grace": (
        _case("move BA m1", "move AB m2", "purge AB p1", "purge BA p2", before=("AB",), writes=1),
        60_000,
        ["m2: decides", "p1: stops purging", "p2: stops purging"],
    ),
    "what was cancelled is removed, while it is moved to a third": (
        _case("abort AB x1", "sweep AB s1", "move AC m2", "move AB m3", before=("AB-",), shards=3),
        60_000,
        ["s1: forgets the slot", "m2: decides", "s1: stops purging"],
    ),
    "round three shards, with old hints": (
        _case("move AB m1", "move BC m2", "move CA m3", shards=3, writes=1),
        10_000,
        ["m1: hints", "m2: hints", "m3: decides"],
    ),
    "on to a third, while the first move is gone on with, and ended": (
        _case("move AB m1", "abort AB x1", "move BC m2", shards=3),
        40_000,
        ["m2: decides", "x1: releases"],
    ),
    "a failover of the source loses two": (
        _case("move AB m1", "abort AB x1", failovers=1, lossy="A", depth=2, keeps_writes=True),
        50_000,
        ["a failover of A loses 1", "m1: decides", "x1: reopens"],
    ),
    "a failover of the target loses two": (
        _case("move AB m1", "abort AB x1", failovers=1, lossy="B", depth=2, writes=1),
        50_000,
        ["a failover of B loses 2", "x1: releases", "x1: reopens"],
    ),
    "a failover of the target loses two, and the source is purged": (
        _case("move AB m1", "purge AB p1", "abort AB x1", failovers=1, lossy="B", depth=2),
        50_000,
        ["p1: does not find the decision any more", "p1: forgets the slot", "x1: reopens"],
    ),
    "there and back, and failovers of both lose two": (
        _case("move AB m1", "move BA m2", failovers=2, lossy="AB", depth=2),
        50_000,
        ["a failover of A loses 2", "a failover of B loses 2", "m2: decides"],
    ),
    "a failover of the source loses writes, and items are compared": (
        _case(
            "move AB m1", "abort AB x1", failovers=1, lossy="A", writes=2,
            rules=Rules(compare_items=True),
        ),
        50_000,
        ["a failover of A loses 1"],
    ),
    "the source is restored": (
        _case("move AB m1", "abort AB x1", restores="A", writes=1),
        40_000,
        ["A is restored", "m1: gives up", "m1: decides"],
    ),
    "the target is restored": (
        _case("move AB m1", "move AB m2", restores="B"),
        40_000,
        ["B is restored", "m1: gives up"],
    ),
}  # fmt: skip

SOAK = {
    "two movers, two targets, a lost answer": (
        _case("move AB m1", "move AC m2", shards=3, writes=1, lost=1), 200_000
    ),
    "a mover and two who end it": (
        _case("move AB m1", "abort AB x1", "abort AB x2", writes=1), 500_000
    ),
    "a mover died after the fence; two go on, somebody ends it": (
        _case("move AB m1", "move AB m2", "abort AB x1", before=("AB-",)), 500_000
    ),
    "a mover died after the fence; another goes on, somebody ends it, three lost answers": (
        _case("move AB m1", "abort AB x1", before=("AB-",), writes=1, lost=3), 1_500_000
    ),
    "what is cancelled is removed, while others move it": (
        _case("move AB m1", "abort AB x1", "sweep AB s1", "move AC m2", shards=3), 500_000
    ),
    "a failover of the source, two movers and who ends it": (
        _case("move AB m1", "abort AB x1", "move AB m2", failovers=1, lossy="A", depth=2), 500_000
    ),
    "two movers and who ends it": (
        _case("move AB m1", "move AB m2", "abort AB x1", writes=1), 1_500_000
    ),
    "a mover and who ends it, two lost answers": (
        _case("move AB m1", "abort AB x1", writes=1, lost=2), 1_500_000
    ),
    "a failover of the target, two movers and who ends it": (
        _case(
            "move AB m1", "move AB m2", "abort AB x1", failovers=1, lossy="B"
        ), 2_000_000
    ),
    "failovers of both": (
        _case("move AB m1", "move AB m2", "abort AB x1", failovers=1, lossy="AB"),
        2_000_000
    ),
    "four moves between three shards": (
        _case("move AB m1", "move BC m2", "move CA m3", "move AB m4", shards=3), 500_000
    ),
}  # fmt: skip

BROKEN = {
    "the decision is the source's": (
        _case(
            "move AB m1", "abort AB x1", failovers=1, lossy="A", writes=1,
            rules=Rules(decide_on_source=True),
        ),
        {TWO},
    ),
    "a release is sent again, whatever the row is by then": (
        _case("move AB m1", "move BA m2", lost=1, rules=Rules(release_if_unchanged=False)),
        {BACK, STUCK},
    ),
    "a reopening is sent again, whatever the row is by then": (
        _case(
            "move AB m1", "abort AB x1", before=("AB-",), lost=1,
            rules=Rules(reopen_if_unchanged=False),
        ),
        {TWO},
    ),
    "the source is reopened, and nothing is cancelled on the target": (
        _case("move AB m1", "abort AB x1", rules=Rules(cancel_before_reopen=False)),
        {TWO},
    ),
    "sessions are compared without their incarnation": (
        _case("move AB m1", writes=2, rules=Rules(compare_incarnations=False)),
        {MISSING},
    ),
    "a purge goes on, whatever the row is by then": (
        _case("move AB m1", "purge AB p1", "move BA m2", rules=Rules(guard_purge=False)),
        {PURGED},
    ),
    "a purge does not wait until the decision is durable": (
        _case(
            "move AB m1", "purge AB p1", failovers=1, lossy="B",
            rules=Rules(purge_when_durable=False),
        ),
        {STUCK},
    ),
    "no barrier after the fence": (
        _case("move AB m1", writes=1, rules=Rules(pass_barrier=False)),
        {MISSING},
    ),
    "a mark claims again after the barrier": (
        _case("move AB m1", "abort AB x1", lost=1, rules=Rules(claim_once=False)),
        {TWO},
    ),
    "nobody looks at the source after the claim": (
        _case(
            "move AB m1", "abort AB x1", before=("AB-",), lost=1,
            rules=Rules(look_after_claim=False),
        ),
        {TWO},
    ),
    "a fence that a failover takes back": (
        _case(
            "move AB m1", failovers=1, lossy="A",
            rules=Rules(durable=DURABLE - {Act.FENCE, Act.BARRIER}),
        ),
        {TWO},
    ),
    "a cancelling that a failover takes back": (
        _case(
            "move AB m1", "abort AB x1", failovers=1, lossy="B",
            rules=Rules(durable=DURABLE - {Act.CANCEL}),
        ),
        {TWO},
    ),
    "a mark, and the decision of the move before it, that a failover takes back": (
        _case(
            "move AB m1", "move BA m2", failovers=1, lossy="B", depth=2,
            rules=Rules(durable=DURABLE - {Act.MARK}),
        ),
        {STUCK},
    ),
    "writes that a failover takes back after they were copied": (
        _case("move AB m1", failovers=1, lossy="A", writes=2),
        {MISSING},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "most", "steps"), HOLDS.values(), ids=HOLDS)
def test_nothing_is_lost(case: Case, most: int, steps: list[str]) -> None:
    found = _explore(case, most)
    assert found.flaw is None, found
    assert set(steps) <= found.steps, "the case does not come to what it is about"


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("case", "most"), SOAK.values(), ids=SOAK)
def test_nothing_is_lost_however_long_one_looks(case: Case, most: int) -> None:
    found = _explore(case, most)
    assert found.flaw is None, found


@pytest.mark.parametrize(("case", "flaws"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_noticed(case: Case, flaws: set[str]) -> None:
    """Each of the flaws is what comes first, if the others are overlooked."""
    for flaw in flaws:
        overlooked = flaws - {flaw}
        found = _explore(case, 50_000, overlook=next(iter(overlooked), None))
        assert found.flaw == flaw, found


def test_who_forgets_his_mark_uses_it_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request from the first time, whose answer was lost, counts the second time."""
    monkeypatch.setattr(Progress, "ask", lambda _: Act.MARK)
    case = _case("move AB m1", "abort AB x1", before=("AB-",), lost=1)
    assert _explore(case, 50_000).flaw == TWO


def test_who_reopens_comes_up_to_what_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a hint with the epoch of that would outdo whoever gets the slot next."""

    def as_before(pair: Pair) -> SlotRow:
        row = reopen(pair)
        return replace(row, epoch=pair.source.epoch) if pair.source.state == OWNED else row

    monkeypatch.setattr(model, "reopen", as_before)
    assert _explore(_case("move AB m1", "abort AB x1", "sweep AB s1"), 50_000).flaw == LITTER
