"""The map that shards' records make, and records that do not fit together: without a database."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardgate.errors import OwnershipConflict
from shardgate.slotmap import (
    HASH,
    Identity,
    Plan,
    ShardRecord,
    SlotRow,
    build_map,
    check_identities,
    lost,
    mistaken,
)
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
        SlotRow(slot, UUID[owner], "owned", int(epochs[slot])) for slot, owner in enumerate(owners)
    )
    return ShardRecord(identity, {UUID[peer]: peer for peer in peers if peer != name}, rows)


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


def test_a_shard_without_slots_has_a_record_all_the_same() -> None:
    plan = replace(PLAN, weights={"a": 1, "b": 1, "c": 1})
    records = _records(a=_record("a", "aabb"), c=_record("c", "aabb"))
    assert set(build_map(plan, records).owners) == {"a", "b"}


def test_a_slot_of_which_nobody_has_a_record() -> None:
    with pytest.raises(OwnershipConflict, match=r"'main'.*no shard has a record of slot 3"):
        build_map(PLAN, _records(a=_record("a", "aab"), b=_record("b", "aab")))


def test_an_owner_that_the_settings_do_not_name() -> None:
    record = _record("a", "aacc", peers="abc")
    with pytest.raises(OwnershipConflict, match="slot 2 belongs to 'c', which"):
        build_map(PLAN, {"a": record})


def test_an_owner_that_nobody_knows() -> None:
    with pytest.raises(OwnershipConflict, match="slot 2 belongs to a shard with the UUID uuid-c"):
        build_map(PLAN, {"a": _record("a", "aacc")})


def test_nothing_is_wrong_with_shards_that_fit() -> None:
    records = _records(a=_record("a", "aabb"), b=_record("b", "aabb"))
    assert mistaken(PLAN, records) == {}
    check_identities(PLAN, records)
    assert mistaken(PLAN, {}) == {}
    check_identities(PLAN, {})


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
    records = _records(a=_record("a", "aabb"), b=_changed(_record("b", "aabb"), **changes))
    found = mistaken(PLAN, records)
    assert list(found) == ["b"]
    assert found["b"].startswith(f"shard 'b' says that its {what} is {value!r}, but it should be ")
    assert hint in found["b"]
    with pytest.raises(OwnershipConflict, match="keyspace 'main': shard 'b'") as caught:
        check_identities(PLAN, records)
    assert caught.value.keyspace == "main"


@pytest.mark.parametrize("stranger", "abc")
def test_the_stranger_among_three_is_the_one_that_differs(stranger: str) -> None:
    plan = replace(PLAN, weights={"a": 1, "b": 1, "c": 1})
    records = {name: _record(name, "abca") for name in "abc"}
    records[stranger] = _changed(records[stranger], keyspace_uuid="another")
    assert list(mistaken(plan, records)) == [stranger]


def test_every_shard_that_is_not_the_right_one_is_named() -> None:
    """As after two URLs were swapped."""
    records = _records(a=_record("b", "aabb"), b=_record("a", "aabb"))
    assert list(mistaken(PLAN, records)) == ["a", "b"]


def test_shards_that_have_lost_their_record() -> None:
    records = {"a": _record("a", "aabb")}
    assert lost(records, "ab") == {
        "b": "shard 'b' has no record of its own, but its peers know it as uuid-b: is its URL the "
        "right one, or was its database emptied?"
    }
    assert lost(records, "ac") == {}  # new: nobody knows it
    assert lost({}, "ab") == {}
