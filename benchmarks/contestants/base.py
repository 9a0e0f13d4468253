"""What a contestant is: it makes handles of sessions that can be read and appended to."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from benchmarks.load import items

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.servers import Servers

TENANTS = 50
SECONDS_FOR_A_CONNECTION = 600
"""Nobody is to fail because others wait as well: waiting is part of what is measured."""
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Name:
    """A session: of the tenant, and its own id."""

    tenant: str
    session: str

    @property
    def text(self) -> str:
        """Both, for peers that know no tenants."""
        return f"{self.tenant}/{self.session}"


def names(count: int, tenants: int = TENANTS) -> list[Name]:
    """``count`` sessions of so many tenants, those of a tenant not side by side."""
    return [Name(f"tenant-{n % tenants}", f"chat-{n}") for n in range(count)]


@dataclass(slots=True, kw_only=True)
class Stage:
    """Where a contestant plays: on which databases, and what they hold at the start.

    Contestants that use the same tables share a database, which is loaded once. ``shards`` are
    databases of ``spread_over`` servers. In a contestant's own process there are no ``servers``:
    everything is there and loaded.
    """

    servers: Servers | None
    family: str = "postgresql"
    connections: int = 32
    sessions: int = 1_000
    history: int = 20
    tenants: int = TENANTS
    shards: int = 1
    spread_over: int = 1
    urls: dict[str, str] = field(default_factory=dict)
    stores: dict[str, str] = field(default_factory=dict)

    async def database(self, label: str, *, server: int = 0) -> tuple[str, bool]:
        """The URL of the database of this label, and whether it is new."""
        new = label not in self.urls
        if new:
            if self.servers is None:
                raise LookupError(f"the database {label!r} was not made beforehand")
            on_server = {"server": server} if self.family == "postgresql" else {}
            make: Callable[..., Awaitable[str]] = getattr(self.servers, self.family)
            self.urls[label] = await make(**on_server)
        return self.urls[label], new

    async def redis(self, *, durable: bool) -> tuple[str, bool]:
        """The URL of a Redis, and whether it is new here."""
        label = f"redis, durable={durable}"
        new = label not in self.stores
        if new:
            if self.servers is None:
                raise LookupError(f"{label!r} was not started beforehand")
            self.stores[label] = await self.servers.redis(durable=durable)
        return self.stores[label], new

    async def clear(self) -> None:
        """Drop the databases on PostgreSQL: what is left lying about is vacuumed by the next."""
        if self.family == "postgresql" and self.servers is not None:
            for url in self.urls.values():
                await self.servers.drop_postgresql(url)


class Session(Protocol):
    """A handle of a session, as the SDK has them."""

    async def get_items(self, limit: int | None = None) -> list[Any]: ...

    async def add_items(self, items: list[Any]) -> None: ...


class Contestant(ABC):
    """Somebody who keeps histories. ``open`` leaves ``stage.sessions`` sessions loaded; it may be
    opened again after ``close``, in another process for one."""

    key: ClassVar[str]
    title: ClassVar[str]
    durability: ClassVar[str]

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.names = names(stage.sessions, stage.tenants)
        self.connections = stage.connections

    @abstractmethod
    async def open(self) -> None:
        """Make tables, connections and the sessions. MissingError: not to be had here."""

    @abstractmethod
    def session(self, name: Name) -> Session:
        """A handle."""

    @abstractmethod
    async def close(self) -> None:
        """Close what ``open`` opened."""

    async def load(self) -> None:
        """Fill the sessions by the contestant's own appends."""
        history = items(self.stage.history)
        gate = asyncio.Semaphore(_AT_ONCE)

        async def fill(name: Name) -> None:
            async with gate:
                await self.session(name).add_items(history)

        await asyncio.gather(*map(fill, self.names))


def engine_options(connections: int) -> dict[str, Any]:
    """SQLAlchemy's options for a pool of exactly ``connections``."""
    return {
        "pool_size": connections,
        "max_overflow": 0,
        "pool_timeout": SECONDS_FOR_A_CONNECTION,
    }
