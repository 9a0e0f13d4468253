"""The declared schema: it compiles everywhere, forgets no table, and is what gets created."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Table, inspect
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.mysql import aiomysql
from sqlalchemy.dialects.postgresql import asyncpg

from shardgate.engines import DIALECTS
from shardgate.sql.create import create_tables
from shardgate.sql.schema import TableNames, Tables, build_tables, ddl

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import Dialect

    from harness.engines import EngineMaker

STANDALONE = TableNames.standalone("agent_sessions", "agent_messages")
GATEWAY = TableNames.gateway("shardgate_")
INNODB_KEY_BYTES = 3072
BYTES_PER_CHARACTER = 4


def _mariadb() -> Dialect:
    dialect = aiomysql.dialect()
    dialect.is_mariadb = True
    return dialect


COMPILERS: dict[str, Any] = {
    "postgresql": asyncpg.dialect,
    "mysql": aiomysql.dialect,
    "mariadb": _mariadb,
    "sqlite": sqlite.dialect,
}
NAMES = pytest.mark.parametrize("names", [STANDALONE, GATEWAY], ids=["stand-alone", "gateway"])


@NAMES
@pytest.mark.parametrize("dialect", COMPILERS)
def test_it_compiles(dialect: str, names: TableNames) -> None:
    tables = build_tables(names)
    statements = ddl(tables, COMPILERS[dialect]())
    created = [one for one in statements if one.startswith("CREATE TABLE")]
    assert len(created) == len(tables.metadata.tables)
    assert len(statements) == len(created) + 2
    if dialect in ("mysql", "mariadb"):
        for one in created:
            assert "ENGINE=InnoDB" in one
            assert "CHARSET=utf8mb4" in one
            assert "ROW_FORMAT=DYNAMIC" in one
        assert "LONGTEXT" in "".join(created)
        assert "DATETIME(6)" in "".join(created)
    if dialect == "postgresql":
        assert 'COLLATE "C"' in "".join(created)


@NAMES
def test_no_table_with_a_tenant_is_forgotten(names: TableNames) -> None:
    """Moves, purges, exports and erasure go by these two lists: what is not there outlives them."""
    tables = build_tables(names)
    with_tenant = {table for table in tables.metadata.tables.values() if "tenant_id" in table.c}
    assert with_tenant == {*tables.slot_owned, *tables.tenant_owned}
    for table in tables.slot_owned:
        assert {"tenant_id", "session_id"} <= set(table.primary_key.columns.keys())


@NAMES
def test_no_key_is_longer_than_innodb_takes(names: TableNames) -> None:
    dialect = aiomysql.dialect()
    for table in build_tables(names).metadata.tables.values():
        keys = [table.primary_key.columns, *(index.columns for index in table.indexes)]
        for columns in keys:
            length = sum(_key_bytes(column.type.dialect_impl(dialect)) for column in columns)
            assert length <= INNODB_KEY_BYTES, table.name


def _key_bytes(kind: Any) -> int:
    implementation = getattr(kind, "impl_instance", kind)
    length = getattr(implementation, "length", None)
    if length is None:
        return 8
    binary = "BINARY" in type(implementation).__name__.upper()
    return int(length) * (1 if binary else BYTES_PER_CHARACTER)


def test_the_two_kinds_share_no_name() -> None:
    """Both can be in one database, and in one MetaData."""
    tables = build_tables(STANDALONE)
    both = build_tables(GATEWAY, metadata=tables.metadata)
    assert len(both.metadata.tables) == 3 + 7
    names = [index.name for table in both.metadata.tables.values() for index in table.indexes]
    assert len(set(names)) == len(names)


def test_a_schema_is_named_in_every_statement() -> None:
    tables = build_tables(GATEWAY, schema="eu 1")
    assert all(table.schema == "eu 1" for table in tables.metadata.tables.values())
    for one in ddl(tables, COMPILERS["postgresql"]()):
        assert '"eu 1".' in one
    assert tables.slots.name == "shardgate_slots"


@NAMES
async def test_what_is_created_is_what_is_declared(
    make_engine: EngineMaker, names: TableNames
) -> None:
    engine, tables = make_engine(), build_tables(names)
    await create_tables(engine, tables)
    await create_tables(engine, tables)
    async with engine.connect() as connection:
        found = await connection.run_sync(_reflected)
        assert set(found) == set(tables.metadata.tables)
        for name, table in tables.metadata.tables.items():
            assert found[name] == _declared(table, engine.dialect), name


def _declared(table: Table, dialect: Dialect) -> dict[str, Any]:
    return {
        "columns": {
            column.name: (_kind(column.type, dialect), bool(column.nullable))
            for column in table.columns
        },
        "key": table.primary_key.columns.keys(),
        "indexes": {index.name: index.columns.keys() for index in table.indexes},
    }


def _reflected(connection: Connection) -> dict[str, dict[str, Any]]:
    inspector = inspect(connection)
    return {
        name: {
            "columns": {
                column["name"]: (_kind(column["type"], connection.dialect), column["nullable"])
                for column in inspector.get_columns(name)
            },
            "key": inspector.get_pk_constraint(name)["constrained_columns"],
            "indexes": {
                index["name"]: index["column_names"] for index in inspector.get_indexes(name)
            },
        }
        for name in inspector.get_table_names()
    }


def _kind(kind: Any, dialect: Dialect) -> str:
    """A type as the database writes it, without what it adds and means nothing."""
    written = str(kind.dialect_impl(dialect).compile(dialect)).upper()
    for extra in (" WITHOUT TIME ZONE", " CHARACTER SET UTF8MB4", " COLLATE UTF8MB4_BIN"):
        written = written.replace(extra, "")
    written = written.replace("INTEGER(11)", "INTEGER").replace("BIGINT(20)", "BIGINT")
    return written.replace("SMALLINT(6)", "SMALLINT")


@pytest.mark.backends("postgresql")
async def test_tables_in_a_schema_of_their_own(make_engine: EngineMaker) -> None:
    engine = make_engine()
    sets: list[Tables] = [build_tables(GATEWAY, schema=name) for name in ("eu", "us 'x'")]
    for tables in sets:
        await create_tables(engine, tables)
    async with engine.connect() as connection:
        found = await connection.run_sync(
            lambda sync: [inspect(sync).get_table_names(schema=name) for name in ("eu", "us 'x'")]
        )
        assert [len(names) for names in found] == [7, 7]
        public = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        assert public == []


def test_every_driver_has_one_dialect() -> None:
    assert set(DIALECTS) == {"asyncpg", "aiomysql", "aiosqlite"}


async def test_a_missing_index_is_created_later(make_engine: EngineMaker) -> None:
    """An index that a later version adds, or that somebody dropped, comes with the next start."""
    engine, tables = make_engine(), build_tables(STANDALONE)
    await create_tables(engine, tables)
    index = next(iter(tables.sessions.indexes))
    async with engine.begin() as connection:
        await connection.run_sync(index.drop)
    await create_tables(engine, tables)
    async with engine.connect() as connection:
        found = await connection.run_sync(_reflected)
    assert index.name in found["agent_sessions"]["indexes"]
