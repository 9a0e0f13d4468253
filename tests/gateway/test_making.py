"""Putting a gateway together: the environment, engines, event loops, closing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from gateway.shards import engine_at, item, named, session_on, settings_at, tables_at
from shardgate import Gateway, KeyspaceNotCreated, UsageError, metadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from conftest import MakeDatabases
    from gateway.conftest import Gateways
    from harness.engines import EngineMaker

    SQLiteUrls = Callable[[str], dict[str, str]]


async def _use(gateway: Gateway, text_: str = "hello") -> None:
    """Append to a session of each shard and read it back."""
    await gateway.open()
    for shard in gateway.shards:
        session = gateway.tenant("acme").session(session_on(gateway, shard))
        await session.add_items([item(text_)])
        assert (await session.get_items())[-1] == item(text_)


@pytest.fixture
def environment(databases: MakeDatabases, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    async def set_up(**more: str) -> None:
        monkeypatch.chdir(tmp_path)  # no .env of ours
        urls = named(await databases(2))
        values = {f"SHARDS__{name.upper()}__URL": url for name, url in urls.items()}
        for name, value in (values | more).items():
            monkeypatch.setenv(f"SHARDGATE_{name}", value)

    return set_up


async def test_the_environment_is_all_that_is_needed(environment: Any) -> None:
    await environment(CREATE_TABLES="true", KEYSPACES__MAIN__SLOTS="16")
    async with Gateway.from_env() as gateway:
        assert list(gateway.shards) == ["a", "b"]
        await _use(gateway)
        page = await gateway.tenant("acme").list_sessions()
        assert {session.item_count for session in page.sessions} == {1}
    async with Gateway.from_env() as gateway:
        session = gateway.tenant("acme").session(session_on(gateway, "b"))
        assert await session.get_items() == [item("hello")]


async def test_it_opens_itself_at_the_first_operation(environment: Any) -> None:
    await environment(CREATE_TABLES="true", KEYSPACES__MAIN__SLOTS="16")
    gateway = Gateway.from_env()
    session = gateway.tenant("acme").session("chat-1")
    await session.add_items([item("one")])
    assert await session.get_items() == [item("one")]
    await gateway.aclose()


async def test_from_env_takes_engines_too(
    sqlite_urls: SQLiteUrls, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHARDGATE_SHARDS__A__URL", "sqlite+aiosqlite:///not-used.db")
    monkeypatch.setenv("SHARDGATE_CREATE_TABLES", "true")
    engine = create_async_engine(sqlite_urls("a")["a"])
    async with Gateway.from_env(engines={"a": engine}) as gateway:
        await _use(gateway)
    await engine.dispose()
    assert not (tmp_path / "not-used.db").exists()


async def test_an_engine_that_is_passed_in_stays_open(
    databases: MakeDatabases, make_engine: EngineMaker
) -> None:
    urls = named(await databases(2))
    engine = make_engine(urls["a"])
    pool = engine.pool
    async with Gateway(settings_at(urls), engines={"a": engine}) as gateway:
        assert gateway.shards["a"].engine is engine
        await _use(gateway)
        idle = pool.checkedin()  # type: ignore[attr-defined]  # a queue pool has it
        own = gateway.shards["b"].engine
        assert own is not engine
    assert engine.pool is pool
    assert pool.checkedin() == idle > 0  # type: ignore[attr-defined]
    assert own.pool is not None
    assert own.pool.checkedin() == 0  # type: ignore[attr-defined]
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM shardgate_sessions")) == 1


async def test_a_failure_on_an_engine_that_is_passed_in_leaves_its_pool_alone(
    sqlite_urls: SQLiteUrls, make_sqlite_engine: Callable[[str], AsyncEngine]
) -> None:
    urls = sqlite_urls("a")
    engine = make_sqlite_engine(urls["a"])
    pool = engine.pool
    with pytest.raises(KeyspaceNotCreated):
        async with Gateway(settings_at(urls, create_tables=False), engines={"a": engine}):
            raise AssertionError("opened without a keyspace")
    assert engine.pool is pool
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1


@pytest.fixture
async def make_sqlite_engine() -> Any:
    made: list[AsyncEngine] = []

    def make(url: str) -> AsyncEngine:
        made.append(create_async_engine(url))
        return made[-1]

    yield make
    for engine in made:
        await engine.dispose()


async def test_a_factory_makes_the_other_engines_and_they_are_closed(
    sqlite_urls: SQLiteUrls, make_sqlite_engine: Callable[[str], AsyncEngine]
) -> None:
    urls = sqlite_urls("abc")
    calls: list[tuple[str, URL, dict[str, Any]]] = []
    made: dict[str, AsyncEngine] = {}

    def factory(name: str, url: URL, options: dict[str, Any]) -> AsyncEngine:
        calls.append((name, url, options))
        made[name] = create_async_engine(url, **options)
        return made[name]

    settings = settings_at(urls, engine_kwargs={"pool_recycle": 77})
    mine = make_sqlite_engine(urls["b"])
    gateway = Gateway(settings, engines={"b": mine}, engine_factory=factory)
    assert [(name, str(url)) for name, url, _ in calls] == [("a", urls["a"]), ("c", urls["c"])]
    assert all(options == settings.engine_options("a") for _, _, options in calls)
    assert calls[0][2]["pool_recycle"] == 77
    assert {name: gateway.shards[name].engine for name in urls} == made | {"b": mine}

    pools = {name: engine.pool for name, engine in made.items()}
    async with gateway:
        await _use(gateway)
    for name, engine in made.items():
        assert engine.pool is not pools[name]  # disposed: a fresh pool without connections
    assert mine.pool.checkedin() > 0  # type: ignore[attr-defined]


async def test_a_url_with_a_password_reaches_the_factory_whole(sqlite_urls: SQLiteUrls) -> None:
    seen: list[str] = []

    def factory(name: str, url: URL, options: dict[str, Any]) -> AsyncEngine:
        seen.append(url.render_as_string(hide_password=False))
        return create_async_engine(sqlite_urls(name)[name])

    given = "postgresql+asyncpg://user:p%40ss@db.example:5433/sessions"
    gateway = Gateway(settings_at({"a": given}), engine_factory=factory)
    assert seen == [given]
    await gateway.aclose()


async def test_an_engine_for_no_shard_is_refused(
    sqlite_urls: SQLiteUrls, make_sqlite_engine: Callable[[str], AsyncEngine]
) -> None:
    urls = sqlite_urls("ab")
    engine = make_sqlite_engine(urls["a"])
    with pytest.raises(UsageError, match=r"engines names A, .*settings do not have"):
        Gateway(settings_at(urls), engines={"A": engine})


async def test_a_driver_that_we_do_not_speak_is_refused(
    sqlite_urls: SQLiteUrls, make_sqlite_engine: Callable[[str], AsyncEngine]
) -> None:
    urls = sqlite_urls("ab")
    engine = make_sqlite_engine(urls["b"])
    engine.dialect.driver = "asyncmy"  # no other async driver is at hand
    with pytest.raises(UsageError, match=r"shard 'b'.*asyncmy.*asyncpg.*aiomysql.*aiosqlite"):
        Gateway(settings_at(urls), engines={"b": engine})


async def test_an_engine_that_is_not_async_is_refused(sqlite_urls: SQLiteUrls) -> None:
    engine: Any = create_engine("sqlite://")
    with pytest.raises(UsageError, match=r"shard 'b'.*type Engine.*create_async_engine"):
        Gateway(settings_at(sqlite_urls("ab")), engines={"b": engine})
    engine.dispose()


async def test_making_a_gateway_does_no_io(tmp_path: Any) -> None:
    settings = settings_at({"a": f"sqlite+aiosqlite:///{tmp_path}/missing/folder/a.db"})
    gateway = Gateway(settings)
    gateway.tenant("acme").session("chat-1")
    await gateway.aclose()


async def test_a_closed_gateway_says_so(sqlite_urls: SQLiteUrls) -> None:
    gateway = Gateway(settings_at(sqlite_urls("ab")))
    async with gateway:
        tenant = gateway.tenant("acme")
        session = tenant.session("chat-1")
        await session.add_items([item("one")])
    for act in (
        gateway.open,
        gateway.create_tables,
        gateway.check,
        gateway.__aenter__,
        session.get_items,
        session.pop_item,
        session.clear_session,
        tenant.list_sessions,
        lambda: session.add_items([item("two")]),
        lambda: tenant.delete_session("chat-1"),
    ):
        with pytest.raises(UsageError, match="closed"):
            await act()
    await gateway.aclose()  # twice is no mistake


async def test_the_engines_are_closed_when_the_block_raises(sqlite_urls: SQLiteUrls) -> None:
    gateway = Gateway(settings_at(sqlite_urls("a")))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block itself is what is tested
        async with gateway:
            await _use(gateway)
            raise ZeroDivisionError
    engine = gateway.shards["a"].engine
    assert engine.pool.checkedin() == 0  # type: ignore[attr-defined]


async def test_the_engines_are_closed_when_opening_fails(sqlite_urls: SQLiteUrls) -> None:
    gateway = Gateway(settings_at(sqlite_urls("a"), create_tables=False))
    with pytest.raises(KeyspaceNotCreated):
        await gateway.__aenter__()
    engine = gateway.shards["a"].engine
    assert engine.pool.checkedin() == 0  # type: ignore[attr-defined]


def test_a_gateway_belongs_to_the_loop_of_its_first_operation(sqlite_urls: SQLiteUrls) -> None:
    gateway = Gateway(settings_at(sqlite_urls("a")))  # made without a loop
    session = gateway.tenant("acme").session("chat-1")

    async def elsewhere() -> None:
        tenant = gateway.tenant("acme")
        for act in (session.get_items, gateway.check, gateway.open, tenant.list_sessions):
            with pytest.raises(UsageError, match="one event loop"):
                await act()

    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(session.add_items([item("one")]))
        second.run(elsewhere())
        assert first.run(session.get_items()) == [item("one")]
        first.run(gateway.aclose())


async def test_without_a_keyspace_nothing_is_created(
    databases: MakeDatabases, gateways: Gateways
) -> None:
    urls = named(await databases(2))
    settings = settings_at(urls, create_tables=False)
    gateway = gateways.make(settings)
    said = r"keyspace 'main'.*not been created.*create-tables.*create_tables\(\)"
    session = gateway.tenant("acme").session("chat-1")
    for act in (gateway.open, session.get_items, lambda: session.add_items([item("one")])):
        with pytest.raises(KeyspaceNotCreated, match=said) as caught:
            await act()
        assert caught.value.keyspace == "main"
    assert [await tables_at(url) for url in urls.values()] == [set(), set()]

    await gateway.create_tables()
    await session.add_items([item("one")])
    later = await gateways.open(settings)
    assert await later.tenant("acme").session("chat-1").get_items() == [item("one")]


async def test_tables_alone_are_no_keyspace(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    """As a migration tool leaves them."""
    urls = sqlite_urls("a")
    async with engine_at(urls["a"]) as engine, engine.begin() as connection:
        await connection.run_sync(metadata().create_all)
    gateway = gateways.make(settings_at(urls, create_tables=False))
    with pytest.raises(KeyspaceNotCreated):
        await gateway.open()
    await gateway.create_tables()
    await _use(gateway)
