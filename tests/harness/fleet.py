"""All servers of one test run: shared ones for plain tests, further ones to break."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

import pytest

from harness.programs import RunFolder

if TYPE_CHECKING:
    from harness.servers import Backend, Server


class Fleet:
    """Starts servers when they are first asked for, and ends all of them in ``close``."""

    def __init__(self) -> None:
        self._folder: RunFolder | None = None
        self._shared: dict[str, list[Server]] = {}
        self._started: list[Server] = []
        atexit.register(self.close)

    async def shared(self, backend: Backend, index: int = 0) -> Server:
        """Return the run's server number ``index`` of this backend; started again if it is down.

        Skips the test if the backend is somebody else's and has fewer servers.
        """
        servers = self._shared.setdefault(backend.id, [])
        if backend.servers is not None and index >= backend.servers:
            pytest.skip(f"{backend.id}: {backend.servers} server(s) given, more are needed")
        while len(servers) <= index:
            servers.append(self._make(backend, durable=False))
        await servers[index].start()
        return servers[index]

    async def start(self, backend: Backend, *, durable: bool = False) -> Server:
        """Start a server of its own for a test that stops or kills it.

        ``durable`` keeps the database's own safety against a loss of power. Skips the test if the
        backend has nothing that can be killed.
        """
        if not backend.endable:
            pytest.skip(f"{backend.id} ({backend.how}): no server that tests may end")
        server = self._make(backend, durable=durable)
        await server.start()
        return server

    def _make(self, backend: Backend, *, durable: bool) -> Server:
        if self._folder is None:
            self._folder = RunFolder()
        server = backend.make(backend, self._folder, durable)
        self._started.append(server)
        return server

    def close(self) -> None:
        """End every server and remove the data; may be called again."""
        atexit.unregister(self.close)
        while self._started:
            self._started.pop().close()
        self._shared.clear()
        if self._folder is not None:
            self._folder.close()
            self._folder = None
