"""A gateway remembers nothing of the sessions that went through it."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import TYPE_CHECKING, Any

from gateway.shards import item, settings_at
from shardgate import Gateway

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.conftest import Gateways
    from shardgate import GatewaySession, Tenant

    SQLiteUrls = Callable[[str], dict[str, str]]

HANDLES = 100_000
PER_HANDLE = 1  # byte: a single kept reference would be eight


def _grown(act: Callable[[], None]) -> int:
    """How many bytes more are in use after ``act`` than before."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        act()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


async def test_handles_leave_nothing_behind(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    gateway = await gateways.open(settings_at(sqlite_urls("ab")))

    def make() -> None:
        for number in range(HANDLES):
            gateway.tenant(f"tenant-{number}").session(f"chat-{number}")
            gateway.route("acme", f"chat-{number}")

    make_few = range(100)
    for number in make_few:  # what is made once and kept is made now
        gateway.tenant("acme").session(str(number))
    assert _grown(make) < HANDLES * PER_HANDLE


async def test_used_sessions_leave_nothing_behind(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    gateway = await gateways.open(settings_at(sqlite_urls("ab")))
    kept: list[weakref.ref[GatewaySession | Tenant]] = []

    async def use(number: int) -> None:
        tenant = gateway.tenant(f"tenant-{number}")
        session = tenant.session(f"chat-{number}")
        await session.add_items([item("one")])
        await session.get_items()
        await session.pop_item()
        await session.clear_session()
        await tenant.list_sessions()
        await tenant.delete_session(f"chat-{number}")
        kept.extend((weakref.ref(session), weakref.ref(tenant)))

    for number in range(50):
        await use(number)
    gc.collect()
    assert [reference for reference in kept if reference() is not None] == []
    assert _sizes(gateway) == _sizes(await gateways.open(gateway.settings))


def _sizes(gateway: Gateway) -> dict[str, int]:
    """How much each part of the gateway, of its shards and of its stores holds."""
    holders = [gateway, *gateway.shards.values(), *gateway._keyspaces["main"]._stores.values()]
    return {
        f"{number}.{name}": len(value)
        for number, holder in enumerate(holders)
        for name, value in vars(holder).items()
        if isinstance(value, dict | list | set)
    }


async def test_a_closed_gateway_is_let_go(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    gateway = Gateway(settings_at(sqlite_urls("a")))
    async with gateway:
        await gateway.tenant("acme").session("chat-1").add_items([item("one")])
    watched: list[weakref.ref[Any]] = [
        weakref.ref(gateway),
        weakref.ref(gateway.shards["a"].engine.sync_engine),
    ]
    del gateway
    gc.collect()
    assert [reference() for reference in watched] == [None, None]
