"""Tenants, their keyspaces, and where their sessions really are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway.shards import item, named, records, session_on, settings_at
from shardgate import Gateway, TenantRefused, UsageError
from shardgate.slots import slot_range

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeDatabases
    from gateway.conftest import Gateways

    SQLiteUrls = Callable[[str], dict[str, str]]

BAD_TENANTS = ["", "a b", "a/b", "ä", "a\0b", "a\n", "x" * 65, None, 7, b"acme"]
BAD_SESSIONS = ["", "a\0b", "\ud800", "x" * 256, None, 7, b"chat"]


def _keyspaces(urls: dict[str, str], **more: Any) -> dict[str, Any]:
    """Two keyspaces, "main" on a and "eu" on b."""
    shards = {"a": {"url": urls["a"]}, "b": {"url": urls["b"], "keyspace": "eu"}}
    keyspaces = {"main": {"slots": 16}, "eu": {"slots": 16}}
    return {"urls": shards, "keyspaces": keyspaces} | more


@pytest.mark.parametrize("bad", BAD_TENANTS, ids=repr)
async def test_what_is_no_tenant_id_is_refused(bad: Any, sqlite_urls: SQLiteUrls) -> None:
    gateway = Gateway(settings_at(sqlite_urls("a")))
    with pytest.raises(UsageError, match="tenant_id"):
        gateway.tenant(bad)
    with pytest.raises(UsageError, match="tenant_id"):
        gateway.route(bad, "chat-1")
    await gateway.aclose()


@pytest.mark.parametrize("bad", BAD_SESSIONS, ids=repr)
async def test_what_is_no_session_id_is_refused(
    bad: Any, sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    gateway = await gateways.open(settings_at(sqlite_urls("a")))
    tenant = gateway.tenant("acme")
    with pytest.raises(UsageError, match="session_id"):
        tenant.session(bad)
    with pytest.raises(UsageError, match="session_id"):
        gateway.route("acme", bad)
    with pytest.raises(UsageError, match="session_id"):
        await tenant.delete_session(bad)


async def test_a_tenant_without_a_keyspace_is_refused(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    settings = settings_at(**_keyspaces(sqlite_urls("ab"), tenants={"acme": "eu"}))
    gateway = await gateways.open(settings)
    for act in (gateway.tenant, lambda tenant: gateway.route(tenant, "chat-1")):
        with pytest.raises(TenantRefused, match=r"'globex'.*tenants.*default_keyspace") as caught:
            act("globex")
        assert caught.value.tenant == "globex"
    with pytest.raises(TenantRefused):
        gateway.tenant("Acme")  # another tenant


async def test_the_settings_say_where_tenants_live(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("ab")
    values = _keyspaces(urls, tenants={"acme": "eu", "Acme": "main"}, default_keyspace="main")
    gateway = await gateways.open(settings_at(**values))
    placed = {"acme": "b", "Acme": "a", "globex": "a"}
    for tenant, shard in placed.items():
        assert gateway.tenant(tenant).keyspace == gateway.route(tenant, "chat-1").keyspace
        assert gateway.route(tenant, "chat-1").shard == shard
        await gateway.tenant(tenant).session("chat-1").add_items([item(tenant)])
    for shard, url in urls.items():
        stored = {row["tenant_id"] for row in await records(url, "sessions")}
        assert stored == {tenant for tenant, where in placed.items() if where == shard}


async def test_the_caller_may_say_where_a_tenant_lives(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    gateway = await gateways.open(settings_at(**_keyspaces(sqlite_urls("ab"))))
    for keyspace, shard in (("main", "a"), ("eu", "b")):
        tenant = gateway.tenant("acme", keyspace=keyspace)
        assert (tenant.tenant_id, tenant.keyspace) == ("acme", keyspace)
        await tenant.session("chat-1").add_items([item(keyspace)])
        assert gateway.route("acme", "chat-1", keyspace=keyspace).shard == shard
        assert await tenant.session("chat-1").get_items() == [item(keyspace)]
    assert await gateway.tenant("acme", keyspace="eu").delete_session("chat-1")
    assert await gateway.tenant("acme", keyspace="main").session("chat-1").get_items() != []


async def test_a_keyspace_that_is_not_there_is_refused(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    gateway = await gateways.open(settings_at(sqlite_urls("a")))
    for act in (
        lambda: gateway.tenant("acme", keyspace="us"),
        lambda: gateway.route("acme", "chat-1", keyspace="us"),
        lambda: gateway.tenant("acme", keyspace=""),
    ):
        with pytest.raises(UsageError, match=r"there is no keyspace.*main"):
            act()


async def test_a_route_needs_an_open_gateway(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    gateway = gateways.make(settings_at(sqlite_urls("a")))
    with pytest.raises(UsageError, match=r"keyspace 'main'.*not been read yet.*open"):
        gateway.route("acme", "chat-1")
    await gateway.open()
    assert gateway.route("acme", "chat-1").shard == "a"


@pytest.mark.parametrize("spread", [None, 4])
async def test_sessions_are_where_the_route_says(
    spread: int | None, databases: MakeDatabases, gateways: Gateways
) -> None:
    urls = named(await databases(2))
    keyspaces = {"main": {"slots": 64, "spread": spread}}
    gateway = await gateways.open(settings_at(urls, keyspaces=keyspaces))
    ids = [(tenant, f"chat {n}/ä") for tenant in ("acme", "globex") for n in range(6)]
    for tenant, session in ids:
        await gateway.tenant(tenant).session(session).add_items([item(session)])
    found = {}
    for shard, url in urls.items():
        for row in await records(url, "sessions"):
            found[row["tenant_id"], row["session_id"]] = shard, row["h"]
    assert found.keys() == set(ids)
    for key, (shard, h) in found.items():
        route = gateway.route(*key)
        first, last = slot_range(route.slot, 64)
        assert (route.shard, route.h) == (shard, h)
        assert first <= h <= last


async def test_deleting_a_session_removes_it_from_its_shard(
    databases: MakeDatabases, gateways: Gateways
) -> None:
    urls = named(await databases(2))
    gateway = await gateways.open(settings_at(urls))
    acme, globex = gateway.tenant("acme"), gateway.tenant("globex")
    id_ = session_on(gateway, "b")
    for tenant in (acme, globex):
        await tenant.session(id_).add_items([item("one"), item("two")])
    assert await acme.delete_session(id_) is True
    assert await acme.delete_session(id_) is False
    assert await acme.delete_session("never was") is False
    assert await acme.session(id_).get_items() == []
    assert (await acme.list_sessions()).sessions == ()
    assert await globex.session(id_).get_items() == [item("one"), item("two")]
    for table in ("sessions", "messages"):
        stored = [row for url in urls.values() for row in await records(url, table)]
        assert {row["tenant_id"] for row in stored} == {"globex"}
    await acme.session(id_).add_items([item("new")])
    assert await acme.session(id_).get_items() == [item("new")]


async def test_names_of_sessions_and_tenants(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    gateway = gateways.make(settings_at(sqlite_urls("a")))
    tenant = gateway.tenant("acme")
    session = tenant.session("chat-1")
    assert session.session_id == "acme/chat-1"
    assert (session.key.tenant_id, session.key.session_id) == ("acme", "chat-1")
    assert repr(tenant) == "Tenant('acme', keyspace='main')"
    assert repr(session) == "GatewaySession('acme/chat-1')"
