"""The hand-written statements: each parses in its dialect and finds its rows by an index."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import sqlglot
from sqlalchemy import event, insert, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlglot import exp
from sqlglot.errors import ErrorLevel

from shardgate.engines import DIALECTS
from shardgate.shards import Database
from shardgate.sql.dialect import Key
from shardgate.sql.schema import TableNames, Tables, build_tables
from shardgate.sql.transactions import utc_now
from shardgate.store import Codec, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from harness.engines import EngineMaker
    from harness.servers import Database as TestDatabase

URLS = {
    "postgres": "postgresql+asyncpg://u@localhost/d",
    "mysql": "mysql+aiomysql://u@localhost/d",
    "sqlite": "sqlite+aiosqlite://",
}
KEY = Key("", "chat", 1)
OTHERS, ITEMS = 2000, 5000
MYSQL_VALUES = {
    "tenant": "X''",
    "session": "X'63686174'",
    "h": 1,
    "incarnation": 7,
    "n": 1,
    "size": 10,
    "place": 0,
    "data": "'{}'",
    "limit": "LIMIT 20",
}


def written(engine: AsyncEngine, tables: Tables) -> dict[str, str]:
    """A dialect's statements by name; MySQL's with values put in."""
    dialect = DIALECTS[engine.dialect.driver](tables, engine.dialect)
    found = {name: sql for name, sql in vars(dialect).items() if name.endswith("_sql")}
    if engine.dialect.driver == "aiomysql":
        row = found.pop("append_row_sql") % MYSQL_VALUES
        found = {name: sql % (MYSQL_VALUES | {"rows": row}) for name, sql in found.items()}
    return found


def parsed(sql: str, dialect: str) -> list[Any]:
    """The statements of a packet. sqlglot reads INTO with one variable only; MySQL takes more."""
    simpler = re.sub(r"INTO (@\w+)(, @\w+)+", r"INTO \1", sql)
    return [one for one in sqlglot.parse(simpler, dialect, error_level=ErrorLevel.RAISE) if one]


@pytest.mark.parametrize("dialect", URLS)
@pytest.mark.parametrize(
    "names",
    [TableNames.standalone("agent_sessions", "agent_messages"), TableNames.gateway("shardgate_")],
    ids=["stand-alone", "gateway"],
)
def test_every_statement_parses(dialect: str, names: TableNames) -> None:
    engine = create_async_engine(URLS[dialect])
    statements = written(engine, build_tables(names))
    assert {"append_sql", "tail_sql", "pop_sql", "clear_sql"} <= statements.keys() or (
        dialect == "sqlite"
    )
    for name, sql in statements.items():
        for one in parsed(sql, dialect):
            assert not isinstance(one, exp.Command), f"{name}: not understood: {one.sql()}"


@pytest.mark.parametrize("dialect", URLS)
def test_every_statement_names_the_tenant_and_the_session(dialect: str) -> None:
    """Whatever reads or changes rows of a session is bound to both of its ids."""
    engine = create_async_engine(URLS[dialect])
    tables = build_tables(TableNames.gateway("shardgate_"))
    bound = 0
    for name, sql in written(engine, tables).items():
        for statement in parsed(sql, dialect):
            for part in statement.find_all(exp.Select, exp.Update, exp.Delete):
                if not _reads_a_table(part, tables):
                    continue
                columns = {column.name for column in _where(part).find_all(exp.Column)}
                assert {"tenant_id", "session_id"} <= columns, f"{name}: {part.sql()}"
                bound += 1
    assert bound >= 5


def _reads_a_table(part: exp.Expression, tables: Tables) -> bool:
    names = {table.name for table in tables.slot_owned}
    source = part.args.get("from_") or part.args.get("from") or part
    found = source.this if isinstance(source, exp.From) else part.this
    return isinstance(found, exp.Table) and found.name in names


def _where(part: exp.Expression) -> exp.Expression:
    return part.args.get("where") or exp.Where()


async def _filled(engine: AsyncEngine) -> Database:
    """A session of many items among many sessions, with fresh statistics."""
    tables = build_tables(TableNames.standalone("agent_sessions", "agent_messages"))
    database = Database(engine, tables)
    await database.ready(create=True)
    await Store(database).append(KEY, ['{"n": 1}'] * ITEMS)
    row: dict[str, Any] = {"h": 1, "incarnation": 1, "next_seq": 2, "floor_seq": 1, "revision": 1}
    row |= {"item_count": 1, "byte_count": 2, "tenant_id": ""}
    now = {"created_at": utc_now(), "updated_at": utc_now(), "listed_at": utc_now()}
    async with engine.begin() as connection:
        await connection.execute(
            insert(tables.sessions).values(**now),
            [row | {"session_id": f"other {n}"} for n in range(OTHERS)],
        )
        await connection.execute(
            insert(tables.messages).values(created_at=utc_now(), message_data="{}"),
            [
                {"tenant_id": "", "session_id": f"other {n}", "seq": 1, "nbytes": 2}
                for n in range(OTHERS)
            ],
        )
    family = engine.dialect.name
    async with engine.connect() as connection:
        for table in (tables.sessions, tables.messages):
            verb = "ANALYZE TABLE" if family in ("mysql", "mariadb") else "ANALYZE"
            await connection.execute(text(f"{verb} {table.name}"))
        await connection.commit()
    return database


async def _core_statements(database: Database) -> list[tuple[str, Any]]:
    """What SQLAlchemy's own execution sends for the rare operations, with its parameters."""
    sent: list[tuple[str, Any]] = []

    def note(_c: object, _cursor: object, sql: str, values: Any, _x: object, many: bool) -> None:
        if not many and re.match(r"(?i)\s*(SELECT|UPDATE|DELETE)", sql) and "agent_" in sql:
            sent.append((sql, values))

    async def decode(data: str) -> Any:
        return json.loads(data)

    await Store(database).append(Key("", "small", 2), ['{"n": 1}', '{"n": 2}'])
    event.listen(database.engine.sync_engine, "before_cursor_execute", note)
    store = Store(database)
    page = await store.page("", limit=50, after=None)
    last = page[-1]
    await store.page("", limit=50, after=(last.listed_at, last.session_id))
    await store.pop(KEY, Codec(decode=decode, is_json=False))
    tail = await store.tail(KEY, 10)
    await store.replace(KEY, tail, start=8, items=['{"n": 3}'], prune=None)
    await store.delete(Key("", "small", 2))
    event.remove(database.engine.sync_engine, "before_cursor_execute", note)
    assert len(sent) >= 10
    return sent


def _nodes(plan: Any) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from _nodes(inner)


@pytest.mark.backends("postgresql")
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_plans_on_postgresql(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine()
    database = await _filled(engine)
    sql = written(engine, database.tables)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        (sql["append_sql"], ("", "chat", 1, 7, ["{}"], [2])),
        (sql["tail_sql"], ("", "chat", 20)),
        (sql["pop_sql"], ("", "chat")),
        (sql["clear_sql"], ("", "chat")),
    ]
    calls += [(statement, tuple(values)) for statement, values in await _core_statements(database)]
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.execute(f"SET plan_cache_mode = {mode}")
        for statement, values in calls:
            ((told,),) = await driver.fetch(f"EXPLAIN (FORMAT JSON) {statement}", *values)
            nodes = list(_nodes(told[0]["Plan"]))
            used = {node["Node Type"] for node in nodes if "Relation Name" in node}
            assert "Seq Scan" not in used, f"{statement}\n{told}"
            assert not [node for node in nodes if node["Node Type"] == "Sort"], statement
            indexes = {node["Index Name"] for node in nodes if "Index Name" in node}
            assert indexes <= {
                "agent_sessions_pkey",
                "agent_messages_pkey",
                "agent_sessions_by_listed",
            }, statement


@pytest.mark.backends("mariadb", "mysql")
async def test_plans_on_mysql(make_engine: EngineMaker) -> None:
    engine = make_engine()
    database = await _filled(engine)
    statements = [
        re.sub(r"INTO @\w+(, @\w+)*", "", one)
        for packet in written(engine, database.tables).values()
        for one in packet.split("; ")
        if re.match(r"SELECT .*FROM|UPDATE|DELETE", one) and "@shardgate_seq, @" not in one[:25]
    ]
    assert len(statements) >= 8
    core = await _core_statements(database)
    async with engine.connect() as connection:
        values = "@shardgate_floor = 1, @shardgate_seq = 5000, @shardgate_json = 1"
        await connection.execute(text(f"SET {values}, @shardgate_size = 2"))
        explained = [
            (one, await connection.exec_driver_sql(f"EXPLAIN {one}")) for one in statements
        ]
        for one, parameters in core:
            told = await connection.exec_driver_sql(f"EXPLAIN {one}", parameters)
            explained.append((one, told))
    for one, rows in explained:
        for row in rows.mappings():
            if row["table"] is None:
                continue
            assert row["type"] in ("const", "eq_ref", "ref", "range", "system"), (one, row)
            assert row["key"] in ("PRIMARY", "agent_sessions_by_listed"), (one, row)
            assert "filesort" not in (row["Extra"] or ""), (one, row)


@pytest.mark.backends("sqlite")
async def test_plans_on_sqlite(database: TestDatabase, make_engine: EngineMaker) -> None:
    engine = make_engine()
    filled = await _filled(engine)
    named = {"tenant": "", "session": "chat", "seq": 1, "limit": 20, "size": 1, "now": "x"}
    named |= {"h": 1, "incarnation": 1, "n": 1, "stale": "x"}
    calls: list[tuple[str, Any]] = [
        (sql, (named if ":" in sql else ("",) * 6))
        for sql in written(engine, filled.tables).values()
    ]
    calls += await _core_statements(filled)
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        for sql, values in calls:
            rows = await driver.execute_fetchall(f"EXPLAIN QUERY PLAN {sql}", values)
            told = [row[3] for row in rows]
            assert not [line for line in told if line.startswith("SCAN")], (sql, told)
            assert not [line for line in told if "TEMP B-TREE" in line], (sql, told)
