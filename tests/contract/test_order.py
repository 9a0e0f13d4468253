"""Order is the order of commits; appends never interleave; what was seen stays as it was seen."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from contract import writers
from contract.writers import append_batches, append_together, assert_order_of_commits, assert_whole

if TYPE_CHECKING:
    from contract.conftest import OpenDoor
    from contract.doors import Door
    from harness.processes import Children


async def test_items_come_back_in_the_order_of_appends(door: Door) -> None:
    session = door.session()
    await append_batches(session, "a", 9)
    await append_batches(door.session(), "b", 9)
    history = await session.get_items()
    assert writers.batches_in(history) == [(who, n) for who in "ab" for n in range(9)]
    assert_whole(history)


async def test_appends_of_many_tasks(door: Door, open_door: OpenDoor) -> None:
    doors = [door, await open_door()]
    spans = await asyncio.gather(
        *(
            append_together(d.session, [f"{n}-{i}" for i in range(12)], 8)
            for n, d in enumerate(doors)
        )
    )
    history = await door.session().get_items()
    assert_whole(history)
    assert_order_of_commits(history, [span for some in spans for span in some])
    assert await door.counters() == (len(history), sum(map(len, await door.stored())))


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["gateway"], indirect=True)
async def test_appends_of_several_processes_under_the_eyes_of_a_reader(
    door: Door, children: Children
) -> None:
    await door.session().get_items()
    arguments = [
        {"address": door.address, "writers": [f"{n}-{i}" for i in range(4)], "batches": 12}
        for n in range(3)
    ]
    done = asyncio.ensure_future(children.run("contract.writers:append_in_process", arguments))
    seen = await _watch(door, done)
    spans = [tuple(span) for result in await done for span in result]
    history = await door.session().get_items()
    assert_whole(history)
    assert_order_of_commits(history, spans)
    assert history[: len(seen)] == seen


async def test_a_reader_sees_only_what_is_added_at_the_end(door: Door) -> None:
    async def write() -> list[writers.Span]:
        return await append_together(door.session, [str(n) for n in range(10)], 10)

    done = asyncio.ensure_future(write())
    seen = await _watch(door, done)
    assert seen == (await door.session().get_items())[: len(seen)]


async def _watch(door: Door, done: asyncio.Future[Any]) -> list[Any]:
    """Read until ``done``: each reading begins with the one before, and is whole appends."""
    session = door.session()
    seen: list[Any] = []
    while not done.done():
        now = await session.get_items()
        assert now[: len(seen)] == seen
        assert_whole(now)
        newest = await session.get_items(limit=7)
        later = await session.get_items()
        assert _holds_in_order(later, now, newest)
        seen = now
    return seen


def _holds_in_order(later: list[Any], now: list[Any], newest: list[Any]) -> bool:
    """Whether ``newest``, read between the two, is a run of ``later`` not ending before ``now``."""
    ends = range(max(len(now), len(newest)), len(later) + 1)
    return any(later[end - len(newest) : end] == newest for end in ends)
