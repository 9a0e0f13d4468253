"""``check()``: what it tells of shards that serve, and of those that do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from gateway.shards import execute, item, named, session_on, settings_at
from shardgate import HealthReport, ShardHealth

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeDatabases
    from gateway.conftest import Gateways
    from harness.servers import Backend

    SQLiteUrls = Callable[[str], dict[str, str]]


async def test_shards_that_serve(
    backend: Backend, databases: MakeDatabases, gateways: Gateways
) -> None:
    gateway = await gateways.open(settings_at(named(await databases(2))))
    report = await gateway.check()
    assert report.ok
    assert list(report.shards) == ["a", "b"]
    for name, health in report.shards.items():
        assert (health.name, health.keyspace, health.slots) == (name, "main", 8)
        assert (health.ok, health.reachable, health.error) == (True, True, None)
        assert health.latency is not None
        assert 0 < health.latency < 20
        family = "mysql" if backend.family == "mariadb" else backend.family
        assert health.server is not None
        assert health.server.split()[0] in (family, "mariadb")
        major = backend.version.split(".")[0]
        assert health.server.split()[1].split(".")[0] in (major, "5")  # MariaDB may say 5.5.5-


async def test_a_shard_that_is_down(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    urls = sqlite_urls("ab")
    await (await gateways.open(settings_at(urls))).aclose()
    urls["b"] = urls["b"].replace("b.db", "no/such/folder/b.db")
    gateway = gateways.make(settings_at(urls, create_tables=False))
    report = await gateway.check()
    assert not report.ok
    assert report.shards["a"].ok
    health = report.shards["b"]
    assert (health.reachable, health.server, health.latency, health.slots) == (
        False,
        None,
        None,
        None,
    )
    assert "shard 'b'" in str(health.error)


@pytest.mark.backends("postgresql", "mariadb")
async def test_a_server_that_is_down(
    backend: Backend, databases: MakeDatabases, gateways: Gateways
) -> None:
    if not backend.endable:
        pytest.skip(f"{backend.id}: no server that tests may end")
    made = await databases(2, servers=2)
    gateway = await gateways.open(settings_at(named(made)))
    assert (await gateway.check()).ok
    await made[1].server.kill()
    report = await gateway.check()
    assert [health.reachable for health in report.shards.values()] == [True, False]
    assert "shard 'b'" in str(report.shards["b"].error)
    await made[1].server.start()
    assert (await gateway.check()).ok


async def test_shards_that_are_not_created_yet(
    databases: MakeDatabases, gateways: Gateways
) -> None:
    urls = named(await databases(2))
    gateway = gateways.make(settings_at(urls, create_tables=False))
    report = await gateway.check()
    for name, health in report.shards.items():
        assert not health.ok
        assert health.reachable
        assert f"shard '{name}'" in str(health.error)
        assert "create-tables" in str(health.error)
    await gateway.create_tables()
    assert (await gateway.check()).ok


async def test_a_new_shard_that_has_not_joined_yet(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("ab")
    await gateways.open(settings_at(urls))
    gateway = await gateways.open(settings_at(urls | sqlite_urls("c"), create_tables=False))
    report = await gateway.check()
    assert [health.ok for health in report.shards.values()] == [True, True, False]
    assert "create-tables" in str(report.shards["c"].error)
    await gateway.create_tables()
    report = await gateway.check()
    assert report.ok
    assert [health.slots for health in report.shards.values()] == [8, 8, 0]


async def test_swapped_shards(databases: MakeDatabases, gateways: Gateways) -> None:
    urls = named(await databases(3))
    await gateways.open(settings_at(urls))
    swapped = urls | {"a": urls["b"], "b": urls["a"]}
    report = await gateways.make(settings_at(swapped)).check()
    assert [health.ok for health in report.shards.values()] == [False, False, True]
    assert all(health.reachable for health in report.shards.values())
    assert "shard 'a' says that its name is 'b'" in str(report.shards["a"].error)


async def test_an_emptied_shard(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    urls = sqlite_urls("ab")
    gateway = await gateways.open(settings_at(urls))
    await execute(urls["b"], text("DELETE FROM shardgate_shard"))
    report = await gateway.check()
    assert [health.ok for health in report.shards.values()] == [True, False]
    assert "its peers know it" in str(report.shards["b"].error)


async def test_a_shard_of_another_keyspace(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    urls = sqlite_urls("ab")
    await gateways.open(settings_at(urls))
    other = sqlite_urls("c")
    shards = {"c": {"url": other["c"], "keyspace": "eu"}}
    await gateways.open(settings_at(shards, keyspaces={"eu": {"slots": 16}}))
    report = await gateways.make(settings_at(urls | other)).check()
    assert [health.ok for health in report.shards.values()] == [True, True, False]
    assert "keyspace is 'eu'" in str(report.shards["c"].error)


async def test_a_missing_owner_is_a_problem_of_the_keyspace(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("abc")
    await gateways.open(settings_at(urls))
    del urls["c"]
    report = await gateways.make(settings_at(urls)).check()
    assert [health.ok for health in report.shards.values()] == [True, True]
    assert not report.ok
    assert "belong to shard 'c'" in report.problems[0]


async def test_a_keyspace_in_trouble_is_not_another_ones(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("abc")
    shards = {"a": urls["a"], "b": {"url": urls["b"], "keyspace": "eu"}}
    keyspaces = {"main": {"slots": 16}, "eu": {"slots": 16}}
    gateway = await gateways.open(settings_at(shards, keyspaces=keyspaces, default_keyspace="main"))
    await execute(urls["b"], text("UPDATE shardgate_shard SET hash = 'other'"))
    report = await gateway.check()
    assert [health.ok for health in report.shards.values()] == [True, False]
    assert [health.keyspace for health in report.shards.values()] == ["main", "eu"]


async def test_checking_changes_nothing(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    gateway = await gateways.open(settings_at(sqlite_urls("ab")))
    session = gateway.tenant("acme").session(session_on(gateway, "a"))
    await session.add_items([item("one")])
    await gateway.check()
    assert await session.get_items() == [item("one")]


def test_a_report_is_good_when_all_shards_are() -> None:
    good = ShardHealth("a", "main", reachable=True)
    bad = ShardHealth("b", "main", reachable=True, error="wrong")
    assert HealthReport({"a": good}).ok
    assert not HealthReport({"a": good}, ("a slot is nobody's",)).ok
    assert not HealthReport({"a": good, "b": bad}).ok
