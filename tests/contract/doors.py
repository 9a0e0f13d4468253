"""The two ways to a session: stand-alone, and through a gateway of several shards.

A door is opened on fresh databases, and can be opened again elsewhere, also in another process, by
its ``address``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import insert, select

from shardgate.engines import shared_engine
from shardgate.session import SQLAlchemySession
from shardgate.settings import GatewaySettings
from shardgate.sql.schema import STANDALONE_TENANT, TableNames, Tables, build_tables
from shardgate.sql.transactions import utc_now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from sqlalchemy import ColumnElement, Table
    from sqlalchemy.ext.asyncio import AsyncEngine

    from shardgate.gateway import Gateway
    from shardgate.store import Place, Store

Address = dict[str, Any]

TENANT = "acme"
SLOTS = 64
SESSION = "chat-1"


class Session(Protocol):
    """A session as the tests see it: items are any JSON, not only what the SDK's types allow."""

    session_id: str

    async def get_items(self, limit: int | None = None) -> list[Any]: ...
    async def add_items(self, items: list[Any]) -> None: ...
    async def pop_item(self) -> Any: ...
    async def clear_session(self) -> None: ...
    async def _perform(self, act: Callable[[Store, Place], Awaitable[Any]]) -> Any: ...
    async def _get_compaction_snapshot(self, limit: int) -> Any: ...


class Door(ABC):
    """Where sessions come from, and what is stored of them as raw rows."""

    def __init__(self, address: Address, tables: Tables, tenant: str) -> None:
        self.address = address
        self.tables = tables
        self.tenant = tenant

    @abstractmethod
    def session(self, session_id: str = SESSION, **options: Any) -> Session: ...

    @abstractmethod
    def engine(self, session_id: str = SESSION) -> AsyncEngine:
        """The engine of the database where the session lives."""

    @property
    @abstractmethod
    def engines(self) -> list[AsyncEngine]: ...

    @abstractmethod
    async def delete(self, session_id: str = SESSION) -> bool: ...

    @abstractmethod
    async def close(self) -> None: ...

    async def damage(self, data: str = "{not json", session_id: str = SESSION) -> None:
        """Append a row behind the session's back, as a broken program would."""
        sessions, messages = self.tables.sessions, self.tables.messages
        async with self.engine(session_id).connect() as connection:
            of_session = self._of(sessions, session_id)
            ((seq,),) = await connection.execute(select(sessions.c.next_seq).where(*of_session))
            row = {"tenant_id": self.tenant, "session_id": session_id, "seq": seq}
            await connection.execute(
                insert(messages).values(
                    **row, message_data=data, nbytes=len(data), created_at=utc_now()
                )
            )
            counted = {"next_seq": seq + 1, "item_count": sessions.c.item_count + 1}
            counted |= {"byte_count": sessions.c.byte_count + len(data)}
            await connection.execute(sessions.update().where(*of_session).values(**counted))
            await connection.commit()

    async def stored(self, session_id: str = SESSION) -> list[str]:
        """The texts of the session's visible rows, oldest first."""
        sessions, messages = self.tables.sessions, self.tables.messages
        statement = (
            select(messages.c.message_data)
            .join(sessions, messages.c.session_id == sessions.c.session_id)
            .where(*self._of(messages, session_id), *self._of(sessions, session_id))
            .where(messages.c.seq >= sessions.c.floor_seq)
            .order_by(messages.c.seq)
        )
        async with self.engine(session_id).connect() as connection:
            return list((await connection.execute(statement)).scalars())

    async def counters(self, session_id: str = SESSION) -> tuple[int, int]:
        """What the session's row says of its items: their number and their bytes."""
        sessions = self.tables.sessions
        async with self.engine(session_id).connect() as connection:
            statement = select(sessions.c.item_count, sessions.c.byte_count)
            found = await connection.execute(statement.where(*self._of(sessions, session_id)))
            count, size = found.one_or_none() or (0, 0)
            return count, size

    def _of(self, table: Table, session_id: str) -> Sequence[ColumnElement[bool]]:
        return table.c.tenant_id == self.tenant, table.c.session_id == session_id


class StandaloneDoor(Door):
    """``SQLAlchemySession.from_url``. Opened again, it has an engine of its own."""

    def __init__(self, address: Address) -> None:
        names = TableNames.standalone("agent_sessions", "agent_messages")
        super().__init__(address, build_tables(names), STANDALONE_TENANT)
        self._source: tuple[str, dict[str, Any]] = (address["urls"][0], address["engine_kwargs"])

    def session(self, session_id: str = SESSION, **options: Any) -> Session:
        url, engine_kwargs = self._source
        return SQLAlchemySession.from_url(
            session_id, url=url, engine_kwargs=engine_kwargs, create_tables=True, **options
        )

    def engine(self, session_id: str = SESSION) -> AsyncEngine:
        return shared_engine(*self._source)

    @property
    def engines(self) -> list[AsyncEngine]:
        return [self.engine()]

    async def delete(self, session_id: str = SESSION) -> bool:
        session: Any = self.session(session_id)
        return bool(await session._delete())

    async def close(self) -> None:
        await SQLAlchemySession.from_url(
            SESSION, url=self._source[0], engine_kwargs=self._source[1]
        ).aclose()


class GatewayDoor(Door):
    """One tenant of a gateway whose shards are the address's databases."""

    def __init__(self, address: Address, gateway: Gateway) -> None:
        super().__init__(address, build_tables(TableNames.gateway("shardgate_")), TENANT)
        self.gateway = gateway

    @classmethod
    async def open(cls, address: Address) -> GatewayDoor:
        from shardgate.gateway import Gateway

        gateway = Gateway(gateway_settings(address["urls"], address["engine_kwargs"]))
        if not address.get("opens_itself"):
            await gateway.open()
        return cls(address, gateway)

    def session(self, session_id: str = SESSION, **options: Any) -> Session:
        return self.gateway.tenant(self.tenant).session(session_id, **options)

    def engine(self, session_id: str = SESSION) -> AsyncEngine:
        shard = self.gateway.route(self.tenant, session_id).shard
        return self.gateway.shards[shard].engine

    @property
    def engines(self) -> list[AsyncEngine]:
        return [shard.engine for shard in self.gateway.shards.values()]

    async def delete(self, session_id: str = SESSION) -> bool:
        return await self.gateway.tenant(self.tenant).delete_session(session_id)

    async def close(self) -> None:
        await self.gateway.aclose()


def gateway_settings(
    urls: Sequence[str], engine_kwargs: dict[str, Any] | None = None, **settings: Any
) -> GatewaySettings:
    shards = {f"s{number}": {"url": url} for number, url in enumerate(urls)}
    values = {
        "shards": shards,
        "keyspaces": {"main": {"slots": SLOTS}},
        "engine_kwargs": engine_kwargs or {},
        "create_tables": True,
        "operation_deadline": 60,
    }
    return GatewaySettings.from_dict(values | settings)


async def open_door(address: Address) -> Door:
    if address["kind"] == "standalone":
        return StandaloneDoor(address)
    return await GatewayDoor.open(address)


@asynccontextmanager
async def door_at(address: Address) -> AsyncIterator[Door]:
    """A door at the same databases, for a child process."""
    door = await open_door(address)
    try:
        yield door
    finally:
        await door.close()
