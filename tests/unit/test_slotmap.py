"""The map that shards' records make, and records that contradict each other: without a database."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardgate.agreement import Memory, Plan, contradictions
from shardgate.errors import OwnershipConflict
from shardgate.handover import SlotRow
from shardgate.records import HASH, Identity, Peer, ShardRecord
from shardgate.slotmap import all_said, build_map, ranges, unnamed_owners, unserved
from shardgate.sql.schema import SCHEMA_VERSION

PLAN = Plan("main", slots=4, spread=None, weights={"a": 1, "b": 1})
UUID = {"a": "uuid-a", "b": "uuid-b", "c": "uuid-c"}


def _record(name: str, owners: str, *, epochs: str = "1111", peers: str = "ab") -> ShardRecord:
    """A shard's record; ``owners`` and ``epochs`` have a character for each slot."""
    identity = Identity(
        shard_uuid=UUID[name],
        name=name,
        keyspace="main",
        keyspace_uuid="uuid-of-main",
        slots=4,
        spread=None,
        hash=HASH,
        schema_version=SCHEMA_VERSION,
        map_version=1,
    )
    rows = tuple(
        SlotRow(slot, UUID[owner], "owned" if owner == name else "elsewhere", int(epochs[slot]))
        for slot, owner in enumerate(owners)
    )
    known = {UUID[peer]: Peer(peer, 1) for peer in peers if peer != name}
    return ShardRecord(identity, known, rows)


def _records(**records: ShardRecord) -> dict[str, ShardRecord]:
    return records


def _changed(record: ShardRecord, **changes: Any) -> ShardRecord:
    return replace(record, identity=replace(record.identity, **changes))


def _state(record: ShardRecord, slot: int, state: str) -> ShardRecord:
    rows = [replace(row, state=state) if row.slot == slot else row for row in record.rows]
    return replace(record, rows=tuple(rows))


def test_the_map_of_shards_that_agree() -> None:
    known = build_map(PLAN, _records(a=_record("a", "aabb"), b=_record("b", "aabb")))
    assert (known.name, known.slots, known.spread) == ("main", 4, None)
    assert known.owners == ("a", "a", "b", "b")
    assert known.epochs == (1, 1, 1, 1)


def test_one_shard_knows_for_a_peer_that_is_down() -> None:
    assert build_map(PLAN, {"b": _record("b", "aabb")}).owners == ("a", "a", "b", "b")


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_higher_epoch_counts(order: str) -> None:
    records = {"a": _record("a", "aaaa"), "b": _record("b", "abbb", epochs="1222")}
    known = build_map(PLAN, {name: records[name] for name in order})
    assert known.owners == ("a", "b", "b", "b")
    assert known.epochs == (1, 2, 2, 2)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_at_one_epoch_a_claim_goes_before_a_hint(order: str) -> None:
    """a has released slot 3 and b owns it, as in the last step of a move."""
    records = {"a": _record("a", "abba"), "b": _record("b", "abbb")}
    records["a"] = _state(records["a"], 3, "released")
    assert build_map(PLAN, {name: records[name] for name in order}).owners == ("a", "b", "b", "b")


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_draining_owner_still_claims(order: str) -> None:
    records = {"a": _state(_record("a", "aabb"), 0, "draining"), "b": _record("b", "babb")}
    records["b"] = _state(records["b"], 0, "importing")
    assert build_map(PLAN, {name: records[name] for name in order}).owners[0] == "a"


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("source", "ab")
def test_at_one_epoch_who_owns_goes_before_who_drains(order: str, source: str) -> None:
    """The mover died between the decision on the target and the release of the source."""
    target = "b" if source == "a" else "a"
    records = {"a": _record("a", "aaaa"), "b": _record("b", "bbbb")}
    records[source] = _state(records[source], 0, "draining")
    known = build_map(PLAN, {name: records[name] for name in order})
    assert known.owners[0] == target


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_shard_that_imports_a_slot_does_not_have_it_yet(order: str) -> None:
    records = {"a": _record("a", "aabb"), "b": _record("b", "babb", epochs="2111")}
    records["b"] = _state(records["b"], 0, "importing")
    known = build_map(PLAN, {name: records[name] for name in order})
    assert (known.owners[0], known.epochs[0]) == ("a", 1)
    assert unserved(PLAN, records) == {}


def test_a_slot_that_nobody_claims_concerns_whom_the_best_hint_names() -> None:
    """b was put back to before slots 1, 2 and 3 had come to it; c remembers still less."""
    a, b = _record("a", "abbb", epochs="1222"), _record("b", "aaaa")
    c = _record("c", "aaaa")
    problems = unserved(PLAN, _records(a=a, b=b, c=c))
    assert list(problems) == ["b"]
    assert problems["b"].startswith("slots 1-3 are claimed by no shard; shard 'b' is the last")
    assert unserved(PLAN, _records(a=a, b=_record("b", "abbb"), c=c)) != {}  # epochs too low
    assert unserved(PLAN, _records(a=a, b=_record("b", "abbb", epochs="1222"), c=c)) == {}


def test_a_slot_that_is_claimed_at_a_lower_epoch_than_others_know_of() -> None:
    """Calls are sent to b by the hint, and b refuses them: a shard with a claim is to be asked."""
    a, b, c = _record("a", "aaaa"), _record("b", "aaaa"), _record("c", "abaa", epochs="1311")
    problems = unserved(PLAN, _records(a=a, b=b, c=c))
    assert list(problems) == ["a"]
    assert problems["a"].startswith("slots 1 are claimed by shard 'a', and others have recorded")


def test_of_a_slot_whose_owner_was_not_asked_nothing_is_known() -> None:
    assert unserved(PLAN, _records(a=_record("a", "aacc", peers="abc"))) == {}
    assert unserved(PLAN, _records(a=_record("a", "aabb"))) == {}


def test_a_slot_of_which_nothing_is_said() -> None:
    with pytest.raises(OwnershipConflict, match="no shard has a record of slot 3"):
        all_said(PLAN, [_record("a", "aab")])


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([4], "4"), ([1, 2, 3, 7], "1-3, 7"), ([0, 2, 3], "0, 2-3")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_a_shard_without_slots_has_a_record_all_the_same() -> None:
    plan = replace(PLAN, weights={"a": 1, "b": 1, "c": 1})
    records = _records(a=_record("a", "aabb"), c=_record("c", "aabb"))
    assert set(build_map(plan, records).owners) == {"a", "b"}


def test_a_slot_of_which_nobody_has_a_record() -> None:
    with pytest.raises(OwnershipConflict, match=r"'main'.*no shard has a record of slot 3"):
        build_map(PLAN, _records(a=_record("a", "aab"), b=_record("b", "aab")))


def test_an_owner_that_the_settings_do_not_name() -> None:
    """Its slots are known to be its own; the others can be served."""
    known = build_map(PLAN, {"a": _record("a", "aacc", peers="abc")})
    assert known.owners == ("a", "a", "c", "c")
    assert known.uuids["c"] == UUID["c"]
    assert list(unnamed_owners(PLAN, known)) == ["c"]
    assert "2 slots belong to shard 'c'" in unnamed_owners(PLAN, known)["c"]


def test_an_owner_that_nobody_knows() -> None:
    assert build_map(PLAN, {"a": _record("a", "aacc")}).owners[2:] == ("uuid-c", "uuid-c")


def _wrong(answers: dict[str, ShardRecord | None], **options: Any) -> dict[str, str]:
    names = sorted(answers)
    plan = replace(PLAN, weights=dict.fromkeys(names, 1.0))
    return {name: wrong.reason for name, wrong in contradictions(plan, answers, **options).items()}


def test_nothing_is_wrong_with_shards_that_fit() -> None:
    assert _wrong({"a": _record("a", "aabb"), "b": _record("b", "aabb")}) == {}
    assert _wrong({}) == {}
    assert _wrong({"a": None, "b": None}) == {}


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"name": "a"}, "URL"),
        ({"keyspace": "eu"}, "URL"),
        ({"slots": 8}, "fixed when the keyspace was created"),
        ({"spread": 2}, "fixed when the keyspace was created"),
        ({"hash": "other"}, "another version"),
        ({"schema_version": 99}, "another version"),
        ({"shard_uuid": "another"}, "URL"),
    ],
    ids=str,
)
def test_a_shard_that_is_not_the_right_one_is_named(changes: dict[str, object], hint: str) -> None:
    ((what, value),) = changes.items()
    found = _wrong({"a": _record("a", "aabb"), "b": _changed(_record("b", "aabb"), **changes)})
    assert list(found) == ["b"]
    assert found["b"].startswith(f"shard 'b' says that its {what} is {value!r}, but it should be ")
    assert hint in found["b"]


@pytest.mark.parametrize("stranger", "abc")
def test_the_stranger_among_three_is_the_one_that_differs(stranger: str) -> None:
    """Whatever it says of the others does not count: it knows other shards of these names."""
    records: dict[str, ShardRecord | None] = {}
    for name in "abc":
        records[name] = _record(name, "abca", peers="abc")
    elsewhere = {f"other-{name}": Peer(name, 99) for name in "abc" if name != stranger}
    other = _changed(_record(stranger, "abca"), keyspace_uuid="another", shard_uuid="other")
    records[stranger] = replace(other, peers=elsewhere)
    assert list(_wrong(records)) == [stranger]


def test_as_many_shards_of_one_keyspace_as_of_another_one() -> None:
    records = {"a": _record("a", "aabb"), "b": _record("b", "aabb")}
    records["b"] = _changed(records["b"], keyspace_uuid="another")
    found = _wrong(dict(records))
    assert list(found) == ["a", "b"]
    assert "just as many" in found["a"]


def test_every_shard_that_is_not_the_right_one_is_named() -> None:
    """As after two URLs were swapped."""
    assert list(_wrong({"a": _record("b", "aabb"), "b": _record("a", "aabb")})) == ["a", "b"]


def test_shards_that_have_lost_their_record() -> None:
    known = _record("a", "aabb")
    assert _wrong({"a": known, "b": None}) == {
        "b": "shard 'b' has no record of its own, but its peers know it as uuid-b: is its URL the "
        "right one, or was its database emptied?"
    }
    assert _wrong({"a": known, "c": None}) == {}  # new: nobody knows it


def _knowing(record: ShardRecord, peer: str, version: int) -> ShardRecord:
    return replace(record, peers={**record.peers, UUID[peer]: Peer(peer, version)})


def test_an_older_copy_is_behind_what_its_peers_have_recorded() -> None:
    """It may be read from: the slots that are its own still are."""
    records = {
        "a": _knowing(_record("a", "aabb"), "b", 3),
        "b": _changed(_record("b", "aabb"), map_version=2),
    }
    assert "version 2 of its slot map, and version 3" in _wrong(dict(records))["b"]
    assert list(_wrong(dict(records))) == ["b"]
    assert contradictions(PLAN, records)["b"].reads
    records["b"] = _changed(records["b"], map_version=3)
    assert _wrong(dict(records)) == {}


def test_an_older_copy_is_behind_what_this_process_has_seen() -> None:
    alone = {"b": _changed(_record("b", "aabb"), map_version=2)}
    assert list(_wrong(dict(alone), memory=Memory(versions={UUID["b"]: 3}))) == ["b"]
    assert _wrong(dict(alone), memory=Memory(versions={UUID["b"]: 2, UUID["a"]: 9})) == {}


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_two_claims_the_higher_epoch_is_right(order: str) -> None:
    records = {"a": _record("a", "aaab", epochs="1121"), "b": _record("b", "abbb", epochs="1211")}
    found = _wrong({name: records[name] for name in order})
    assert sorted(found) == ["a", "b"]  # slot 1 is b's, slot 2 is a's
    assert "'a' claims slot 1 at epoch 1, and shard 'b' claims it at epoch 2" in found["a"]
    assert "'b' claims slot 2 at epoch 1, and shard 'a' claims it at epoch 2" in found["b"]


def test_of_two_claims_at_one_epoch_neither_is_right() -> None:
    records = {"a": _record("a", "aaab"), "b": _record("b", "abbb")}
    assert sorted(_wrong(dict(records))) == ["a", "b"]


def test_a_slot_that_is_being_moved_is_not_claimed_twice() -> None:
    """The source is draining, and the target owns it already."""
    records = {
        "a": _state(_record("a", "aaab", epochs="1121"), 2, "draining"),
        "b": _record("b", "aabb", epochs="1121"),
    }
    assert _wrong(dict(records)) == {}
