"""A server that takes requests and never answers: the operation's deadline ends the wait.

Bounds are generous: they tell a deadline from a hang.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from gateway.shards import item, named, session_on, settings_at
from harness.proxy import CuttingProxy
from shardgate import Gateway, OutcomeUnknown, ShardUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from conftest import MakeDatabases
    from gateway.conftest import Gateways

pytestmark = pytest.mark.backends("postgresql", "mariadb")

DEADLINE = 1.0
NO_HANG = 20


@pytest.fixture
async def urls(databases: MakeDatabases) -> dict[str, str]:
    return named(await databases(2))


@pytest.fixture
async def proxy(urls: dict[str, str], gateways: Gateways) -> AsyncIterator[CuttingProxy]:
    """In front of b; the keyspace has been created, with an item in a session on each shard."""
    gateway = await gateways.open(settings_at(urls))
    for name in urls:
        await gateway.tenant("acme").session(session_on(gateway, name)).add_items([item("old")])
    async with CuttingProxy.in_front_of(urls["b"]) as proxy:
        urls["b"] = proxy.url(urls["b"])
        yield proxy
        proxy.resume()


@pytest.fixture
async def gateway(urls: dict[str, str], proxy: CuttingProxy, gateways: Gateways) -> Gateway:
    """Open, with a connection to each shard in its pool, and a short deadline for b."""
    gateway = await gateways.open(settings_at(urls, create_tables=False))
    for name in urls:
        await gateway.tenant("acme").session(session_on(gateway, name)).get_items()
    return hasty(gateway)


def hasty(gateway: Gateway) -> Gateway:
    """Shorten the deadline, for b alone: a busy machine can miss one as short as that."""
    gateway.shards["b"].deadline = DEADLINE
    return gateway


async def _connected(proxy: CuttingProxy) -> None:
    while not proxy.open_connections:  # noqa: ASYNC110 - the proxy has no event for it
        await asyncio.sleep(0.01)


async def _once_back(read: Callable[[], Awaitable[list[Any]]]) -> list[Any]:
    """What is read of a shard that answers again: a busy machine can miss so short a deadline."""
    async with asyncio.timeout(NO_HANG):
        while True:
            with suppress(ShardUnavailable):
                return await read()


async def _no_hang(*acts: Any) -> list[Any]:
    async with asyncio.timeout(NO_HANG):
        return await asyncio.gather(*acts, return_exceptions=True)


async def test_reads_of_a_frozen_shard_end(gateway: Gateway, proxy: CuttingProxy) -> None:
    tenant = gateway.tenant("acme")
    frozen = tenant.session(session_on(gateway, "b"))
    alive = tenant.session(session_on(gateway, "a"))
    proxy.freeze()
    first, second, listed, lived = await _no_hang(
        frozen.get_items(), frozen.get_items(3), tenant.list_sessions(), alive.get_items()
    )
    for error in (first, second, listed):
        assert isinstance(error, ShardUnavailable), repr(error)
        assert error.shard == "b"
        assert f"within {DEADLINE:g} seconds" in str(error)
    assert lived == [item("old")]
    (page,) = await _no_hang(tenant.list_sessions(allow_partial=True))
    assert page.unavailable_shards == ("b",)
    assert len(page.sessions) == 1
    proxy.resume()
    assert await _once_back(frozen.get_items) == [item("old")]


@pytest.mark.parametrize("operation", ["add_items", "pop_item", "clear_session", "delete"])
async def test_a_write_that_was_sent_to_a_frozen_shard_has_an_unknown_outcome(
    operation: str, gateway: Gateway, proxy: CuttingProxy
) -> None:
    tenant, id_ = gateway.tenant("acme"), session_on(gateway, "b")
    session = tenant.session(id_)
    writes: dict[str, Callable[[], Any]] = {
        "add_items": lambda: session.add_items([item("new")]),
        "pop_item": session.pop_item,
        "clear_session": session.clear_session,
        "delete": lambda: tenant.delete_session(id_),
    }
    proxy.freeze()
    (error,) = await _no_hang(writes[operation]())
    proxy.resume()
    assert error.shard == "b"
    assert "shard 'b'" in str(error)
    if operation == "delete" and isinstance(error, ShardUnavailable):
        # A transaction of several statements, stopped before the first that writes.
        assert await _once_back(session.get_items) == [item("old")]
        return
    assert isinstance(error, OutcomeUnknown), repr(error)
    assert "may or may not have taken effect" in str(error)
    found = await _once_back(session.get_items)
    assert found in ([], [item("old")], [item("old"), item("new")])


async def test_a_write_that_never_got_a_connection_was_not_sent(
    urls: dict[str, str], proxy: CuttingProxy, gateways: Gateways
) -> None:
    gateway = await gateways.open(
        settings_at(urls, create_tables=False, engine_kwargs={"poolclass": "NullPool"})
    )
    hasty(gateway)
    session = gateway.tenant("acme").session(session_on(gateway, "b"))
    proxy.freeze()
    (error,) = await _no_hang(session.add_items([item("new")]))
    assert isinstance(error, ShardUnavailable), repr(error)
    assert error.shard == "b"
    proxy.resume()
    assert await _once_back(session.get_items) == [item("old")]


async def test_opening_with_a_frozen_shard(
    urls: dict[str, str], proxy: CuttingProxy, gateways: Gateways
) -> None:
    proxy.freeze()
    gateway = hasty(gateways.make(settings_at(urls)))
    assert await _no_hang(gateway.open()) == [None]
    alive = gateway.tenant("acme").session(session_on(gateway, "a"))
    assert await alive.get_items() != []
    (report,) = await _no_hang(gateway.check())
    assert report.shards["a"].ok
    assert not report.shards["b"].reachable
    proxy.resume()
    frozen = gateway.tenant("acme").session(session_on(gateway, "b"))
    assert await _once_back(frozen.get_items) != []


async def test_many_operations_wait_for_a_frozen_keyspace_together(
    urls: dict[str, str], proxy: CuttingProxy, gateways: Gateways
) -> None:
    """Not one after the other, which would take as many deadlines as there are operations, and
    not each with a connection of its own."""
    only = {"b": urls["b"]}
    proxy.freeze()
    gateway = hasty(gateways.make(settings_at(only, create_tables=False)))
    tenant, before = gateway.tenant("acme"), proxy.traffic.connections
    errors = await _no_hang(*(tenant.session(str(number)).get_items() for number in range(100)))
    assert {type(error) for error in errors} == {ShardUnavailable}
    assert {error.shard for error in errors} == {"b"}
    assert proxy.traffic.connections == before + 1


async def test_closing_while_a_frozen_keyspace_is_waited_for(
    urls: dict[str, str], proxy: CuttingProxy, gateways: Gateways
) -> None:
    proxy.freeze()
    gateway = gateways.make(settings_at({"b": urls["b"]}, create_tables=False))
    waiting = asyncio.create_task(gateway.tenant("acme").session("chat-1").get_items())
    await _connected(proxy)
    await _no_hang(gateway.aclose())
    (error,) = await _no_hang(waiting)
    assert isinstance(error, Exception)
    assert "closed" in str(error)


async def test_somebody_who_gives_up_does_not_take_the_others_map_away(
    urls: dict[str, str], proxy: CuttingProxy, gateways: Gateways
) -> None:
    proxy.delay = 0.05
    gateway = gateways.make(settings_at(urls, create_tables=False))
    tenant = gateway.tenant("acme")
    first = asyncio.create_task(tenant.list_sessions())
    second = asyncio.create_task(tenant.list_sessions())
    await _connected(proxy)
    first.cancel()
    assert len((await second).sessions) == 2
    with pytest.raises(asyncio.CancelledError):
        await first
