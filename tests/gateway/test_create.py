"""Creating a keyspace: what is stored afterwards, on every database."""

from __future__ import annotations

from collections import Counter
from itertools import count
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import delete, insert, text

from gateway.shards import (
    SLOTS,
    check_peers,
    content,
    engine_at,
    execute,
    identity,
    item,
    named,
    owners,
    records,
    session_on,
    settings_at,
    tables_at,
)
from shardgate import ShardUnavailable, SQLAlchemySession, TablesMismatch, metadata, slotmap
from shardgate.shards import Shard
from shardgate.slots import tenant_slots

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import MakeDatabases
    from gateway.conftest import Gateways
    from harness.engines import EngineMaker
    from harness.servers import Database

    SQLiteUrls = Callable[[str], dict[str, str]]

ALL_TABLES = {
    f"shardgate_{name}"
    for name in ("sessions", "messages", "ops", "slots", "shard", "peers", "tenants")
}


async def test_every_shard_holds_the_whole_map(
    databases: MakeDatabases, gateways: Gateways
) -> None:
    urls = named(await databases(3))
    gateway = gateways.make(settings_at(urls, create_tables=False))
    await gateway.create_tables()
    stored = {name: await identity(url) for name, url in urls.items()}
    assert len({row["keyspace_uuid"] for row in stored.values()}) == 1
    assert [row["name"] for row in stored.values()] == list(urls)
    assert {(row["keyspace"], row["slots"], row["spread"]) for row in stored.values()} == {
        ("main", SLOTS, None)
    }
    assert Counter(await owners(urls)) == {"a": 6, "b": 5, "c": 5}
    await check_peers(urls)
    for url in urls.values():
        assert await tables_at(url) == ALL_TABLES


async def test_creating_again_changes_nothing(databases: MakeDatabases, gateways: Gateways) -> None:
    urls = named(await databases(2))
    gateway = await gateways.open(settings_at(urls))
    before = [await content(url) for url in urls.values()]
    await gateway.create_tables()
    await gateways.open(settings_at(urls))
    await gateways.make(settings_at(urls)).create_tables()
    assert [await content(url) for url in urls.values()] == before


async def test_a_lost_table_is_made_again(databases: MakeDatabases, gateways: Gateways) -> None:
    urls = named(await databases(2))
    gateway = await gateways.open(settings_at(urls))
    await execute(urls["a"], text("DROP TABLE shardgate_ops"))
    await gateway.create_tables()
    assert await tables_at(urls["a"]) == ALL_TABLES


async def test_weights_share_out_the_slots(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    urls = sqlite_urls("ab")
    shards = {"a": {"url": urls["a"], "weight": 3}, "b": {"url": urls["b"], "weight": 1}}
    await gateways.open(settings_at(shards))
    assert Counter(await owners(urls)) == {"a": 12, "b": 4}


async def test_changed_weights_move_nothing(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    urls = sqlite_urls("ab")
    await gateways.open(settings_at(urls))
    before = await owners(urls)
    shards = {"a": {"url": urls["a"], "weight": 9}, "b": {"url": urls["b"]}}
    gateway = await gateways.open(settings_at(shards))
    await gateway.create_tables()
    assert await owners(urls) == before


async def test_spread_is_stored_and_kept(databases: MakeDatabases, gateways: Gateways) -> None:
    urls = named(await databases(2))
    keyspaces = {"main": {"slots": 64, "spread": 2}}
    gateway = await gateways.open(settings_at(urls, keyspaces=keyspaces))
    assert [(await identity(url))["spread"] for url in urls.values()] == [2, 2]
    slots = frozenset(gateway.route("acme", f"chat-{number}").slot for number in range(200))
    assert slots == tenant_slots("acme", slots=64, spread=2)


async def test_two_keyspaces_know_nothing_of_each_other(
    databases: MakeDatabases, gateways: Gateways
) -> None:
    a, b, c = [database.url for database in await databases(3)]
    shards = {"a": a, "b": {"url": b, "keyspace": "eu"}, "c": {"url": c, "keyspace": "eu"}}
    keyspaces = {"main": {"slots": 16}, "eu": {"slots": 32}}
    await gateways.open(settings_at(shards, keyspaces=keyspaces))
    assert set(await owners({"a": a}, slots=16)) == {"a"}
    assert set(await owners({"b": b, "c": c}, slots=32)) == {"b", "c"}
    await check_peers({"a": a})
    await check_peers({"b": b, "c": c})
    assert (await identity(a))["keyspace_uuid"] != (await identity(b))["keyspace_uuid"]


@pytest.mark.parametrize("new", ["a", "z"], ids=["sorts first", "sorts last"])
async def test_a_new_shard_joins_without_slots(
    new: str, databases: MakeDatabases, gateways: Gateways
) -> None:
    *old, late = await databases(3)
    urls = named(old, "mn")
    gateway = await gateways.open(settings_at(urls))
    before, keyspace = await owners(urls), (await identity(urls["m"]))["keyspace_uuid"]
    session = gateway.tenant("acme").session("chat-1")
    await session.add_items([item("kept")])

    urls[new] = late.url
    joined = await gateways.open(settings_at(urls))
    assert await owners(urls) == before
    assert (await identity(late.url))["keyspace_uuid"] == keyspace
    await check_peers(urls)
    assert await joined.tenant("acme").session("chat-1").get_items() == [item("kept")]


async def _half_join(urls: dict[str, str], new: str, url: str) -> None:
    """What is left of a creation that ended after it had given the new shard its identity."""
    tables = metadata()
    row = (await records(next(iter(urls.values())), "shard"))[0]
    row |= {"name": new, "shard_uuid": str(uuid4())}
    async with engine_at(url) as engine, engine.begin() as connection:
        await connection.run_sync(tables.create_all)
        await connection.execute(insert(tables.tables["shardgate_shard"]).values(row))


@pytest.mark.parametrize("new", ["a", "z"], ids=["sorts first", "sorts last"])
async def test_joining_that_broke_off_is_finished_without_moving_anything(
    new: str, sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("mn")
    await gateways.open(settings_at(urls))
    before = await owners(urls)
    late = sqlite_urls(new)
    await _half_join(urls, new, late[new])
    await gateways.open(settings_at(urls | late))
    assert await owners(urls | late) == before
    await check_peers(urls | late)


# What the first shard, and what the others, have not got yet when creation breaks off.
BROKEN_OFF = {
    "first founded": (("peers", "slots"), ("peers", "slots", "shard")),
    "all founded": (("peers", "slots"), ("peers", "slots")),
    "first has slots": (("peers",), ("peers", "slots")),
    "all have slots": (("peers",), ("peers",)),
    "first knows its peers": ((), ("peers",)),
}


@pytest.mark.parametrize("left", BROKEN_OFF)
async def test_creation_that_broke_off_is_finished(
    left: str, sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("abc")
    await gateways.open(settings_at(urls))
    before, tables = await owners(urls), metadata().tables
    of_first, of_others = BROKEN_OFF[left]
    for name, url in urls.items():
        gone = of_first if name == "a" else of_others
        await execute(url, *(delete(tables[f"shardgate_{table}"]) for table in gone))

    await gateways.open(settings_at(urls))
    assert await owners(urls) == before
    await check_peers(urls)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_creation_that_an_opening_broke_off_is_finished_by_the_first_operations(
    when: str, tmp_path: Path, gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard does not answer, or its answer is lost, wherever that is: nobody is told that the
    keyspace has not been created, and every shard serves as soon as it answers."""
    steps = 0
    lost_step = 0

    def losing(step: Any) -> Any:
        async def lose(shard: Shard, *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            is_lost = steps == lost_step
            if is_lost and when == "before":
                raise ShardUnavailable("the shard is away", shard=shard.name)
            answer = await step(shard, *args, **kwargs)
            if is_lost:
                raise ShardUnavailable("the answer is lost", shard=shard.name)
            return answer

        return lose

    monkeypatch.setattr(Shard, "tell", losing(Shard.tell))
    monkeypatch.setattr(Shard, "ready", losing(Shard.ready))
    while lost_step <= steps:
        lost_step, steps = lost_step + 1, 0
        urls = {name: f"sqlite+aiosqlite:///{tmp_path}/{lost_step}{name}.db" for name in "ab"}
        gateway = await gateways.open(settings_at(urls))
        await gateway.tenant("acme").session("chat-1").get_items()
        for name in "ab":
            session = gateway.tenant("acme").session(session_on(gateway, name))
            await session.add_items([item(name)])
            assert await session.get_items() == [item(name)]
        await gateway.aclose()
        await (await gateways.open(settings_at(urls))).aclose()
        await check_peers(urls)
    assert steps > len(urls)


async def test_a_shard_that_somebody_else_has_just_made_is_not_taken_for_lost(
    sqlite_urls: SQLiteUrls, gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are not read in one moment: b may be read before it is founded, a after it."""
    urls = sqlite_urls("ab")
    await gateways.open(settings_at(urls))
    before = [await content(url) for url in urls.values()]
    read_records = slotmap.read_records

    looks = count()

    async def read_too_early(shards: Any, **options: Any) -> Any:
        found, down = await read_records(shards, **options)
        return (found | {"b": None} if next(looks) == 0 else found), down

    monkeypatch.setattr(slotmap, "read_records", read_too_early)
    await gateways.make(settings_at(urls)).create_tables()
    assert [await content(url) for url in urls.values()] == before


async def test_a_shard_added_before_creation_was_finished_joins_the_keyspace_that_was_begun(
    sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    urls = sqlite_urls("b")
    await gateways.open(settings_at(urls))
    begun, tables = (await identity(urls["b"]))["keyspace_uuid"], metadata().tables
    await execute(urls["b"], delete(tables["shardgate_slots"]))
    urls |= sqlite_urls("a")
    await gateways.open(settings_at(urls))
    assert (await identity(urls["a"]))["keyspace_uuid"] == begun
    assert set(await owners(urls)) == {"a", "b"}


@pytest.mark.backends("postgresql")
async def test_two_schemas_of_one_database_are_two_shards(
    database: Database, gateways: Gateways
) -> None:
    shards = {
        name: {"url": database.url, "schema": schema}
        for name, schema in (("a", "Tenants 1"), ("b", "tenants_2"))
    }
    gateway = await gateways.open(settings_at(shards))
    for shard, schema in (("a", "Tenants 1"), ("b", "tenants_2")):
        assert await tables_at(database.url, schema=schema) == ALL_TABLES
        session_id = session_on(gateway, shard)
        session = gateway.tenant("acme").session(session_id)
        await session.add_items([item(shard)])
        assert await session.get_items() == [item(shard)]
        stored = await records(database.url, "sessions", schema=schema)
        assert [row["session_id"] for row in stored] == [session_id]
    assert await tables_at(database.url) == set()
    assert len((await gateway.tenant("acme").list_sessions()).sessions) == 2


@pytest.mark.backends("postgresql")
async def test_a_schema_that_is_there_is_used(database: Database, gateways: Gateways) -> None:
    await execute(database.url, text("CREATE SCHEMA one"))
    await gateways.open(settings_at({"a": {"url": database.url, "schema": "one"}}))
    assert await tables_at(database.url, schema="one") == ALL_TABLES


async def test_a_prefix_parts_two_gateways_in_one_database(
    database: Database, gateways: Gateways
) -> None:
    for prefix in ("one_", "two_"):
        gateway = await gateways.open(settings_at({"a": database.url}, table_prefix=prefix))
        await gateway.tenant("acme").session("chat-1").add_items([item(prefix)])
    for prefix in ("one_", "two_"):
        gateway = await gateways.open(settings_at({"a": database.url}, table_prefix=prefix))
        assert await gateway.tenant("acme").session("chat-1").get_items() == [item(prefix)]


async def test_tables_of_the_standalone_class_are_refused(
    database: Database, make_engine: EngineMaker, gateways: Gateways
) -> None:
    session = SQLAlchemySession(
        "chat-1",
        engine=make_engine(),
        create_tables=True,
        sessions_table="shardgate_sessions",
        messages_table="shardgate_messages",
    )
    await session.add_items([item("mine")])
    before = await content(database.url)
    gateway = gateways.make(settings_at({"a": database.url}, create_tables=False))
    with pytest.raises(TablesMismatch, match=r"shardgate_sessions.*table_prefix"):
        await gateway.create_tables()
    assert await session.get_items() == [item("mine")]
    assert (await content(database.url))["shardgate_messages"] == before["shardgate_messages"]
