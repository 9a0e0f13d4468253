"""First use by many tasks and processes at once, while the tables are being created."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from contract.doors import door_at
from contract.writers import append_together, assert_order_of_commits, assert_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contract.doors import Address
    from contract.writers import Span
    from harness.processes import Children

TASKS = 50


def _address(kind: str, urls: Sequence[str], number: int = 0) -> Address:
    options = {"pool_recycle": 30_000 + number}
    return {"kind": kind, "urls": urls, "engine_kwargs": options, "opens_itself": True}


async def use_at_first_sight(argument: dict[str, Any]) -> list[Span]:
    """Run in a child process: many tasks open doors of their own and append at once."""
    writers: list[str] = argument["writers"]

    async def use(number: int) -> list[Span]:
        address = _address(argument["kind"], argument["urls"], number % 2)
        async with door_at(address) as door:
            return await append_together(door.session, writers[number::4], 2)

    used = await asyncio.gather(*map(use, range(4)))
    return [span for spans in used for span in spans]


async def test_many_tasks(kind: str, fresh_urls: list[str]) -> None:
    async with door_at(_address(kind, fresh_urls)) as door:
        sessions = [door.session(f"chat-{n}") for n in range(TASKS)]
        firsts: list[Any] = [
            session.add_items([{"n": n}]) if n % 5 else session.get_items()
            for n, session in enumerate(sessions)
        ]
        others = [door.session("hot").add_items([{"hot": n}]) for n in range(TASKS)]
        await asyncio.gather(*firsts, *others, door.session("x").pop_item())
        for n, session in enumerate(sessions):
            assert await session.get_items() == ([{"n": n}] if n % 5 else [])
        hot = await door.session("hot").get_items()
        assert sorted(item["hot"] for item in hot) == list(range(TASKS))


@pytest.mark.processes
async def test_many_processes(kind: str, fresh_urls: list[str], children: Children) -> None:
    arguments = [
        {"kind": kind, "urls": fresh_urls, "writers": [f"{n}-{i}" for i in range(12)]}
        for n in range(4)
    ]
    results = await children.run("contract.test_first_use:use_at_first_sight", arguments)
    spans = [tuple(span) for result in results for span in result]
    async with door_at(_address(kind, fresh_urls)) as door:
        history = await door.session().get_items()
    assert_whole(history)
    assert len(spans) == 4 * 12 * 2
    assert_order_of_commits(history, spans)


async def test_cancelled_first_uses(kind: str, fresh_urls: list[str]) -> None:
    """Whoever waits for the tables may give up; who does not is served."""
    async with door_at(_address(kind, fresh_urls)) as door:
        tasks = [
            asyncio.ensure_future(door.session(f"chat-{n}").add_items([{"n": n}]))
            for n in range(30)
        ]
        for turn in range(20):
            await asyncio.sleep(0)
            tasks[turn].cancel()
        await asyncio.wait(tasks)
        assert not any(task.cancelled() for task in tasks[20:])
        assert all(task.cancelled() for task in tasks[:3])
        for n in range(20, 30):
            await tasks[n]
            assert await door.session(f"chat-{n}").get_items() == [{"n": n}]
        for n in range(20):
            assert await door.session(f"chat-{n}").get_items() in ([], [{"n": n}])
