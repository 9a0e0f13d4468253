"""A proxy that holds one request back while its sender has already given it up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from harness.proxy import CuttingProxy

if TYPE_CHECKING:
    from harness.proxy import Side

SECONDS = 10
"""Bounds a wait that has gone wrong."""


class HoldingProxy(CuttingProxy):
    """A proxy that can also play the network in which an old packet arrives after a newer one.

    ``attempts`` counts the connections that clients have tried to open, refused ones too.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        super().__init__(target_host, target_port)
        self.attempts = 0
        self._hold = False
        self._released = asyncio.Event()
        self._holding = asyncio.Event()
        self._orphans: list[asyncio.Task[None]] = []

    def hold_next(self) -> None:
        """Hold back what a client sends next; other connections, opened later, are let through."""
        self._hold = True
        self._released.clear()
        self._holding.clear()

    async def is_holding(self) -> None:
        """Wait until something is held back."""
        await asyncio.wait_for(self._holding.wait(), SECONDS)

    def drop_clients(self) -> None:
        """End the clients' side of every connection; the server is to notice nothing of it yet."""
        for link, task in self._links.items():
            client: Any = link._writers[0]
            client.transport.abort()
            client.write, client.write_eof, client.drain = _ignore, _ignore, _pass
            self._orphans.append(task)

    async def arrive(self) -> None:
        """Let go what is held back, and wait until the server has done with it and hung up."""
        self.release()
        await asyncio.wait_for(asyncio.gather(*self._orphans), SECONDS)

    def release(self) -> None:
        self._released.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.attempts += 1
        super()._accept(reader, writer)

    async def _passage(self, side: Side, data: bytes) -> tuple[bytes, bool]:
        if side == "client" and self._hold:
            self._hold = False
            self._holding.set()
            await self._released.wait()
        return await super()._passage(side, data)

    @classmethod
    def in_front_of(cls, url: str) -> HoldingProxy:
        plain = CuttingProxy.in_front_of(url)
        return cls(*plain.target)


def _ignore(*_: object) -> None:
    """Nobody listens any more."""


async def _pass() -> None:
    """Nobody is waited for any more."""
