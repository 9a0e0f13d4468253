"""What a warm operation costs: one round trip on the wire, guards and ops included."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiosqlite
import pytest
from sqlalchemy import text
from sqlalchemy.sql.compiler import SQLCompiler

from gateway.shards import item, settings_at
from harness.proxy import CuttingProxy
from shardgate import Gateway
from shardgate.session import GatewaySession, SQLAlchemySession

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


@pytest.mark.parametrize("door", ["gateway", "alone"])
async def test_nothing_is_compiled_for_a_new_handle(
    database: Database, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    original: Any = SQLCompiler.__init__

    def noting(compiler: Any, dialect: Any, statement: Any, *rest: Any, **options: Any) -> None:
        compiled.append(statement)
        original(compiler, dialect, statement, *rest, **options)

    async with open_session(door, database.url) as session:
        await warm(session)
        monkeypatch.setattr(SQLCompiler, "__init__", noting)
        for number in range(5):
            for act in ACTS.values():
                await act(another(session, f"chat-{number}"))
    assert compiled == []


def another(session: StoredSession, name: str) -> StoredSession:
    """A new handle, of another session at the same place."""
    if isinstance(session, GatewaySession):
        gateway: Any = session._gateway
        handle: StoredSession = gateway.tenant("acme").session(name)
        return handle
    assert isinstance(session, SQLAlchemySession)
    return SQLAlchemySession(name, engine=session.engine)


@pytest.mark.backends("postgresql")
async def test_statements_stay_prepared_whatever_the_handle_and_however_many_go_together(
    database: Database,
) -> None:
    pool = {"pool_size": 1, "max_overflow": 0}
    async with Gateway(settings_at({"one": database.url}, engine_kwargs=pool)) as gateway:

        async def use(many: int) -> None:
            handles = [gateway.tenant("acme").session(f"chat-{n}") for n in range(many)]
            await asyncio.gather(*(handle.add_items([item("x")] * many) for handle in handles))
            await asyncio.gather(*(handle.get_items(many) for handle in handles))

        async def prepared() -> set[str]:
            async with gateway.shards["one"].engine.connect() as connection:
                rows = await connection.scalars(text("SELECT name FROM pg_prepared_statements"))
                return set(rows)

        await use(8)
        await prepared()
        before = await prepared()
        assert len(before) >= 5  # one and many appended, one and many read, and this
        for many in range(1, 12):
            await use(many)
        assert await prepared() == before
