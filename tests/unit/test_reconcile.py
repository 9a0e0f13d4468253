"""What is to be done about a shard, by the records that shards could have: without a database."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardgate.agreement import Contradiction, Plan
from shardgate.control.reconcile import Act, Change, Remedy, find_remedy
from shardgate.errors import KeyspaceNotCreated, OwnershipConflict, ShardUnavailable
from shardgate.handover import CLAIMING, OWNED, SlotRow
from shardgate.records import HASH, Identity, Peer, ShardRecord
from shardgate.slotmap import Reading, all_said, unserved
from shardgate.sql.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

SLOTS = 4
STATES = {"O": "owned", "D": "draining", "I": "importing", "e": "elsewhere", "r": "released"}
BEHIND = Contradiction("it is behind", reads=True)
STRANGER = Contradiction("it is another shard")


def plan(names: str = "abc") -> Plan:
    return Plan("main", slots=SLOTS, spread=None, weights=dict.fromkeys(names, 1.0))


def record(name: str, rows: str, *, version: int = 5, peers: Mapping[str, int]) -> ShardRecord:
    """A shard's record; each slot is owner, state and epoch, as in "aO1 be2"."""
    identity = Identity(
        shard_uuid=f"uuid-{name}",
        name=name,
        keyspace="main",
        keyspace_uuid="uuid-of-main",
        slots=SLOTS,
        spread=None,
        hash=HASH,
        schema_version=SCHEMA_VERSION,
        map_version=version,
    )
    said = tuple(
        SlotRow(slot, f"uuid-{row[0]}", STATES[row[1]], int(row[2:]))
        for slot, row in enumerate(rows.split())
    )
    known = {f"uuid-{peer}": Peer(peer, has) for peer, has in peers.items() if peer != name}
    return ShardRecord(identity, known, said)


def reading(
    wrong: Mapping[str, Contradiction] | None = None, down: str = "", **rows: str | None
) -> Reading:
    """What shards have said whose slot maps are at version 5, as everybody knows."""
    peers = dict.fromkeys(rows, 5)
    records = {
        name: None if said is None else record(name, said, peers=peers)
        for name, said in rows.items()
    }
    unavailable = {name: ShardUnavailable(f"shard {name!r} is away", shard=name) for name in down}
    return Reading(records, unavailable, wrong or {})


def about_first_slot(**first: str) -> Remedy:
    """What is to be done about b, which is behind, where only slot 0 is in question."""
    rest = {"a": "aO1 be1 ce1", "b": "ae1 bO1 ce1", "c": "ae1 be1 cO1"}
    rows: dict[str, Any] = {name: f"{said} {rest[name]}" for name, said in first.items()}
    return find_remedy(plan(), reading({"b": BEHIND}, **rows), "b")


def only(remedy: Remedy) -> Change:
    (change,) = remedy.changes
    assert change.after.slot == 0
    return change


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        ("aO2", "bO1", "ae2"),
        ("aD2", "bO1", "ae2"),
        ("aO2", "bD1", "ae1"),
        ("aO2", "bD2", "be1"),  # the mover died after the decision, before the release
        ("aO2", "bO1", "ce3"),  # a has to be reconciled, too
    ],
)
def test_a_slot_is_given_up_to_a_claim_that_counts_more(a: str, b: str, c: str) -> None:
    remedy = about_first_slot(a=a, b=b, c=c)
    assert (only(remedy).act, remedy.loses) == (Act.GIVE, False)
    assert only(remedy).after == SlotRow(0, "uuid-a", "elsewhere", 2)
    assert remedy.steps[0] == "give slots 0 up to shard 'a', which owns them"


@pytest.mark.parametrize("state", "OD")
def test_of_two_equal_claims_one_is_given_up_and_something_may_be_lost(state: str) -> None:
    remedy = about_first_slot(a=f"a{state}3", b=f"b{state}3", c="be3")
    assert (only(remedy).act, remedy.loses) == (Act.CONCEDE, True)
    assert only(remedy).after == SlotRow(0, "uuid-a", "elsewhere", 3)
    assert "claims them at the same epoch, without what only this shard" in remedy.steps[0]


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        ("aO1", "bO2", "ae1"),
        ("aD2", "bO2", "ae2"),  # the source of a move that was decided
        ("be1", "bO2", "ae2"),
        ("be2", "bD2", "cI3"),  # a move to c that goes on
        ("be2", "bO2", "cI3"),
    ],
)
def test_the_best_claim_is_kept(a: str, b: str, c: str) -> None:
    remedy = about_first_slot(a=a, b=b, c=c)
    assert remedy.changes == ()
    assert len(remedy.steps) == 1


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        ("ce4", "bO1", "be1"),  # c was put back, too
        ("be4", "bO1", "ae1"),  # it went and came back after the copy was made
        ("aO1", "bO2", "ae4"),
        ("ce3", "bD2", "cI4"),
    ],
)
def test_a_claim_is_not_given_up_to_a_mere_hint(a: str, b: str, c: str) -> None:
    remedy = about_first_slot(a=a, b=b, c=c)
    assert (only(remedy).act, remedy.loses) == (Act.KEEP, True)
    top = max(int(said[2:]) for said in (a, b, c))
    assert only(remedy).after == SlotRow(0, "uuid-b", "owned", top + 1)
    assert remedy.steps[0].startswith("have it keep slots 0, which it alone claims, without")


def test_a_slot_is_not_kept_against_a_shard_that_the_settings_lack() -> None:
    with pytest.raises(OwnershipConflict, match=r"slot 0 .* uuid-d .*add it to the shards"):
        about_first_slot(a="de4", b="bO1", c="be1")


def test_what_it_says_of_others_is_corrected_where_it_is_older() -> None:
    remedy = about_first_slot(a="aO3", b="ce1", c="ae3")
    assert (only(remedy).act, remedy.loses) == (Act.CORRECT, False)
    assert only(remedy).after == SlotRow(0, "uuid-a", "elsewhere", 3)
    assert remedy.steps[0] == "correct what it says of 1 slots of other shards"
    assert about_first_slot(a="aO3", b="ae3", c="ae3").changes == ()
    assert about_first_slot(a="aO3", b="ce4", c="ae3").changes == ()


@pytest.mark.parametrize("b", ["ae1", "ar1", "bI4", "ce2"])
def test_a_slot_that_nobody_claims_is_taken_by_whom_the_best_hint_names(b: str) -> None:
    remedy = about_first_slot(a="br3", b=b, c="ae1")
    assert (only(remedy).act, remedy.loses) == (Act.TAKE, True)
    assert only(remedy).after == SlotRow(0, "uuid-b", "owned", max(3, int(b[2:])) + 1)
    assert remedy.steps[0].startswith("have it own slots 0 again, without")


def test_a_slot_that_is_another_shards_to_take_is_left_and_said() -> None:
    remedy = about_first_slot(a="ce3", b="ae1", c="ae1")
    assert remedy.changes == ()
    assert remedy.notes == ("slots 0 are claimed by no shard; reconcile shard 'c' for them",)
    assert about_first_slot(a="ce3", b="be4", c="ae5").notes  # a's: of two hints, the higher one


def test_of_two_hints_at_one_epoch_every_shard_takes_the_same() -> None:
    rows = {"a": "be2 aO1 aO1 aO1", "b": "ae2 ae1 ae1 ae1"}
    wrong = {"a": BEHIND, "b": BEHIND}
    taken = [find_remedy(plan("ab"), reading(wrong, **rows), name).changes for name in "ab"]
    assert sorted(len(changes) for changes in taken) == [0, 1]


HEALTHY = {
    "a": "aO1 be1 ce1 ce1",
    "b": "ae1 bO1 ce1 ce1",
    "c": "ae1 be1 cO1 cO1",
}


def test_nothing_is_wrong() -> None:
    assert find_remedy(plan(), reading(**HEALTHY), "b") == Remedy("b", None)


def test_it_is_right_and_named_for_a_slot_that_nobody_claims() -> None:
    rows = HEALTHY | {"c": "ae1 be1 be2 cO1"}
    remedy = find_remedy(plan(), reading(**rows), "b")
    assert remedy.problem is not None
    assert "slots 2 are claimed by no shard" in remedy.problem
    assert [change.after for change in remedy.changes] == [SlotRow(2, "uuid-b", "owned", 3)]
    assert find_remedy(plan(), reading(**rows), "a").problem is None


@pytest.mark.parametrize("missing", ["unknown to it", "it is unknown", "published to nobody"])
def test_it_is_right_and_has_to_be_introduced(missing: str) -> None:
    """As after a reconciliation that was ended half-way."""
    told = reading(**HEALTHY)
    records = dict(told.created)
    if missing == "unknown to it":
        records["b"] = replace(records["b"], peers={})
    elif missing == "it is unknown":
        records["c"] = replace(records["c"], peers={"uuid-a": Peer("a", 5)})
    else:
        identity = replace(records["b"].identity, map_version=6)
        records["b"] = replace(records["b"], identity=identity)
    remedy = find_remedy(plan(), replace(told, records=records), "b")
    assert "do not know of each other" in str(remedy.problem)
    assert (remedy.map_version, remedy.changes, remedy.loses) == (None, (), False)
    assert len(remedy.steps) == 1
    assert remedy.steps[0].startswith("introduce it to its peers")


def test_a_shard_that_is_not_created_yet() -> None:
    with pytest.raises(KeyspaceNotCreated, match=r"shard 'd'.*create-tables"):
        find_remedy(plan("abcd"), reading(**HEALTHY, d=None), "d")


def test_a_shard_that_is_another_one() -> None:
    told = reading({"b": STRANGER, "c": STRANGER}, **HEALTHY)
    assert find_remedy(plan(), told, "b") == Remedy("b", "it is another shard")


def test_others_that_cannot_be_read_are_to_be_mended_first() -> None:
    for wrong in ({"b": BEHIND, "c": STRANGER}, {"b": STRANGER, "c": STRANGER}):
        rows = HEALTHY if wrong["b"] is BEHIND else HEALTHY | {"b": None}
        with pytest.raises(OwnershipConflict, match=r"before shard 'b', mend these: it is another"):
            find_remedy(plan(), reading(wrong, **rows), "b")


def test_others_that_are_behind_are_named() -> None:
    remedy = find_remedy(plan(), reading({"b": BEHIND, "c": BEHIND}, **HEALTHY), "b")
    assert remedy.notes == ("another shard is to be reconciled, too: it is behind",)


def test_others_that_do_not_answer_are_needed() -> None:
    rows = {name: HEALTHY[name] for name in "ab"}
    for wrong in ({}, {"b": BEHIND}):
        with pytest.raises(OwnershipConflict, match="shard 'c' is away"):
            find_remedy(plan(), reading(wrong, down="c", **rows), "b")
    with pytest.raises(ShardUnavailable, match="shard 'b' is away"):
        find_remedy(plan(), reading(down="b", a=HEALTHY["a"], c=HEALTHY["c"]), "b")


def test_an_emptied_shard_is_made_again() -> None:
    told = reading({"b": STRANGER}, a="aO1 be1 be3 ce1", b=None, c="ae1 be1 be1 cO1")
    peers = {"a": 5, "b": 7, "c": 5}
    records = dict(told.records) | {"a": record("a", "aO1 be1 be3 ce1", peers=peers)}
    remedy = find_remedy(plan(), replace(told, records=records), "b")
    assert remedy.lost is not None
    assert (remedy.lost.name, remedy.lost.shard_uuid) == ("b", "uuid-b")
    assert [change.before for change in remedy.changes] == [None] * SLOTS
    assert [change.after for change in remedy.changes] == [
        SlotRow(0, "uuid-a", "elsewhere", 1),
        SlotRow(1, "uuid-b", "owned", 2),
        SlotRow(2, "uuid-b", "owned", 4),
        SlotRow(3, "uuid-c", "elsewhere", 1),
    ]
    assert remedy.loses
    assert remedy.steps[1] == "have it own slots 1-2 again, without their sessions"
    assert remedy.map_version is not None
    assert remedy.map_version > 7


def test_of_several_emptied_shards_one_is_made_first() -> None:
    told = reading({"b": STRANGER, "c": STRANGER}, a=HEALTHY["a"], b=None, c=None)
    peers = dict.fromkeys("abc", 5)
    records = {"a": record("a", HEALTHY["a"], peers=peers), "b": None, "c": None}
    remedy = find_remedy(plan(), replace(told, records=records), "b")
    assert len(remedy.changes) == SLOTS
    assert remedy.notes[1] == "slots 2-3 are claimed by no shard; reconcile shard 'c' for them"


def test_no_copy_and_no_process_has_seen_the_version() -> None:
    remedy = about_first_slot(a="aO2", b="bO1", c="ae2")
    assert remedy.map_version is not None
    assert remedy.map_version >= 5 + 1000


def test_the_digest_stands_for_what_is_done() -> None:
    told = {"a": "aO2", "b": "bO1", "c": "ae2"}
    assert about_first_slot(**told).digest == about_first_slot(**told).digest
    assert about_first_slot(**told).digest != about_first_slot(**told | {"a": "aO3"}).digest


def _row(speaker: str) -> st.SearchStrategy[str]:
    own, other = (
        st.sampled_from([f"{speaker}{state}" for state in "ODI"]),
        st.sampled_from([f"{peer}{state}" for peer in "abc" if peer != speaker for state in "er"]),
    )
    epochs = st.integers(0, 4)
    return st.builds(lambda said, epoch: f"{said}{epoch}", own | other, epochs)


def _rows(speaker: str) -> st.SearchStrategy[str]:
    return st.lists(_row(speaker), min_size=SLOTS, max_size=SLOTS).map(" ".join)


SAID = st.fixed_dictionaries({name: _rows(name) for name in "abc"})


def everything(rows: Mapping[str, str]) -> Reading:
    return reading(dict.fromkeys("abc", BEHIND), **rows)


def applied(told: Reading, name: str) -> Reading:
    """What the shards say after one of them has been reconciled."""
    changed = {
        change.after.slot: change.after for change in find_remedy(plan(), told, name).changes
    }
    before = told.created[name]
    after = replace(before, rows=tuple(changed.get(row.slot, row) for row in before.rows))
    return replace(told, records={**told.records, name: after})


def claims(told: Reading, slot: int) -> dict[str, tuple[int, bool]]:
    """Who claims a slot, with what counts in a claim."""
    return {
        name: (row.epoch, row.state == OWNED)
        for name, one in told.created.items()
        for row in [one.rows[slot]]
        if row.owner == one.uuid and row.state in CLAIMING
    }


@given(SAID, st.sampled_from("abc"))
def test_no_claim_is_doubled_and_none_is_the_last_to_go(rows: dict[str, str], name: str) -> None:
    before = everything(rows)
    remedy, after = find_remedy(plan(), before, name), applied(before, name)
    lossy = {change.after.slot for change in remedy.changes if change.loses}
    for slot in range(SLOTS):
        was, now = claims(before, slot), claims(after, slot)
        assert now or not was
        others = [weight for peer, weight in now.items() if peer != name]
        assert now.get(name) not in others
        if name in was and name not in now and slot not in lossy:
            assert max(now.values()) > was[name]
        if name in now and now[name] != was.get(name):
            assert slot in lossy
            assert now[name][0] > max(one.rows[slot].epoch for one in before.created.values())


@given(SAID, st.permutations("abc"))
def test_when_all_are_reconciled_each_slot_is_served_by_one(
    rows: dict[str, str], order: list[str]
) -> None:
    told = everything(rows)
    for name in order:
        told = applied(told, name)
    assert unserved(plan(), told.usable) == {}
    for slot, said in enumerate(all_said(plan(), told.created.values())):
        assert said.claimant is not None
        assert len(claims(told, slot)) == 1
    for name in order:
        assert not any(change.loses for change in find_remedy(plan(), told, name).changes)
