"""Fixtures of the gateway's tests.

gateways     `gateways.make(settings, **options)`: a Gateway; at teardown it is closed, and no
             connection of its engines may be out. `await gateways.open(...)`: opened
sqlite_urls  `sqlite_urls("ab")`: URLs of fresh SQLite files by shard name, without a backend
shared_server  `await shared_server("mariadb")`: the run's server of this family; skips without
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from harness.engines import EngineMaker
from shardgate import Gateway, GatewaySettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from harness.servers import Server


class Gateways:
    """Makes gateways and watches their engines' connections."""

    def __init__(self) -> None:
        self._watched = EngineMaker("")
        self._made: list[Gateway] = []

    def make(self, settings: GatewaySettings, **options: Any) -> Gateway:
        gateway = Gateway(settings, **options)
        self._made.append(gateway)
        for shard in gateway.shards.values():
            self._watched.watch(shard.engine)
        return gateway

    async def open(self, settings: GatewaySettings, **options: Any) -> Gateway:
        gateway = self.make(settings, **options)
        await gateway.open()
        return gateway

    async def finish(self) -> None:
        for gateway in self._made:
            await gateway.aclose()
        await self._watched.finish()


@pytest.fixture(autouse=True)
def short_outages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are down for long here, and whole seconds of riding over it tell nothing new."""
    monkeypatch.setattr("shardgate.shards.Database.outage", 0.3)


@pytest_asyncio.fixture
async def gateways() -> AsyncIterator[Gateways]:
    some = Gateways()
    yield some
    await some.finish()


@pytest.fixture
def sqlite_urls(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    return lambda names: {name: f"sqlite+aiosqlite:///{tmp_path / name}.db" for name in names}


@pytest.fixture
def shared_server(pytestconfig: pytest.Config) -> Callable[[str], Awaitable[Server]]:
    """Servers of another family than the test's own backend, out of the same fleet."""
    plugin: Any = pytestconfig.pluginmanager.get_plugin(
        str(Path(__file__).parents[1] / "conftest.py")
    )
    found, fleet = pytestconfig.stash[plugin.FOUND], pytestconfig.stash[plugin.FLEET]

    async def shared(family: str) -> Server:
        for backend in found.backends:
            if backend.family == family and backend.endable:
                server: Server = await fleet.shared(backend)
                return server
        pytest.skip(f"no {family} server that tests may end")

    return shared
