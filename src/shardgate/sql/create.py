"""Creating the tables, by many tasks and processes at once, and telling whose they are.

``CREATE TABLE IF NOT EXISTS`` still collides when two run together (PostgreSQL: a unique violation
in its catalogue), so creators take turns: an advisory lock on PostgreSQL, a named lock on MySQL and
MariaDB, the database's write lock on SQLite.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateSchema

from shardgate.errors import TablesMismatch
from shardgate.sql.schema import ownership_check_name
from shardgate.sql.sqlite import begin_immediate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import Connection, Inspector, Table
    from sqlalchemy.engine.interfaces import IsolationLevel
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from shardgate.sql.schema import Tables

_MYSQL = ("mysql", "mariadb")
_LOCK_KEY = 0x5348415244474154
"""The advisory lock's number: the letters SHARDGAT."""
_LOCK_NAME = "shardgate.create_tables"
_LOCK_SECONDS = 60
_SDK_COLUMNS = {"session_id", "created_at", "updated_at"}


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A transaction that behaves alike whatever isolation level ``engine`` was made with.

    READ COMMITTED on PostgreSQL and MySQL, where locking first and reading afterwards then sees
    what the lock has waited for. On SQLite it holds the write lock from the start.
    """
    if engine.dialect.name in _MYSQL:
        async with engine.connect() as connection, _mysql_transaction(connection):
            yield connection
        return
    sqlite = engine.dialect.name == "sqlite"
    async with engine.connect() as connection:
        level: IsolationLevel = "SERIALIZABLE" if sqlite else "READ COMMITTED"
        await connection.execution_options(isolation_level=level)
        async with connection.begin():
            if sqlite:
                await begin_immediate((await connection.get_raw_connection()).driver_connection)
            yield connection


@asynccontextmanager
async def _mysql_transaction(connection: AsyncConnection) -> AsyncIterator[None]:
    """Said in SQL: SQLAlchemy would set the session's level, and leave it so for the next user."""
    for statement in ("COMMIT", "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"):
        await connection.exec_driver_sql(statement)
    await connection.exec_driver_sql("START TRANSACTION")
    try:
        yield
        await connection.exec_driver_sql("COMMIT")
    except BaseException as error:
        lost = isinstance(error, DBAPIError) and error.connection_invalidated
        if not connection.invalidated and not lost:
            await connection.exec_driver_sql("ROLLBACK")
        raise


async def create_tables(engine: AsyncEngine, tables: Tables) -> None:
    """Create whatever is missing. Safe to run at any time, by anyone, together.

    Raises:
        TablesMismatch: tables of these names exist and are not ours, or belong to the other kind.
    """
    if await _missing(engine, tables):
        async with _taking_turns(engine) as connection:
            await connection.run_sync(_create_missing, tables)
    await verify_tables(engine, tables)


async def verify_tables(engine: AsyncEngine, tables: Tables) -> bool:
    """Whether the tables exist; refuses those that are somebody else's.

    Raises:
        TablesMismatch: as for :func:`create_tables`.
    """
    async with engine.connect() as connection:
        exist = await connection.run_sync(_verify, tables)
        await connection.rollback()
    return exist


async def _missing(engine: AsyncEngine, tables: Tables) -> bool:
    async with engine.connect() as connection:
        missing = await connection.run_sync(lambda sync: _to_create(inspect(sync), tables) != [])
        await connection.rollback()
    return missing


@asynccontextmanager
async def _taking_turns(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with transaction(engine) as connection:
        name = engine.dialect.name
        if name == "postgresql":
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        if name not in _MYSQL:
            yield connection
            return
        lock = {"name": _LOCK_NAME, "seconds": _LOCK_SECONDS}
        taken = await connection.execute(text("SELECT GET_LOCK(:name, :seconds)"), lock)
        if taken.scalar_one() != 1:
            raise TimeoutError("another process has been creating the tables for too long")
        try:
            yield connection
        finally:
            if not connection.invalidated:  # a lost connection has let go, and would hide why
                await connection.execute(text("SELECT RELEASE_LOCK(:name)"), {"name": _LOCK_NAME})


def _to_create(inspector: Inspector, tables: Tables) -> list[Any]:
    """The tables and indexes that do not exist yet."""
    schema = tables.metadata.schema
    existing = set(inspector.get_table_names(schema=schema))
    missing: list[Any] = []
    for table in tables.metadata.sorted_tables:
        if table.name not in existing:
            missing.append(table)
        elif table.indexes:
            missing += _missing_indexes(inspector, table)
    return missing


def _missing_indexes(inspector: Inspector, table: Table) -> list[Any]:
    existing = {index["name"] for index in inspector.get_indexes(table.name, schema=table.schema)}
    columns = {column["name"] for column in inspector.get_columns(table.name, schema=table.schema)}
    return [
        index
        for index in table.indexes
        if index.name not in existing and columns.issuperset(index.columns.keys())
    ]


def _create_missing(connection: Connection, tables: Tables) -> None:
    schema = tables.metadata.schema
    if schema is not None and schema not in inspect(connection).get_schema_names():
        connection.execute(CreateSchema(schema))
    for thing in _to_create(inspect(connection), tables):
        thing.create(connection)


def _verify(connection: Connection, tables: Tables) -> bool:
    inspector = inspect(connection)
    table = tables.sessions
    if not inspector.has_table(table.name, schema=table.schema):
        return False
    columns = {column["name"] for column in inspector.get_columns(table.name, schema=table.schema)}
    _refuse_foreign(table, columns)
    other = ownership_check_name(table.name, gateway=not tables.of_gateway)
    checks = inspector.get_check_constraints(table.name, schema=table.schema)
    if other in {check["name"] for check in checks}:
        owner = "the stand-alone SQLAlchemySession" if tables.of_gateway else "a Shardgate gateway"
        raise TablesMismatch(
            f"table {table.name!r} belongs to {owner}, whose sessions must not be mixed with "
            f"these; choose {'another table_prefix' if tables.of_gateway else 'other table names'}"
        )
    return True


def _refuse_foreign(table: Table, columns: set[str]) -> None:
    missing = sorted(set(table.columns.keys()) - columns)
    if not missing:
        return
    if columns == _SDK_COLUMNS:
        raise TablesMismatch(
            f"table {table.name!r} was made by the OpenAI Agents SDK's own SQLAlchemySession, "
            "which stores sessions in another form; give this one names of its own, for example "
            "sessions_table='shardgate_agent_sessions', messages_table='shardgate_agent_messages'"
        )
    raise TablesMismatch(
        f"table {table.name!r} exists but is not Shardgate's: it has no column "
        f"{', '.join(missing)}; choose other table names"
    )
