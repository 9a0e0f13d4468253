"""What a warm operation costs: one round trip on the wire, guards and ops included."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiosqlite
import pytest

from gateway.shards import item, settings_at
from harness.proxy import CuttingProxy
from shardgate import Gateway
from shardgate.session import SQLAlchemySession

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from harness.servers import Database
    from shardgate.session import StoredSession

ACTS: dict[str, Callable[[StoredSession], Awaitable[Any]]] = {
    "append": lambda session: session.add_items([item("one"), item("two")]),
    "read": lambda session: session.get_items(20),
    "pop": lambda session: session.pop_item(),
    "clear": lambda session: session.clear_session(),
}


@asynccontextmanager
async def open_session(door: str, url: str) -> AsyncIterator[StoredSession]:
    """A session by one of the doors, on an engine that the library makes."""
    if door == "gateway":
        async with Gateway(settings_at({"one": url})) as gateway:
            yield gateway.tenant("acme").session("chat")
        return
    session = SQLAlchemySession.from_url("chat", url=url, create_tables=True)
    try:
        yield session
    finally:
        await session.aclose()


async def warm(session: StoredSession) -> None:
    """Do everything twice, so that connections are made and statements prepared."""
    for act in [*ACTS.values()] * 2:
        await act(session)
    await session.add_items([item("kept"), item("popped")])


@pytest.mark.backends("postgresql", "mariadb", "mysql")
@pytest.mark.parametrize("door", ["gateway", "alone"])
async def test_one_round_trip_on_the_wire(database: Database, door: str) -> None:
    async with (
        CuttingProxy.in_front_of(database.url) as proxy,
        open_session(door, proxy.url(database.url)) as session,
    ):
        await warm(session)
        counted = {}
        for name, act in ACTS.items():
            before = proxy.traffic
            await act(session)
            counted[name] = (proxy.traffic - before).round_trips
        assert counted == dict.fromkeys(ACTS, 1)
        assert (proxy.traffic - before).connections == 0


@pytest.mark.backends("sqlite")
@pytest.mark.parametrize("door", ["gateway", "alone"])
async def test_one_hop_to_the_thread(
    database: Database, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hops: list[object] = []
    execute: Any = aiosqlite.Connection._execute

    async def counting(connection: Any, act: Any, *arguments: Any, **options: Any) -> Any:
        hops.append(act)
        return await execute(connection, act, *arguments, **options)

    async with open_session(door, database.url) as session:
        await warm(session)
        monkeypatch.setattr(aiosqlite.Connection, "_execute", counting)
        counted = {}
        for name, act in ACTS.items():
            hops.clear()
            await act(session)
            counted[name] = len(hops)
        monkeypatch.undo()
        assert counted == dict.fromkeys(ACTS, 1)
