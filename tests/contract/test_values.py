"""Any JSON value survives, and what is not JSON is refused before anything is written."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardgate.errors import UsageError

if TYPE_CHECKING:
    from contract.conftest import OpenDoor
    from contract.doors import Door

TEXTS = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    [
        "\0",
        "a\0b",
        "\ud800",
        "\udfff x",
        "é",
        "e\u0301",
        "😀",
        "'",
        "\\",
        '"',
        "%s",
        "--",
        ";",
        "\x1a",
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    LEAVES | st.integers(min_value=2**63, max_value=2**300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
FIXED: list[Any] = [
    {},
    [],
    "",
    "\0",
    "\0 \x01\x7f\x80\u2028",
    "\ud800",
    "a\udfffb\ud83d",
    "😀👨‍👩‍👧 é e\u0301 ﷽ \U0010ffff",
    "' \" \\ \\' %s %(x)s :x ? $1 {x} ; -- /* */ \r\n\t\b\x1a",
    2**63,
    -(2**63) - 1,
    10**4000,
    [0, -0.0, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, 1e16, 1.0],
    [float("nan"), float("inf"), float("-inf")],
    {"": {"": [{"\0": None, "\ud800": True, "k": False}]}},
    {"role": "user", "content": [{"type": "input_text", "text": "línea\n"}]},
]


def same(value: object) -> str:
    """Equal for equal JSON: NaN included; 1, 1.0 and True told apart."""
    return json.dumps(value, sort_keys=True)


def nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = {"down": value} if level % 2 else [value]
    return value


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(values=st.lists(VALUES, min_size=1, max_size=8))
async def test_any_json_survives(door: Door, values: list[Any]) -> None:
    session = door.session()
    await session.clear_session()
    items: list[Any] = [{"value": value} for value in values]
    await session.add_items(items)
    assert same(await session.get_items()) == same(items)
    assert same(await session.pop_item()) == same(items[-1])
    assert same(await session.get_items(3)) == same(items[:-1][-3:])


async def test_chosen_values_survive(door: Door) -> None:
    for ensure_ascii in (True, False):
        session = door.session(f"ascii {ensure_ascii}", ensure_ascii=ensure_ascii)
        items: list[Any] = [{"value": value} for value in FIXED]
        await session.add_items(items)
        assert same(await session.get_items()) == same(items)
        assert same([await session.pop_item() for _ in items]) == same(items[::-1])


async def test_items_that_are_no_objects_survive(door: Door) -> None:
    session = door.session()
    items: list[Any] = ["text", 7, 1.5, True, [1, [2]], "\ud800"]
    await session.add_items(items)
    assert same(await session.get_items()) == same(items)
    assert same([await session.pop_item() for _ in items]) == same(items[::-1])


async def test_a_tuple_is_a_list(door: Door) -> None:
    items: list[Any] = [{"t": (1, (2, 3))}]
    await door.session().add_items(items)
    assert await door.session().get_items() == [{"t": [1, [2, 3]]}]


@pytest.mark.parametrize("ensure_ascii", [True, False])
async def test_twenty_megabytes(door: Door, ensure_ascii: bool) -> None:
    session = door.session(ensure_ascii=ensure_ascii)
    text = "20 MB of text. " * (20_000_000 // 15) if ensure_ascii else "é😀 €\0" * 2_000_000
    items: list[Any] = [{"n": 1}, {"text": text}]
    await session.add_items(items)
    assert (await session.get_items(1))[0] == items[1]
    assert await session.pop_item() == items[1]
    assert await session.get_items() == items[:1]


async def test_deep_nesting_survives(door: Door) -> None:
    session = door.session()
    items: list[Any] = [nested(400), nested(500)]
    await session.add_items(items)
    assert await session.get_items() == items
    assert [await session.pop_item() for _ in items] == items[::-1]


class _Model:
    role = "user"


REFUSED = [
    datetime(2024, 1, 1, tzinfo=UTC),
    {1, 2},
    b"bytes",
    {1: "x"},
    {None: "x"},
    {("a",): 1},
    Decimal(1),
    UUID(int=1),
    _Model(),
    object,
    nested(501),
    10 ** (sys.int_info.default_max_str_digits + 1),
    range(3),
]


async def test_what_is_not_json_is_refused_whole(door: Door) -> None:
    session = door.session()
    await session.add_items([{"n": 1}])
    before = (await door.stored(), await door.counters())
    for value in REFUSED:
        for bad in (value, {"a": [0, {"deep": value}]}):
            items: list[Any] = [{"n": 2}, {"n": 3}, bad]
            with pytest.raises(UsageError, match=r"item|integer"):
                await session.add_items(items)
    assert (await door.stored(), await door.counters()) == before
    with pytest.raises(UsageError):
        await door.session("not used yet").add_items([{1, 2}])
    assert await door.stored("not used yet") == []


@pytest.mark.backends("sqlite")
async def test_the_error_names_the_place(door: Door) -> None:
    items: list[Any] = [{"content": [{"text": "x"}, {"when": datetime(2024, 1, 1, tzinfo=UTC)}]}]
    with pytest.raises(UsageError, match=r"\['content'\]\[1\]\['when'\].*datetime"):
        await door.session().add_items(items)


async def test_many_items_in_one_append(door: Door) -> None:
    items: list[Any] = [{"n": n, "text": "é" * (n % 50)} for n in range(3000)]
    await door.session().add_items(items)
    assert await door.session().get_items() == items


async def test_reads_do_not_depend_on_the_writer(door: Door, open_door: OpenDoor) -> None:
    items: list[Any] = [{"value": value} for value in FIXED]
    await door.session(ensure_ascii=False).add_items(items)
    other = await open_door()
    assert same(await other.session().get_items()) == same(items)
