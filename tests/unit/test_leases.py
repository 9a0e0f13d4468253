"""Connections that are kept between two operations: who has them next, and that all come back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from shardgate.leases import IDLE_TURNS, Kept, Lease

if TYPE_CHECKING:
    import pytest


class Pool:
    """Counts what has come back to it."""

    def __init__(self) -> None:
        self.back: list[Connection] = []


class Connection:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.invalid = self.detached = False
        self.info: dict[Any, Any] = {}
        self.driver_connection = object()

    def close(self) -> None:
        self.pool.back.append(self)

    def invalidate(self) -> None:
        self.invalid = True

    def detach(self) -> None:
        self.detached = True


class Engine:
    def __init__(self, pool: Pool) -> None:
        self.sync_engine = self
        self.pool = pool


class Stock:
    """An engine with its pool, and leases of its connections."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.engine = Engine(self.pool)
        self.kept = Kept(asyncio.get_running_loop())

    def lease(self) -> Lease:
        made = Connection(self.pool)
        return Lease(*cast("Any", (made, self.engine, self.pool)), since=0.0)

    @property
    def back(self) -> list[Any]:
        return self.pool.back


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_the_next_one_takes_what_was_just_used() -> None:
    stock = Stock()
    first, second = stock.lease(), stock.lease()
    assert stock.kept.take() is None
    stock.kept.keep(first)
    stock.kept.keep(second)
    assert first.used
    assert stock.kept.take() is second
    assert stock.kept.take() is first
    assert stock.kept.take() is None
    await turns(IDLE_TURNS + 2)
    assert stock.back == [], "they are in use"


async def test_what_nobody_takes_goes_back() -> None:
    stock = Stock()
    lease = stock.lease()
    stock.kept.keep(lease)
    await turns(IDLE_TURNS)
    assert stock.back == []
    await turns(1)
    assert stock.back == [lease.connection]
    assert stock.kept.take() is None


async def test_to_be_used_now_and_then_keeps_no_other_from_going_back() -> None:
    stock = Stock()
    idle, busy = stock.lease(), stock.lease()
    stock.kept.keep(idle)
    stock.kept.keep(busy)
    for _ in range(3 * IDLE_TURNS):
        taken = stock.kept.take()
        assert taken is busy
        stock.kept.keep(busy)
        await turns(1)
    assert stock.back == [idle.connection]


async def test_the_event_loop_has_nothing_to_do_for_those_that_are_in_use() -> None:
    stock = Stock()
    stock.kept.keep(stock.lease())
    assert stock.kept.take() is not None
    await turns(1)
    assert stock.kept._kept() is None


async def test_of_an_engine_that_was_closed_none_is_used_again() -> None:
    stock = Stock()
    lease = stock.lease()
    stock.kept.keep(lease)
    stock.engine.pool = Pool()
    assert stock.kept.take() is None
    assert cast("Any", lease.connection).invalid
    assert stock.back == []


async def test_all_can_be_returned_at_once() -> None:
    stock = Stock()
    leases = [stock.lease() for _ in range(3)]
    for lease in leases:
        stock.kept.keep(lease)
    await stock.kept.end()
    assert stock.back == [lease.connection for lease in reversed(leases)]
    await turns(IDLE_TURNS + 2)
    assert len(stock.back) == 3


async def test_one_that_cannot_be_returned_is_reported_and_no_other_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    stock = Stock()
    bad, good = stock.lease(), stock.lease()

    def fail() -> None:
        raise LookupError("no way back")

    monkeypatch.setattr(bad.connection, "close", fail)
    stock.kept.keep(bad)
    stock.kept.keep(good)
    await turns(IDLE_TURNS + 2)
    asyncio.get_running_loop().set_exception_handler(None)
    assert stock.back == [good.connection]
    assert [str(context["exception"]) for context in told] == ["no way back"]


def test_a_loop_that_is_closed_keeps_none() -> None:
    """It has not gone round: nobody refers to the connection any more, and so to its pool."""
    loop = asyncio.new_event_loop()
    kept: list[Kept] = []
    connections: list[Any] = []

    async def use() -> None:
        stock = Stock()
        lease = stock.lease()
        kept.append(stock.kept)
        connections.append(lease.connection)
        stock.kept.keep(lease)

    loop.run_until_complete(use())
    assert not connections[0].detached
    loop.close()
    assert connections[0].detached
    assert kept[0].take() is None
