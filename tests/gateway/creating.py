"""Many tasks of a process that create the same keyspaces; run in several processes at once."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway.shards import item
from shardgate import Gateway, GatewaySettings

TASKS = 2


async def create_all(argument: dict[str, Any]) -> int:
    """Create each keyspace of ``argument["rounds"]`` from several tasks; how often it was done."""
    done = 0
    for values in argument["rounds"]:
        settings = GatewaySettings.from_dict(values)
        done += sum(await asyncio.gather(*(_create(settings) for _ in range(TASKS))))
    return done


async def _create(settings: GatewaySettings) -> bool:
    gateway = Gateway(settings)
    try:
        await gateway.create_tables()
        # Whoever is done first begins to write while the others still create.
        session = gateway.tenant("acme").session("chat-1")
        await session.add_items([item("one")])
        return bool(await session.get_items())
    finally:
        await gateway.aclose()
