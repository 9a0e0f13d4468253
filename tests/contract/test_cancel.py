"""A cancelled call leaves the history whole, the pool without a leak, and the next call working."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from contract.doors import open_door as open_at
from contract.writers import assert_whole, batch_of
from harness.proxy import CuttingProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

    from contract.doors import Door
    from harness.engines import EngineMaker

NETWORKED = ("postgresql", "mariadb", "mysql")


def _moments() -> Iterator[int]:
    """Turns of the event loop: each of the first, then further and further apart."""
    yield from range(16)
    turns = 16
    while turns < 1500:
        yield turns
        turns += turns // 6


async def _cancel_after(turns: int, call: Coroutine[Any, Any, Any]) -> bool:
    """Cancel ``call`` after so many turns of the event loop; whether it had ended before."""
    task = asyncio.ensure_future(call)
    for _ in range(turns):
        if task.done():
            break
        await asyncio.sleep(0)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


async def test_append_at_any_moment(door: Door, engines: EngineMaker) -> None:
    session = door.session()
    done: set[int] = set()
    seen: list[Any] = []
    for n, turns in enumerate(_moments()):
        if await _cancel_after(turns, session.add_items(batch_of("w", n, 3))):
            done.add(n)
        now = await door.session().get_items()
        assert now[: len(seen)] == seen, "what was seen has changed"
        assert_whole(now)
        assert await engines.still_out() == 0
        seen = now
    await session.add_items(batch_of("w", 10_000, 3))
    history = await session.get_items()
    assert_whole(history)
    assert done | {10_000} <= {item["batch"] for item in history}
    assert history[: len(seen)] == seen
    assert await door.counters() == (len(history), sum(map(len, await door.stored())))


async def test_pop_at_any_moment(door: Door, engines: EngineMaker) -> None:
    items = [{"n": n} for n in range(80)]
    session = door.session()
    await session.add_items(items)
    left = len(items)
    for turns in _moments():
        popped = await _cancel_after(turns, session.pop_item())
        now = await door.session().get_items()
        assert now == items[: len(now)]
        assert left - len(now) in ((1,) if popped else (0, 1))
        assert await engines.still_out() == 0
        left = len(now)
    assert await session.pop_item() == items[left - 1]
    assert (await door.counters())[0] == left - 1


async def test_clear_at_any_moment(door: Door, engines: EngineMaker) -> None:
    session = door.session()
    for n, turns in enumerate(_moments()):
        items = batch_of("w", n, 2)
        await session.add_items(items)
        cleared = await _cancel_after(turns, session.clear_session())
        now = await door.session().get_items()
        assert now in (([],) if cleared else ([], items))
        assert await engines.still_out() == 0
        await session.clear_session()
    assert await session.get_items() == []


async def test_read_and_deletion_at_any_moment(door: Door, engines: EngineMaker) -> None:
    session = door.session()
    for n, turns in enumerate(_moments()):
        items = batch_of("w", n, 2)
        await session.add_items(items)
        await _cancel_after(turns, session.get_items())
        assert await session.get_items() == items
        deleted = await _cancel_after(turns, door.delete())
        assert await session.get_items() in (([],) if deleted else ([], items))
        assert await engines.still_out() == 0
        await door.delete()


async def test_many_callers_cancelled_at_once(door: Door, engines: EngineMaker) -> None:
    """More callers than connections: some are cancelled while they wait for one."""
    tasks = [
        asyncio.ensure_future(door.session().add_items(batch_of(str(n), 0, 3))) for n in range(40)
    ]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    history = await door.session().get_items()
    assert_whole(history)
    acknowledged = {str(n) for n, outcome in enumerate(outcomes) if outcome is None}
    assert acknowledged
    assert acknowledged <= {item["writer"] for item in history}
    assert await engines.still_out() == 0
    await asyncio.gather(*(door.session().add_items(batch_of(str(n), 1, 1)) for n in range(40)))
    assert len(await door.session().get_items()) == len(history) + 40


@pytest_asyncio.fixture
async def proxies(urls: list[str]) -> AsyncIterator[list[CuttingProxy]]:
    proxies = [CuttingProxy.in_front_of(url) for url in urls]
    for proxy in proxies:
        await proxy.__aenter__()
    yield proxies
    for proxy in proxies:
        proxy.resume()
        await proxy.close()


@pytest_asyncio.fixture
async def cuttable(
    kind: str, door: Door, urls: list[str], proxies: list[CuttingProxy], engines: EngineMaker
) -> AsyncIterator[Door]:
    """The same databases through a proxy for each, with one idle connection in use before."""
    through = [proxy.url(url) for proxy, url in zip(proxies, urls, strict=True)]
    options = {"pool_size": 1, "max_overflow": 0, "pool_recycle": 20_000}
    cuttable = await open_at({"kind": kind, "urls": through, "engine_kwargs": options})
    for engine in cuttable.engines:
        engines.watch(engine)
    await door.session().add_items([{"n": n} for n in range(5)])
    assert len(await cuttable.session().get_items()) == 5
    yield cuttable
    for proxy in proxies:
        proxy.resume()
    await cuttable.close()


async def _frozen(proxies: list[CuttingProxy], call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start ``call``, and stop the network once its statement is on its way."""
    for proxy in proxies:
        proxy.freeze()
    before = sum(proxy.traffic.client_bytes for proxy in proxies)
    task = asyncio.ensure_future(call)
    while sum(proxy.traffic.client_bytes for proxy in proxies) == before:
        assert not task.done()
        await asyncio.sleep(0.001)
    return task


def _left_after(act: str) -> list[Any]:
    items = [{"n": n} for n in range(5)]
    return {"add": [*items, {"n": 5}], "pop": items[:4], "clear": []}[act]


def _call(door: Door, act: str) -> Coroutine[Any, Any, Any]:
    session = door.session()
    if act == "add":
        return session.add_items([{"n": 5}])
    return session.pop_item() if act == "pop" else session.clear_session()


@pytest.mark.backends(*NETWORKED)
@pytest.mark.parametrize("act", ["add", "pop", "clear"])
async def test_a_write_that_was_sent_settles_first(
    door: Door, cuttable: Door, proxies: list[CuttingProxy], act: str
) -> None:
    """It is not given up while its outcome is open; when the caller hears, the outcome is final."""
    task = await _frozen(proxies, _call(cuttable, act))
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    assert len(await door.session().get_items()) == 5
    for proxy in proxies:
        proxy.resume()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await door.session().get_items() == _left_after(act)
    assert await cuttable.session().get_items() == _left_after(act)


@pytest.mark.backends(*NETWORKED)
@pytest.mark.parametrize("act", ["add", "pop", "clear"])
async def test_a_write_that_never_answers_is_given_up(
    door: Door,
    cuttable: Door,
    proxies: list[CuttingProxy],
    engines: EngineMaker,
    monkeypatch: pytest.MonkeyPatch,
    act: str,
) -> None:
    monkeypatch.setattr("shardgate.shards.CANCELLED_SECONDS", 0.05)
    task = await _frozen(proxies, _call(cuttable, act))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await engines.still_out() == 0
    for proxy in proxies:
        proxy.resume()
    await cuttable.session().add_items([{"n": 9}])
    history = await door.session().get_items()
    assert {"n": 9} in history
    without = [item for item in history if item != {"n": 9}]
    assert without in ([{"n": n} for n in range(5)], _left_after(act))


@pytest.mark.backends(*NETWORKED)
async def test_a_read_is_given_up_at_once(
    cuttable: Door, proxies: list[CuttingProxy], engines: EngineMaker
) -> None:
    task = await _frozen(proxies, cuttable.session().get_items())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await engines.still_out() == 0
    for proxy in proxies:
        proxy.resume()
    assert len(await cuttable.session().get_items()) == 5
