"""``from_url``: one engine for each (URL, options, event loop), and sessions in several threads."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.pool import NullPool

from contract.writers import assert_order_of_commits, assert_whole, batch_of
from shardgate.session import SQLAlchemySession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contract.doors import Session
    from harness.engines import EngineMaker
    from harness.servers import Database

THREADS = 4
CONNECTIONS = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
    "mariadb": "SELECT count(*) FROM information_schema.processlist WHERE db = database()",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database()",
}


def _session(database: Database, session_id: str = "chat-1", **options: Any) -> Any:
    return SQLAlchemySession.from_url(session_id, url=database.url, create_tables=True, **options)


async def test_five_hundred_sessions_use_one_pool(
    database: Database, make_engine: EngineMaker
) -> None:
    sessions = [_session(database, f"chat-{n}") for n in range(500)]
    make_engine.watch(sessions[0].engine)
    assert {id(session.engine) for session in sessions} == {id(sessions[0].engine)}
    await asyncio.gather(*(session.add_items([{"n": n}]) for n, session in enumerate(sessions)))
    for n, session in list(enumerate(sessions))[::50]:
        assert await session.get_items() == [{"n": n}]
    if database.backend.family in CONNECTIONS:
        async with make_engine(poolclass=NullPool).connect() as connection:
            asked = await connection.execute(text(CONNECTIONS[database.backend.family]))
            assert asked.scalar_one() <= 5 + 10 + 1
    await sessions[7].aclose()


async def test_other_options_are_another_engine(database: Database) -> None:
    plain = _session(database)
    small = _session(database, engine_kwargs={"pool_size": 2, "connect_args": {}})
    same = _session(database, "chat-2", engine_kwargs={"connect_args": {}, "pool_size": 2})
    truth = _session(database, engine_kwargs={"pool_size": 1})
    assert small.engine is same.engine
    assert len({id(session.engine) for session in (plain, small, truth)}) == 3
    assert small.engine.pool.size() == 2
    await small.add_items([{"n": 1}])
    assert await plain.get_items() == [{"n": 1}]
    for session in (plain, small, truth):
        await session.aclose()


async def test_the_next_call_after_aclose_works(database: Database) -> None:
    session, other = _session(database), _session(database, "chat-2")
    await session.add_items([{"n": 1}])
    before = session.engine
    await session.aclose()
    await session.aclose()
    assert before.pool.checkedin() == 0
    assert await session.get_items() == [{"n": 1}]
    await other.add_items([{"n": 2}])
    assert other.engine is session.engine is not before
    await other.aclose()


@pytest.fixture
def collected() -> Iterator[None]:
    """Collect what a closed loop has left behind here, and not in some later test."""
    yield
    gc.collect()


NOT_CLOSED = (
    pytest.mark.filterwarnings(  # who does not close hears it, if Python is asked to say so
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    )
)


@NOT_CLOSED
@pytest.mark.usefixtures("collected")
def test_several_runs_one_after_the_other(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """As a program does that calls ``asyncio.run`` again and again, and closes now and then."""
    session = _session(database)

    async def use(number: int) -> list[Any]:
        await asyncio.gather(*(session.add_items([{"n": number}]) for _ in range(3)))
        if number % 2:
            await session.aclose()
        found: list[Any] = await session.get_items()
        if number == 3:
            await session.aclose()
        return found

    for number in range(4):
        history = asyncio.run(use(number))
        assert [item["n"] for item in history] == [n for n in range(number + 1) for _ in range(3)]
    assert not caplog.records


def _in_threads(session: Session, close: Callable[[], Any] | None = None) -> list[Any]:
    """Append from several threads at once, each with its own event loop."""
    together = threading.Barrier(THREADS)

    async def append(thread: int) -> list[Any]:
        spans = []
        together.wait(timeout=30)
        for batch in range(8):
            began = asyncio.get_running_loop().time()
            await session.add_items(batch_of(str(thread), batch, 2))
            spans.append((str(thread), batch, began, asyncio.get_running_loop().time()))
        if close is not None:
            await close()
        return spans

    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(lambda thread: asyncio.run(append(thread)), range(THREADS))
        return [span for spans in results for span in spans]


def test_one_session_in_several_threads(database: Database) -> None:
    session = _session(database)
    spans = _in_threads(session, session.aclose)

    async def read() -> list[Any]:
        history: list[Any] = await session.get_items()
        await session.aclose()
        return history

    history = asyncio.run(read())
    assert_whole(history)
    assert_order_of_commits(history, spans)


def test_one_engine_without_a_pool_in_several_threads(
    database: Database, make_engine: EngineMaker
) -> None:
    engine = make_engine(poolclass=NullPool)
    session: Any = SQLAlchemySession("chat-1", engine=engine, create_tables=True)
    spans = _in_threads(session)
    history = asyncio.run(session.get_items())
    assert_whole(history)
    assert_order_of_commits(history, spans)
    popped = asyncio.run(session.pop_item())
    assert popped == history[-1]


@NOT_CLOSED
@pytest.mark.usefixtures("collected")
async def test_engines_of_closed_loops_are_dropped(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> None:
        async def use() -> None:
            await _session(database).get_items()

        asyncio.run(use())

    before = _shared_engines()
    for _ in range(3):
        await asyncio.to_thread(run)
    session = _session(database)
    await session.get_items()
    assert _shared_engines() <= before + 1
    assert not caplog.records
    await session.aclose()


def _shared_engines() -> int:
    from shardgate.engines import _shared

    return sum(len(engines.by_loop) for engines in _shared.values())


async def test_an_engine_passed_in_is_not_closed(
    database: Database, make_engine: EngineMaker
) -> None:
    engine = make_engine()
    pool = engine.pool
    session: Any = SQLAlchemySession("chat-1", engine=engine, create_tables=True)
    await session.add_items([{"n": 1}])
    await session.aclose()
    assert engine.pool is pool
    assert pool.checkedin() == 1  # type: ignore[attr-defined]  # a queue pool has it
    assert session.engine is engine


@pytest.mark.backends("sqlite")
def test_naming_a_session_does_no_input_or_output(database: Database) -> None:
    """Without an event loop, and where there is nothing to connect to."""
    session = SQLAlchemySession.from_url("chat-1", url="postgresql+asyncpg://u:p@127.0.0.1:1/none")
    assert session.engine.pool.checkedin() == 0  # type: ignore[attr-defined]
    assert "u:p@" not in repr(session)
