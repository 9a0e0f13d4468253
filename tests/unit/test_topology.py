"""The slot map as a value, and the sharing out of slots."""

from __future__ import annotations

from collections import Counter
from dataclasses import FrozenInstanceError
from fractions import Fraction
from itertools import product
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardgate.errors import UsageError
from shardgate.topology import KeyspaceMap, assign, reassign

if TYPE_CHECKING:
    from collections.abc import Mapping

names = st.sampled_from([f"shard_{n}" for n in range(12)])
weight = st.integers(1, 20) | st.floats(0.01, 100)
weightings = st.dictionaries(names, weight, min_size=1)
counts = st.integers(0, 12).map(lambda bits: 2**bits)


def small_map(**changes: Any) -> KeyspaceMap:
    fields: dict[str, Any] = {
        "name": "main",
        "slots": 4,
        "spread": None,
        "owners": ("a", "a", "b", "b"),
        "epochs": (1, 1, 1, 5),
    }
    return KeyspaceMap(**fields | changes)


def exact_shares(slots: int, weights: Mapping[str, float]) -> dict[str, Fraction]:
    total = sum(Fraction(each) for each in weights.values())
    return {name: slots * Fraction(each) / total for name, each in weights.items()}


def within_one_slot(owners: tuple[str, ...], weights: Mapping[str, float]) -> bool:
    held = Counter(owners)
    shares = exact_shares(len(owners), weights)
    return set(held) <= set(weights) and all(
        floor(share) <= held[name] <= ceil(share) for name, share in shares.items()
    )


def moved(before: tuple[str, ...], after: tuple[str, ...]) -> set[tuple[int, str, str]]:
    pairs = zip(before, after, strict=True)
    return {(slot, one, two) for slot, (one, two) in enumerate(pairs) if one != two}


# --- the first assignment


def test_equal_weights_share_evenly_in_runs() -> None:
    assert assign(8, {"b": 1, "a": 1}) == ("a", "a", "a", "a", "b", "b", "b", "b")


def test_remainders_go_to_the_largest_then_by_name() -> None:
    assert Counter(assign(8, {"a": 1, "b": 1, "c": 1})) == {"a": 3, "b": 3, "c": 2}
    assert Counter(assign(16, {"a": 5, "b": 3, "c": 1})) == {"a": 9, "b": 5, "c": 2}


@pytest.mark.parametrize(("shards", "most"), [(3, 1.001), (4, 1.001), (31, 1.01), (64, 1.016)])
def test_no_shard_is_much_fuller_than_the_mean(shards: int, most: float) -> None:
    held = Counter(assign(4096, {f"shard_{n}": 1 for n in range(shards)}))
    assert len(held) == shards
    assert max(held.values()) * shards / 4096 <= most


@given(counts, weightings)
def test_each_shard_is_within_one_slot_of_its_share(slots: int, weights: dict[str, float]) -> None:
    owners = assign(slots, weights)
    assert len(owners) == slots
    assert within_one_slot(owners, weights)


@given(counts, weightings, st.randoms())
def test_the_order_of_the_weights_does_not_count(
    slots: int, weights: dict[str, float], random: Any
) -> None:
    shuffled = list(weights.items())
    random.shuffle(shuffled)
    owners = assign(slots, weights)
    assert assign(slots, dict(shuffled)) == owners
    assert reassign(owners, dict(shuffled)) == reassign(owners, weights)


def test_weights_are_added_without_overflow() -> None:
    assert assign(4, {"a": 1e308, "b": 1e308}) == ("a", "a", "b", "b")


def test_a_shard_without_weight_gets_nothing() -> None:
    assert assign(4, {"a": 1, "b": 0}) == ("a",) * 4


@pytest.mark.parametrize("wrong", [-1, -0.5, float("nan"), float("inf")])
def test_a_weight_is_finite_and_not_negative(wrong: float) -> None:
    with pytest.raises(UsageError, match="shard 'b' weighs"):
        assign(4, {"a": 1, "b": wrong})


@pytest.mark.parametrize("weights", [{}, {"a": 0}])
def test_somebody_has_to_take_the_slots(weights: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="no shard can take slots"):
        assign(4, weights)


def test_the_slot_count_is_a_power_of_two() -> None:
    with pytest.raises(UsageError, match="12 slots"):
        assign(12, {"a": 1})
    with pytest.raises(UsageError, match="0 slots"):
        reassign((), {"a": 1})


# --- the next assignment


def fewest_moves(owners: tuple[str, ...], weights: Mapping[str, float]) -> int:
    """Try every rounding of the shares: a shard keeps at most its quota, the rest has to move."""
    held = Counter(owners)
    shares = exact_shares(len(owners), weights)
    roundings = product(*({floor(share), ceil(share)} for share in shares.values()))
    return min(
        len(owners) - sum(min(held[name], n) for name, n in zip(shares, quotas, strict=True))
        for quotas in roundings
        if sum(quotas) == len(owners)
    )


@given(st.integers(0, 5).flatmap(lambda bits: st.tuples(*[names] * 2**bits)), weightings)
def test_no_fewer_slots_could_move(owners: tuple[str, ...], weights: dict[str, float]) -> None:
    after = reassign(owners, weights)
    assert within_one_slot(after, weights)
    assert len(moved(owners, after)) == fewest_moves(owners, weights)


@given(counts, weightings)
def test_nothing_moves_while_nothing_changes(slots: int, weights: dict[str, float]) -> None:
    owners = assign(slots, weights)
    assert reassign(owners, weights) == owners


@given(counts, weightings, weightings)
def test_a_second_pass_moves_nothing(
    slots: int, before: dict[str, float], after: dict[str, float]
) -> None:
    owners = reassign(assign(slots, before), after)
    assert reassign(owners, after) == owners


@given(counts, st.integers(1, 12), weight)
def test_a_new_shard_takes_its_share_and_nobody_else_gains(
    slots: int, shards: int, new_weight: float
) -> None:
    weights: dict[str, float] = {f"shard_{n}": 1 for n in range(shards)}
    before = assign(slots, weights)
    wider = {**weights, "new": new_weight}
    moves = moved(before, reassign(before, wider))
    share = exact_shares(slots, wider)["new"]
    assert {to for _, _, to in moves} <= {"new"}
    assert floor(share) <= len(moves) <= ceil(share)


@given(counts, st.integers(2, 12))
def test_a_leaving_shard_gives_its_slots_and_nobody_else_loses(slots: int, shards: int) -> None:
    weights: dict[str, float] = {f"shard_{n}": 1 for n in range(shards)}
    before = assign(slots, weights)
    for rest in ({**weights, "shard_0": 0}, {n: w for n, w in weights.items() if n != "shard_0"}):
        after = reassign(before, rest)
        moves = moved(before, after)
        assert {origin for _, origin, _ in moves} <= {"shard_0"}
        assert len(moves) == before.count("shard_0")
        assert "shard_0" not in after


@pytest.mark.parametrize(("shards", "moves"), [(1, 2048), (4, 819), (32, 124), (64, 63)])
def test_growing_by_one_moves_the_ideal_share(shards: int, moves: int) -> None:
    weights: dict[str, float] = {f"shard_{n}": 1 for n in range(shards)}
    before = assign(4096, weights)
    assert len(moved(before, reassign(before, {**weights, "new": 1}))) == moves


def test_growing_step_by_step_stays_balanced() -> None:
    weights: dict[str, float] = {"shard_00": 1}
    owners = assign(4096, weights)
    for n in range(1, 64):
        weights[f"shard_{n:02}"] = 1
        owners = reassign(owners, weights)
        assert within_one_slot(owners, weights)


# --- the map as a value


def test_a_map_tells_owners() -> None:
    keyspace = small_map()
    assert [keyspace.owner(slot) for slot in range(4)] == ["a", "a", "b", "b"]
    assert keyspace.slots_of("b") == (2, 3)
    assert keyspace.slots_of("c") == ()


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_that_does_not_exist_is_refused(slot: int) -> None:
    with pytest.raises(UsageError, match=f"no slot {slot}"):
        small_map().owner(slot)
    with pytest.raises(UsageError, match=f"no slot {slot}"):
        small_map().with_slot(slot, "a", 9)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"slots": 3}, "3 slots: use a power of two"),
        ({"slots": 8}, "keyspace 'main': 4 owners for 8 slots"),
        ({"epochs": (1,)}, "keyspace 'main': 1 epochs for 4 slots"),
        ({"epochs": (1, 1, -2, 1)}, "slot 2 has a negative epoch"),
        ({"owners": ("a", "", "b", "b")}, "slot 1 has no owner"),
        ({"spread": 0}, "spread is 0; use 1 to 4"),
        ({"spread": 5}, "spread is 5; use 1 to 4"),
    ],
)
def test_a_map_that_disagrees_with_itself_is_refused(
    changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        small_map(**changes)


def test_learning_makes_a_new_map() -> None:
    before = small_map()
    after = before.with_slot(1, "c", 2)
    assert after == small_map(owners=("a", "c", "b", "b"), epochs=(1, 2, 1, 5))
    assert before == small_map()


def test_old_news_is_ignored() -> None:
    keyspace = small_map()
    assert keyspace.with_slot(3, "a", 4) is keyspace
    assert keyspace.with_slot(3, "b", 5) is keyspace


def test_an_equal_epoch_may_name_the_target_of_a_move() -> None:
    assert small_map().with_slot(3, "a", 5).owner(3) == "a"


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.integers(0, 9))))
def test_epochs_never_go_backwards(news: list[tuple[int, str, int]]) -> None:
    keyspace = small_map()
    for slot, owner, epoch in news:
        learned = keyspace.with_slot(slot, owner, epoch)
        assert all(old <= new for old, new in zip(keyspace.epochs, learned.epochs, strict=True))
        assert learned.epochs[slot] == max(epoch, keyspace.epochs[slot])
        keyspace = learned


def test_a_map_cannot_be_changed() -> None:
    owners: Any = ["a", "a", "b", "b"]
    keyspace = small_map(owners=owners)
    owners[0] = "z"
    assert keyspace.owner(0) == "a"
    with pytest.raises(FrozenInstanceError):
        keyspace.slots = 8  # type: ignore[misc]  # the point of the test
