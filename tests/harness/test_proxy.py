"""The proxy against a server that answers each line with the same line."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from harness.engines import other_tasks
from harness.programs import HOST
from harness.proxy import CuttingProxy, Traffic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from harness.engines import EngineMaker
    from harness.servers import Database


class Echo:
    """An echo server by line, which remembers what it heard."""

    def __init__(self) -> None:
        self.port = 0
        self.heard = bytearray()
        self.resets = 0
        self.ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.heard += data
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            self.resets += 1
        self.ended.set()
        writer.close()


@pytest_asyncio.fixture
async def echo() -> AsyncIterator[Echo]:
    server = Echo()
    listening = await asyncio.start_server(server.serve, HOST, 0)
    server.port = listening.sockets[0].getsockname()[1]
    async with listening:
        yield server


@pytest_asyncio.fixture
async def proxy(echo: Echo) -> AsyncIterator[CuttingProxy]:
    async with CuttingProxy(HOST, echo.port) as running:
        yield running
    assert other_tasks() == [] or running.open_connections == 0


class Caller:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, data: bytes) -> bytes:
        await self.send(data)
        return await self.reader.readexactly(len(data))


@asynccontextmanager
async def calling(proxy: CuttingProxy) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection(HOST, proxy.port)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()


async def test_forwards_and_counts(proxy: CuttingProxy) -> None:
    async with calling(proxy) as one, calling(proxy) as two:
        assert await one.ask(b"first") == b"first"
        before = proxy.traffic
        assert await two.ask(b"second") == b"second"
        assert await one.ask(b"third") == b"third"
        assert proxy.traffic - before == Traffic(round_trips=2, client_bytes=11, server_bytes=11)
        assert proxy.traffic.connections == 2
        assert proxy.open_connections == 2


async def test_an_answer_in_pieces_is_one_round_trip(proxy: CuttingProxy) -> None:
    data = bytes(3_000_000)
    async with calling(proxy) as caller:
        await asyncio.gather(caller.send(b"x"), caller.reader.readexactly(1))
        before = proxy.traffic.round_trips
        assert await caller.ask(b"ab") == b"ab"
        assert proxy.traffic.round_trips - before == 1
        _, answer = await asyncio.gather(caller.send(data), caller.reader.readexactly(len(data)))
        assert answer == data


async def test_cut_resets_both_sides(proxy: CuttingProxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        await caller.ask(b"hello")
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await caller.reader.readexactly(1)
        await echo.ended.wait()
        assert echo.resets == 1
    async with calling(proxy) as caller:
        assert await caller.ask(b"again") == b"again"


async def test_cut_after_bytes_of_the_client(proxy: CuttingProxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        await caller.ask(b"before")
        proxy.cut_after(client=3)
        await caller.send(b"abcdef")
        await proxy.was_cut()
        await echo.ended.wait()
    assert bytes(echo.heard) == b"beforeabc"


async def test_cut_after_bytes_of_the_server_loses_the_answer(
    proxy: CuttingProxy, echo: Echo
) -> None:
    async with calling(proxy) as caller:
        await caller.ask(b"before")
        proxy.cut_after(server=0)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await caller.ask(b"commit")
        await echo.ended.wait()
    assert bytes(echo.heard) == b"beforecommit"
    async with calling(proxy) as caller:
        assert await caller.ask(b"once only") == b"once only"


async def test_exactly_the_bytes_allowed_do_not_cut(proxy: CuttingProxy) -> None:
    async with calling(proxy) as caller:
        proxy.cut_after(server=4)
        assert await caller.ask(b"four") == b"four"
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await caller.ask(b"5")


async def test_freeze_holds_and_resume_delivers(proxy: CuttingProxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        await caller.ask(b"warm")
        proxy.freeze()
        asking = asyncio.create_task(caller.ask(b"held"))
        while proxy.traffic.client_bytes < 8:  # noqa: ASYNC110 - the proxy has no event for it
            await asyncio.sleep(0)
        assert bytes(echo.heard) == b"warm"
        assert not asking.done()
        proxy.resume()
        assert await asking == b"held"


async def test_frozen_connections_can_be_cut(proxy: CuttingProxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        await caller.ask(b"warm")
        proxy.freeze()
        await caller.send(b"lost")
        proxy.cut()
        await echo.ended.wait()
    assert bytes(echo.heard) == b"warm"


async def test_delay_is_applied(proxy: CuttingProxy) -> None:
    loop = asyncio.get_running_loop()
    async with calling(proxy) as caller:
        proxy.delay = 0.05
        before = loop.time()
        await caller.ask(b"slow")
        assert loop.time() - before >= 0.1  # a lower bound: there and back


async def test_refusing(proxy: CuttingProxy) -> None:
    proxy.refusing = True
    with pytest.raises(ConnectionResetError):
        async with calling(proxy) as caller:
            await caller.reader.readexactly(1)
    proxy.refusing = False
    async with calling(proxy) as caller:
        assert await caller.ask(b"back") == b"back"


async def test_end_of_stream_passes_through(proxy: CuttingProxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        await caller.send(b"bye")
        caller.writer.write_eof()
        assert await caller.reader.read() == b"bye"
    assert echo.resets == 0


async def test_close_leaves_no_task_and_no_connection(echo: Echo) -> None:
    before = other_tasks()
    async with CuttingProxy(HOST, echo.port) as proxy:
        callers = [await asyncio.open_connection(HOST, proxy.port) for _ in range(5)]
        for _, writer in callers:
            writer.write(b"x")
        for reader, _ in callers:
            await reader.readexactly(1)
        proxy.freeze()
    assert proxy.open_connections == 0
    for _, writer in callers:
        writer.close()
    await echo.ended.wait()
    mine = [task for task in other_tasks() if "harness.proxy" in repr(task.get_coro())]
    assert mine == before == []


async def test_a_target_that_is_down_resets_the_caller(unused_tcp_port: int) -> None:
    async with CuttingProxy(HOST, unused_tcp_port) as proxy, calling(proxy) as caller:
        with pytest.raises(ConnectionResetError):
            await caller.reader.readexactly(1)


@pytest.mark.backends("postgresql", "mariadb")
async def test_a_database_through_the_proxy(database: Database, make_engine: EngineMaker) -> None:
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    async with CuttingProxy.in_front_of(database.url) as proxy:
        engine = make_engine(proxy.url(database.url), isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            before = proxy.traffic
            raw = await connection.get_raw_connection()
            driver = raw.driver_connection
            assert driver is not None
            await _ask(driver)
            assert (proxy.traffic - before).round_trips == 1
            proxy.cut()
            with pytest.raises((DBAPIError, OSError)):
                await connection.execute(text("SELECT 1"))
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1


async def _ask(driver: object) -> None:
    """One simple query on the driver's own connection: one request, one answer."""
    if hasattr(driver, "execute"):
        await driver.execute("SELECT 1; SELECT 2")
        return
    cursor = await driver.cursor()  # type: ignore[attr-defined] # aiomysql has no type hints
    await cursor.execute("SELECT 1")
    await cursor.close()
