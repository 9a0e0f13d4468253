"""Shards that are not what the settings or their peers take them for: refused, and not touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import pytest
from sqlalchemy import delete, update

from gateway.shards import content, engine_at, execute, item, named, settings_at
from shardgate import OwnershipConflict, metadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeDatabases
    from gateway.conftest import Gateways

    SQLiteUrls = Callable[[str], dict[str, str]]

TABLES = metadata().tables
SHARD = TABLES["shardgate_shard"]


class Refused(Protocol):
    async def __call__(self, urls: dict[str, str], *, naming: str, **settings: Any) -> None: ...


@pytest.fixture
def refused(gateways: Gateways) -> Refused:
    """Creating and opening are refused in words that match ``naming``; nothing is written."""

    async def refused(urls: dict[str, str], *, naming: str, **settings: Any) -> None:
        before = [await content(url) for url in urls.values()]
        for create_tables in (True, False):
            gateway = gateways.make(settings_at(urls, **settings, create_tables=create_tables))
            for act in (
                gateway.create_tables,
                gateway.open,
                lambda door=gateway: door.tenant("acme").session("1").add_items([item("lost?")]),
            ):
                with pytest.raises(OwnershipConflict, match=naming) as caught:
                    await act()
                assert caught.value.keyspace == "main"
        assert [await content(url) for url in urls.values()] == before

    return refused


@pytest.fixture
async def pair(sqlite_urls: SQLiteUrls, gateways: Gateways) -> dict[str, str]:
    """Two shards of a keyspace that has been created."""
    urls = sqlite_urls("ab")
    await gateways.open(settings_at(urls))
    return urls


async def test_swapped_urls(databases: MakeDatabases, gateways: Gateways, refused: Refused) -> None:
    urls = named(await databases(2))
    await gateways.open(settings_at(urls))
    swapped = {"a": urls["b"], "b": urls["a"]}
    await refused(swapped, naming="shard 'a'.*name is 'b'.*should be 'a'.*URL")


async def test_an_empty_database_in_the_place_of_a_shard(
    databases: MakeDatabases, gateways: Gateways, refused: Refused
) -> None:
    *made, empty = await databases(3)
    urls = named(made)
    await gateways.open(settings_at(urls))
    await refused(urls | {"b": empty.url}, naming="shard 'b' has no record.*URL.*emptied")


async def test_a_shard_that_was_emptied(pair: dict[str, str], refused: Refused) -> None:
    """Also where its tables have been made again, as a migration tool would."""
    async with engine_at(pair["b"]) as engine, engine.begin() as connection:
        await connection.run_sync(metadata().drop_all)
        await connection.run_sync(metadata().create_all)
    await refused(pair, naming="shard 'b' has no record.*URL.*emptied")


async def test_a_shard_of_another_keyspace(
    pair: dict[str, str], sqlite_urls: SQLiteUrls, gateways: Gateways, refused: Refused
) -> None:
    other = sqlite_urls("c")
    shards = {"c": {"url": other["c"], "keyspace": "eu"}}
    await gateways.open(settings_at(shards, keyspaces={"eu": {"slots": 16}}))
    await refused(pair | other, naming="shard 'c'.*keyspace is 'eu'.*should be 'main'")


async def test_a_shard_of_another_keyspace_of_the_same_name(
    pair: dict[str, str], sqlite_urls: SQLiteUrls, gateways: Gateways, refused: Refused
) -> None:
    for name in ("0", "z"):
        other = sqlite_urls(name)
        await gateways.open(settings_at(other))
        await refused(pair | other, naming=f"shard '{name}'.*keyspace_uuid")


async def test_a_shard_made_anew_under_its_old_name(pair: dict[str, str], refused: Refused) -> None:
    slots = TABLES["shardgate_slots"]
    await execute(pair["b"], update(SHARD).values(shard_uuid=str(uuid4())), delete(slots))
    await refused(pair, naming="shard 'b'.*shard_uuid")


@pytest.mark.parametrize(
    ("what", "settings"),
    [("slots", {"slots": 32}), ("spread", {"slots": 16, "spread": 4})],
    ids=["slots", "spread"],
)
async def test_a_changed_shape(
    what: str, settings: dict[str, Any], pair: dict[str, str], refused: Refused
) -> None:
    naming = f"shard 'a'.*{what}.*fixed when the keyspace was created"
    await refused(pair, keyspaces={"main": settings}, naming=naming)


@pytest.mark.parametrize(
    ("what", "value"), [("hash", "siphash/2"), ("schema_version", 99)], ids=["hash", "schema"]
)
async def test_a_shard_of_another_version(
    what: str, value: object, pair: dict[str, str], refused: Refused
) -> None:
    await execute(pair["b"], update(SHARD).values({what: value}))
    await refused(pair, naming=f"shard 'b'.*{what}.*{value}.*another version")


async def test_a_renamed_shard(pair: dict[str, str], refused: Refused) -> None:
    renamed = {"a": pair["a"], "c": pair["b"]}
    await refused(renamed, naming="shard 'c'.*name is 'b'.*should be 'c'")


async def test_a_shard_with_slots_that_is_missing_from_the_settings(
    pair: dict[str, str], refused: Refused
) -> None:
    await refused({"a": pair["a"]}, naming="slot 8 belongs to 'b'")


async def test_a_new_shard_does_not_hide_that_another_one_is_wrong(
    pair: dict[str, str], sqlite_urls: SQLiteUrls, refused: Refused
) -> None:
    """Creation stops before the new shard gets its tables."""
    urls = sqlite_urls("c") | {"a": pair["b"], "b": pair["a"]}
    await refused(urls, naming="shard 'a'")


async def test_sessions_work_again_once_the_settings_are_right(
    pair: dict[str, str], gateways: Gateways, refused: Refused
) -> None:
    gateway = await gateways.open(settings_at(pair))
    await gateway.tenant("acme").session("chat-1").add_items([item("kept")])
    await refused({"a": pair["b"], "b": pair["a"]}, naming="shard 'a'")
    again = await gateways.open(settings_at(pair))
    assert await again.tenant("acme").session("chat-1").get_items() == [item("kept")]
