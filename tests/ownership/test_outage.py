"""Short outages are ridden over: a killed server that comes back costs time, not an error."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from shardgate import Gateway, GatewaySettings

if TYPE_CHECKING:
    from conftest import StartServer
    from harness.servers import Backend

APPENDERS = 32
KILLS = 4


@pytest.mark.backends("postgresql", "mariadb")
async def test_no_call_raises_while_a_shard_is_killed_and_restarted(
    backend: Backend, start_server: StartServer
) -> None:
    server = await start_server(backend, durable=True)
    settings = GatewaySettings.from_dict(
        {"shards": {"one": {"url": await server.create_database()}}, "create_tables": True}
    )
    async with Gateway(settings) as gateway:
        tenant = gateway.tenant("acme")
        acknowledged: dict[int, int] = {}
        ended = asyncio.Event()

        async def append(writer: int) -> None:
            session = tenant.session(f"chat-{writer % 8}")
            number = 0
            while not ended.is_set():
                await session.add_items([{"writer": writer, "number": number}])
                acknowledged[writer] = number = number + 1

        async def kill() -> None:
            for _ in range(KILLS):
                before = dict(acknowledged)
                while len(acknowledged) < APPENDERS or any(  # noqa: ASYNC110 - 32 would set it
                    acknowledged[writer] == before.get(writer) for writer in acknowledged
                ):
                    await asyncio.sleep(0.01)
                await server.kill()
                await server.start()
            ended.set()

        async with asyncio.TaskGroup() as group:
            for writer in range(APPENDERS):
                group.create_task(append(writer))
            group.create_task(kill())

        for chat in range(8):
            items = await tenant.session(f"chat-{chat}").get_items()
            for writer in range(chat, APPENDERS, 8):
                numbers = [item["number"] for item in items if item["writer"] == writer]
                assert numbers == list(range(acknowledged[writer]))
