"""The two kinds of session under test, as one process after the other sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from shardgate.session import SQLAlchemySession

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from harness.engines import EngineMaker
    from shardgate.session import StoredSession

SESSION_ID = "chat-1"


class Store(ABC):
    """Where sessions live. ``restart`` forgets everything that is not in a database."""

    async def __aenter__(self) -> Store:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def restart(self) -> None:
        await self.close()
        await self.open()

    @abstractmethod
    async def open(self) -> None: ...

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    def session(self, session_id: str = SESSION_ID, **options: Any) -> StoredSession:
        """A new session object."""

    @property
    @abstractmethod
    def engines(self) -> Sequence[AsyncEngine]:
        """The engines in use now."""

    @property
    @abstractmethod
    def messages_table(self) -> str: ...


class Standalone(Store):
    messages_table = "agent_messages"

    def __init__(self, make_engine: EngineMaker) -> None:
        self._make_engine = make_engine

    async def open(self) -> None:
        self.engine = self._make_engine()

    async def close(self) -> None:
        await self.engine.dispose()

    def session(self, session_id: str = SESSION_ID, **options: Any) -> SQLAlchemySession:
        return self.session_of(SQLAlchemySession, session_id, **options)

    def session_of(
        self, kind: type[SQLAlchemySession], session_id: str = SESSION_ID, **options: Any
    ) -> SQLAlchemySession:
        """A session of a subclass."""
        return kind(session_id, engine=self.engine, create_tables=True, **options)

    @property
    def engines(self) -> Sequence[AsyncEngine]:
        return [self.engine]


class ThroughGateway(Store):
    """Several shards, and another tenant with the same session ids."""

    messages_table = "shardgate_messages"

    def __init__(self, urls: Sequence[str]) -> None:
        shards = {f"shard_{place}": {"url": url} for place, url in enumerate(urls)}
        self._settings = {
            "shards": shards,
            "keyspaces": {"main": {"slots": 16}},
            "default_keyspace": "main",
            "create_tables": True,
        }

    async def open(self) -> None:
        from shardgate import Gateway, GatewaySettings

        self._stack = AsyncExitStack()
        settings = GatewaySettings.from_dict(self._settings)
        self._gateway = await self._stack.enter_async_context(Gateway(settings))

    async def close(self) -> None:
        await self._stack.aclose()

    def session(self, session_id: str = SESSION_ID, **options: Any) -> StoredSession:
        return self._gateway.tenant("acme").session(session_id, **options)

    @property
    def engines(self) -> Sequence[AsyncEngine]:
        return [shard.engine for shard in self._gateway.shards.values()]


class Reference:
    """The SDK's own session in a store's place: a restart changes nothing, the data is kept."""

    def __init__(self, session: Any) -> None:
        self._session = session

    async def restart(self) -> None: ...

    def session(self) -> Any:
        return self._session


async def stored_rows(store: Store) -> list[str]:
    """The texts of all messages in the store's databases, as they stand there."""
    rows: list[str] = []
    for engine in store.engines:
        async with engine.connect() as connection:
            said = await connection.execute(
                text(f"SELECT message_data FROM {store.messages_table} ORDER BY seq")
            )
            rows += said.scalars()
    return rows
