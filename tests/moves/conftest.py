"""Fixtures of the moves' tests.

apart    `await apart("sqlite", "postgresql")`: URLs of fresh databases of these families, by shard
         name, each family in its newest version; skips without one of them
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from harness.servers import Server

    Apart = Callable[..., Awaitable[dict[str, str]]]


@pytest_asyncio.fixture
async def apart(pytestconfig: pytest.Config) -> AsyncIterator[Apart]:
    plugin: Any = pytestconfig.pluginmanager.get_plugin(
        str(Path(__file__).parents[1] / "conftest.py")
    )
    found, fleet = pytestconfig.stash[plugin.FOUND], pytestconfig.stash[plugin.FLEET]
    newest = {backend.family: backend for backend in plugin._newest(found.backends)}
    made: list[tuple[Server, str]] = []

    async def make(*families: str) -> dict[str, str]:
        urls: dict[str, str] = {}
        for name, family in zip("abcdefgh", families, strict=False):
            if family not in newest:
                pytest.skip(f"no {family} here")
            server = await fleet.shared(newest[family])
            urls[name] = await server.create_database()
            made.append((server, urls[name]))
        return urls

    yield make
    for server, url in made:
        await server.start()
        await server.drop_database(url)
