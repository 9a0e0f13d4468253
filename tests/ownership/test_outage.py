"""Outages: short ones cost time and no error; longer ones are told at once, and end unaided."""

from __future__ import annotations

import asyncio
from itertools import cycle
from typing import TYPE_CHECKING, Any

import pytest

from contract.doors import gateway_settings
from once.history import End, History
from once.wire import HoldingProxy
from shardgate import Gateway, OutcomeUnknown, ShardUnavailable

if TYPE_CHECKING:
    from conftest import StartServer
    from harness.servers import Backend, Database

APPENDERS = 32
CHATS = 8
KILLS = 4
POOL = 5
CALLERS = 20
NO_HANG = 30
"""Seconds: far more than a caller waits, far less than the deadline that he must not wait for."""

pytestmark = pytest.mark.backends("postgresql", "mariadb")


async def _killed_and_restarted(server: Any, tenant: Any, kills: int) -> list[History]:
    """Appenders, poppers and clearers at work while the server is killed and restarted."""
    histories = [History() for _ in range(CHATS)]
    acknowledged = dict.fromkeys(range(APPENDERS), 0)
    ended = asyncio.Event()

    async def append(writer: int) -> None:
        chat = writer % CHATS
        while not ended.is_set():
            await histories[chat].append(tenant.session(f"chat-{chat}"), f"w{writer}", 2)
            acknowledged[writer] += 1

    async def remove(chat: int, pops: int) -> None:
        session = tenant.session(f"chat-{chat}")
        for turn in cycle(range(pops + 1)):
            if ended.is_set():
                return
            await (histories[chat].pop(session) if turn else histories[chat].clear(session))

    async def kill() -> None:
        for _ in range(kills):
            before = dict(acknowledged)
            while any(acknowledged[writer] == before[writer] for writer in before):  # noqa: ASYNC110 - 32 would set it
                await asyncio.sleep(0.01)
            await server.kill()
            await server.start()
        ended.set()

    async with asyncio.TaskGroup() as group:
        for writer in range(APPENDERS):
            group.create_task(append(writer))
        group.create_task(remove(0, 10))
        group.create_task(remove(1, 10**9))
        group.create_task(kill())
    return histories


async def _rides_over(server: Any, kills: int) -> None:
    async with Gateway(gateway_settings([await server.create_database()])) as gateway:
        tenant: Any = gateway.tenant("acme")
        await tenant.session("chat-0").get_items()
        histories = await _killed_and_restarted(server, tenant, kills)
        kinds = {done.kind for done in histories[0].operations}
        assert kinds == {"append", "pop", "clear"}
        for chat, history in enumerate(histories):
            assert history.errors() == []
            assert {done.end for done in history.operations} == {End.ACKNOWLEDGED}
            assert history.problems(await tenant.session(f"chat-{chat}").get_items()) == []


@pytest.mark.usefixtures("long_outages")
async def test_no_call_raises_while_a_shard_is_killed_and_restarted(
    backend: Backend, start_server: StartServer
) -> None:
    await _rides_over(await start_server(backend, durable=True), KILLS)


@pytest.mark.usefixtures("long_outages")
@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_no_call_raises_under_a_hundred_kills(
    backend: Backend, start_server: StartServer
) -> None:
    await _rides_over(await start_server(backend, durable=True), 100)


async def _all_fail(calls: list[Any]) -> None:
    """Every call fails and names the shard, without waiting for its deadline."""
    answers = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), NO_HANG)
    for answer in answers:
        assert isinstance(answer, ShardUnavailable | OutcomeUnknown), answer
        assert answer.shard == "s0"
        assert "shard 's0'" in str(answer)


async def test_a_server_that_stays_down(database: Database) -> None:
    """More callers than connections: all are told; then one at a time asks, until it is back."""
    async with HoldingProxy.in_front_of(database.url) as proxy:
        pool = {"pool_size": POOL, "max_overflow": 0}
        settings = gateway_settings(
            [proxy.url(database.url)], pool, operation_deadline=100, create_tables=True
        )
        async with Gateway(settings) as gateway:
            session: Any = gateway.tenant("acme").session("chat-1")
            history = History()
            await history.append(session, "before")
            await asyncio.gather(*(session.get_items() for _ in range(POOL)))
            proxy.refusing = True
            proxy.cut()
            await _all_fail([session.add_items([{"id": "lost"}]) for _ in range(CALLERS)])

            before = proxy.attempts
            for act in (session.get_items, session.pop_item, session.clear_session):
                await _all_fail([act()])
            assert proxy.attempts - before <= 3, "each operation asks once"
            before = proxy.attempts
            await _all_fail([session.add_items([{"id": "lost"}]) for _ in range(CALLERS)])
            assert proxy.attempts - before <= 1, "one of all that come at once asks"

            proxy.refusing = False
            await history.append(session, "after")
            await asyncio.gather(*(history.append(session, f"w{n}") for n in range(CALLERS)))
            assert history.errors() == []
            assert history.problems(await session.get_items()) == []
