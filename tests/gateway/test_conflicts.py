"""Shards that are not what the settings or their peers take them for: refused, and not touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import pytest
from sqlalchemy import delete, update

from gateway.shards import content, engine_at, execute, item, named, session_on, settings_at
from shardgate import Gateway, OwnershipConflict, ShardQuarantined, metadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeDatabases
    from gateway.conftest import Gateways

    SQLiteUrls = Callable[[str], dict[str, str]]

TABLES = metadata().tables
SHARD = TABLES["shardgate_shard"]


class Refused(Protocol):
    async def __call__(
        self, urls: dict[str, str], *, wrong: str, naming: str, **settings: Any
    ) -> None: ...


@pytest.fixture
def refused(gateways: Gateways) -> Refused:
    """The shards of ``wrong`` are refused in words that match ``naming``, and nothing is written
    there; the others serve. Creating is refused altogether."""

    async def refused(urls: dict[str, str], *, wrong: str, naming: str, **settings: Any) -> None:
        before = {name: await content(url) for name, url in urls.items()}
        for create_tables in (True, False):
            gateway = gateways.make(settings_at(urls, **settings, create_tables=create_tables))
            with pytest.raises(OwnershipConflict, match=naming) as caught:
                await gateway.create_tables()
            assert caught.value.keyspace == "main"
            assert {name: await content(url) for name, url in urls.items()} == before
            right = sorted(urls.keys() - set(wrong))
            if not right:
                await refuses_everything(gateway, naming)
                continue
            await gateway.open()
            report = await gateway.check()
            assert {name for name, health in report.shards.items() if not health.ok} == set(wrong)
            for name in sorted(set(wrong) & set(gateway._keyspaces["main"].map.owners)):
                await refuses(gateway, name, naming)
            for name in right:
                await serves(gateway, name)
            assert {name: await content(urls[name]) for name in wrong} == {
                name: before[name] for name in wrong
            }
            before = {name: await content(url) for name, url in urls.items()}

    return refused


async def refuses_everything(gateway: Gateway, naming: str) -> None:
    for act in (
        gateway.open,
        lambda: gateway.tenant("acme").session("1").add_items([item("lost?")]),
    ):
        with pytest.raises(OwnershipConflict, match=naming) as caught:
            await act()
        assert caught.value.keyspace == "main"


async def refuses(gateway: Gateway, shard: str, naming: str) -> None:
    tenant = gateway.tenant("acme")
    session = tenant.session(session_on(gateway, shard))
    for act in (
        lambda: session.add_items([item("lost?")]),
        session.get_items,
        session.pop_item,
        session.clear_session,
        lambda: tenant.delete_session(session.key.session_id),
        tenant.list_sessions,
    ):
        with pytest.raises(ShardQuarantined, match=naming):
            await act()
    page = await tenant.list_sessions(allow_partial=True)
    assert shard in page.unavailable_shards


async def serves(gateway: Gateway, shard: str) -> None:
    session = gateway.tenant("acme").session(session_on(gateway, shard))
    before = await session.get_items()
    await session.add_items([item("kept")])
    assert await session.get_items() == [*before, item("kept")]


@pytest.fixture
async def pair(sqlite_urls: SQLiteUrls, gateways: Gateways) -> dict[str, str]:
    """Two shards of a keyspace that has been created."""
    urls = sqlite_urls("ab")
    await gateways.open(settings_at(urls))
    return urls


async def test_swapped_urls(databases: MakeDatabases, gateways: Gateways, refused: Refused) -> None:
    urls = named(await databases(3))
    await gateways.open(settings_at(urls))
    swapped = urls | {"a": urls["b"], "b": urls["a"]}
    await refused(swapped, wrong="ab", naming="shard '(.)'.*name is '.'.*should be '\\1'.*URL")


async def test_reordered_urls(
    databases: MakeDatabases, gateways: Gateways, refused: Refused
) -> None:
    urls = named(await databases(3))
    await gateways.open(settings_at(urls))
    reordered = dict(zip("abc", [urls["b"], urls["c"], urls["a"]], strict=True))
    await refused(reordered, wrong="abc", naming="shard 'a'.*name is 'b'.*should be 'a'.*URL")


async def test_an_empty_database_in_the_place_of_a_shard(
    databases: MakeDatabases, gateways: Gateways, refused: Refused
) -> None:
    *made, empty = await databases(3)
    urls = named(made)
    await gateways.open(settings_at(urls))
    await refused(
        urls | {"b": empty.url}, wrong="b", naming="shard 'b' has no record.*URL.*emptied"
    )


async def test_a_shard_that_was_emptied(pair: dict[str, str], refused: Refused) -> None:
    """Also where its tables have been made again, as a migration tool would."""
    async with engine_at(pair["b"]) as engine, engine.begin() as connection:
        await connection.run_sync(metadata().drop_all)
        await connection.run_sync(metadata().create_all)
    await refused(pair, wrong="b", naming="shard 'b' has no record.*URL.*emptied")


async def test_a_shard_of_another_keyspace(
    pair: dict[str, str], sqlite_urls: SQLiteUrls, gateways: Gateways, refused: Refused
) -> None:
    other = sqlite_urls("c")
    shards = {"c": {"url": other["c"], "keyspace": "eu"}}
    await gateways.open(settings_at(shards, keyspaces={"eu": {"slots": 16}}))
    await refused(pair | other, wrong="c", naming="shard 'c'.*keyspace is 'eu'.*should be 'main'")


async def test_a_shard_of_another_keyspace_of_the_same_name(
    pair: dict[str, str], sqlite_urls: SQLiteUrls, gateways: Gateways, refused: Refused
) -> None:
    for name in ("0", "z"):
        other = sqlite_urls(name)
        await gateways.open(settings_at(other))
        await refused(pair | other, wrong=name, naming=f"shard '{name}'.*keyspace_uuid")


async def test_two_shards_of_two_keyspaces_of_one_name(
    pair: dict[str, str], sqlite_urls: SQLiteUrls, gateways: Gateways, refused: Refused
) -> None:
    """Nobody can tell which of them is right."""
    other = sqlite_urls("cd")
    await gateways.open(settings_at({"b": other["c"], "z": other["d"]}))
    await refused(
        {"a": pair["a"], "b": other["c"]}, wrong="ab", naming="shard '[ab]'.*just as many"
    )


async def test_a_shard_made_anew_under_its_old_name(pair: dict[str, str], refused: Refused) -> None:
    slots = TABLES["shardgate_slots"]
    await execute(pair["b"], update(SHARD).values(shard_uuid=str(uuid4())), delete(slots))
    await refused(pair, wrong="b", naming="shard 'b'.*shard_uuid")


@pytest.mark.parametrize(
    ("what", "settings"),
    [("slots", {"slots": 32}), ("spread", {"slots": 16, "spread": 4})],
    ids=["slots", "spread"],
)
async def test_a_changed_shape(
    what: str, settings: dict[str, Any], pair: dict[str, str], refused: Refused
) -> None:
    naming = f"shard 'a'.*{what}.*fixed when the keyspace was created"
    await refused(pair, wrong="ab", keyspaces={"main": settings}, naming=naming)


@pytest.mark.parametrize(
    ("what", "value"), [("hash", "siphash/2"), ("schema_version", 99)], ids=["hash", "schema"]
)
async def test_a_shard_of_another_version(
    what: str, value: object, pair: dict[str, str], refused: Refused
) -> None:
    await execute(pair["b"], update(SHARD).values({what: value}))
    await refused(pair, wrong="b", naming=f"shard 'b'.*{what}.*{value}.*another version")


async def test_a_renamed_shard(pair: dict[str, str], refused: Refused) -> None:
    renamed = {"a": pair["a"], "c": pair["b"]}
    await refused(renamed, wrong="c", naming="shard 'c'.*name is 'b'.*should be 'c'")


async def test_a_shard_with_slots_that_is_missing_from_the_settings(
    pair: dict[str, str], gateways: Gateways
) -> None:
    """A process with an old list of shards serves what it can reach."""
    full = await gateways.open(settings_at(pair))
    on_b = session_on(full, "b")
    gateway = await gateways.open(settings_at({"a": pair["a"]}))
    await serves(gateway, "a")
    problem = "8 slots belong to shard 'b', which the settings do not name"
    with pytest.raises(OwnershipConflict, match=problem):
        await gateway.tenant("acme").session(on_b).add_items([item("lost?")])
    with pytest.raises(OwnershipConflict, match=problem):
        await gateway.tenant("acme").list_sessions()
    page = await gateway.tenant("acme").list_sessions(allow_partial=True)
    assert page.unavailable_shards == ("b",)
    report = await gateway.check()
    assert report.shards["a"].ok
    assert not report.ok
    assert problem in report.problems[0]


async def test_a_new_shard_does_not_hide_that_another_one_is_wrong(
    pair: dict[str, str], sqlite_urls: SQLiteUrls, gateways: Gateways
) -> None:
    """Creation stops before the new shard gets its tables."""
    urls = sqlite_urls("c") | {"a": pair["b"], "b": pair["a"]}
    before = [await content(url) for url in urls.values()]
    gateway = gateways.make(settings_at(urls))
    with pytest.raises(OwnershipConflict, match="shard 'a'"):
        await gateway.create_tables()
    with pytest.raises(OwnershipConflict, match="shard 'a'"):
        await gateway.open()
    assert [await content(url) for url in urls.values()] == before


async def test_sessions_work_again_once_the_settings_are_right(
    pair: dict[str, str], gateways: Gateways, refused: Refused
) -> None:
    gateway = await gateways.open(settings_at(pair))
    await gateway.tenant("acme").session("chat-1").add_items([item("kept")])
    await refused({"a": pair["b"], "b": pair["a"]}, wrong="ab", naming="shard 'a'")
    again = await gateways.open(settings_at(pair))
    assert await again.tenant("acme").session("chat-1").get_items() == [item("kept")]
