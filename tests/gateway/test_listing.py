"""A tenant's sessions, listed over several shards, compared with a model."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, insert

from gateway.shards import engine_at, item, named, session_on, settings_at
from shardgate import Gateway, SessionPage, ShardUnavailable, UsageError, metadata
from shardgate.slots import tenant_slots

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeDatabases
    from gateway.conftest import Gateways
    from shardgate import Tenant

    SQLiteUrls = Callable[[str], dict[str, str]]

SESSIONS = metadata().tables["shardgate_sessions"]
START = datetime(2026, 3, 1, 12)
# Equal times on purpose, and ids whose order differs between bytes and languages.
IDS = ["a", "B", "b", "ä", "z", "Z", "a ", "a/1", "é", "😀", "￿", "_", "chat-10", "chat-9"]
Place = tuple[datetime, str]


def _row(tenant: str, session_id: str, listed_at: datetime, h: int, count: int) -> dict[str, Any]:
    return {
        "tenant_id": tenant,
        "session_id": session_id,
        "h": h,
        "incarnation": 1,
        "next_seq": count + 1,
        "floor_seq": 0,
        "revision": count,
        "item_count": count,
        "byte_count": 10 * count,
        "created_at": START,
        "updated_at": listed_at + timedelta(seconds=30),
        "listed_at": listed_at,
    }


async def _fill(gateway: Gateway, urls: dict[str, str], tenant: str) -> list[Place]:
    """Sessions at times of our choice, each on its shard; in the order of a listing."""
    places = [
        (START + timedelta(minutes=number % 3, microseconds=number % 2), id_)
        for number, id_ in enumerate(IDS)
    ]
    for shard, url in urls.items():
        rows = [
            _row(tenant, id_, at, gateway.route(tenant, id_).h, number)
            for number, (at, id_) in enumerate(places)
            if gateway.route(tenant, id_).shard == shard
        ]
        assert rows
        async with engine_at(url) as engine, engine.begin() as connection:
            await connection.execute(insert(SESSIONS), rows)
    return sorted(places, key=lambda place: (place[0], place[1].encode()), reverse=True)


async def _walk(tenant: Tenant, limit: int) -> list[SessionPage]:
    pages: list[SessionPage] = []
    cursor: str | None = None
    while not pages or cursor is not None:
        pages.append(await tenant.list_sessions(limit=limit, cursor=cursor))
        cursor = pages[-1].next_cursor
        assert len(pages) <= len(IDS) + 1
    return pages


def _places(*pages: SessionPage) -> list[Place]:
    return [(one.listed_at, one.session_id) for page in pages for one in page.sessions]


@pytest.mark.parametrize("spread", [None, 8])
async def test_pages_of_any_size_give_the_model(
    spread: int | None, databases: MakeDatabases, gateways: Gateways
) -> None:
    urls = named(await databases(2))
    keyspaces = {"main": {"slots": 16, "spread": spread}}
    gateway = await gateways.open(settings_at(urls, keyspaces=keyspaces))
    model = await _fill(gateway, urls, "acme")
    await _fill(gateway, urls, "globex")
    tenant = gateway.tenant("acme")
    for limit in (1, 2, 3, 7, len(IDS) - 1, len(IDS), len(IDS) + 1, 1000):
        pages = await _walk(tenant, limit)
        assert _places(*pages) == model
        assert [len(page.sessions) for page in pages[:-1]] == [limit] * (len(pages) - 1)
        assert 0 < len(pages[-1].sessions) <= limit
        assert {page.unavailable_shards for page in pages} == {()}


async def test_a_session_is_shown_with_its_numbers(
    databases: MakeDatabases, gateways: Gateways
) -> None:
    gateway = await gateways.open(settings_at(named(await databases(2))))
    tenant = gateway.tenant("acme")
    session = tenant.session("chat-1")
    await session.add_items([item("one"), item("two")])
    await session.pop_item()
    (info,) = (await tenant.list_sessions()).sessions
    assert (info.session_id, info.item_count) == ("chat-1", 1)
    assert info.byte_count == len('{"role":"user","content":"one"}')
    for time in (info.created_at, info.updated_at, info.listed_at):
        assert isinstance(time, datetime)
        assert time.tzinfo is None
    assert info.created_at <= info.listed_at <= info.updated_at


async def test_nothing_to_list(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    gateway = await gateways.open(settings_at(sqlite_urls("ab")))
    assert await gateway.tenant("acme").list_sessions() == SessionPage((), None)


async def test_fifty_by_default(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    gateway = await gateways.open(settings_at(sqlite_urls("ab")))
    tenant = gateway.tenant("acme")
    for number in range(51):
        await tenant.session(str(number)).add_items([item("x")])
    page = await tenant.list_sessions()
    assert len(page.sessions) == 50
    last = await tenant.list_sessions(cursor=page.next_cursor)
    assert (len(last.sessions), last.next_cursor) == (1, None)


@pytest.mark.parametrize("limit", [0, -1, 1001, True, 1.0, "5", None])
async def test_what_is_no_limit_is_refused(
    limit: Any, sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    gateway = await gateways.open(settings_at(sqlite_urls("a")))
    with pytest.raises(UsageError, match="limit must be an integer from 1 to 1000"):
        await gateway.tenant("acme").list_sessions(limit=limit)


async def test_a_cursor_is_good_for_its_tenant_and_keyspace_alone(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("ab")
    shards = {"a": urls["a"], "b": {"url": urls["b"], "keyspace": "eu"}}
    keyspaces = {"main": {"slots": 16}, "eu": {"slots": 16}}
    gateway = await gateways.open(settings_at(shards, keyspaces=keyspaces))
    acme = gateway.tenant("acme", keyspace="main")
    for number in range(3):
        await acme.session(str(number)).add_items([item("x")])
    cursor = (await acme.list_sessions(limit=1)).next_cursor
    assert cursor is not None
    for other in (
        gateway.tenant("globex", keyspace="main"),
        gateway.tenant("Acme", keyspace="main"),
        gateway.tenant("acme", keyspace="eu"),
    ):
        with pytest.raises(UsageError, match="another tenant or keyspace"):
            await other.list_sessions(cursor=cursor)
    assert len((await acme.list_sessions(cursor=cursor)).sessions) == 2


async def test_pages_go_on_in_another_process(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    urls = sqlite_urls("ab")
    gateway = await gateways.open(settings_at(urls))
    model = await _fill(gateway, urls, "acme")
    first = await gateway.tenant("acme").list_sessions(limit=5)
    elsewhere = await gateways.open(settings_at(urls, create_tables=False))
    second = await elsewhere.tenant("acme").list_sessions(cursor=first.next_cursor)
    assert _places(first, second) == model


async def test_a_shard_that_is_down_fails_the_page_or_is_named(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("ab")
    gateway = await gateways.open(settings_at(urls))
    model = await _fill(gateway, urls, "acme")
    here = [place for place in model if gateway.route("acme", place[1]).shard == "a"]
    urls["b"] = urls["b"].replace("b.db", "no/such/folder/b.db")
    gateway = await gateways.open(settings_at(urls, create_tables=False))
    tenant = gateway.tenant("acme")
    with pytest.raises(ShardUnavailable, match="shard 'b'") as caught:
        await tenant.list_sessions()
    assert caught.value.shard == "b"

    first = await tenant.list_sessions(limit=2, allow_partial=True)
    rest = await tenant.list_sessions(cursor=first.next_cursor, allow_partial=True)
    assert _places(first, rest) == here
    assert {first.unavailable_shards, rest.unavailable_shards} == {("b",)}


async def test_only_shards_with_slots_of_the_tenant_are_asked(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("abcd")
    keyspaces = {"main": {"slots": 64, "spread": 2}}
    gateway = await gateways.open(settings_at(urls, keyspaces=keyspaces))
    for number in range(20):  # which slots a shard owns is read at its first page
        await gateway.tenant(f"tenant-{number}").list_sessions()
    asked: list[str] = []
    for name, shard in gateway.shards.items():

        def note(*_: Any, name: str = name) -> None:
            asked.append(name)

        event.listen(shard.engine.sync_engine.pool, "checkout", note)
    few = 0
    for number in range(20):
        tenant = f"tenant-{number}"
        asked.clear()
        await gateway.tenant(tenant).list_sessions()
        slots = tenant_slots(tenant, slots=64, spread=2)
        assert slots is not None
        ids = (str(number) for number in range(100))
        assert sorted(asked) == sorted({gateway.route(tenant, id_).shard for id_ in ids})
        few += len(asked) == 1
    assert few  # some tenants are on one shard alone


async def test_a_shard_without_slots_is_not_asked(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("ab")
    await gateways.open(settings_at(urls))
    gateway = await gateways.open(settings_at(urls | sqlite_urls("c")))
    asked: list[object] = []
    event.listen(
        gateway.shards["c"].engine.sync_engine.pool, "checkout", lambda *_: asked.append(1)
    )
    await gateway.tenant("acme").list_sessions()
    assert asked == []


async def test_used_sessions_come_first(databases: MakeDatabases, gateways: Gateways) -> None:
    """The order follows use to the minute: what is older than that comes after what is new."""
    urls = named(await databases(2))
    gateway = await gateways.open(settings_at(urls))
    model = await _fill(gateway, urls, "acme")
    tenant, old = gateway.tenant("acme"), model[-1][1]
    await tenant.session(old).add_items([item("again")])
    page = await tenant.list_sessions(limit=len(IDS))
    assert page.sessions[0].session_id == old
    assert _places(page)[1:] == model[:-1]


async def test_every_session_is_listed_once_while_others_are_added(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("ab")
    gateway = await gateways.open(settings_at(urls))
    model, tenant = await _fill(gateway, urls, "acme"), gateway.tenant("acme")
    found, cursor = [], None
    for number in range(len(IDS)):
        page = await tenant.list_sessions(limit=1, cursor=cursor)
        found += _places(page)
        cursor = page.next_cursor
        for shard in "ab":
            new = session_on(gateway, shard) + f" {number}"
            await tenant.session(new).add_items([item("new")])
    assert found == model
    assert cursor is None
