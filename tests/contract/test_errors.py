"""A database's errors reach the caller as SQLAlchemy's own, and the next call works."""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import AsyncAdaptedQueuePool

from harness.engines import go_round
from harness.proxy import CuttingProxy
from shardgate.session import SQLAlchemySession

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from conftest import StartServer
    from harness.engines import EngineMaker
    from harness.servers import Backend, Database

NETWORKED = ("postgresql", "mariadb", "mysql")


def _calls(session: Any) -> list[Callable[[], Awaitable[Any]]]:
    return [
        session.get_items,
        lambda: session.add_items([{"n": 1}]),
        session.pop_item,
        session.clear_session,
        lambda: session._get_compaction_snapshot(3),
    ]


async def _errors(session: Any) -> list[BaseException]:
    """What each call raises, all at once: each may ride over some seconds. All have to raise."""
    calls = [call() for call in _calls(session)]
    outcomes: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, SQLAlchemyError), repr(outcome)
    return outcomes


async def test_missing_tables(database: Database, make_engine: EngineMaker) -> None:
    engine = make_engine(poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0)
    session: Any = SQLAlchemySession("chat-1", engine=engine)
    for error in await _errors(session):
        assert isinstance(error, (ProgrammingError, OperationalError))
        assert "agent_" in str(error)
    await SQLAlchemySession("chat-1", engine=engine, create_tables=True).get_items()
    await session.add_items([{"n": 1}])
    assert await session.get_items() == [{"n": 1}]


@pytest.mark.backends(*NETWORKED)
async def test_a_server_that_was_killed_and_came_back(
    backend: Backend, start_server: StartServer
) -> None:
    server = await start_server(backend)
    url = await server.create_database()
    session: Any = SQLAlchemySession.from_url("chat-1", url=url, create_tables=True)
    await asyncio.gather(*(session.add_items([{"n": 1}]) for _ in range(3)))
    await server.kill()
    for error in await _errors(session):
        _assert_no_password(error, url)
    await server.start()
    assert await session.get_items() == [{"n": 1}] * 3
    await session.add_items([{"n": 2}])
    assert await session.pop_item() == {"n": 2}
    await go_round()
    assert session.engine.pool.checkedout() == 0
    await session.aclose()


@pytest.mark.backends(*NETWORKED)
async def test_connections_that_were_cut(database: Database) -> None:
    """A broken connection costs one error at the most: the others are dropped with it."""
    async with CuttingProxy.in_front_of(database.url) as proxy:
        session: Any = SQLAlchemySession.from_url(
            "chat-1", url=proxy.url(database.url), create_tables=True
        )
        await session.add_items([{"n": 1}])
        await asyncio.gather(*(session.get_items() for _ in range(5)))
        await go_round()
        assert session.engine.pool.checkedin() > 1
        for call in [session.get_items, *_calls(session)]:
            proxy.cut()
            (outcome,) = await asyncio.gather(*[call()], return_exceptions=True)
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, DBAPIError)
                assert outcome.connection_invalidated
            await session.get_items()
            await asyncio.gather(*(session.get_items() for _ in range(5)))
        await go_round()
        assert session.engine.pool.checkedout() == 0
        await session.aclose()


@pytest.mark.backends(*NETWORKED)
async def test_nobody_listens(database: Database) -> None:
    async with CuttingProxy.in_front_of(database.url) as proxy:
        url = proxy.url(database.url)
    session: Any = SQLAlchemySession.from_url("chat-1", url=url, create_tables=True)
    for error in await _errors(session):
        _assert_no_password(error, url)
    await session.aclose()


@pytest.mark.backends(*NETWORKED)
async def test_a_wrong_password_is_never_shown(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    url = make_url(database.url).set(password="not-the-pass%word")  # noqa: S106 - a wrong one
    wrong = url.render_as_string(hide_password=False)
    session: Any = SQLAlchemySession.from_url("chat-1", url=wrong)
    for error in await _errors(session):
        _assert_no_password(error, wrong)
    assert "not-the-pass" not in caplog.text + repr(session) + repr(vars(session)["_key"])
    await session.aclose()


@pytest.mark.backends(*NETWORKED)
async def test_a_database_that_does_not_exist(database: Database) -> None:
    url = make_url(database.url).set(database="nowhere").render_as_string(hide_password=False)
    session: Any = SQLAlchemySession.from_url("chat-1", url=url, create_tables=True)
    for error in await _errors(session):
        _assert_no_password(error, url)
    await session.aclose()


def _assert_no_password(error: BaseException, url: str) -> None:
    password = make_url(url).password
    assert isinstance(password, str)
    told = "".join(traceback.format_exception(error))
    assert password not in told


async def test_an_error_of_the_callers_own_decoder_is_the_callers(database: Database) -> None:
    """Only what says that a row is no item is taken for that; anything else is a bug to be seen."""

    class Broken(SQLAlchemySession):
        async def _deserialize_item(self, item: str) -> Any:
            raise KeyError("a bug")

    session: Any = Broken.from_url("chat-1", url=database.url, create_tables=True)
    await session.add_items([{"n": 1}])
    for call in (session.get_items, session.pop_item):
        with pytest.raises(KeyError, match="a bug"):
            await call()
    plain: Any = SQLAlchemySession.from_url("chat-1", url=database.url)
    assert await plain.get_items() == [{"n": 1}]
    await go_round()
    assert plain.engine.pool.checkedout() == 0
    await plain.aclose()
