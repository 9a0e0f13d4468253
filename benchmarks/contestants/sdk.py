"""The SDK's own sessions: SQLAlchemySession, with new handles and with kept ones; RedisSession."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.contestants.base import (
    SECONDS_FOR_A_CONNECTION,
    Contestant,
    Session,
    engine_options,
)
from benchmarks.contestants.bulk import load_sdk
from benchmarks.servers import require

if TYPE_CHECKING:
    from benchmarks.contestants.base import Name


class SDKSQLAlchemy(Contestant):
    """A new handle for each exchange, all on one engine."""

    key: ClassVar[str] = "sdk"
    title: ClassVar[str] = "SDK SQLAlchemySession"
    durability: ClassVar[str] = "the server's: each append is on disk before it returns"

    async def open(self) -> None:
        memory = require("agents.extensions.memory.sqlalchemy_session")
        self._make = memory.SQLAlchemySession
        url, new = await self.stage.database("sdk")
        self._engine = create_async_engine(url, **engine_options(self.connections))
        if new:
            await self._make("first", engine=self._engine, create_tables=True).get_items(1)
            await self._fill(url)

    async def _fill(self, url: str) -> None:
        if self.stage.family == "postgresql":
            await load_sdk(url, self.names, self.stage.history)
        else:
            await self.load()

    def session(self, name: Name) -> Session:
        made: Session = self._make(name.text, engine=self._engine)
        return made

    async def close(self) -> None:
        await self._engine.dispose()


class SDKSQLAlchemyKept(SDKSQLAlchemy):
    """A handle for each session, kept: what the statements cost without their compilation."""

    key: ClassVar[str] = "sdk-kept"
    title: ClassVar[str] = "SDK SQLAlchemySession, handles kept"

    async def open(self) -> None:
        await super().open()
        self._kept = {name: super(SDKSQLAlchemyKept, self).session(name) for name in self.names}

    def session(self, name: Name) -> Session:
        return self._kept[name]


class SDKRedis(Contestant):
    """Redis as it comes: an append that has returned may be lost with the machine."""

    key: ClassVar[str] = "redis"
    title: ClassVar[str] = "SDK RedisSession, not durable"
    durability: ClassVar[str] = "none: a snapshot now and then"
    durable: ClassVar[bool] = False

    async def open(self) -> None:
        self._make = require("agents.extensions.memory.redis_session").RedisSession
        url, new = await self.stage.redis(durable=self.durable)
        redis: Any = require("redis.asyncio")
        pool = redis.BlockingConnectionPool.from_url(
            url, max_connections=self.connections, timeout=SECONDS_FOR_A_CONNECTION
        )
        self._client = redis.Redis.from_pool(pool)
        if new:
            await self._client.flushdb()
            await self.load()

    def session(self, name: Name) -> Session:
        made: Session = self._make(name.text, redis_client=self._client)
        return made

    async def close(self) -> None:
        await self._client.aclose()


class SDKRedisDurable(SDKRedis):
    """Redis with a log that is synced at each write."""

    key: ClassVar[str] = "redis-durable"
    title: ClassVar[str] = "SDK RedisSession, appendfsync always"
    durability: ClassVar[str] = "appendfsync always: on disk before it returns"
    durable: ClassVar[bool] = True
