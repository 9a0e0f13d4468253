"""The same results whatever engine the caller has made; and it stays as it was."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, StaticPool

from contract.doors import TENANT, gateway_settings
from contract.writers import append_together, assert_order_of_commits, assert_whole
from shardgate.gateway import Gateway
from shardgate.session import SQLAlchemySession

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from contract.doors import Session
    from harness.engines import EngineMaker
    from harness.servers import Database

ONE = {"poolclass": AsyncAdaptedQueuePool, "pool_size": 1, "max_overflow": 0}


@dataclass(frozen=True)
class Made:
    """How a caller made an engine, and the server's own default isolation level."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    server: str | None = None

    def __str__(self) -> str:
        return self.name


SERVERS = (
    Made("read committed", {"isolation_level": "READ COMMITTED"}),
    Made("repeatable read", {"isolation_level": "REPEATABLE READ"}),
    Made("serializable", {"isolation_level": "SERIALIZABLE"}),
    Made("autocommit", {"isolation_level": "AUTOCOMMIT"}),
    Made("server repeatable read", server="REPEATABLE READ"),
    Made("server serializable", server="SERIALIZABLE"),
    Made("server serializable, autocommit", {"isolation_level": "AUTOCOMMIT"}, "SERIALIZABLE"),
    Made("no pool", {"poolclass": NullPool}),
    Made("static pool", {"poolclass": StaticPool}),
    Made("static pool, serializable", {"poolclass": StaticPool, "isolation_level": "SERIALIZABLE"}),
    Made("one connection", ONE),
    Made("no reset", {"pool_reset_on_return": None}),
    Made("large pool", {"pool_size": 40}),
)
MYSQL = (
    Made("read uncommitted", {"isolation_level": "READ UNCOMMITTED"}),
    Made("no rollback", {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}),
    Made("latin1", {"connect_args": {"charset": "latin1"}}),
)
POSTGRESQL = (Made("no statement cache", {"connect_args": {"statement_cache_size": 0}}),)
SQLITE = (
    Made("defaults"),
    Made("serializable", {"isolation_level": "SERIALIZABLE"}),
    Made("read uncommitted", {"isolation_level": "READ UNCOMMITTED"}),
    Made("autocommit", {"isolation_level": "AUTOCOMMIT"}),
    Made("no pool", {"poolclass": NullPool}),
    Made("static pool", {"poolclass": StaticPool}),
    Made("one connection", ONE),
    Made("no reset", {"pool_reset_on_return": None}),
    Made("immediate", {"connect_args": {"isolation_level": "IMMEDIATE"}}),
)


@asynccontextmanager
async def _server_default(database: Database, level: str | None) -> AsyncIterator[None]:
    """Set a server's, or a database's, default isolation level for as long as this lasts."""
    if level is None:
        yield
        return
    if database.backend.family == "postgresql":
        name = make_url(database.url).database
        value = level.lower()
        await database.server._execute(
            f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{value}'"
        )
        yield  # the database is dropped with its settings
        return
    try:
        await database.server._execute(f"SET GLOBAL TRANSACTION ISOLATION LEVEL {level}")
        yield
    finally:
        await database.server._execute("SET GLOBAL TRANSACTION ISOLATION LEVEL REPEATABLE READ")


async def _use_hard(session_of: Callable[[str], Session]) -> None:
    """Many tasks on one session and on others, with everything that a session can do."""
    hot = "hot"
    appending = asyncio.ensure_future(
        append_together(lambda: session_of(hot), [str(n) for n in range(20)], 4)
    )
    await asyncio.gather(
        appending,
        *(session_of(f"chat-{n % 6}").add_items([{"n": n}]) for n in range(24)),
        *(session_of(hot).get_items(limit=5) for _ in range(8)),
        *(session_of("cleared").clear_session() for _ in range(4)),
        *(session_of("cleared").add_items([{"n": n}]) for n in range(4)),
    )
    history = await session_of(hot).get_items()
    assert_whole(history)
    assert_order_of_commits(history, appending.result())
    popped = await asyncio.gather(*(session_of(hot).pop_item() for _ in range(len(history))))
    assert len({str(item) for item in popped}) == len(history)
    assert None not in popped
    others = [await session_of(f"chat-{n}").get_items() for n in range(6)]
    assert sorted(item["n"] for items in others for item in items) == list(range(24))
    await session_of("cleared").clear_session()
    assert await session_of("cleared").get_items() == []
    snapshot = await session_of("chat-0")._get_compaction_snapshot(2)
    assert await snapshot.replace_suffix(0, [{"summary": 1}])
    assert (await session_of("chat-0").get_items())[-1] == {"summary": 1}
    items = [{"text": "é😀\0\ud800 ' \\"}]
    await session_of("text é").add_items(items)
    assert await session_of("text é").get_items() == items


def _standalone(engine: AsyncEngine) -> Callable[[str], Session]:
    def session_of(session_id: str) -> Any:
        return SQLAlchemySession(
            session_id, engine=engine, create_tables=True, ensure_ascii=len(session_id) % 2 == 0
        )

    return session_of


@pytest.mark.backends("postgresql")
@pytest.mark.parametrize("made", SERVERS + POSTGRESQL, ids=str)
async def test_any_postgresql_engine(
    database: Database, make_engine: EngineMaker, made: Made
) -> None:
    async with _server_default(database, made.server):
        await _use_hard(_standalone(make_engine(**made.options)))


@pytest.mark.backends("mariadb", "mysql")
@pytest.mark.parametrize("made", SERVERS + MYSQL, ids=str)
async def test_any_mysql_engine(database: Database, make_engine: EngineMaker, made: Made) -> None:
    async with _server_default(database, made.server):
        await _use_hard(_standalone(make_engine(**made.options)))


@pytest.mark.backends("sqlite")
@pytest.mark.parametrize("made", SQLITE, ids=str)
async def test_any_sqlite_engine(database: Database, make_engine: EngineMaker, made: Made) -> None:
    await _use_hard(_standalone(make_engine(**made.options)))


@pytest.mark.backends("sqlite")
@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:"])
async def test_a_database_in_memory(make_engine: EngineMaker, url: str) -> None:
    await _use_hard(_standalone(make_engine(url)))


@pytest.mark.backends("mariadb", "mysql")
async def test_the_other_scheme_of_mariadb(database: Database, make_engine: EngineMaker) -> None:
    url = database.url.replace("mysql+", "mariadb+")
    await _use_hard(_standalone(make_engine(url)))
    session: Any = SQLAlchemySession.from_url("é", url=url)
    await session.add_items([{"text": "é"}])
    assert await session.get_items() == [{"text": "é"}]
    assert await session.pop_item() == {"text": "é"}
    await session.aclose()


@pytest.mark.parametrize(
    "options",
    [{"isolation_level": "SERIALIZABLE"}, {"poolclass": StaticPool}],
    ids=["serializable", "static pool"],
)
async def test_engines_passed_to_a_gateway(
    database: Database, make_engine: EngineMaker, options: dict[str, Any]
) -> None:
    engine = make_engine(**options)
    settings = gateway_settings(["sqlite+aiosqlite:///not-used.db"])
    async with Gateway(settings, engines={"s0": engine}) as gateway:
        tenant = gateway.tenant(TENANT)
        await _use_hard(lambda session_id: tenant.session(session_id))
        assert len((await tenant.list_sessions()).sessions) == 9
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1


ASK = {
    "postgresql": (
        "SHOW transaction_isolation",
        "SHOW default_transaction_isolation",
        "SELECT pg_backend_pid()",
    ),
    "mariadb": ("SELECT @@tx_isolation", "SELECT @@autocommit", "SELECT CONNECTION_ID()"),
    "mysql": ("SELECT @@transaction_isolation", "SELECT @@autocommit", "SELECT CONNECTION_ID()"),
    "sqlite": ("PRAGMA journal_mode", "PRAGMA busy_timeout", "PRAGMA synchronous"),
}


async def _state(engine: AsyncEngine, family: str) -> list[Any]:
    """What a caller sees of its engine: the connection's settings and identity, pool, events."""
    async with engine.connect() as connection:
        asked = [(await connection.execute(text(question))).scalar() for question in ASK[family]]
        raw = await connection.get_raw_connection()
        asked += [id(raw.driver_connection), await connection.get_isolation_level()]
    pool = engine.sync_engine.pool
    listeners = [len(list(event)) for event in (pool.dispatch.connect, pool.dispatch.checkout)]
    options = dict(engine.sync_engine.get_execution_options())
    return [*asked, id(pool), listeners, options, type(pool)]


@pytest.mark.parametrize("level", [None, "SERIALIZABLE", "AUTOCOMMIT"])
async def test_an_engine_passed_in_stays_as_it_was(
    database: Database, make_engine: EngineMaker, level: str | None
) -> None:
    options: dict[str, Any] = ONE | ({"isolation_level": level} if level else {})
    engine = make_engine(**options)
    before = await _state(engine, database.backend.family)
    session_of = _standalone(engine)
    await _use_hard(session_of)
    await session_of("hot").aclose()  # type: ignore[attr-defined]  # a stand-alone one has it
    assert await _state(engine, database.backend.family) == before
    assert await session_of("chat-1").get_items() != []


async def test_the_callers_transaction_is_not_disturbed(
    database: Database, make_engine: EngineMaker
) -> None:
    """A session takes a connection of its own; what the caller rolls back is the caller's."""
    engine = make_engine()
    session: Any = SQLAlchemySession("chat-1", engine=engine, create_tables=True)
    await session.add_items([{"n": 1}])
    async with engine.connect() as connection:
        await connection.execute(text("SELECT count(*) FROM agent_messages"))
        await session.add_items([{"n": 2}])
        await connection.rollback()
    assert await session.get_items() == [{"n": 1}, {"n": 2}]
