"""Ids, hash and slots: golden vectors, and properties that hold for all ids."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import mmh3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardgate import slots as slots_module
from shardgate.errors import UsageError
from shardgate.slots import (
    check_session_id,
    check_slot_count,
    check_tenant_id,
    hash_key,
    session_hash,
    slot_of,
    slot_of_stored,
    slot_range,
    to_signed,
)

TENANT_CHARACTERS = [chr(code) for code in range(0x21, 0x7F) if chr(code) != "/"]
tenant_ids = st.text(TENANT_CHARACTERS, min_size=1, max_size=64)
session_ids = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=255
)
slot_counts = st.integers(0, 16).map(lambda bits: 2**bits)
hashes = st.integers(0, 2**64 - 1)

# Stored data depends on every line: a line that fails means that the code is wrong, not the line.
# (tenant, session, slots, spread, h, slot), made with a second implementation of the same rules.
GOLDEN = [
    ("acme", "chat-1", 4096, None, 0x60BCEE637C9491FC, 1547),
    ("acme", "chat-2", 4096, None, 0x3780DFB8FDB0EB6B, 888),
    ("Acme", "chat-1", 4096, None, 0x8C28F0F8A2853CCA, 2242),
    ("ab", "c", 4096, None, 0x1BEDBD27F843C7E6, 446),
    ("a", "bc", 4096, None, 0x4920195F3486406E, 1170),
    ("a", " ", 4096, None, 0x5417AEAF8635C3D5, 1345),
    ("a", "  ", 4096, None, 0x4DF67E76CBD6C204, 1247),
    ("a", "\u200b", 4096, None, 0x8B7170869BFD439C, 2231),
    ("a", "\ufeff", 4096, None, 0x8937D17B7D97D78B, 2195),
    ("a", "0", 1, None, 0x2FBDCFCE5B3E1118, 0),
    ("acme", "chat-\xe1", 4096, None, 0x8BABB770427ABE13, 2234),
    ("acme", "chat-a\u0301", 4096, None, 0x8CAD4F9653E83130, 2250),
    ("acme", "\U0001f600" * 255, 4096, None, 0xE44B65DC699BFE12, 3652),
    ("~" * 64, "x" * 255, 65536, None, 0xE9A1985A475D8BEB, 59809),
    ("acme", "chat-1", 4096, 16, 0xEF5CEE637C9491FC, 3829),
    ("acme", "chat-2", 4096, 16, 0x9160DFB8FDB0EB6B, 2326),
    ("acme", "chat-1", 4096, 1, 0x008CEE637C9491FC, 8),
    ("acme", "chat-2", 4096, 1, 0x0080DFB8FDB0EB6B, 8),
    ("globex", "chat-1", 4096, 16, 0xD030AF95929C030A, 3331),
    ("acme", "\u4f60\u597d", 256, 3, 0x00A67815025048A5, 0),
    ("acme", "chat-1", 1, 1, 0x60BCEE637C9491FC, 0),
    ("acme", "chat-1", 65536, 1000, 0x69F9EE637C9491FC, 27129),
]


@pytest.mark.parametrize(("tenant", "session", "slots", "spread", "h", "slot"), GOLDEN)
def test_golden_vectors(
    tenant: str, session: str, slots: int, spread: int | None, h: int, slot: int
) -> None:
    found = session_hash(tenant, session, slots=slots, spread=spread)
    assert (found, slot_of(found, slots)) == (h, slot)
    first, last = slot_range(slot, slots)
    assert first <= to_signed(h) <= last


def test_mmh3_gives_the_vectors_of_its_manual() -> None:
    assert mmh3.hash64("foo") == (-2129773440516405919, 9128664383759220103)
    assert mmh3.hash128("foo", 42) == 215966891540331383248189432718888555506


def test_mmh3_passes_the_verification_that_its_author_published() -> None:
    # SMHasher: key i is the bytes 0 .. i-1, hashed with seed 256 - i; then the hash of the hashes.
    hashes = b"".join(mmh3.mmh3_x64_128_digest(bytes(range(i)), 256 - i) for i in range(256))
    assert int.from_bytes(mmh3.mmh3_x64_128_digest(hashes, 0)[:4], "little") == 0x6384BA69


def test_the_low_64_bits_are_the_first_word() -> None:
    key = b"\0\0\0\x04acme" + b"\0\0\0\x06chat-1"
    assert hash_key("acme", "chat-1") == mmh3.hash128(key) % 2**64
    assert hash_key("acme", "chat-1") == mmh3.hash64(key, signed=False)[0]


def keys_hashed(tenant: str, session: str, spread: int | None) -> set[bytes]:
    """Return the keys that session_hash gives to the hash function."""
    keys = set()

    def record(key: bytes) -> tuple[int, int]:
        keys.add(key)
        return mmh3.mmh3_x64_128_utupledigest(key)

    with patch.object(slots_module, "mmh3_x64_128_utupledigest", record):
        session_hash(tenant, session, slots=4096, spread=spread)
    return keys


def read_part(key: bytes) -> tuple[str, bytes]:
    """Read one length-prefixed text; return it and what follows."""
    end = 4 + int.from_bytes(key[:4], "big")
    return key[4:end].decode(), key[end:]


@given(tenant_ids, session_ids)
def test_a_pair_can_be_read_back_from_its_key(tenant: str, session: str) -> None:
    (key,) = keys_hashed(tenant, session, None)
    read_tenant, rest = read_part(key)
    assert (read_tenant, *read_part(rest)) == (tenant, session, b"")


@given(st.text(TENANT_CHARACTERS, min_size=3, max_size=64), st.data())
def test_moving_the_border_between_tenant_and_session_changes_the_hash(
    text: str, data: st.DataObject
) -> None:
    borders = st.integers(1, len(text) - 1)
    one, two = data.draw(st.lists(borders, min_size=2, max_size=2, unique=True))
    assert hash_key(text[:one], text[one:]) != hash_key(text[:two], text[two:])


@given(tenant_ids, session_ids, st.integers(1, 4096))
def test_a_bucket_key_is_no_session_key(tenant: str, session: str, spread: int) -> None:
    parts = [read_part(key) for key in keys_hashed(tenant, session, spread)]
    marked = [(text, rest[4:]) for text, rest in parts if rest[:4] == b"\xff\xff\xff\xff"]
    assert len(marked) == 1  # the length in a session key is at most 1020
    assert marked[0][0] == tenant
    assert int.from_bytes(marked[0][1], "big") < spread


@given(tenant_ids, session_ids, slot_counts, st.none() | st.integers(1, 64))
def test_a_slot_is_in_range_and_its_range_has_the_hash(
    tenant: str, session: str, slots: int, spread: int | None
) -> None:
    h = session_hash(tenant, session, slots=slots, spread=spread)
    slot = slot_of(h, slots)
    first, last = slot_range(slot, slots)
    assert 0 <= slot < slots
    assert first <= to_signed(h) <= last


@given(tenant_ids, session_ids, slot_counts, st.integers(1, 64))
def test_spread_leaves_the_low_bits_alone(
    tenant: str, session: str, slots: int, spread: int
) -> None:
    width = 2**64 // slots
    h = session_hash(tenant, session, slots=slots, spread=spread)
    assert h % width == hash_key(tenant, session) % width


def slots_used(tenant: str, sessions: range, spread: int | None) -> set[int]:
    hashes = (session_hash(tenant, f"s{n}", slots=4096, spread=spread) for n in sessions)
    return {slot_of(h, 4096) for h in hashes}


@given(tenant_ids, st.integers(1, 16))
def test_other_sessions_use_the_same_few_slots(tenant: str, spread: int) -> None:
    # 16 buckets and 400 sessions: a bucket stays empty once in 10**10 times.
    used = slots_used(tenant, range(400), spread)
    assert len(used) <= spread
    assert slots_used(tenant, range(400, 800), spread) == used


def test_spread_uses_its_slots_and_tenants_use_different_ones() -> None:
    assert len(slots_used("acme", range(400), 16)) == 16
    assert slots_used("acme", range(400), 16) != slots_used("globex", range(400), 16)
    assert len(slots_used("acme", range(400), None)) > 300


def test_sessions_fill_the_slots_evenly() -> None:
    counts = [0] * 16
    for n in range(16_000):
        counts[slot_of(session_hash("acme", f"chat-{n}", slots=16, spread=None), 16)] += 1
    assert max(counts) < 1150  # 1000 expected, standard deviation 31
    assert min(counts) > 850


@given(slot_counts)
def test_slot_ranges_part_the_signed_space_in_order(slots: int) -> None:
    ranges = [slot_range(slot, slots) for slot in range(slots)]
    assert ranges[0][0] == -(2**63)
    assert ranges[-1][1] == 2**63 - 1
    assert all(one[1] + 1 == two[0] for one, two in pairwise(ranges))
    assert len({last - first for first, last in ranges}) == 1


@given(hashes, slot_counts)
def test_the_ends_of_a_range_belong_to_the_slot(h: int, slots: int) -> None:
    slot = slot_of(h, slots)
    ends = slot_range(slot, slots)
    assert [slot_of_stored(end, slots) for end in ends] == [slot, slot]


@given(hashes, hashes)
def test_signed_order_is_unsigned_order(one: int, two: int) -> None:
    assert (to_signed(one) < to_signed(two)) == (one < two)
    assert slot_of_stored(to_signed(one), 2**32) == one >> 32
    assert -(2**63) <= to_signed(one) < 2**63


@pytest.mark.parametrize("slots", [0, -1, -4096, 3, 4095, 2**33])
def test_a_slot_count_is_a_power_of_two(slots: int) -> None:
    with pytest.raises(UsageError, match=f"^{slots} slots: use a power of two"):
        check_slot_count(slots)
    with pytest.raises(UsageError):
        slot_range(0, slots)


@pytest.mark.parametrize("slot", [-1, 4096])
def test_a_slot_that_does_not_exist_has_no_range(slot: int) -> None:
    with pytest.raises(UsageError, match=f"no slot {slot}: slots are numbered 0 to 4095"):
        slot_range(slot, 4096)


@given(tenant_ids)
def test_a_tenant_id_comes_back_as_it_is(tenant: str) -> None:
    assert check_tenant_id(tenant) is tenant


@given(session_ids)
def test_a_session_id_comes_back_as_it_is(session: str) -> None:
    assert check_session_id(session) == session


@given(st.text(max_size=70))
def test_the_tenant_rule_is_the_set_of_its_characters(text: str) -> None:
    allowed = 1 <= len(text) <= 64 and all(c in TENANT_CHARACTERS for c in text)
    assert accepts(check_tenant_id, text) == allowed


@given(st.text(st.characters(), max_size=260))  # surrogates too
def test_the_session_rule_is_what_a_database_can_store(text: str) -> None:
    allowed = 1 <= len(text) <= 255 and not any(
        c == "\0" or "\ud800" <= c <= "\udfff" for c in text
    )
    assert accepts(check_session_id, text) == allowed


def accepts(check: Any, text: str) -> bool:
    try:
        return bool(check(text) == text)
    except UsageError:
        return False


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("", "tenant_id is empty; use 1 to 64 printable ASCII"),
        ("x" * 65, "tenant_id has 65 characters; use 1 to 64"),
        ("a b", r"tenant_id has U\+0020 at character 2; use 1 to 64"),
        ("acme/eu", r"tenant_id has U\+002F at character 5;"),
        ("acme\n", r"tenant_id has U\+000A at character 5;"),
        ("\x7f", r"tenant_id has U\+007F at character 1;"),
        ("\U0001f600acm\xe9", r"tenant_id has U\+1F600 at character 1;"),
        (None, "tenant_id is of type NoneType, not str; use"),
        (7, "tenant_id is of type int, not str; use"),
        (b"acme", "tenant_id is of type bytes, not str; use"),
    ],
)
def test_a_wrong_tenant_id_is_told_where_and_how_to_mend_it(value: object, complaint: str) -> None:
    with pytest.raises(UsageError, match=f"^{complaint}"):
        check_tenant_id(value)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("", "session_id is empty; use 1 to 255 characters"),
        ("x" * 256, "session_id has 256 characters; use 1 to 255"),
        ("\U0001f600" * 256, "session_id has 256 characters;"),
        ("ab\0", r"session_id has U\+0000 at character 3; use"),
        ("\U0001f600\ud83d", r"session_id has U\+D83D at character 2;"),
        (None, "session_id is of type NoneType, not str; use"),
        (["chat"], "session_id is of type list, not str; use"),
    ],
)
def test_a_wrong_session_id_is_told_where_and_how_to_mend_it(value: object, complaint: str) -> None:
    with pytest.raises(UsageError, match=f"^{complaint}"):
        check_session_id(value)


@pytest.mark.parametrize("check", [check_tenant_id, check_session_id])
def test_a_str_subclass_becomes_a_plain_str(check: Any) -> None:
    class Name(str):
        __slots__ = ()

    checked = check(Name("acme"))
    assert checked == "acme"
    assert type(checked) is str


@pytest.mark.parametrize(
    "session", [" ", "a ", "\t", "a/b", "%_'\"\\", "x" * 255, "\U0001f600" * 255]
)
def test_session_ids_of_every_kind_are_allowed(session: str) -> None:
    assert check_session_id(session) == session
