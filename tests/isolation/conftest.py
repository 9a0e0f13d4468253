"""The isolation suite's gateway: three shards on each backend.

gateway     a gateway over fresh databases, opened
open_again  `open_again()`: another gateway on the same databases, with engines of its own
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_asyncio

from contract.doors import gateway_settings
from shardgate.gateway import Gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakeDatabases
    from harness.engines import EngineMaker

SHARDS = 3


@pytest_asyncio.fixture
async def urls(databases: MakeDatabases) -> list[str]:
    return [database.url for database in await databases(SHARDS)]


@pytest_asyncio.fixture
async def gateway(urls: list[str], make_engine: EngineMaker) -> AsyncIterator[Gateway]:
    async with Gateway(gateway_settings(urls)) as gateway:
        for shard in gateway.shards.values():
            make_engine.watch(shard.engine)
        yield gateway
