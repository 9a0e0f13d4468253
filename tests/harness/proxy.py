"""A TCP proxy that breaks the network on demand, and counts what crosses it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Literal, Self

from sqlalchemy.engine import make_url

from harness.programs import HOST

if TYPE_CHECKING:
    from types import TracebackType

CHUNK = 65536
Side = Literal["client", "server"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What has crossed the proxy so far; subtract two to get what crossed in between.

    A round trip is a switch from data of the client to data of the server on one connection.
    Requests that a client sends without waiting for answers count once or several times, as the
    answers happen to come.
    """

    connections: int = 0
    round_trips: int = 0
    client_bytes: int = 0
    server_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class CuttingProxy:
    """Forwards 127.0.0.1:``port`` to a target until told otherwise; an async context manager.

    ``delay`` holds every piece of data back for so many seconds. While ``refusing`` is true, new
    connections are reset at once. Bytes are counted when they arrive at the proxy.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        self.target = (target_host, target_port)
        self.port = 0
        self.delay = 0.0
        self.refusing = False
        self.traffic = Traffic()
        self._server: asyncio.Server | None = None
        self._links: dict[_Link, asyncio.Task[None]] = {}
        self._open_gate = asyncio.Event()
        self._open_gate.set()
        self._allowance: dict[Side, int] = {}
        self._cuts = asyncio.Event()

    @classmethod
    def in_front_of(cls, url: str) -> CuttingProxy:
        """Make a proxy whose target is the server of a SQLAlchemy URL."""
        parsed = make_url(url)
        if parsed.host is None or parsed.port is None:
            raise ValueError("a proxy needs a URL with a host and a port")
        return cls(parsed.host, parsed.port)

    def url(self, url: str) -> str:
        """Return ``url`` with this proxy in place of its host and port."""
        changed = make_url(url).set(host=HOST, port=self.port)
        return changed.render_as_string(hide_password=False)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop listening, reset every connection, and wait for the proxy's tasks."""
        self.refusing = True
        if self._server is not None:
            self._server.close()
        while self._links:
            tasks = list(self._links.values())
            self.cut()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    @property
    def open_connections(self) -> int:
        return len(self._links)

    def cut(self) -> None:
        """Reset (RST) every open connection on both sides, now."""
        self._cuts.set()
        for link, task in self._links.items():
            link.reset()
            task.cancel()

    def cut_after(self, *, client: int | None = None, server: int | None = None) -> None:
        """Let so many bytes of a side through, then reset the connection that carries the next.

        Counts from this call, over all connections, and cuts once: with ``server=0`` the next
        request arrives and its answer is lost. Await ``was_cut`` to know that it has happened.
        """
        self._cuts.clear()
        limits: dict[Side, int | None] = {"client": client, "server": server}
        self._allowance = {side: limit for side, limit in limits.items() if limit is not None}

    async def was_cut(self) -> None:
        """Wait until the cut asked for by ``cut_after`` has happened."""
        await self._cuts.wait()

    def freeze(self) -> None:
        """Forward nothing from now on, with every connection left open."""
        self._open_gate.clear()

    def resume(self) -> None:
        """Forward again, first what was held back."""
        self._open_gate.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            _reset(writer)
            return
        self.traffic += Traffic(connections=1)
        link = _Link(self, reader, writer)
        task = asyncio.create_task(link.run())
        self._links[link] = task
        task.add_done_callback(lambda _: self._links.pop(link, None))

    async def _passage(self, side: Side, data: bytes) -> tuple[bytes, bool]:
        """Hold ``data`` back as told; return what may pass, and whether to cut after it."""
        if self.delay:
            await asyncio.sleep(self.delay)
        await self._open_gate.wait()
        allowed = self._allowance.get(side)
        if allowed is None:
            return data, False
        if len(data) <= allowed:
            self._allowance[side] = allowed - len(data)
            return data, False
        self._allowance.clear()
        return data[:allowed], True


class _Link:
    """One client connection and its connection to the target."""

    def __init__(
        self, proxy: CuttingProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writers = [writer]
        self._last: Side = "server"

    def reset(self) -> None:
        for writer in self._writers:
            _reset(writer)

    async def run(self) -> None:
        try:
            reader, writer = await asyncio.open_connection(*self._proxy.target)
        except OSError:
            self.reset()
            return
        self._writers.append(writer)
        client = self._writers[0]
        for end in self._writers:
            end.transport.set_write_buffer_limits(high=0)  # drained means sent
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump("client", self._reader, writer))
                group.create_task(self._pump("server", reader, client))
        except* OSError:
            self.reset()  # one side reset its connection: so does the proxy on the other side
        finally:
            for end in self._writers:
                end.close()

    async def _pump(
        self, side: Side, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(CHUNK):
            self._count(side, len(data))
            passing, cut = await self._proxy._passage(side, data)
            try:
                writer.write(passing)
                await writer.drain()
            finally:  # whoever is to be cut off may have gone by himself
                if cut:
                    self.reset()
                    self._proxy._cuts.set()
            if cut:
                return
        with contextlib.suppress(OSError):
            writer.write_eof()

    def _count(self, side: Side, size: int) -> None:
        if side == "client":
            change = Traffic(client_bytes=size)
        else:
            change = Traffic(server_bytes=size, round_trips=int(self._last == "client"))
        self._last = side
        self._proxy.traffic += change


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: the peer sees a reset and loses what it has not read."""
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        no_linger = struct.pack("ii", 1, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
    writer.transport.abort()
