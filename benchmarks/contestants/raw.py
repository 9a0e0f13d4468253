"""The floor: the drivers themselves, sending our own guarded statements on held connections.

They do an exchange's whole work, from items to items: JSON is written and read, op ids are made.
They know beforehand where each session lives. They do not wait out an outage, send nothing again,
and do not notice that a session has moved.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from abc import abstractmethod
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

import aiomysql  # type: ignore[import-untyped]  # it has no types
import asyncpg
from sqlalchemy import text
from sqlalchemy.engine import make_url

from benchmarks.contestants.base import Contestant, Session
from benchmarks.contestants.ours import DURABLE, ThroughGateway
from benchmarks.servers import driver_url
from shardgate.coalescing import share
from shardgate.engines import make_engine
from shardgate.items import MARKED, decode_all, encode, split
from shardgate.shards import SEATS
from shardgate.sql.dialect import Append, Guard, Key, Operation, Outcome, TailRead
from shardgate.sql.mysql import MySQL
from shardgate.sql.postgresql import PostgreSQL
from shardgate.sql.schema import TableNames, build_tables

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from benchmarks.contestants.base import Name, Stage
    from shardgate import Gateway

_PREFIX = "shardgate_"


class Shelf:
    """Connections that are held. Who came first is served first, by the one that was used last."""

    def __init__(self) -> None:
        self.connections: list[Any] = []
        self._free = asyncio.Semaphore(0)

    def add(self, connection: Any) -> None:
        self.connections.append(connection)
        self._free.release()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Any]:
        async with self._free:
            connection = self.connections.pop()
            try:
                yield connection
            finally:
                self.connections.append(connection)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a session lives: its key, its guard, and the connections that lead there."""

    key: Key
    guard: Guard
    shelf: Shelf


class Raw(Contestant):
    """What both drivers share: the gateway's tables, and a shelf of connections to each shard."""

    durability: ClassVar[str] = DURABLE

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.shelves: dict[str, Shelf] = {}
        self.spots: dict[Name, Spot] = {}

    async def open(self) -> None:
        gateway = ThroughGateway(self.stage)
        await gateway.open()  # makes and fills the tables, unless they are there
        try:
            owners = await _owners(gateway.gateway)
            self.shelves = {name: Shelf() for name in owners}
            for name in self.names:
                where = gateway.gateway.route(name.tenant, name.session)
                key = Key(name.tenant, name.session, where.h)
                guard = Guard(where.slot, owners[where.shard])
                self.spots[name] = Spot(key, guard, self.shelves[where.shard])
        finally:
            await gateway.close()
        self.prepare(next(iter(gateway.urls.values())))
        for shard, shelf in self.shelves.items():
            for _ in range(max(1, self.connections // self.stage.shards)):
                shelf.add(await self.connect(gateway.urls[shard]))

    async def close(self) -> None:
        for shelf in self.shelves.values():
            for connection in shelf.connections:
                await self.end(connection)

    @abstractmethod
    def prepare(self, url: str) -> None:
        """Write the statements."""

    @abstractmethod
    async def connect(self, url: str) -> Any:
        """A connection of the driver's own."""

    @abstractmethod
    async def end(self, connection: Any) -> None:
        """Close it."""


async def _owners(gateway: Gateway) -> dict[str, str]:
    """The shards' UUIDs by name."""
    owners = {}
    for name, shard in gateway.shards.items():
        async with shard.engine.connect() as connection:
            uuid = await connection.scalar(text(f"SELECT shard_uuid FROM {_PREFIX}shard"))  # noqa: S608 - a constant
            owners[name] = str(uuid)
    return owners


def _tables() -> Any:
    return build_tables(TableNames.gateway(_PREFIX))


class RawPostgreSQL(Raw):
    """asyncpg."""

    key: ClassVar[str] = "raw"
    title: ClassVar[str] = "raw asyncpg, our statement"

    def prepare(self, url: str) -> None:
        dialect = PostgreSQL(_tables(), make_engine(url, {}).dialect)
        self.tail_sql, self.append_sql = dialect.tail_sql, dialect.append_sql

    async def connect(self, url: str) -> Any:
        return await asyncpg.connect(driver_url(url))

    async def end(self, connection: Any) -> None:
        await connection.close()

    def session(self, name: Name) -> Session:
        return AsyncpgSession(self, self.spots[name])


@dataclass(frozen=True, slots=True)
class AsyncpgSession:
    """One statement for each operation."""

    raw: RawPostgreSQL
    spot: Spot

    async def get_items(self, limit: int | None = None) -> list[Any]:
        key, guard = self.spot.key, self.spot.guard
        place = (key.tenant_id, key.session_id, guard.slot, guard.owner)
        async with self.spot.shelf.one() as connection:
            _, newest = await connection.fetchrow(self.raw.tail_sql, *place, limit, MARKED)
        return [json.loads(data) for data in reversed(newest.split(MARKED))]

    async def add_items(self, items: list[Any]) -> None:
        key, guard = self.spot.key, self.spot.guard
        place = (key.tenant_id, key.session_id, guard.slot, guard.owner, key.h)
        data = [json.dumps(item, separators=(",", ":")) for item in items]
        sizes = list(map(len, data))
        values = (uuid4().hex, None, secrets.randbits(63), data, sizes, len(sizes), sum(sizes))
        async with self.spot.shelf.one() as connection:
            here, new = await connection.fetchrow(self.raw.append_sql, *place, *values)
        if not (here and new):
            raise LookupError("the guard refused a session that lives here")


def _append(spot: Spot, items: list[Any]) -> Append:
    data = [encode(item) for item in items]
    operation = Operation(secrets.token_hex(16), "append")
    return Append(spot.key, spot.guard, operation, data)


def _check(outcome: Outcome | None) -> None:
    if outcome is not Outcome.DONE:
        raise LookupError("the guard refused a session that lives here")


class RawTogether(RawPostgreSQL):
    """asyncpg, with our statements for many operations: what is left to a gateway that gathers.

    As many connections for reads and for appends as we have seats. Those that are free share out
    all who wait, as many as we send together; nothing else is done for them.
    """

    key: ClassVar[str] = "raw-together"
    title: ClassVar[str] = "raw asyncpg, our statement for many"

    def prepare(self, url: str) -> None:
        self.dialect = PostgreSQL(_tables(), make_engine(url, {}).dialect)
        self.connections = 2 * SEATS

    async def open(self) -> None:
        await super().open()
        (shelf,) = self.shelves.values()
        room = Room()
        self.reads = Bench(room, self.dialect.tail_many, shelf.connections[:SEATS])
        self.appends = Bench(room, self.dialect.append_many, shelf.connections[SEATS:])

    def session(self, name: Name) -> Session:
        return CrowdSession(self, self.spots[name])


class Room:
    """How many operations of all kinds wait or are under way."""

    size = 0


class Bench:
    """Operations of a kind that wait for a connection, and go on it together."""

    def __init__(self, room: Room, send: Any, connections: list[Any]) -> None:
        self._room = room
        self._send = send
        self._free = list(connections)
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._flights: set[asyncio.Task[None]] = set()
        self._is_open = False

    async def join(self, operation: Any) -> Any:
        """The operation's answer."""
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._waiting.append((operation, answer))
        self._room.size += 1
        if not self._is_open:
            self._is_open = True
            loop.call_soon(self._depart)
        return await answer

    def _depart(self) -> None:
        """Share out who waits as our seats do."""
        self._is_open = False
        while self._waiting and self._free:
            most = share(len(self._waiting), crowd=self._room.size, free=len(self._free))
            going, self._waiting = self._waiting[:most], self._waiting[most:]
            flight = asyncio.create_task(self._fly(self._free.pop(), going))
            self._flights.add(flight)
            flight.add_done_callback(self._flights.discard)

    async def _fly(self, connection: Any, going: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        answers = await self._send(connection, [operation for operation, _ in going])
        for (_, waits), answer in zip(going, answers, strict=True):
            waits.set_result(answer)
        self._room.size -= len(going)
        self._free.append(connection)
        self._depart()


@dataclass(frozen=True, slots=True)
class CrowdSession:
    """Operations that go with others."""

    raw: RawTogether
    spot: Spot

    async def get_items(self, limit: int | None = None) -> list[Any]:
        rows = await self.raw.reads.join(TailRead(self.spot.key, self.spot.guard, limit))
        return decode_all(rows)[::-1]

    async def add_items(self, items: list[Any]) -> None:
        _check(await self.raw.appends.join(_append(self.spot, items)))


class RawMariaDB(Raw):
    """aiomysql. The packet is written by our dialect: nobody else could write it faster."""

    key: ClassVar[str] = "raw"
    title: ClassVar[str] = "raw aiomysql, our packet"

    def prepare(self, url: str) -> None:
        self.dialect = MySQL(_tables(), make_engine(url, {}).dialect)

    async def connect(self, url: str) -> Any:
        place = make_url(url)
        return await aiomysql.connect(
            host=place.host,
            port=place.port,
            user=place.username,
            password=place.password,
            db=place.database,
            charset="utf8mb4",
            autocommit=True,
        )

    async def end(self, connection: Any) -> None:
        await connection.ensure_closed()

    def session(self, name: Name) -> Session:
        return AiomysqlSession(self, self.spots[name])


@dataclass(frozen=True, slots=True)
class AiomysqlSession:
    """One packet for each operation."""

    raw: RawMariaDB
    spot: Spot

    async def get_items(self, limit: int | None = None) -> list[Any]:
        tail, spot = self.raw.dialect.tail, self.spot
        async with self.spot.shelf.one() as connection:
            rows = await tail(connection, TailRead(spot.key, spot.guard, limit))
        return [json.loads(data) for data in reversed(split(rows or []))]

    async def add_items(self, items: list[Any]) -> None:
        data = [json.dumps(item, separators=(",", ":")) for item in items]
        append = Append(self.spot.key, self.spot.guard, Operation(uuid4().hex, "append"), data)
        async with self.spot.shelf.one() as connection:
            await self.raw.dialect.append(connection, append)
