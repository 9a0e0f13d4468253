"""Plans of moves: few of them, each of which improves, and nothing for nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil, floor, inf, isclose
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardgate.control.rebalance import (
    THRESHOLD,
    Load,
    MovePlan,
    ShardLoad,
    drained,
    plan_moves,
    plan_of_slots,
)
from shardgate.errors import UsageError
from shardgate.slots import tenant_slots
from shardgate.topology import KeyspaceMap, assign, reassign

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Situation = tuple[KeyspaceMap, dict[str, float], list[Load]]

EMPTY = Load()
ROUNDING = 1e-9
MANY = 4096
NAMES = [f"shard_{n}" for n in range(8)]
EVEN = Load(sessions=10, items=5000, nbytes=4_000_000, writes=1.0)

weight = st.integers(1, 20) | st.floats(0.01, 100)
weights_or_none = st.just(0) | weight
loads = st.builds(
    Load,
    sessions=st.integers(0, 1000),
    items=st.integers(0, 10**6),
    nbytes=st.integers(0, 10**9),
    writes=st.floats(0, 100),
)
thresholds = st.sampled_from([0.0, THRESHOLD, 0.3])


def keyspace(owners: Sequence[str]) -> KeyspaceMap:
    return KeyspaceMap(
        name="main", slots=len(owners), spread=None, owners=tuple(owners), epochs=(1,) * len(owners)
    )


def alike(names: Sequence[str] | int) -> dict[str, float]:
    chosen = [f"shard_{n:02}" for n in range(names)] if isinstance(names, int) else names
    return dict.fromkeys(chosen, 1.0)


def times(n: int) -> Load:
    """A slot that carries n times as much as another one."""
    return Load(EVEN.sessions * n, EVEN.items * n, EVEN.nbytes * n, EVEN.writes * n)


def owners_after(known: KeyspaceMap, plan: MovePlan) -> list[str]:
    """Who owns each slot at the end; AssertionError unless each move is from the owner."""
    owners = list(known.owners)
    for move in plan.moves:
        assert owners[move.slot] == move.source != move.target
        owners[move.slot] = move.target
    return owners


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """A keyspace, weights of which at least one counts, and any loads."""
    slots = 2 ** draw(st.integers(0, 5))
    weights = draw(st.dictionaries(st.sampled_from(NAMES), weights_or_none, min_size=1))
    weights[draw(st.sampled_from(NAMES))] = draw(weight)
    owners = draw(st.lists(st.sampled_from(NAMES), min_size=slots, max_size=slots))
    some = draw(st.lists(loads, min_size=slots, max_size=slots))
    return keyspace(owners), weights, some


# --- what holds for every plan


@given(situations(), thresholds)
def test_every_slot_ends_with_one_owner_and_moves_once_at_most(
    situation: Situation, threshold: float
) -> None:
    known, weights, some = situation
    plan = plan_moves(known, weights, some, threshold=threshold)
    owners = owners_after(known, plan)
    moved = [move.slot for move in plan.moves]
    assert len(set(moved)) == len(moved)
    assert all(weights[move.target] for move in plan.moves)
    assert all(move.load == some[move.slot] for move in plan.moves)
    held = Counter(owners)
    assert {name: shard.slots for name, shard in plan.after.items() if shard.slots} == held


@given(situations(), thresholds)
def test_a_shard_without_weight_ends_empty(situation: Situation, threshold: float) -> None:
    known, weights, some = situation
    owners = owners_after(known, plan_moves(known, weights, some, threshold=threshold))
    assert not {name for name, each in weights.items() if not each} & set(owners)


@given(situations())
def test_a_shard_that_the_settings_lack_keeps_its_slots(
    situation: Situation,
) -> None:
    known, weights, some = situation
    plan = plan_moves(known, weights, some, threshold=0)
    lacking = set(known.owners) - weights.keys()
    assert set(plan.unreachable) == lacking
    assert not lacking & {move.source for move in plan.moves}
    assert not lacking & {move.target for move in plan.moves}


@given(situations(), thresholds)
def test_no_move_makes_it_worse(situation: Situation, threshold: float) -> None:
    """Each move is looked at by itself: the worse one of its two shards is better off after it."""
    known, weights, some = situation
    plan = plan_moves(known, weights, some, threshold=threshold)
    owners = list(known.owners)
    for move in plan.moves:
        one = plan_of_slots(keyspace(owners), [move.slot], move.target, some, weights=weights)
        pair = move.source, move.target
        before, after = (max(side[name].ratio for name in pair) for side in (one.before, one.after))
        gives_all = not weights[move.source]
        assert after < before or (gives_all and after == before == inf)
        assert one.imbalance_after <= one.imbalance_before * (1 + ROUNDING)
        owners[move.slot] = move.target


@given(situations(), thresholds)
def test_part_of_a_plan_is_its_beginning(situation: Situation, threshold: float) -> None:
    known, weights, some = situation
    whole = plan_moves(known, weights, some, threshold=threshold)
    for most in range(0, len(whole.moves) + 2, 3):
        part = plan_moves(known, weights, some, threshold=threshold, most=most)
        assert part.moves == whole.moves[:most]


@given(situations())
def test_the_order_of_the_weights_does_not_count(
    situation: Situation,
) -> None:
    known, weights, some = situation
    turned = dict(reversed(weights.items()))
    assert plan_moves(known, turned, some) == plan_moves(known, weights, some)


@given(situations(), thresholds)
def test_all_shares_together_are_the_keyspace(situation: Situation, threshold: float) -> None:
    known, weights, some = situation
    plan = plan_moves(known, weights, some, threshold=threshold)
    for side in (plan.before, plan.after):
        assert isclose(sum(shard.share for shard in side.values()), 1)
        reached = [shard for shard in side.values() if shard.wanted is not None]
        wanted = sum(shard.wanted or 0 for shard in reached)
        assert isclose(sum(shard.share for shard in reached), wanted, abs_tol=ROUNDING)


# --- where all slots carry the same


@given(
    st.integers(0, 6).flatmap(
        lambda bits: st.lists(st.sampled_from(NAMES), min_size=2**bits, max_size=2**bits)
    ),
    st.sets(st.sampled_from(NAMES), min_size=1),
    st.sampled_from([EMPTY, EVEN]),
)
def test_equal_slots_are_shared_as_evenly_and_by_as_few_moves_as_can_be(
    owners: list[str], names: set[str], each: Load
) -> None:
    known, weights = keyspace(owners), dict.fromkeys(NAMES, 0.0) | alike(sorted(names))
    plan = plan_moves(known, weights, [each] * known.slots, threshold=0)
    held = Counter(owners_after(known, plan))
    share = known.slots / len(names)
    assert all(floor(share) <= held[name] <= ceil(share) for name in names)
    ideal = reassign(known.owners, weights)
    assert len(plan.moves) == sum(map(str.__ne__, known.owners, ideal))


@pytest.mark.parametrize(("shards", "slots"), [(1, 64), (3, 4096), (4, 4096), (31, 4096)])
def test_a_joining_shard_gets_its_share_and_nobody_else_gains(shards: int, slots: int) -> None:
    """By the default threshold too, which the others do not exceed where there are many."""
    known = keyspace(assign(slots, alike(shards)))
    plan = plan_moves(known, alike(shards + 1), [EMPTY] * slots)
    held = Counter(owners_after(known, plan))
    share = slots / (shards + 1)
    assert {move.target for move in plan.moves} == {f"shard_{shards:02}"}
    assert floor(share) <= len(plan.moves) <= ceil(share)
    assert max(held.values()) <= ceil(share)


@pytest.mark.parametrize("shards", [2, 4, 32])
def test_a_drained_shard_gives_to_all_others_alike(shards: int) -> None:
    weights = alike(shards)
    known = keyspace(assign(MANY, weights))
    plan = plan_moves(known, drained(weights, "shard_00"), [EMPTY] * MANY)
    held = Counter(owners_after(known, plan))
    assert {move.source for move in plan.moves} == {"shard_00"}
    assert len(plan.moves) == known.owners.count("shard_00")
    assert max(held.values()) - min(held.values()) <= 1
    assert (plan.imbalance_before, plan.after["shard_00"].slots) == (inf, 0)


def test_a_heavier_weight_gets_more() -> None:
    weights = {"a": 1.0, "b": 3.0}
    plan = plan_moves(keyspace(assign(MANY, alike("ab"))), weights, [EVEN] * MANY)
    assert {name: shard.slots for name, shard in plan.after.items()} == {"a": 1024, "b": 3072}
    assert isclose(plan.imbalance_before, 2)
    assert isclose(plan.imbalance_after, 1)


# --- where there is nothing to do


def within(threshold: float) -> tuple[KeyspaceMap, list[Load]]:
    """Two shards of which one carries more than the other, by about this much of its share."""
    known = keyspace(assign(MANY, alike("ab")))
    more = replace(EVEN, items=floor(EVEN.items * (1 + 2 * threshold)))
    more = replace(more, nbytes=floor(EVEN.nbytes * (1 + 2 * threshold)))
    more = replace(more, writes=EVEN.writes * (1 + 2 * threshold))
    return known, [more if owner == "a" else EVEN for owner in known.owners]


def test_nothing_is_done_within_the_threshold() -> None:
    known, some = within(0.045)
    plan = plan_moves(known, alike("ab"), some)
    assert 1.03 < plan.imbalance_before == plan.imbalance_after < 1.05
    assert plan.moves == ()
    assert plan.load == EMPTY
    assert plan.seconds(1e6) == 0
    assert plan_moves(known, alike("ab"), some, threshold=0.01).moves


def test_what_is_beyond_the_threshold_is_brought_to_the_share() -> None:
    known, some = within(0.08)
    plan = plan_moves(known, alike("ab"), some)
    assert plan.imbalance_before > 1.05
    assert plan.imbalance_after < 1.001


@given(situations())
def test_a_plan_that_was_carried_out_leaves_nothing_to_do_where_it_ends_within_the_threshold(
    situation: Situation,
) -> None:
    known, weights, some = situation
    plan = plan_moves(known, weights, some, threshold=0.3)
    ratios = [plan.after[name].ratio for name, each in weights.items() if each]
    if plan.imbalance_after <= 1.3 and min(ratios) >= 0.5:
        after = keyspace(owners_after(known, plan))
        assert plan_moves(after, weights, some, threshold=0.3).moves == ()


def test_an_empty_keyspace_stays_where_it_is() -> None:
    """A few first sessions are no reason to move anything."""
    some = [EMPTY] * MANY
    for slot in range(10):
        some[slot] = Load(sessions=1, items=50, nbytes=50_000, writes=0.05)
    assert plan_moves(keyspace(assign(MANY, alike(4))), alike(4), some).moves == ()


def test_a_few_writes_seen_by_chance_move_nothing() -> None:
    stored = replace(EVEN, writes=0.0)
    some = [stored] * MANY
    some[7] = replace(stored, writes=0.2)
    assert plan_moves(keyspace(assign(MANY, alike(4))), alike(4), some).moves == ()


def test_measured_writes_count() -> None:
    known = keyspace(assign(MANY, alike("ab")))
    some = [replace(EVEN, writes=5.0 if owner == "a" else 0.1) for owner in known.owners]
    plan = plan_moves(known, alike("ab"), some)
    assert {(move.source, move.target) for move in plan.moves} == {("a", "b")}
    assert plan.after["a"].load.writes < plan.before["a"].load.writes


# --- where slots differ much


def zipf_tenants(tenants: int, *, spread: int, items: int) -> list[Load]:
    """Slots under tenants of which the n-th has 1/n of what the largest one has."""
    total = sum(1 / n for n in range(1, tenants + 1))
    held = [0.0] * MANY
    for n in range(1, tenants + 1):
        slots = tenant_slots(f"tenant-{n}", slots=MANY, spread=spread)
        assert slots is not None
        for slot in slots:
            held[slot] += items / total / n / len(slots)
    return [Load(items=int(one), nbytes=900 * int(one)) for one in held]


def test_ten_thousand_zipf_tenants_on_32_shards_balance_by_few_moves() -> None:
    some = zipf_tenants(10_000, spread=16, items=10_000_000)
    weights = alike(32)
    plan = plan_moves(keyspace(assign(MANY, weights)), weights, some)
    assert plan.imbalance_before > 1.3
    assert plan.imbalance_after <= 1.05
    assert len(plan.moves) <= 30
    assert plan.load.nbytes < 0.1 * sum(one.nbytes for one in some)


def test_a_slot_that_is_more_than_a_share_stays_and_loses_its_neighbours() -> None:
    some = [EVEN] * MANY
    some[5] = times(MANY)
    weights = alike(4)
    plan = plan_moves(keyspace(assign(MANY, weights)), weights, some)
    assert 5 not in {move.slot for move in plan.moves}
    assert plan.after["shard_00"].slots == 1
    others = [shard.ratio for name, shard in plan.after.items() if name != "shard_00"]
    assert max(others) / min(others) < 1.01


def test_of_two_ways_the_one_with_fewer_moves_is_taken() -> None:
    """One slot of ten is exactly what is too much."""
    known = keyspace(["a"] * 16 + ["b"] * 16)
    plan = plan_moves(known, alike("ab"), [EVEN] * 14 + [times(10)] * 2 + [EVEN] * 16)
    assert [move.load for move in plan.moves] == [times(10)]


def test_of_two_ways_the_one_that_copies_less_is_taken() -> None:
    """What is too much fits into two shards, half of it into each."""
    some = [times(n) for n in (10, 10, 5, 5, 10, 5, 10, 5)]
    plan = plan_moves(keyspace("aaaabbcc"), alike("abc"), some)
    assert [(move.load, move.target) for move in plan.moves] == [(times(5), "b"), (times(5), "c")]
    assert isclose(plan.imbalance_after, 1, rel_tol=0.001)


def test_within_the_threshold_small_slots_stay() -> None:
    """The four tenths of a slot that are still too much in the end could be made up of them."""
    small = replace(EVEN, items=500, nbytes=400_000, writes=0.1)
    known = keyspace("a" * 39 + "b" * 25)
    plan = plan_moves(known, alike("ab"), [EVEN] * 30 + [small] * 10 + [EVEN] * 24)
    assert [move.load for move in plan.moves] == [EVEN] * 3
    assert 1.01 < plan.imbalance_after < 1.02


def test_a_drained_shard_gives_its_heaviest_slots_first_to_where_they_fit() -> None:
    some = [times(n) for n in (1, 8, 1, 2)]
    plan = plan_moves(keyspace("aaaa"), {"a": 0, "b": 1, "c": 2}, some)
    assert [(move.slot, move.target) for move in plan.moves] == [
        (1, "c"),
        (3, "b"),
        (2, "b"),
        (0, "b"),
    ]


# --- summaries and estimates


def test_a_plan_says_what_it_copies_and_what_each_shard_carries() -> None:
    some = [Load(1, 10, 1000, 0.5), Load(2, 20, 2000), Load(3, 30, 3000), Load(4, 40, 4000)]
    plan = plan_of_slots(keyspace("aabb"), [3, 0, 0], "a", some, weights=alike("ab"))
    (move,) = plan.moves
    assert (move.slot, move.source, move.target, move.load) == (3, "b", "a", some[3])
    assert plan.load == some[3]
    assert plan.seconds(500) == 8
    assert plan.before["a"].load == Load(3, 30, 3000, 0.5)
    assert plan.after["a"].load == Load(7, 70, 7000, 0.5)
    assert [plan.after[name].slots for name in "ab"] == [3, 1]


def test_a_shard_that_is_not_named_has_a_share_and_no_wanted_one() -> None:
    plan = plan_moves(keyspace("aaaabbzz"), alike("ab"), [EMPTY] * 8)
    assert plan.unreachable == ("z",)
    assert plan.after["z"] == ShardLoad(slots=2, load=EMPTY, share=0.25, wanted=None)
    assert (plan.after["z"].ratio, plan.imbalance_after) == (0, 1)
    assert [plan.after[name].wanted for name in "ab"] == [0.375, 0.375]


def test_slots_go_where_they_are_sent_whatever_it_does_to_the_balance() -> None:
    known = keyspace("aabb")
    plan = plan_of_slots(known, range(4), "b", [EVEN] * 4, weights={"a": 1, "b": 0})
    assert [move.slot for move in plan.moves] == [0, 1]
    assert plan.imbalance_after == inf


# --- wrong input


@pytest.mark.parametrize(
    ("weights", "words"),
    [({}, "no shard can take slots"), ({"a": 0}, "no shard"), ({"a": -1, "b": 1}, "'a' weighs")],
)
def test_somebody_has_to_take_the_slots(weights: Mapping[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_moves(keyspace("aabb"), weights, [EMPTY] * 4)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"most": -1}, "at the most"),
    ],
)
def test_limits_are_not_negative(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_moves(keyspace("aabb"), alike("ab"), [EMPTY] * 4, **wrong)


def test_each_slot_has_a_load() -> None:
    with pytest.raises(UsageError, match="3 loads for 4 slots"):
        plan_moves(keyspace("aabb"), alike("ab"), [EMPTY] * 3)


@pytest.mark.parametrize(
    ("slots", "target", "words"),
    [([4], "a", "no slot 4"), ([0], "c", "no shard 'c'"), ([3], "a", "no shard 'z'")],
)
def test_slots_move_between_shards_that_there_are(
    slots: list[int], target: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        plan_of_slots(keyspace("abbz"), slots, target, [EMPTY] * 4, weights=alike("ab"))


def test_a_shard_is_drained_into_others() -> None:
    assert drained({"a": 2.0, "b": 1.0}, "a") == {"a": 0.0, "b": 1.0}
    with pytest.raises(UsageError, match="no shard 'c'"):
        drained({"a": 2.0, "b": 1.0}, "c")
    with pytest.raises(UsageError, match="no other one"):
        drained({"a": 2.0, "b": 0.0}, "a")
