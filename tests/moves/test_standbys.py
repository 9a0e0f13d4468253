"""Standbys that may lack a commit are seen, or it is said that they cannot be.

The shards' users here are ordinary ones: they own a database, and no privilege of the server.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.engine import make_url

from gateway.shards import settings_at
from moves.moving import SECONDS
from shardgate import Gateway, StandbysNotSafe
from shardgate.control.standbys import _replicas_of_mysql, check_commits, wait_for_standbys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from conftest import MakeDatabases, StartServer
    from harness.mariadb import MariaDBServer
    from harness.postgresql import PostgreSQLServer
    from harness.servers import Backend, LocalServer
    from shardgate.shards import Shard

USER = "plain"


@asynccontextmanager
async def shard_at(server: LocalServer, user: str = USER) -> AsyncIterator[Shard]:
    """A shard in the database "app" of a server; the user's password is the user's name."""
    url = make_url(server.url("app")).set(username=user, password=user)
    settings = settings_at({"a": url.render_as_string(hide_password=False)}, slots=8)
    async with Gateway(settings) as gateway:
        yield gateway.shards["a"]


async def safe(shard: Shard) -> None:
    """StandbysNotSafe, and at once, where something speaks against moves or removals."""
    await check_commits(shard)
    await wait_for_standbys(shard, seconds=SECONDS)


async def refused(shard: Shard, match: str) -> None:
    """AssertionError unless neither moves nor removals are let pass."""
    for act in (check_commits, partial(wait_for_standbys, seconds=0)):
        with pytest.raises(StandbysNotSafe, match=match):
            await act(shard)


async def until(act: Callable[[], Awaitable[None]]) -> None:
    """Wait until something holds: servers take a while to connect, and to read settings again."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                return await act()
            except (AssertionError, StandbysNotSafe, pytest.fail.Exception):
                await asyncio.sleep(0.05)


# PostgreSQL


@pytest.fixture
async def primary(backend: Backend, start_server: StartServer) -> PostgreSQLServer:
    from harness.postgresql import PostgreSQLServer

    server = await start_server(backend)
    assert isinstance(server, PostgreSQLServer)
    await server.execute(f"CREATE ROLE {USER} LOGIN PASSWORD '{USER}'")
    await server.execute(f"CREATE DATABASE app OWNER {USER}")
    return server


async def synchronous(primary: PostgreSQLServer, names: str) -> None:
    await primary.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
    await primary.execute("SELECT pg_reload_conf()")


async def unconfirmed(shard: Shard, number: int) -> None:
    with pytest.raises(StandbysNotSafe, match=f"'a' has {number} standbys that need not confirm"):
        await check_commits(shard)


@pytest.mark.backends("postgresql-18")
async def test_postgresql_says_what_it_hides_from_an_ordinary_role(
    primary: PostgreSQLServer,
) -> None:
    standby = await primary.standby()
    try:
        async with shard_at(primary) as shard:
            await safe(shard)
            await standby.start()
            await until(partial(refused, shard, "GRANT pg_monitor"))
            await synchronous(primary, "*")  # still, it cannot be known
            await refused(shard, "GRANT pg_monitor")
            await primary.execute(f"GRANT pg_read_all_stats TO {USER}")
            await until(partial(safe, shard))
    finally:
        await asyncio.to_thread(standby.close)


@pytest.mark.backends("postgresql-18")
async def test_of_a_quorum_some_may_lack_a_commit(primary: PostgreSQLServer) -> None:
    await primary.execute(f"GRANT pg_monitor TO {USER}")
    standbys = [await primary.standby() for _ in range(2)]
    try:
        for standby in standbys:
            await standby.start()
        async with shard_at(primary) as shard:
            await until(partial(unconfirmed, shard, 2))
            await wait_for_standbys(shard, seconds=SECONDS)
            for names, number in (("ANY 1 (*)", 1), ("FIRST 1 (*)", 1)):
                await synchronous(primary, names)
                await until(partial(unconfirmed, shard, number))
            for names in ("ANY 2 (*)", "FIRST 2 (*)"):
                await synchronous(primary, "")
                await until(partial(unconfirmed, shard, 2))
                await synchronous(primary, names)
                await until(partial(safe, shard))
    finally:
        for standby in standbys:
            await asyncio.to_thread(standby.close)


# MariaDB, and with it what MySQL does alike

ON_SOURCE = ("--log-bin=log", "--server-id=1")


@pytest.fixture
async def maker(databases: MakeDatabases) -> AsyncIterator[Callable[..., Awaitable[MariaDBServer]]]:
    """Starts servers with options of their own, and with the ordinary user."""
    from harness.mariadb import MariaDBServer

    (database,) = await databases(1)
    made: list[MariaDBServer] = []

    async def make(*options: str) -> MariaDBServer:
        if not isinstance(database.server, MariaDBServer):
            pytest.skip("not from programs: no servers with other options")
        server = database.server.another(*options)
        made.append(server)
        await server.start()
        return server

    yield make
    for server in made:
        await asyncio.to_thread(server.close)


async def let_in(server: MariaDBServer, user: str = USER) -> None:
    await server.execute(
        "CREATE DATABASE IF NOT EXISTS app",
        f"CREATE USER {user} IDENTIFIED BY '{user}'",
        f"GRANT ALL ON app.* TO {user}",
    )


@pytest.mark.backends("mariadb")
async def test_mariadb_tells_everybody_how_many_replicas_there_are(maker: Any) -> None:
    source, replica = await maker(*ON_SOURCE), await maker("--server-id=2")
    await let_in(source)
    async with shard_at(source) as shard:
        await safe(shard)
        await replica.follow(source)
        await until(partial(refused, shard, "'a' has 1 standbys"))
        await source.execute("SET GLOBAL rpl_semi_sync_master_enabled = ON")
        await replica.execute(
            "SET GLOBAL rpl_semi_sync_slave_enabled = ON", "STOP SLAVE", "START SLAVE"
        )
        await until(partial(safe, shard))


@pytest.mark.backends("mariadb")
async def test_mysql_tells_those_with_a_privilege(maker: Any) -> None:
    """MySQL has no count of replicas; what it has instead, MariaDB has as well."""
    source, replica = await maker(*ON_SOURCE), await maker("--server-id=2")
    for user in (USER, "granted", "by_role"):
        await let_in(source, user)
    await source.execute(
        "GRANT PROCESS ON *.* TO granted",
        "CREATE ROLE watcher",
        "GRANT PROCESS ON *.* TO watcher",
        "GRANT watcher TO by_role",
        "SET DEFAULT ROLE watcher FOR by_role",
    )

    async def sees(user: str) -> int:
        async with shard_at(source, user) as shard:
            return await shard.query(partial(_replicas_of_mysql, shard="a"))

    async def seen(number: int) -> None:
        assert [await sees("granted"), await sees("by_role")] == [number, number]
        with pytest.raises(StandbysNotSafe, match=r"GRANT PROCESS ON \*\.\*"):
            await sees(USER)

    await seen(0)
    await replica.follow(source)
    await until(partial(seen, 1))


@pytest.mark.backends("mariadb")
async def test_without_a_binary_log_there_is_no_replica(maker: Any) -> None:
    server = await maker()
    await let_in(server)
    async with shard_at(server) as shard:
        await safe(shard)
        assert await shard.query(partial(_replicas_of_mysql, shard="a")) == 0
