"""Between two operations that follow one another, a connection does not go back to its pool: on our
own engines, for a moment, and for nobody else's harm."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text

from harness.engines import go_round, other_tasks
from harness.proxy import CuttingProxy
from shardgate import SQLAlchemySession, leases

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from harness.engines import EngineMaker
    from harness.servers import Database

pytestmark = pytest.mark.backends("postgresql")


class Counted:
    """How often connections were taken out of a pool and returned, how many were made, and how many
    were dropped."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.out = self.back = self.made = self.dropped = 0
        pool = engine.sync_engine.pool
        event.listen(pool, "checkout", lambda *_: self._count("out"))
        event.listen(pool, "checkin", lambda *_: self._count("back"))
        event.listen(pool, "connect", lambda *_: self._count("made"))
        event.listen(pool, "invalidate", lambda *_: self._count("dropped"))

    def _count(self, what: str) -> None:
        setattr(self, what, getattr(self, what) + 1)


@pytest.fixture
async def session(database: Database) -> AsyncIterator[Any]:
    made: Any = SQLAlchemySession.from_url("chat", url=database.url, create_tables=True)
    await made.add_items([{"n": 0}])
    await go_round()
    yield made
    await made.aclose()


async def _exchange(session: Any, number: int) -> None:
    await session.get_items(20)
    await session.add_items([{"n": number}])


async def test_operations_that_follow_one_another_share_a_check_out(session: Any) -> None:
    counted = Counted(session.engine)
    for number in range(5):
        await _exchange(session, number)
    assert (counted.out, counted.back, counted.made) == (1, 0, 0)
    await go_round()
    assert (counted.out, counted.back) == (1, 1)
    assert session.engine.pool.checkedout() == 0


async def test_but_not_for_ever(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners, recycling and whoever waits at the pool have their turn."""
    monkeypatch.setattr("shardgate.shards.KEPT_SECONDS", 0)
    counted = Counted(session.engine)
    for number in range(5):
        await _exchange(session, number)
    assert counted.out == counted.back == 10
    assert leases.KEPT_SECONDS <= 0.1


async def test_an_engine_of_somebody_elses_is_not_kept_waiting(make_engine: EngineMaker) -> None:
    engine = make_engine()
    session: Any = SQLAlchemySession("chat", engine=engine, create_tables=True)
    await session.add_items([{"n": 0}])
    counted = Counted(engine)
    await _exchange(session, 1)
    assert counted.out == counted.back == 2


async def test_who_waits_at_the_pool_comes_first(database: Database) -> None:
    """With one connection, a transaction of the platform's own gets it between two operations."""
    session: Any = SQLAlchemySession.from_url(
        "chat",
        url=database.url,
        create_tables=True,
        engine_kwargs={"pool_size": 1, "max_overflow": 0, "pool_timeout": 5},
    )
    await session.add_items([{"n": 0}])
    done = asyncio.Event()

    async def exchange() -> None:
        while not done.is_set():
            await _exchange(session, 1)

    busy = asyncio.create_task(exchange())
    await asyncio.sleep(0.02)
    async with session.engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1
    done.set()
    await busy
    await session.aclose()


async def test_one_that_is_kept_when_the_wire_is_cut_costs_no_more_than_any_other(
    database: Database,
) -> None:
    async with CuttingProxy.in_front_of(database.url) as proxy:
        url = proxy.url(database.url)
        session: Any = SQLAlchemySession.from_url("chat", url=url, create_tables=True)
        await session.add_items([{"n": 0}])
        for number in range(1, 4):
            await session.get_items(20)
            proxy.cut()
            await session.add_items([{"n": number}])
        assert [item["n"] for item in await session.get_items()] == [0, 1, 2, 3]
        await session.aclose()


async def test_one_that_is_kept_when_the_engine_is_closed_is_dropped(session: Any) -> None:
    engine = session.engine
    await session.get_items(20)
    counted, pool = Counted(engine), engine.pool
    assert pool.checkedout() == 1
    await engine.dispose()
    await session.add_items([{"n": 1}])
    await go_round()
    assert counted.dropped == 1
    assert engine.pool.checkedout() == 0
    assert [item["n"] for item in await session.get_items()] == [0, 1]
    assert engine.pool.checkedout() == 1, "the new pool's are kept, too"


@pytest.mark.filterwarnings("ignore:unclosed")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_loop_that_is_closed_right_after_it_keeps_no_pool_alive(database: Database) -> None:
    async def use() -> weakref.ref[Any]:
        session: Any = SQLAlchemySession.from_url("chat", url=database.url, create_tables=True)
        await session.add_items([{"n": 0}])
        pool = session.engine.pool
        assert pool.checkedout() == 1
        return weakref.ref(pool)

    def on_a_loop_of_its_own() -> weakref.ref[Any]:
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(use())
        finally:
            loop.close()

    pool = await asyncio.to_thread(on_a_loop_of_its_own)
    session: Any = SQLAlchemySession.from_url("chat", url=database.url)
    assert await session.get_items() == [{"n": 0}]
    gc.collect()
    assert pool() is None
    await session.aclose()


async def test_closing_waits_for_those_that_the_pool_has_no_room_for(database: Database) -> None:
    session: Any = SQLAlchemySession.from_url(
        "chat",
        url=database.url,
        create_tables=True,
        engine_kwargs={"pool_size": 1, "max_overflow": 10},
    )
    await session.add_items([{"n": 0}])
    for _ in range(5):
        await asyncio.gather(*(session.get_items() for _ in range(40)))
        await session.aclose()
        assert not other_tasks()


async def test_closing_returns_it_first(database: Database) -> None:
    """It is closed with its pool, politely, and not dropped."""
    session: Any = SQLAlchemySession.from_url("chat", url=database.url, create_tables=True)
    await session.add_items([{"n": 0}])
    counted, pool = Counted(session.engine), session.engine.pool
    assert pool.checkedout() == 1
    await session.aclose()
    assert pool.checkedout() <= 0
    assert counted.dropped == 0
