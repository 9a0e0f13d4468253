"""The hand-written statements: each parses in its dialect and finds its rows by an index."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import sqlglot
from sqlalchemy import event, insert, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlglot import exp
from sqlglot.errors import ErrorLevel

from shardgate.engines import DIALECTS
from shardgate.items import joined
from shardgate.shards import Database
from shardgate.sql.dialect import Append, Guard, Key, Operation, TailRead
from shardgate.sql.schema import TableNames, Tables, build_tables
from shardgate.sql.transactions import utc_now
from shardgate.store import Codec, Place, Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from typing import Self

    from sqlalchemy.ext.asyncio import AsyncEngine

    from harness.engines import EngineMaker

URLS = {
    "postgres": "postgresql+asyncpg://u@localhost/d",
    "mysql": "mysql+aiomysql://u@localhost/d",
    "sqlite": "sqlite+aiosqlite://",
}
STANDALONE = build_tables(TableNames.standalone("agent_sessions", "agent_messages"))
GATEWAY = build_tables(TableNames.gateway("shardgate_"))
TENANT, OWNER, SLOT, SLOTS = "acme", "00000000-0000-4000-8000-000000000000", 7, 4096
GUARD = Guard(SLOT, OWNER)
OTHERS, ITEMS = 2000, 5000

Sent = tuple[str, tuple[Any, ...]]


class _Answered(Exception):  # noqa: N818 - it is no error
    """The statement has been seen; there is nobody to answer it."""


class Listener:
    """A driver's connection (asyncpg's or aiomysql's) that only notes what would be sent."""

    charset = "utf8mb4"

    def get_server_info(self) -> str:
        """As MySQL: the statements of a change, not yet wrapped into one for MariaDB."""
        return "8.4.0"

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.in_transaction = False

    def is_in_transaction(self) -> bool:
        return self.in_transaction

    async def fetch(self, sql: str, *values: Any) -> Any:
        self.sent.append((sql, values))
        raise _Answered

    fetchrow = fetchval = execute = fetch

    def escape(self, value: str) -> str:
        return "'" + value.replace("'", "''") + "'"

    def cursor(self, _kind: object) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


class Full(Listener):
    """A server that cannot make one text of what it is asked for; rows it can."""

    async def fetchrow(self, sql: str, *values: Any) -> Any:
        self.sent.append((sql, values))
        raise asyncpg.ProgramLimitExceededError

    async def fetch(self, sql: str, *values: Any) -> Any:
        self.sent.append((sql, values))
        return [(2, "two"), (1, "one")]


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_what_is_too_large_for_one_text_is_read_as_rows(in_transaction: bool) -> None:
    """In a transaction at once: there, a statement that has failed would be the last one."""
    engine = create_async_engine(URLS["postgres"])
    dialect: Any = DIALECTS["asyncpg"](GATEWAY, engine.dialect)
    server = Full()
    server.in_transaction = in_transaction
    read = TailRead(Key(TENANT, "chat", 1), GUARD, 20)
    assert await dialect.tail(server, read) == joined(["two", "one"])
    as_text = [] if in_transaction else [dialect.tail_sql]
    assert [sql for sql, _ in server.sent] == [*as_text, dialect.long_tail_sql]


async def sent_by(engine: AsyncEngine, tables: Tables) -> dict[str, Sent]:
    """What each operation of a session sends: PostgreSQL's with its values, MySQL's as a packet."""
    dialect = DIALECTS[engine.dialect.driver](tables, engine.dialect)
    of_gateway = tables.of_gateway
    key = Key(TENANT if of_gateway else "", "chat", 1)
    guard = GUARD if of_gateway else None
    listener = Listener()
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "append": lambda: dialect.append(
            listener,
            Append(key, guard, Operation("+1", "append", "ff"), ['{"a": 1}', "{}"]),
        ),
        "tail": lambda: dialect.tail(listener, TailRead(key, guard, 20)),
        "tail of all": lambda: dialect.tail(listener, TailRead(key, guard, None)),
        "pop": lambda: dialect.pop(listener, key, guard, Operation("-2", "pop")),
        "clear": lambda: dialect.clear(listener, key, guard, Operation("-3", "clear")),
    }
    for call in calls.values():
        with pytest.raises(_Answered):
            await call()
    return dict(zip(calls, listener.sent, strict=True))


def sqlite_statements(engine: AsyncEngine, tables: Tables) -> dict[str, str]:
    """SQLite's are sent one by one, each as it was written."""
    dialect = DIALECTS["aiosqlite"](tables, engine.dialect)
    return {name: sql for name, sql in vars(dialect).items() if name.endswith("_sql") and sql}


async def statements(dialect: str, tables: Tables) -> dict[str, str]:
    engine = create_async_engine(URLS[dialect])
    if dialect == "sqlite":
        return sqlite_statements(engine, tables)
    return {name: sql for name, (sql, _) in (await sent_by(engine, tables)).items()}


def parsed(sql: str, dialect: str) -> list[Any]:
    """The statements of a packet. sqlglot reads INTO with one variable only; MySQL takes more."""
    simpler = re.sub(r"INTO (@\w+)(, @\w+)+", r"INTO \1", sql)
    return [one for one in sqlglot.parse(simpler, dialect, error_level=ErrorLevel.RAISE) if one]


@pytest.mark.parametrize("dialect", URLS)
@pytest.mark.parametrize("tables", [STANDALONE, GATEWAY], ids=["stand-alone", "gateway"])
async def test_every_statement_parses(dialect: str, tables: Tables) -> None:
    for name, sql in (await statements(dialect, tables)).items():
        for one in parsed(sql, dialect):
            assert not isinstance(one, exp.Command), f"{name}: not understood: {one.sql()}"


@pytest.mark.parametrize("dialect", URLS)
async def test_every_statement_names_the_tenant_and_the_session(dialect: str) -> None:
    """Whatever reads or changes rows of a session is bound to both of its ids."""
    bound = 0
    for name, sql in (await statements(dialect, GATEWAY)).items():
        for statement in parsed(sql, dialect):
            for part in statement.find_all(exp.Select, exp.Update, exp.Delete):
                if _reads_a_session(part):
                    assert {"tenant_id", "session_id"} <= _bound(part), f"{name}: {part.sql()}"
                    bound += 1
    assert bound >= 5


def _reads_a_session(part: Any) -> bool:
    names = {table.name for table in GATEWAY.slot_owned}
    source = part.args.get("from_") or part.args.get("from") or part
    found = source.this if isinstance(source, exp.From) else part.this
    return isinstance(found, exp.Table) and found.name in names


def _bound(part: Any) -> set[str]:
    """The columns in a statement's own condition, without those of the selects inside it."""
    where = part.args.get("where") or exp.Where()
    inside = where.walk(prune=lambda node: isinstance(node, exp.Select))
    return {node.name for node in inside if isinstance(node, exp.Column)}


PLACE = Place(Key(TENANT, "chat", 1), GUARD)


async def _filled(engine: AsyncEngine) -> Database:
    """A session of many items among many sessions, with fresh statistics."""
    database = Database(engine, GATEWAY)
    await database.ready(create=True)
    now = {"created_at": utc_now(), "updated_at": utc_now()}
    row: dict[str, Any] = {"h": 1, "incarnation": 1, "next_seq": 2, "floor_seq": 1, "revision": 1}
    row |= {"item_count": 1, "byte_count": 2, "tenant_id": TENANT}
    others = [f"other {n}" for n in range(OTHERS)]
    async with engine.begin() as connection:
        await connection.execute(
            insert(GATEWAY.slots),
            [{"slot": n, "owner": OWNER, "state": "owned", "epoch": 1} for n in range(SLOTS)],
        )
        await connection.execute(
            insert(GATEWAY.tenants).values(status="admitted", **now),
            [{"tenant_id": TENANT}, *({"tenant_id": f"tenant-{n}"} for n in range(1000))],
        )
        await connection.execute(
            insert(GATEWAY.sessions).values(listed_at=utc_now(), **now),
            [row | {"session_id": session_id} for session_id in others],
        )
        await connection.execute(
            insert(GATEWAY.messages).values(created_at=utc_now(), message_data="{}"),
            [
                {"tenant_id": TENANT, "session_id": session_id, "seq": 1, "nbytes": 2}
                for session_id in others
            ],
        )
        await connection.execute(
            insert(GATEWAY.ops).values(created_at=utc_now(), kind="append", h=1, op_id="+0"),
            [{"tenant_id": TENANT, "session_id": session_id} for session_id in others],
        )
        await connection.execute(
            insert(GATEWAY.shard).values(created_at=utc_now()),
            {
                "one": 1,
                "shard_uuid": OWNER,
                "name": "s0",
                "keyspace": "main",
                "keyspace_uuid": OWNER,
                "slots": SLOTS,
                "hash": "x",
                "schema_version": 1,
                "map_version": 1,
            },
        )
    await Store(database).append(PLACE, Operation("+1", "append"), ['{"n": 1}'] * ITEMS)
    async with engine.connect() as connection:
        for table in GATEWAY.metadata.tables.values():
            verb = "ANALYZE TABLE" if engine.dialect.name in ("mysql", "mariadb") else "ANALYZE"
            await connection.execute(text(f"{verb} {table.name}"))
        await connection.commit()
    return database


async def _core_statements(database: Database) -> list[tuple[str, Any]]:
    """What SQLAlchemy's own execution sends for the rare operations, with its parameters."""
    sent: list[tuple[str, Any]] = []

    def note(_c: object, _cursor: object, sql: str, values: Any, _x: object, many: bool) -> None:
        if not many and re.match(r"(?i)\s*(SELECT|UPDATE|DELETE)", sql) and "shardgate_" in sql:
            sent.append((sql, values))

    async def decode(data: str) -> Any:
        return json.loads(data)

    store = Store(database)
    small = Place(Key(TENANT, "small", 2), GUARD)
    await store.append(small, Operation("+2", "append"), ['{"n": 1}', '{"n": 2}'])
    event.listen(database.engine.sync_engine, "before_cursor_execute", note)
    last = (await store.page(TENANT, limit=50, after=None)).sessions[-1][1]
    await store.page(TENANT, limit=50, after=(last.listed_at, last.session_id))
    await store.pop(PLACE, Operation("+3", "pop"), Codec(decode=decode, is_json=False))
    tail = await store.tail(PLACE, 10)
    replace = Operation("+4", "replace")
    assert await store.replace(PLACE, replace, tail, start=8, items=['{"n": 3}'], prune=None)
    assert await store.recorded(PLACE, "+4") is not None
    assert await store.delete(small, Operation("+5", "delete"))
    event.remove(database.engine.sync_engine, "before_cursor_execute", note)
    assert len(sent) >= 10
    return sent


INDEXES = {"shardgate_sessions_by_listed"}
ONE_ROW = {"shardgate_shard"}  # however it is read


def _nodes(plan: Any) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from _nodes(inner)


@pytest.mark.backends("postgresql")
async def test_plans_on_postgresql(make_engine: EngineMaker) -> None:
    engine = make_engine()
    database = await _filled(engine)
    calls = list((await sent_by(engine, GATEWAY)).values())
    calls += [(sql, tuple(values)) for sql, values in await _core_statements(database)]
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        for mode in ("force_custom_plan", "force_generic_plan"):
            await driver.execute(f"SET plan_cache_mode = {mode}")
            for sql, values in calls:
                ((told,),) = await driver.fetch(f"EXPLAIN (FORMAT JSON) {sql}", *values)
                for node in _nodes(told[0]["Plan"]):
                    _assert_by_index(node, f"{mode}: {sql}\n{told}")


def _assert_by_index(node: dict[str, Any], told: str) -> None:
    if node.get("Relation Name") in ONE_ROW:
        return
    assert node["Node Type"] != "Seq Scan", told
    if "Index Name" in node:
        assert node["Index Name"] in INDEXES or node["Index Name"].endswith("_pkey"), told
    if node["Node Type"] == "Sort":
        # Only of the few rows that a limit has already chosen.
        assert "Relation Name" not in node["Plans"][0], told


@pytest.mark.backends("mariadb", "mysql")
async def test_plans_on_mysql(make_engine: EngineMaker) -> None:
    engine = make_engine()
    database = await _filled(engine)
    calls: list[tuple[str, Any]] = [
        (re.sub(r"INTO @\w+(, @\w+)*", "", one), ())
        for packet, _ in (await sent_by(engine, GATEWAY)).values()
        for one in packet.split("; ")
        if re.match(r"SELECT .*FROM|UPDATE|DELETE", one)
    ]
    assert len(calls) >= 10
    calls += await _core_statements(database)
    async with engine.connect() as connection:
        known = {"floor": 1, "seq": ITEMS, "json": 1, "size": 2, "here": 1, "new": 1}
        values = ", ".join(f"@shardgate_{name} = {value}" for name, value in known.items())
        await connection.execute(text(f"SET {values}"))
        for sql, parameters in calls:
            told = await connection.exec_driver_sql(f"EXPLAIN {sql}", parameters)
            for row in told.mappings():
                _assert_by_key(dict(row), sql)


def _assert_by_key(row: dict[str, Any], sql: str) -> None:
    table = row["table"]
    if table is None or table.startswith("<derived") or table in ONE_ROW:
        return
    assert row["type"] in ("const", "eq_ref", "ref", "range", "system"), (sql, row)
    assert row["key"] in {"PRIMARY", *INDEXES}, (sql, row)


@pytest.mark.backends("sqlite")
async def test_plans_on_sqlite(make_engine: EngineMaker) -> None:
    engine = make_engine()
    database = await _filled(engine)
    calls: list[tuple[str, Any]] = [
        (sql, dict.fromkeys(re.findall(r":(\w+)", sql), 1) or (1,) * sql.count("?"))
        for sql in sqlite_statements(engine, GATEWAY).values()
    ]
    calls += await _core_statements(database)
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        for sql, values in calls:
            rows = await driver.execute_fetchall(f"EXPLAIN QUERY PLAN {sql}", values)
            for line in (row[3] for row in rows):
                scanned = line.startswith("SCAN shardgate_")
                assert not scanned or any(table in line for table in ONE_ROW), (sql, line)
                # Only the rows that a limit has already chosen may be sorted.
                assert "TEMP B-TREE" not in line or "AS anon_1" in sql, (sql, line)
