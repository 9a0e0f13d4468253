"""What a tenant id and a session id may be, and the hash that gives them a place.

Everything stored depends on this arithmetic: a change of one bit here loses every session that is
stored already. Golden vectors in the tests pin it.

A hash ``h`` is 64 bits wide. Its top log2(S) bits are the slot, so a slot is one contiguous range
of ``h``. Python code computes with the unsigned ``h``; databases store it signed, moved down by
2**63, which keeps the order. SQL never computes a slot: it gets ranges as parameters.

``h`` places a session and does not identify it: different sessions may share an ``h``.
"""

from __future__ import annotations

import re
from struct import Struct

from mmh3 import mmh3_x64_128_utupledigest

from shardgate.errors import UsageError

MAX_TENANT_ID = 64  # characters; all of them are ASCII, so bytes as well
MAX_SESSION_ID = 255  # code points: up to 1020 bytes of UTF-8
MAX_SLOTS = 2**32  # a bucket number has four bytes in its key

_SIGN = 2**63
_NO_LENGTH = b"\xff\xff\xff\xff"  # stands where a session's length would: no session is that long
_TENANT_RULE = f"use 1 to {MAX_TENANT_ID} printable ASCII characters without space and '/'"
_SESSION_RULE = f"use 1 to {MAX_SESSION_ID} characters without U+0000 and surrogates"
_NOT_IN_TENANT = re.compile(r"[^!-.0-~]")
_NOT_IN_SESSION = re.compile("[\0\ud800-\udfff]")
_u32 = Struct(">I").pack


def check_tenant_id(value: object) -> str:
    """Return ``value`` if it is a tenant id: 1 to 64 printable ASCII characters, no space, no "/".

    Nothing is trimmed or folded. Raises UsageError, also where the type is wrong.
    """
    if (
        type(value) is str
        and 0 < len(value) <= MAX_TENANT_ID
        and value.isascii()
        and value.isprintable()
        and " " not in value
        and "/" not in value
    ):
        return value
    return _check_slowly("tenant_id", value, MAX_TENANT_ID, _NOT_IN_TENANT, _TENANT_RULE)


def check_session_id(value: object) -> str:
    """Return ``value`` if it is a session id: 1 to 255 code points, no U+0000, no surrogate.

    Nothing is trimmed, folded or normalised. Raises UsageError, also where the type is wrong.
    """
    if (
        type(value) is str
        and 0 < len(value) <= MAX_SESSION_ID
        and value.isascii()
        and "\0" not in value
    ):
        return value
    return _check_slowly("session_id", value, MAX_SESSION_ID, _NOT_IN_SESSION, _SESSION_RULE)


def check_slot_count(slots: int) -> int:
    """Return ``slots`` if a keyspace can have that many: a power of two. Raises UsageError."""
    if not 1 <= slots <= MAX_SLOTS or slots & (slots - 1):
        raise UsageError(f"{slots} slots: use a power of two from 1 to 2**32, such as 4096")
    return slots


def check_slot(slot: int, slots: int) -> int:
    """Return ``slot`` if it is one of ``slots``: 0 to slots - 1. Raises UsageError."""
    if not 0 <= slot < slots:
        raise UsageError(f"there is no slot {slot}: slots are numbered 0 to {slots - 1}")
    return slot


def hash_key(tenant_id: str, session_id: str) -> int:
    """Hash a pair of checked ids to 64 unsigned bits.

    The key is the two ids in UTF-8, each after its length in bytes as four bytes, big-endian, so
    that no two pairs share a key. The hash is MurmurHash3 x64 128 with seed 0, of which the low 64
    bits count: the first of its two words, which is also its 128-bit number modulo 2**64.
    """
    tenant, session = tenant_id.encode(), session_id.encode()
    key = _u32(len(tenant)) + tenant + _u32(len(session)) + session
    return mmh3_x64_128_utupledigest(key)[0]


def session_hash(tenant_id: str, session_id: str, *, slots: int, spread: int | None) -> int:
    """Return the unsigned ``h`` of a session in a keyspace of ``slots`` slots.

    ``spread`` is the number of slots that one tenant may use at most, or None for all of them.
    With a spread, the slot bits come from the tenant and one of ``spread`` buckets, the low bits
    still from the whole key. The caller has checked the ids, ``slots`` and ``spread``.
    """
    h = hash_key(tenant_id, session_id)
    if spread is None:
        return h
    low_bits = (1 << _slot_shift(slots)) - 1
    home = _bucket_hash(tenant_id, _bucket(session_id, spread))
    return (home & ~low_bits) | (h & low_bits)


def tenant_slots(tenant_id: str, *, slots: int, spread: int | None) -> frozenset[int] | None:
    """Return the slots that a tenant's sessions can be in; None stands for all of them."""
    if spread is None:
        return None
    return frozenset(slot_of(_bucket_hash(tenant_id, bucket), slots) for bucket in range(spread))


def slot_of(h: int, slots: int) -> int:
    """Return the slot of an unsigned ``h``: its top log2(slots) bits."""
    return h >> _slot_shift(slots)


def slot_of_stored(stored: int, slots: int) -> int:
    """Return the slot of a stored ``h``, which is signed."""
    return (stored + _SIGN) >> (65 - slots.bit_length())


def slot_range(slot: int, slots: int) -> tuple[int, int]:
    """Return the first and the last signed ``h`` of a slot, both inclusive.

    Raises UsageError if there is no such slot.
    """
    shift = _slot_shift(check_slot_count(slots))
    first = to_signed(check_slot(slot, slots) << shift)
    return first, first + (1 << shift) - 1


def to_signed(h: int) -> int:
    """Return an unsigned ``h`` as it is stored: a signed 64-bit integer in the same order."""
    return h - _SIGN


def _slot_shift(slots: int) -> int:
    return 65 - slots.bit_length()


def _part(text: str) -> bytes:
    data = text.encode()
    return _u32(len(data)) + data


def _bucket(session_id: str, spread: int) -> int:
    """Number a session's bucket, 0 to spread - 1. The tenant has no part in it."""
    return mmh3_x64_128_utupledigest(_part(session_id))[0] % spread


def _bucket_hash(tenant_id: str, bucket: int) -> int:
    """Hash a tenant's bucket: the key has the mark and the bucket number in place of a session."""
    return mmh3_x64_128_utupledigest(_part(tenant_id) + _NO_LENGTH + _u32(bucket))[0]


def _check_slowly(name: str, value: object, longest: int, bad: re.Pattern[str], rule: str) -> str:
    """Apply the whole rule, to say what is wrong and to let str subclasses and non-ASCII pass."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is of type {type(value).__name__}, not str; {rule}")
    text = str.__str__(value)  # a plain str: drivers look at the exact type
    if not text:
        raise UsageError(f"{name} is empty; {rule}")
    if len(text) > longest:
        raise UsageError(f"{name} has {len(text)} characters; {rule}")
    if found := bad.search(text):
        code = f"U+{ord(found.group()):04X}"
        raise UsageError(f"{name} has {code} at character {found.start() + 1}; {rule}")
    return text
