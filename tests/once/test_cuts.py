"""The wire is cut at every point of an operation: it succeeds, and takes effect once.

The figures are cuts per database and per kind of session; a soak run makes ten times as many.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, Literal

import pytest

from once.history import End, History
from once.wire import SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from harness.engines import EngineMaker
    from once.conftest import Wire

    Act = Callable[[], Coroutine[Any, Any, End]]

pytestmark = pytest.mark.backends("postgresql", "mariadb", "mysql")

CUTS = 12
"""At each of: what an append, a pop and a clear sends; as many thirds of what it is answered."""
STORM = 14
SOAK = 10


async def _sizes(wire: Wire, act: Act) -> dict[Literal["client", "server"], int]:
    """How many bytes the operation sends and is answered on a connection that has done it once."""
    await act()
    before = wire.proxy.traffic
    await act()
    crossed = wire.proxy.traffic - before
    assert crossed.connections == 0
    return {"client": crossed.client_bytes, "server": crossed.server_bytes}


async def _cut_everywhere(wire: Wire, history: History, act: Act, cuts: int) -> None:
    """Cut before, inside and after the statement, and before and inside its answer."""
    sizes = await _sizes(wire, act)
    for side, number in (("client", cuts), ("server", cuts // 3)):
        for step in range(number):
            wire.proxy.cut_after(**{side: sizes[side] * step // number})
            end = await act()
            assert end is End.ACKNOWLEDGED, history.errors()
            await asyncio.wait_for(wire.proxy.was_cut(), SECONDS)


async def _cut_each(wire: Wire, cuts: int) -> None:
    history, session = History(), wire.through.session()
    await _cut_everywhere(wire, history, lambda: history.append(session, "w", 2), cuts)
    assert history.problems(await wire.items()) == []
    await _cut_everywhere(wire, history, lambda: history.pop(session), cuts)
    assert history.problems(await wire.items()) == []
    assert sum(len(done.ids) for done in history.operations if done.kind == "pop") == (
        2 + cuts + cuts // 3
    )

    async def clear() -> End:
        await history.append(wire.past.session(), "other")
        return await history.clear(session)

    await _cut_everywhere(wire, history, clear, cuts)
    assert await wire.items() == []
    assert history.problems([]) == []
    assert await wire.past.counters() == (0, 0)


async def test_at_every_point(proxied: Wire) -> None:
    await _cut_each(proxied, CUTS)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_at_very_many_points(proxied: Wire) -> None:
    await _cut_each(proxied, CUTS * SOAK)


async def _storm(wire: Wire, cuts: int, *, cancels: bool, seed: int) -> History:
    """Writers, poppers and a clearer at once, under cuts at random points."""
    chance, history = random.Random(seed), History()
    ended = asyncio.Event()

    async def work(act: Act) -> None:
        while not ended.is_set():
            await act()
            await asyncio.sleep(0)

    async def interrupted(act: Act) -> None:
        """Cancel each call after a random number of turns of the event loop."""
        while not ended.is_set():
            task = asyncio.ensure_future(act())
            for _ in range(chance.randrange(120)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

    async def cut() -> None:
        for _ in range(cuts):
            side = chance.choice(["client", "server"])
            wire.proxy.cut_after(**{side: chance.randrange(4000)})
            await wire.proxy.was_cut()
        ended.set()

    def session() -> Any:
        return wire.through.session()

    # Making the tables takes more traffic than most of these cuts let through.
    await history.append(session(), "before")
    async with asyncio.TaskGroup() as group:
        group.create_task(cut())
        for writer in ("a", "b", "c"):
            group.create_task(work(lambda w=writer: history.append(session(), w, 2)))
        group.create_task(work(lambda: history.pop(session())))
        if cancels:
            group.create_task(interrupted(lambda: history.append(session(), "x", 3)))
            group.create_task(interrupted(lambda: history.pop(session())))
    return history


@pytest.mark.parametrize("cancels", [False, True], ids=["", "cancelled"])
async def test_a_storm(proxied: Wire, engines: EngineMaker, cancels: bool) -> None:
    history = await _storm(proxied, STORM, cancels=cancels, seed=1)
    items = await proxied.items()
    assert history.errors() == []
    assert history.problems(items) == []
    assert (await proxied.past.counters())[0] == len(items)
    assert await engines.still_out() == 0


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_a_long_storm(proxied: Wire) -> None:
    history = await _storm(proxied, STORM * SOAK, cancels=True, seed=2)
    assert history.errors() == []
    assert history.problems(await proxied.items()) == []


async def _retried_before_it_arrives(wire: Wire, call: Coroutine[Any, Any, Any]) -> Any:
    """Have ``call``'s first attempt held back on the wire, and its retry go through."""
    wire.proxy.hold_next()
    task = asyncio.ensure_future(call)
    await wire.proxy.is_holding()
    wire.proxy.drop_clients()
    return await asyncio.wait_for(task, SECONDS)


async def test_an_append_that_arrives_after_its_retry(proxied: Wire) -> None:
    session = proxied.through.session()
    await session.add_items([{"id": "before"}])
    await _retried_before_it_arrives(proxied, session.add_items([{"id": "a"}, {"id": "b"}]))
    await proxied.past.session().add_items([{"id": "between"}])
    await proxied.proxy.arrive()
    assert [item["id"] for item in await proxied.items()] == ["before", "a", "b", "between"]


async def test_a_pop_that_arrives_after_its_retry(proxied: Wire) -> None:
    session = proxied.through.session()
    await session.add_items([{"id": n} for n in range(5)])
    assert await session.pop_item() == {"id": 4}
    assert await _retried_before_it_arrives(proxied, session.pop_item()) == {"id": 3}
    await proxied.proxy.arrive()
    assert await proxied.items() == [{"id": n} for n in range(3)]


async def test_a_pop_of_nothing_that_arrives_after_its_retry(proxied: Wire) -> None:
    """The caller was told that there was nothing: what came later is not his."""
    session = proxied.through.session()
    await session.add_items([{"id": "only"}])
    assert await session.pop_item() == {"id": "only"}
    assert await _retried_before_it_arrives(proxied, session.pop_item()) is None
    await proxied.past.session().add_items([{"id": "later"}])
    await proxied.proxy.arrive()
    assert await proxied.items() == [{"id": "later"}]


async def test_a_clear_that_arrives_after_its_retry(proxied: Wire) -> None:
    session = proxied.through.session()
    await session.add_items([{"id": "old"}])
    await session.clear_session()
    await _retried_before_it_arrives(proxied, session.clear_session())
    await proxied.past.session().add_items([{"id": "new"}])
    await proxied.proxy.arrive()
    assert await proxied.items() == [{"id": "new"}]


@pytest.mark.parametrize("left", [0, 1, 2])
async def test_a_pop_whose_answer_is_lost_returns_the_same_item(proxied: Wire, left: int) -> None:
    """Also the last one: that the session is empty by then is the pop's own doing."""
    session = proxied.through.session()
    await session.add_items([{"id": n} for n in range(left + 2)])
    assert await session.pop_item() == {"id": left + 1}
    proxied.proxy.cut_after(server=0)
    assert await session.pop_item() == {"id": left}
    await asyncio.wait_for(proxied.proxy.was_cut(), SECONDS)
    assert await proxied.items() == [{"id": n} for n in range(left)]


async def test_a_pop_whose_answer_is_lost_before_others_clear(proxied: Wire) -> None:
    session = proxied.through.session()
    await session.add_items([{"id": n} for n in range(3)])
    assert await session.pop_item() == {"id": 2}
    proxied.proxy.hold_next()
    task = asyncio.ensure_future(session.pop_item())
    await proxied.proxy.is_holding()
    proxied.proxy.drop_clients()
    await proxied.proxy.arrive()
    await proxied.past.session().clear_session()
    assert await task in ({"id": 1}, None)
    assert await proxied.items() == []
