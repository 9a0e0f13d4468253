"""``shardgate.metadata()``: the same tables for a platform's own migrations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import MetaData, inspect, text

from gateway.shards import engine_at, execute, item, named, settings_at
from shardgate import metadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from conftest import MakeDatabases
    from gateway.conftest import Gateways
    from harness.servers import Database

    SQLiteUrls = Callable[[str], dict[str, str]]

TABLES = ["messages", "ops", "peers", "sessions", "shard", "slots", "tenants"]


def _text(value: Any) -> str:
    """A reflected thing as text; constraints without a name of ours are named by the database."""
    return re.sub(r"\s+", " ", repr(value))


def _shape(connection: Connection, schema: str | None, prefix: str) -> dict[str, Any]:
    """All that the database tells of the tables, with the prefix taken off their names."""
    found, shape = inspect(connection), {}
    for name in sorted(found.get_table_names(schema=schema)):
        parts: dict[str, Any] = {
            "columns": [
                {key: _text(value) for key, value in column.items()}
                for column in found.get_columns(name, schema=schema)
            ],
            "key": found.get_pk_constraint(name, schema=schema)["constrained_columns"],
            "indexes": sorted(map(_text, found.get_indexes(name, schema=schema))),
            "checks": sorted(map(_text, found.get_check_constraints(name, schema=schema))),
            "options": _text(found.get_table_options(name, schema=schema)),
        }
        shape[name.removeprefix(prefix)] = _without_prefix(parts, prefix)
    return shape


def _without_prefix(parts: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name: _text(part).replace(prefix, "") for name, part in parts.items()}


async def _shape_at(url: str, schema: str | None = None, prefix: str = "shardgate_") -> Any:
    async with engine_at(url) as engine, engine.connect() as connection:
        return await connection.run_sync(_shape, schema, prefix)


@pytest.mark.parametrize("prefix", ["shardgate_", "agents_"])
async def test_migrated_tables_are_those_that_the_gateway_makes(
    prefix: str, databases: MakeDatabases, gateways: Gateways
) -> None:
    migrated, created = await databases(2)
    async with engine_at(migrated.url) as engine, engine.begin() as connection:
        await connection.run_sync(metadata(table_prefix=prefix).create_all)
    await gateways.open(settings_at({"a": created.url}, table_prefix=prefix))
    shape = await _shape_at(created.url, prefix=prefix)
    assert sorted(shape) == TABLES
    assert await _shape_at(migrated.url, prefix=prefix) == shape


@pytest.mark.backends("postgresql")
async def test_a_schema_is_in_the_metadata(database: Database, gateways: Gateways) -> None:
    await execute(database.url, text("CREATE SCHEMA migrated"))
    async with engine_at(database.url) as engine, engine.begin() as connection:
        await connection.run_sync(metadata(schema="migrated").create_all)
    await gateways.open(settings_at({"a": {"url": database.url, "schema": "created"}}))
    migrated = await _shape_at(database.url, "migrated")
    assert sorted(migrated) == TABLES
    assert repr(migrated).replace("migrated", "created") == repr(
        await _shape_at(database.url, "created")
    )


async def test_a_gateway_works_on_migrated_tables(
    databases: MakeDatabases, gateways: Gateways
) -> None:
    urls = named(await databases(2))
    for url in urls.values():
        async with engine_at(url) as engine, engine.begin() as connection:
            await connection.run_sync(metadata().create_all)
    gateway = gateways.make(settings_at(urls, create_tables=False))
    await gateway.create_tables()
    session = gateway.tenant("acme").session("chat-1")
    await session.add_items([item("one")])
    assert await session.get_items() == [item("one")]


async def test_the_tables_can_be_dropped_and_made_again(database: Database) -> None:
    tables = metadata()
    for act in (tables.create_all, tables.create_all, tables.drop_all, tables.create_all):
        async with engine_at(database.url) as engine, engine.begin() as connection:
            await connection.run_sync(act)
    assert sorted(await _shape_at(database.url)) == TABLES


def test_it_is_what_alembic_takes() -> None:
    one, other = metadata(), metadata(table_prefix="x_", schema="tenants")
    assert type(one) is MetaData
    assert sorted(one.tables) == [f"shardgate_{name}" for name in TABLES]
    assert sorted(other.tables) == [f"tenants.x_{name}" for name in TABLES]
    assert (one.schema, other.schema) == (None, "tenants")
    assert metadata() is not one  # a caller may add tables of its own
    parts: list[Any] = [
        part for table in other.tables.values() for part in (*table.indexes, *table.constraints)
    ]
    names = [part.name for part in parts if part.name is not None]
    assert all(str(name).startswith("x_") for name in names)
    assert len(set(names)) == len(names)
