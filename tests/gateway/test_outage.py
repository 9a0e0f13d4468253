"""Servers that are down, killed, shut down or starting: only their own sessions fail.

Two shards on a server each; then a shard of each family of databases.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.engine import make_url

from gateway.shards import check_peers, item, named, owners, records, session_on, settings_at
from shardgate import (
    Gateway,
    GatewaySession,
    OutcomeUnknown,
    ShardgateError,
    ShardUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from conftest import MakeDatabases
    from gateway.conftest import Gateways
    from harness.servers import Backend, Database, Server

    SQLiteUrls = Callable[[str], dict[str, str]]

pytestmark = pytest.mark.backends("postgresql", "mariadb")


@pytest.fixture
async def servers(databases: MakeDatabases, backend: Backend) -> list[Database]:
    if not backend.endable:
        pytest.skip(f"{backend.id}: no server that tests may end")
    return await databases(2, servers=2)


@pytest.fixture
async def created(servers: list[Database], gateways: Gateways) -> dict[str, str]:
    """URLs of a and b after their keyspace was created; one item in a session on each."""
    urls = named(servers)
    gateway = await gateways.open(settings_at(urls))
    for name in urls:
        await _session(gateway, name).add_items([item("before")])
    await gateway.aclose()
    return urls


def _session(gateway: Gateway, shard: str) -> GatewaySession:
    return gateway.tenant("acme").session(session_on(gateway, shard))


async def _fails(gateway: Gateway, shard: str) -> None:
    """Every operation on this shard's sessions says that this shard is unavailable."""
    session, tenant = _session(gateway, shard), gateway.tenant("acme")
    for act in (
        session.get_items,
        lambda: session.add_items([item("lost")]),
        session.pop_item,
        session.clear_session,
        lambda: tenant.delete_session(session.key.session_id),
        tenant.list_sessions,
    ):
        with pytest.raises(ShardUnavailable, match=f"shard '{shard}'") as caught:
            await act()
        assert caught.value.shard == shard


async def _works(gateway: Gateway, shard: str) -> None:
    session = _session(gateway, shard)
    before = await session.get_items()
    await session.add_items([item("now")])
    assert await session.get_items() == [*before, item("now")]
    assert before[0] == item("before")


@pytest.mark.parametrize("create_tables", [True, False], ids=["creating", "not creating"])
async def test_opening_while_a_server_is_down(
    create_tables: bool, servers: list[Database], created: dict[str, str], gateways: Gateways
) -> None:
    down = servers[1].server
    await down.kill()
    gateway = await gateways.open(settings_at(created, create_tables=create_tables))
    await _works(gateway, "a")
    await _fails(gateway, "b")
    page = await gateway.tenant("acme").list_sessions(allow_partial=True)
    assert page.unavailable_shards == ("b",)
    assert {gateway.route("acme", one.session_id).shard for one in page.sessions} == {"a"}

    await down.start()
    await _works(gateway, "b")
    page = await gateway.tenant("acme").list_sessions()
    assert (len(page.sessions), page.unavailable_shards) == (2, ())


async def test_a_server_killed_while_the_gateway_is_used(
    servers: list[Database], created: dict[str, str], gateways: Gateways
) -> None:
    gateway = await gateways.open(settings_at(created))
    session = _session(gateway, "b")
    # Fill the pool: each of its connections will be dead.
    await asyncio.gather(*(session.get_items() for _ in range(5)))
    await servers[1].server.kill()
    with pytest.raises((ShardUnavailable, OutcomeUnknown), match="shard 'b'"):
        await session.add_items([item("lost")])
    await _fails(gateway, "b")
    await _works(gateway, "a")
    await servers[1].server.start()
    await _works(gateway, "b")


@pytest.mark.parametrize("operation", ["get_items", "list", "add_items", "delete"])
async def test_a_restart_that_nobody_met(
    operation: str, servers: list[Database], created: dict[str, str], gateways: Gateways
) -> None:
    """The pool is full of connections that died meanwhile: a read is sent again, a write tells."""
    gateway = await gateways.open(settings_at(created))
    tenant, session = gateway.tenant("acme"), _session(gateway, "b")
    await asyncio.gather(*(session.get_items() for _ in range(5)))
    await servers[1].server.kill()
    await servers[1].server.start()
    reads: dict[str, Callable[[], Any]] = {
        "get_items": session.get_items,
        "list": tenant.list_sessions,
    }
    writes: dict[str, Callable[[], Any]] = {
        "add_items": lambda: session.add_items([item("new")]),
        "delete": lambda: tenant.delete_session(session.key.session_id),
    }
    if operation in reads:
        assert await reads[operation]()
        assert (await gateway.check()).ok
        return
    with contextlib.suppress(ShardUnavailable, OutcomeUnknown):
        await writes[operation]()
    await session.add_items([item("now")])
    assert (await session.get_items())[-1] == item("now")


async def test_all_servers_down_at_opening(
    servers: list[Database], created: dict[str, str], gateways: Gateways
) -> None:
    for database in servers:
        await database.server.kill()
    gateway = await gateways.open(settings_at(created))
    session = gateway.tenant("acme").session("chat-1")
    for act in (
        session.get_items,
        lambda: session.add_items([item("lost")]),
        lambda: gateway.tenant("acme").list_sessions(allow_partial=True),
    ):
        with pytest.raises(ShardUnavailable, match=r"shard '[ab]'"):
            await act()
    for database in servers:
        await database.server.start()
    await session.add_items([item("now")])
    for name in created:
        await _works(gateway, name)


async def test_creation_needs_every_shard_and_can_be_run_again(
    servers: list[Database], gateways: Gateways
) -> None:
    urls = named(servers)
    await servers[1].server.kill()
    gateway = gateways.make(settings_at(urls))
    for _ in range(2):
        with pytest.raises(ShardUnavailable, match="shard 'b'") as caught:
            await gateway.create_tables()
        assert caught.value.shard == "b"
    await gateway.open()  # there may be a keyspace that this process cannot see
    with pytest.raises(ShardUnavailable, match="shard 'b'"):
        await gateway.tenant("acme").session("chat-1").add_items([item("nowhere")])

    await servers[1].server.start()
    await gateway.create_tables()
    await owners(urls)
    await check_peers(urls)


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_server_ended_in_the_middle_of_writes(
    how: str, servers: list[Database], created: dict[str, str], gateways: Gateways
) -> None:
    """Each writer ends with an error that names b; what was acknowledged is there afterwards."""
    gateway = await gateways.open(settings_at(created))
    ids = [id_ for id_ in map(str, range(200)) if gateway.route("acme", id_).shard == "b"][:8]
    written: dict[str, int] = dict.fromkeys(ids, 0)
    enough = asyncio.Event()

    async def write(id_: str) -> None:
        while True:
            await gateway.tenant("acme").session(id_).add_items([item(str(written[id_]))])
            written[id_] += 1
            if written[id_] == 5:
                enough.set()

    writers = asyncio.gather(*map(write, ids), return_exceptions=True)
    await enough.wait()
    await getattr(servers[1].server, how)()
    for error in await writers:
        assert isinstance(error, ShardUnavailable | OutcomeUnknown), repr(error)
        assert error.shard == "b"
        assert "shard 'b'" in str(error)
    await _works(gateway, "a")

    await servers[1].server.start()
    for id_, count in written.items():
        stored = await gateway.tenant("acme").session(id_).get_items()
        assert stored[:count] == [item(str(number)) for number in range(count)]
        assert len(stored) <= count + 1  # the write whose outcome is unknown


async def test_a_server_that_is_starting(
    servers: list[Database], created: dict[str, str], gateways: Gateways
) -> None:
    """Whatever a server says while it recovers, callers hear that the shard is unavailable."""
    server = servers[1].server
    await server.kill()
    gateway = await gateways.open(settings_at(created))
    session = _session(gateway, "b")
    started = asyncio.create_task(server.start())
    refusals: list[ShardgateError] = []
    while not started.done():
        try:
            await session.get_items()
        except ShardgateError as error:
            refusals.append(error)
        await asyncio.sleep(0)
    await started
    assert {type(error) for error in refusals} <= {ShardUnavailable}
    await _works(gateway, "b")


async def test_a_shard_that_cannot_be_logged_in_to(
    created: dict[str, str], gateways: Gateways
) -> None:
    right = make_url(created["b"])
    wrongs: list[dict[str, Any]] = [{"password": "no"}, {"database": "not_there"}, {"port": 1}]
    for wrong in (right.set(**changed) for changed in wrongs):
        urls = created | {"b": wrong.render_as_string(hide_password=False)}
        gateway = await gateways.open(settings_at(urls))
        await _works(gateway, "a")
        await _fails(gateway, "b")


@pytest.mark.backends("postgresql")
async def test_shards_on_three_kinds_of_database(
    backend: Backend,
    database: Database,
    sqlite_urls: SQLiteUrls,
    shared_server: Callable[[str], Awaitable[Server]],
    gateways: Gateways,
) -> None:
    if not backend.endable:
        pytest.skip(f"{backend.id}: no server that tests may end")
    maria = await shared_server("mariadb")
    urls = {"p": database.url, "m": await maria.create_database()} | sqlite_urls("s")
    settings = settings_at(urls)
    try:
        gateway = await gateways.open(settings)
        ids = {name: session_on(gateway, name) for name in urls}
        for id_ in ids.values():
            await gateway.tenant("acme").session(id_).add_items([item("before")])
        assert set(await owners(urls)) == set(urls)
        for name, server in (("m", maria), ("p", database.server)):
            await server.kill()
            for door in (gateway, await gateways.open(settings)):
                for other in urls.keys() - {name}:
                    await _works(door, other)
                with pytest.raises((ShardUnavailable, OutcomeUnknown), match=f"shard '{name}'"):
                    await door.tenant("acme").session(ids[name]).get_items()
                await _fails(door, name)
                page = await door.tenant("acme").list_sessions(allow_partial=True)
                assert page.unavailable_shards == (name,)
                assert {one.session_id for one in page.sessions} == {
                    id_ for where, id_ in ids.items() if where != name
                }
            await server.start()
            await _works(gateway, name)
        for name, url in urls.items():
            assert [row["session_id"] for row in await records(url, "sessions")] == [ids[name]]
    finally:
        await maria.start()
        await maria.drop_database(urls["m"])
