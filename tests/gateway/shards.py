"""Settings for shards at given URLs, and a look at what is really stored on them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from sqlalchemy import MetaData, inspect, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from shardgate import GatewaySettings, metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from agents.items import TResponseInputItem
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from harness.servers import Database
    from shardgate import Gateway

SLOTS = 16
PREFIX = "shardgate_"
Rows = list[tuple[Any, ...]]
Content = dict[str, Rows]


def item(text: str) -> TResponseInputItem:
    return {"role": "user", "content": text}


def named(databases: list[Database], names: str = "abcdefgh") -> dict[str, str]:
    """URLs by shard name."""
    return {name: database.url for name, database in zip(names, databases, strict=False)}


def settings_at(urls: Mapping[str, Any], *, slots: int = SLOTS, **more: Any) -> GatewaySettings:
    """Settings of one keyspace; a shard is its URL, or a dict with more than that."""
    shards = {name: {"url": url} if isinstance(url, str) else url for name, url in urls.items()}
    values: dict[str, Any] = {
        "shards": shards,
        "keyspaces": {"main": {"slots": slots}},
        "create_tables": True,
        "operation_deadline": 20,
    }
    return GatewaySettings.from_dict(values | more)


def patient(gateway: Gateway) -> Gateway:
    """No shard's answer is late: what ends at the deadline is what the gateway itself waits for."""
    for shard in gateway.shards.values():
        shard.deadline = 60
    return gateway


def session_on(gateway: Gateway, shard: str, tenant: str = "acme") -> str:
    """The id of a session that lives on this shard."""
    ids = (f"chat-{number}" for number in count())
    return next(id_ for id_ in ids if gateway.route(tenant, id_).shard == shard)


@asynccontextmanager
async def engine_at(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        yield engine
    finally:
        await engine.dispose()


async def execute(url: str, *statements: Any) -> None:
    async with engine_at(url) as engine, engine.begin() as connection:
        for statement in statements:
            await connection.execute(statement)


async def content(url: str, *, schema: str | None = None) -> Content:
    """All tables of a database with their rows, in order, whoever made them."""
    async with engine_at(url) as engine, engine.connect() as connection:
        return await connection.run_sync(_content, schema)


def _content(connection: Connection, schema: str | None) -> Content:
    found = MetaData(schema=schema)
    found.reflect(connection)
    return {
        table.name: sorted((tuple(row) for row in connection.execute(select(table))), key=repr)
        for table in found.sorted_tables
    }


async def tables_at(url: str, *, schema: str | None = None) -> set[str]:
    async with engine_at(url) as engine, engine.connect() as connection:
        return set(await connection.run_sync(lambda c: inspect(c).get_table_names(schema=schema)))


async def records(
    url: str, table: str, *, prefix: str = PREFIX, schema: str | None = None
) -> list[dict[str, Any]]:
    """The rows of a gateway's table, in the order of its key, with Shardgate's own types."""
    full = f"{prefix}{table}"
    chosen = metadata(table_prefix=prefix, schema=schema).tables[
        full if schema is None else f"{schema}.{full}"
    ]
    async with engine_at(url) as engine, engine.connect() as connection:
        rows = await connection.execute(select(chosen).order_by(*chosen.primary_key.columns))
        return [dict(row) for row in rows.mappings()]


async def identity(url: str, **where: Any) -> dict[str, Any]:
    (row,) = await records(url, "shard", **where)
    return row


async def owners(urls: Mapping[str, str], *, slots: int = SLOTS) -> list[str]:
    """Who owns each slot, by name; AssertionError unless all shards say the same of all slots.

    Each shard claims its own, and has hints about the others.
    """
    names = {(await identity(url))["shard_uuid"]: name for name, url in urls.items()}
    assert len(names) == len(urls)
    first, *others = [await claims(url) for url in urls.values()]
    assert all(other == first for other in others)
    assert [slot for slot, _, _ in first] == list(range(slots))
    return [names[owner] for _, owner, _ in first]


async def claims(url: str) -> list[tuple[int, str, int]]:
    """A shard's slots with owner and epoch; AssertionError unless their states fit the owners."""
    own = (await identity(url))["shard_uuid"]
    rows = await records(url, "slots")
    for row in rows:
        assert row["state"] == ("owned" if row["owner"] == own else "elsewhere")
    return [(row["slot"], row["owner"], row["epoch"]) for row in rows]


async def check_peers(urls: Mapping[str, str]) -> None:
    """AssertionError unless every shard knows each other one, and not itself."""
    uuids = {name: (await identity(url))["shard_uuid"] for name, url in urls.items()}
    for name, url in urls.items():
        known = {row["name"]: row["shard_uuid"] for row in await records(url, "peers")}
        assert known == {peer: uuid for peer, uuid in uuids.items() if peer != name}
