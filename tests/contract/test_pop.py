"""``pop_item``: never the same item twice, the newest of its moment, None only when empty."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select

if TYPE_CHECKING:
    from contract.conftest import OpenDoor
    from contract.doors import Door
    from harness.processes import Children


def _numbered(count: int, first: int = 0) -> list[Any]:
    return [{"n": n} for n in range(first, first + count)]


def _numbers(items: list[Any]) -> list[int]:
    return [item["n"] for item in items if item is not None]


async def _assert_counted(door: Door) -> None:
    """The session's counters say what is stored."""
    stored = await door.stored()
    assert await door.counters() == (len(stored), sum(map(len, stored)))


async def _pop_together(doors: list[Door], pops: int) -> list[Any]:
    sessions = [doors[n % len(doors)].session() for n in range(pops)]
    return await asyncio.gather(*(session.pop_item() for session in sessions))


async def test_the_newest_first_and_none_at_the_end(door: Door) -> None:
    session = door.session()
    assert await session.pop_item() is None
    await session.add_items(_numbered(3))
    assert [await session.pop_item() for _ in range(2)] == [{"n": 2}, {"n": 1}]
    await session.add_items([{"n": 9}])
    assert [await session.pop_item() for _ in range(3)] == [{"n": 9}, {"n": 0}, None]
    assert await session.get_items() == []
    assert await door.counters() == (0, 0)


async def test_as_many_at_once_as_there_are_items(door: Door, open_door: OpenDoor) -> None:
    """Were one None or one item given twice, an item would be left."""
    await door.session().add_items(_numbered(48))
    popped = await _pop_together([door, await open_door()], 48)
    assert sorted(_numbers(popped)) == list(range(48))
    assert await door.session().get_items() == []
    await _assert_counted(door)


async def test_more_at_once_than_items(door: Door, open_door: OpenDoor) -> None:
    await door.session().add_items(_numbered(20))
    popped = await _pop_together([door, await open_door()], 40)
    assert sorted(_numbers(popped)) == list(range(20))
    assert popped.count(None) == 20


async def test_fewer_at_once_than_items_take_the_newest(door: Door) -> None:
    await door.session().add_items(_numbered(40))
    popped = await _pop_together([door], 15)
    assert sorted(_numbers(popped)) == list(range(25, 40))
    assert await door.session().get_items() == _numbered(25)
    await _assert_counted(door)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["standalone"], indirect=True)
async def test_by_several_processes(door: Door, children: Children) -> None:
    await door.session().add_items(_numbered(60))
    argument = {"address": door.address, "pops": 20}
    results = await children.run("contract.writers:pop_in_process", [argument] * 3)
    assert sorted(_numbers([item for result in results for item in result])) == list(range(60))


async def test_while_appends_go_on(door: Door) -> None:
    """There is always an item: each pop gets one, and each append's items are there or popped."""
    await door.session().add_items(_numbered(40))
    popped: list[Any] = []

    async def pop() -> None:
        popped.extend([await door.session().pop_item() for _ in range(10)])

    async def append(writer: int) -> None:
        for batch in range(10):
            await door.session().add_items(_numbered(3, 1000 * writer + 3 * batch))

    await asyncio.gather(*(pop() for _ in range(4)), *(append(n) for n in (1, 2, 3)))
    assert None not in popped
    left = await door.session().get_items()
    expected = _numbered(40) + [n for writer in (1, 2, 3) for n in _numbered(30, 1000 * writer)]
    assert sorted(_numbers(popped) + _numbers(left)) == sorted(_numbers(expected))
    for writer in (1, 2, 3):
        mine = [n for n in _numbers(left) if n // 1000 == writer]
        assert mine == sorted(mine)
    await _assert_counted(door)


async def test_while_the_session_is_cleared(door: Door) -> None:
    await door.session().add_items(_numbered(30))
    pops = [door.session().pop_item() for _ in range(12)]
    cleared = door.session().clear_session()
    popped = (await asyncio.gather(*pops[:6], cleared, *pops[6:]))[:6]
    assert len(set(_numbers(popped))) == len(_numbers(popped))
    assert await door.session().get_items() == []
    assert await door.session().pop_item() is None
    assert await door.counters() == (0, 0)


async def test_undecodable_rows_stay_and_are_logged(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    session = door.session()
    await session.add_items(_numbered(2))
    await door.damage("{below")
    await session.add_items(_numbered(1, 2))
    await door.damage("{top")
    await door.damage("")
    before = await door.stored()
    assert [await session.pop_item() for _ in range(4)] == [{"n": 2}, {"n": 1}, {"n": 0}, None]
    assert await door.stored() == ["{below", "{top", ""]
    assert set(await door.stored()) < set(before)
    skipped = [text for _, level, text in caplog.record_tuples if level == logging.WARNING]
    assert ["2 undecodable" in skipped[0], "3 undecodable" in skipped[-1]] == [True, True]
    await session.add_items([{"n": 7}])
    assert await session.pop_item() == {"n": 7}


async def test_many_at_once_over_undecodable_rows(door: Door) -> None:
    for n in range(4):
        await door.session().add_items(_numbered(4, 4 * n))
        await door.damage()
    popped = await _pop_together([door], 16)
    assert sorted(_numbers(popped)) == list(range(16))
    assert await door.stored() == ["{not json"] * 4


async def test_more_undecodable_rows_than_one_reading_takes(door: Door) -> None:
    await door.session().add_items(_numbered(2))
    for _ in range(230):
        await door.damage()
    assert await door.session().pop_item() == {"n": 1}
    assert await door.session().get_items(1) == [{"n": 0}]
    assert await door.session().pop_item() == {"n": 0}
    assert await door.session().pop_item() is None
    assert len(await door.stored()) == 230


async def test_a_number_is_never_given_twice(door: Door) -> None:
    """A reader that holds an item's place must not find another item there."""
    messages = door.tables.messages
    seen: set[int] = set()
    for n in range(5):
        await door.session().add_items(_numbered(2, n))
        async with door.engine().connect() as connection:
            newest = select(messages.c.seq).order_by(messages.c.seq.desc()).limit(1)
            seq = (await connection.execute(newest)).scalar_one()
        assert seq not in seen
        seen.add(seq)
        await door.session().pop_item()
        if n == 2:
            await door.session().clear_session()
