"""Routing: pure, total over checked ids, and only as clever as the topology it is given."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardgate.router import Route, route
from shardgate.slots import session_hash, slot_of, slot_of_stored, to_signed
from shardgate.topology import KeyspaceMap, assign

tenant_ids = st.text(st.characters(min_codepoint=0x30, max_codepoint=0x7E), min_size=1, max_size=64)
session_ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=255)


def keyspace(name: str, *, slots: int = 64, spread: int | None = None) -> KeyspaceMap:
    return KeyspaceMap(
        name=name,
        slots=slots,
        spread=spread,
        owners=assign(slots, {f"{name}_1": 1, f"{name}_2": 3}),
        epochs=tuple(range(1, slots + 1)),
    )


MAIN, EU = keyspace("main"), keyspace("eu", slots=16, spread=2)


def test_a_route_names_shard_slot_epoch_and_hash() -> None:
    # h is the golden 0x60BCEE637C9491FC, less 2**63; its top six bits are 24.
    assert route(MAIN, "acme", "chat-1") == Route(
        keyspace="main", slot=24, shard="main_2", epoch=25, h=0x60BCEE637C9491FC - 2**63
    )


@given(st.sampled_from([MAIN, EU]), tenant_ids, session_ids)
def test_a_route_follows_the_map(known: KeyspaceMap, tenant: str, session: str) -> None:
    found = route(known, tenant, session)
    h = session_hash(tenant, session, slots=known.slots, spread=known.spread)
    assert found.h == to_signed(h)
    assert slot_of_stored(found.h, known.slots) == found.slot
    assert found.slot == slot_of(h, known.slots)
    assert (found.shard, found.epoch) == (known.owner(found.slot), found.slot + 1)
    assert found.keyspace == known.name


@given(tenant_ids, session_ids)
def test_the_same_question_has_the_same_answer(tenant: str, session: str) -> None:
    assert route(EU, tenant, session) == route(EU, tenant, session)


@given(tenant_ids, session_ids)
def test_what_is_learned_changes_the_route_of_that_slot_alone(tenant: str, session: str) -> None:
    before = route(MAIN, tenant, session)
    learned = MAIN.with_slot(before.slot, "main_9", 1000)
    after = route(learned, tenant, session)
    assert (after.shard, after.epoch, after.slot) == ("main_9", 1000, before.slot)
    elsewhere = MAIN.with_slot((before.slot + 1) % 64, "main_9", 1000)
    assert route(elsewhere, tenant, session) == before


@given(tenant_ids, st.lists(session_ids, min_size=1, max_size=50))
def test_a_spread_keyspace_asks_few_slots(tenant: str, sessions: list[str]) -> None:
    assert len({route(EU, tenant, session).slot for session in sessions}) <= 2
