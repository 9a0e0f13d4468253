"""``clear_session``, and deletion, against appends that go on meanwhile."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.util import await_only

from contract.doors import SESSION
from contract.writers import assert_whole, batch_of, batches_in

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from contract.conftest import OpenDoor
    from contract.doors import Door

WRITERS = 8
BATCHES = 14


async def test_clear_leaves_nothing_and_the_session_goes_on(door: Door) -> None:
    session = door.session()
    await session.clear_session()
    assert await session.get_items() == []
    await session.add_items([{"n": 1}, {"n": 2}])
    await door.session("other").add_items([{"n": 3}])
    await session.clear_session()
    await session.clear_session()
    assert await session.get_items() == []
    assert await session.pop_item() is None
    assert await door.counters() == (0, 0)
    await session.add_items([{"n": 4}])
    assert await session.get_items() == [{"n": 4}]
    assert await door.session("other").get_items() == [{"n": 3}]


async def test_clear_takes_undecodable_rows_along(door: Door) -> None:
    await door.session().add_items([{"n": 1}])
    await door.damage()
    await door.session().clear_session()
    assert await door.stored() == []


async def test_delete_leaves_nothing(door: Door) -> None:
    assert await door.delete() is False
    await door.session().add_items([{"n": 1}])
    assert await door.delete() is True
    assert await door.delete() is False
    assert await door.session().get_items() == []
    await door.session().add_items([{"n": 2}])
    assert await door.session().get_items() == [{"n": 2}]


async def _race(door: Door, doors: list[Door], remove: Callable[[], Awaitable[Any]]) -> None:
    """Append with many tasks while ``remove`` runs again and again; look at what is left.

    A clock that counts events tells what must be there: an append that began after the last
    removal had ended; and what must not: one that had ended before the last removal began.
    """
    clock = count()
    spans: dict[tuple[str, int], tuple[int, int]] = {}
    removals: list[tuple[int, int]] = []

    async def append(writer: int) -> None:
        session = doors[writer % len(doors)].session()
        for batch in range(BATCHES):
            items: list[Any] = batch_of(str(writer), batch, 3)
            began = next(clock)
            await session.add_items(items)
            spans[str(writer), batch] = (began, next(clock))

    async def remove_often() -> None:
        for wanted in (20, 40, 70):
            while len(spans) < wanted:  # noqa: ASYNC110 - a turn of the loop, not a delay
                await asyncio.sleep(0)
            began = next(clock)
            await remove()
            removals.append((began, next(clock)))

    await asyncio.gather(remove_often(), *(append(n) for n in range(WRITERS)))
    history = await door.session().get_items()
    assert_whole(history)
    left = set(batches_in(history))
    began, ended = removals[-1]
    assert {key for key, span in spans.items() if span[0] > ended} <= left
    assert not {key for key, span in spans.items() if span[1] < began} & left
    assert await door.counters() == (len(history), sum(map(len, await door.stored())))


async def test_clear_while_appends_go_on(door: Door, open_door: OpenDoor) -> None:
    await _race(door, [door, await open_door()], door.session().clear_session)


async def test_delete_while_appends_go_on(door: Door, open_door: OpenDoor) -> None:
    await _race(door, [door, await open_door()], door.delete)


@pytest.mark.backends("postgresql", "mariadb", "mysql")
async def test_a_session_made_while_it_is_deleted(door: Door, open_door: OpenDoor) -> None:
    """A deletion that finds nothing leaves alone what comes right after it has looked."""
    other = await open_door()
    numbers, looked = count(), False

    def append_between(_c: object, cursor: Any, statement: str, *_: object) -> None:
        nonlocal looked
        looked = looked or (statement.startswith("UPDATE") and cursor.rowcount == 0)
        # A deletion of the session's row would make the append wait for it.
        if looked and f"DELETE FROM {door.tables.sessions.name}" not in statement:
            await_only(other.session().add_items([{"n": next(numbers)}]))

    engine = door.engine().sync_engine
    event.listen(engine, "after_cursor_execute", append_between)
    try:
        assert await door.delete() is False
    finally:
        event.remove(engine, "after_cursor_execute", append_between)
    assert looked
    await other.session().add_items([{"n": next(numbers)}])
    history = await door.session().get_items()
    assert [item["n"] for item in history] == list(range(next(numbers)))


async def test_what_is_left_behind_by_a_race_is_never_seen(door: Door) -> None:
    """Appends, pops, clears and deletions at once: whoever reads sees whole appends only."""
    stop = asyncio.Event()

    async def append(writer: int) -> None:
        for batch in range(BATCHES):
            items: list[Any] = batch_of(str(writer), batch, 2)
            await door.session().add_items(items)

    async def repeat(act: Callable[[], Awaitable[Any]]) -> None:
        while not stop.is_set():
            await act()

    async def read() -> None:
        assert_whole(await door.session().get_items())

    acts: list[Callable[[], Awaitable[Any]]] = [door.session().clear_session, door.delete, read]
    async with asyncio.TaskGroup() as group:
        for act in acts:
            group.create_task(repeat(act))
        await asyncio.gather(*(append(n) for n in range(WRITERS)))
        stop.set()
    await door.delete(SESSION)
    assert await door.session().get_items() == []


@pytest.mark.parametrize("act", ["clear_session", "pop_item"])
async def test_a_session_that_does_not_exist_is_not_made(door: Door, act: str) -> None:
    await getattr(door.session("nobody"), act)()
    assert await door.delete("nobody") is False
