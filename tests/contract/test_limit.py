"""``get_items(limit)``: exactly the newest valid items, oldest first."""

from __future__ import annotations

import asyncio
import logging
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import pytest

from contract.doors import SESSION
from shardgate.errors import UsageError

if TYPE_CHECKING:
    from contract.doors import Door

BROKEN = ["{not json", "", '{"cut": ', "\ufffd"]


async def _strewn(door: Door, valid: int) -> list[Any]:
    """Items with undecodable rows before, between and after them."""
    session = door.session()
    items: list[Any] = [{"n": n} for n in range(valid)]
    for n, item in enumerate(items):
        await session.add_items([item])
        for broken in BROKEN[: n % 3]:
            await door.damage(broken)
    for broken in BROKEN:
        await door.damage(broken)
    return items


async def test_newest_items_oldest_first(door: Door) -> None:
    session = door.session()
    items: list[Any] = [{"n": n} for n in range(20)]
    await session.add_items(items)
    for limit in (1, 7, 19, 20, 21, 10**6):
        assert await session.get_items(limit) == items[-limit:]
    assert await session.get_items(None) == items
    assert await session.get_items(0) == []
    assert await session.get_items() == items


async def test_an_empty_session_has_no_items(door: Door) -> None:
    assert await door.session("never used").get_items() == []
    assert await door.session("never used").get_items(5) == []
    await door.session("never used").add_items([])
    assert await door.session("never used").get_items() == []


async def test_undecodable_rows_do_not_count(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    items = await _strewn(door, 12)
    session = door.session()
    for limit in (1, 2, 3, 5, 11, 12, 13):
        assert await session.get_items(limit) == items[-limit:]
    caplog.clear()
    assert await session.get_items() == items
    ((_, level, message),) = caplog.record_tuples
    assert level == logging.WARNING
    assert f"{12 + len(BROKEN)} undecodable" in message
    assert SESSION in message
    assert door.tenant in message


async def test_a_limit_may_be_of_a_subclass(door: Door) -> None:
    """In a statement with others', too, though its text may be another one."""

    class Pages(IntEnum):
        SHORT = 2

    items: list[Any] = [{"n": n} for n in range(3)]
    await door.session().add_items(items)
    found = await asyncio.gather(*(door.session().get_items(Pages.SHORT) for _ in range(40)))
    assert found == [items[-2:]] * 40


async def test_a_wrong_limit_is_an_error(door: Door) -> None:
    await door.session().add_items([{"n": 1}])
    wrong: list[Any] = [-1, -100, True, False, 1.0, "3", "x"]
    for limit in wrong:
        with pytest.raises(UsageError, match="limit"):
            await door.session().get_items(limit)


async def test_the_default_limit_of_the_session(door: Door) -> None:
    items: list[Any] = [{"n": n} for n in range(9)]
    session = door.session(session_settings={"limit": 4})
    await session.add_items(items)
    assert await session.get_items() == items[-4:]
    assert await session.get_items(6) == items[-6:]
    assert await door.session(session_settings={"limit": 0}).get_items() == []
    assert await door.session(session_settings={"limit": None}).get_items() == items


@pytest.mark.backends("sqlite")
@pytest.mark.parametrize("settings", [{"limit": -1}, {"limit": "3"}, {"limits": 3}, 7])
def test_wrong_settings_are_an_error(door: Door, settings: Any) -> None:
    with pytest.raises(UsageError, match=r"limit|session_settings"):
        door.session(session_settings=settings)


@pytest.mark.backends("sqlite")
async def test_bytes_are_read_if_they_are_text(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite keeps a BLOB in a column of texts; somebody else may have put it there."""
    blobs: list[Any] = ['{"n": "é"}'.encode(), b'{"n": "\xff"}', b"\x00\x01"]
    await door.session().add_items([{"n": 0}])
    for blob in blobs:
        await door.damage(blob)
    await door.session().add_items([{"n": 2}])
    assert await door.session().get_items() == [{"n": 0}, {"n": "é"}, {"n": 2}]
    assert "2 undecodable" in caplog.text
    assert await door.session().get_items(2) == [{"n": "é"}, {"n": 2}]
