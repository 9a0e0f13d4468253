"""For platforms' own tests: a real gateway on throwaway SQLite shards."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shardgate.gateway import Gateway
from shardgate.settings import GatewaySettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def sqlite_gateway(*, shards: int = 2, **settings: Any) -> AsyncIterator[Gateway]:
    """An open gateway on ``shards`` SQLite files in a temporary folder, which goes with it.

    ``settings`` are further fields of ``GatewaySettings``. The environment is not read.
    """
    with TemporaryDirectory(prefix="shardgate-") as folder:
        urls = {
            f"s{number}": {"url": f"sqlite+aiosqlite:///{Path(folder) / f's{number}.db'}"}
            for number in range(shards)
        }
        values = {"shards": urls, "create_tables": True} | settings
        async with Gateway(GatewaySettings.from_dict(values)) as gateway:
            yield gateway
