"""Sessions as the OpenAI Agents SDK takes them: structurally, without importing it.

``GatewaySession`` is one conversation of one tenant of a gateway. ``SQLAlchemySession`` stands
alone, on one database, and takes what the SDK's class of that name takes.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from os import urandom
from typing import TYPE_CHECKING, Any, Literal, TypeVar, TypeVarTuple

from shardgate.engines import close_shared_engine, shared_engine
from shardgate.errors import OutcomeUnknown, UsageError
from shardgate.items import check_items, check_text, decode, encode
from shardgate.purge import end_purge
from shardgate.shards import Database
from shardgate.slots import check_session_id, hash_key, to_signed
from shardgate.sql.dialect import Key, Operation
from shardgate.sql.schema import STANDALONE_TENANT, TableNames, build_tables
from shardgate.sql.transactions import UndecodableError
from shardgate.store import JSON, Codec, Place, Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Self

    from agents.items import TResponseInputItem
    from agents.memory import SessionSettings
    from agents.memory.session import SessionABC as SessionBase
    from sqlalchemy.ext.asyncio import AsyncEngine

    from shardgate.gateway import Gateway
    from shardgate.sql.schema import Tables
    from shardgate.sql.transactions import Tail
else:
    # The SDK's EncryptedSession asks type checkers, and nobody else, for the SDK's base class.
    SessionBase = ABC


T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_LIMIT = 2**31
"""More items than any session has; what a larger limit is taken for."""
MAX_KEY = 127
"""The longest idempotency key, in characters."""
MAX_OP_ID = MAX_KEY + 1
"""A key as an op_id has one character before it."""


@dataclass(frozen=True, slots=True)
class CompactionSnapshot:
    """The newest items of a session, and a way to replace the last of them if nothing changed.

    ``complete`` says whether these are all. ``replace_suffix(start, output)`` puts ``output`` in
    the place of ``items[start:]`` in one transaction, and returns whether it did.
    """

    items: list[TResponseInputItem]
    complete: bool
    replace_suffix: Callable[[int, list[TResponseInputItem]], Awaitable[bool]]


class StoredSession(SessionBase):
    """What the stand-alone session and a gateway's have in common: the SDK's session protocol.

    Every method's ``wrapper`` is the SDK's run context; it is accepted and not used.
    """

    session_id: str

    def __init__(
        self,
        *,
        session_settings: SessionSettings | dict[str, Any] | None,
        ensure_ascii: bool,
    ) -> None:
        given = session_settings
        self._session_settings = None if given is None else _checked_settings(given)
        self._ensure_ascii = ensure_ascii

    @property
    def session_settings(self) -> SessionSettings | None:
        """The session's defaults; a dict becomes the SDK's class once the SDK is loaded."""
        if isinstance(self._session_settings, dict):
            self._session_settings = _as_sdk_settings(self._session_settings)
        return self._session_settings  # type: ignore[return-value]  # a dict only without the SDK

    @session_settings.setter
    def session_settings(self, value: SessionSettings | dict[str, Any] | None) -> None:
        self._session_settings = _checked_settings(value)

    @abstractmethod
    def _perform(
        self, act: Callable[[Store, Place, *Ts], Awaitable[T]], *args: *Ts
    ) -> Awaitable[T]:
        """Run ``act`` where the session lives, wherever that is by then."""

    @property
    def _codec(self) -> Codec:
        """One of its own is made for each call: kept, it would be a cycle, and handles are to go at
        once."""
        decode = self._deserialize_item
        return JSON if _is(decode, _DESERIALIZE) else Codec(decode=decode, is_json=False)

    async def _serialize_item(self, item: TResponseInputItem) -> str:
        """The text to store for an item. May be overridden, together with its counterpart."""
        return encode(item, ensure_ascii=self._ensure_ascii)

    async def _deserialize_item(self, item: str) -> TResponseInputItem:
        """The item of a stored text. ValueError or TypeError say that it is none.

        It must not use the session's engine: a pop may call it within a transaction.
        """
        return decode(item)  # type: ignore[no-any-return]

    async def get_items(
        self, limit: int | None = None, *, wrapper: object = None
    ) -> list[TResponseInputItem]:
        """The newest ``limit`` items, oldest first; all of them where no limit is set anywhere.

        Rows that cannot be decoded are skipped, do not count, and are named in the log.

        Raises:
            UsageError: the limit is negative or not an integer.
        """
        if type(limit) is not int or not 0 < limit <= MAX_LIMIT:
            limit = _checked_limit(self._default_limit() if limit is None else limit)
            if limit == 0:
                return []
        return await self._perform(Store.newest, limit, self._codec)

    async def add_items(
        self,
        items: list[TResponseInputItem],
        *,
        idempotency_key: str | None = None,
        wrapper: object = None,
    ) -> None:
        """Append ``items`` as one, after everything that was appended before.

        Args:
            items: the items, in their order.
            idempotency_key: 1 to 127 characters of the caller's choice. The same key and items
                again, in this session, change nothing and succeed.
            wrapper: the SDK's run context, not used.

        Raises:
            UsageError: an item is not JSON, or the key was used for other items, or was settled as
                not landed; nothing was written.
        """
        given = check_items(items)
        if _is(self._serialize_item, _SERIALIZE):  # as _texts does, without its coroutine
            data = self._encoded(given)
        else:
            data = await self._texts(given)
        if not data:
            return
        if idempotency_key is None:
            operation = _operation("append")
        else:
            operation = _named_append(idempotency_key, data)
        try:  # as _change does, without one coroutine more to keep while it waits
            await self._perform(Store.append, operation, data)
        except OutcomeUnknown as error:
            error.op_id = operation.op_id
            raise

    async def pop_item(self, *, wrapper: object = None) -> TResponseInputItem | None:
        """Remove the newest item and return it; None where there is none.

        Two calls at once never return the same item. A row that cannot be decoded stays.
        """
        return await self._change(Store.pop, _operation("pop"), self._codec)

    async def clear_session(self, *, wrapper: object = None) -> None:
        """Remove every item."""
        await self._change(Store.clear, _operation("clear"))

    async def settle(self, op_id: str) -> bool:
        """Whether an operation took effect whose outcome was unknown; if not, it never will.

        Args:
            op_id: of the ``OutcomeUnknown``. An append with an idempotency key has that key with a
                "=" before it.

        Raises:
            UsageError: it is not an op_id.
        """
        op_id = _checked_id(op_id, "op_id", MAX_OP_ID)
        return await self._perform(Store.settle, op_id)

    async def _get_compaction_snapshot(
        self,
        limit: int,
        *,
        prune_prefix: Callable[[TResponseInputItem], bool] | None = None,
    ) -> CompactionSnapshot | None:
        """The hook by which the SDK's ``OpenAIResponsesCompactionSession`` compacts in place.

        A row that cannot be decoded is kept: the snapshot begins after it and is not complete.
        ``prune_prefix`` says of the rows before the replaced ones, oldest first, which go as well.
        """
        tail = await self._perform(Store.tail, limit)
        codec = self._codec
        items, first = await self._after_undecodable(tail)

        async def prune(data: str) -> bool:
            return prune_prefix is not None and prune_prefix(await codec.item(data))

        async def replace_suffix(start: int, output: list[TResponseInputItem]) -> bool:
            data = await self._texts(output)
            replace = partial(
                Store.replace,
                start=first + start,
                items=data,
                prune=None if prune_prefix is None else prune,
            )
            return await self._change(replace, _operation("replace"), tail)

        return CompactionSnapshot(items, tail.complete and first == 0, replace_suffix)

    async def _atomic_replace_items(self, items: list[TResponseInputItem]) -> bool:
        """The hook by which the SDK's manual compaction replaces the whole history at once."""
        data = await self._texts(check_items(items))
        return await self._change(Store.replace_all, _operation("replace"), data)

    async def _delete(self) -> bool:
        """Remove the session with all its items; whether there was one."""
        return await self._change(Store.delete, _operation("delete"))

    async def _change(
        self,
        act: Callable[[Store, Place, Operation, *Ts], Awaitable[T]],
        operation: Operation,
        *args: *Ts,
    ) -> T:
        try:
            return await self._perform(act, operation, *args)
        except OutcomeUnknown as error:
            error.op_id = operation.op_id
            raise

    async def _after_undecodable(self, tail: Tail) -> tuple[list[TResponseInputItem], int]:
        """The items after the last row that cannot be decoded, and the place of the first."""
        items: list[TResponseInputItem] = []
        first, codec = 0, self._codec
        for number, row in enumerate(tail.rows):
            try:
                items.append(await codec.item(row.data))
            except UndecodableError:
                items, first = [], number + 1
        return items, first

    async def _texts(self, items: list[TResponseInputItem]) -> list[str]:
        """What is to be stored for each item."""
        if _is(self._serialize_item, _SERIALIZE):
            return self._encoded(items)
        return [check_text(await self._serialize_item(item)) for item in items]

    def _encoded(self, items: list[Any]) -> list[str]:
        ensure_ascii = self._ensure_ascii
        return [encode(item, ensure_ascii=ensure_ascii) for item in items]

    def _default_limit(self) -> int | None:
        settings = self._session_settings
        if isinstance(settings, dict):
            return settings.get("limit")
        return None if settings is None else settings.limit


_SERIALIZE, _DESERIALIZE = StoredSession._serialize_item, StoredSession._deserialize_item


def _is(method: object, own: object) -> bool:
    """Whether a session's method is ours: overridden by nobody, be it in a class or in one
    object."""
    return getattr(method, "__func__", None) is own


@dataclass(frozen=True, slots=True)
class SessionKey:
    """The two ids of a gateway's session."""

    tenant_id: str
    session_id: str


class GatewaySession(StoredSession):
    """One conversation of one tenant. Made by ``gateway.tenant(...).session(...)``.

    ``session_id`` is both ids, as "tenant/session": whatever derives something of it, such as the
    key of the SDK's ``EncryptedSession``, derives another for each tenant. ``key`` has them apart.
    """

    def __init__(
        self,
        tenant_id: str,
        session_id: str,
        *,
        gateway: Gateway,
        keyspace: str,
        session_settings: SessionSettings | dict[str, Any] | None = None,
        ensure_ascii: bool = True,
    ) -> None:
        super().__init__(session_settings=session_settings, ensure_ascii=ensure_ascii)
        self._gateway = gateway
        self._keyspace = keyspace
        self._tenant_id = tenant_id
        self._own_id = check_session_id(session_id)
        self._key: Key | None = None
        self.session_id = f"{tenant_id}/{session_id}"

    @property
    def key(self) -> SessionKey:
        """Both ids, apart."""
        return SessionKey(self._tenant_id, self._own_id)

    def __repr__(self) -> str:
        return f"GatewaySession({self.session_id!r})"

    def _perform(
        self, act: Callable[[Store, Place, *Ts], Awaitable[T]], *args: *Ts
    ) -> Awaitable[T]:
        keyspace = self._gateway._in_use(self._keyspace)
        if self._key is None:
            self._key = keyspace.key_of(self._tenant_id, self._own_id)
        return keyspace.perform(self._key, act, *args)


class SQLAlchemySession(StoredSession):
    """A session on one database, without tenants: the drop-in for the SDK's class of this name.

    It may be used from several threads, each with its own event loop, where its engine may:
    sessions made by :meth:`from_url` have an engine for each loop. Errors of the database are
    SQLAlchemy's own. An engine that is passed in is never closed, and no setting of it is changed.
    """

    def __init__(
        self,
        session_id: str,
        *,
        engine: AsyncEngine,
        create_tables: bool = False,
        sessions_table: str = "agent_sessions",
        messages_table: str = "agent_messages",
        session_settings: SessionSettings | dict[str, Any] | None = None,
        ensure_ascii: bool = True,
    ) -> None:
        """Name a session; no I/O.

        Args:
            session_id: 1 to 255 characters, compared exactly.
            engine: an async engine of asyncpg, aiomysql or aiosqlite.
            create_tables: create the tables at the first use, if they are missing.
            sessions_table: the table of the sessions; the operations' table is named after it.
            messages_table: the table of the items.
            session_settings: the SDK's ``SessionSettings`` or a dict: the default ``limit``.
            ensure_ascii: whether stored JSON escapes what is not ASCII.
        """
        super().__init__(session_settings=session_settings, ensure_ascii=ensure_ascii)
        self.session_id = check_session_id(session_id)
        self._engine = engine
        self._url: tuple[str, dict[str, Any]] | None = None
        self._create_tables = create_tables
        self._tables = _standalone_tables(sessions_table, messages_table)
        Database(engine, self._tables)  # refuses a driver that we do not speak
        h = to_signed(hash_key(STANDALONE_TENANT, session_id))
        self._key = Key(STANDALONE_TENANT, session_id, h)

    @classmethod
    def from_url(
        cls,
        session_id: str,
        *,
        url: str,
        engine_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Name a session by its database's URL.

        All sessions of one URL and the same ``engine_kwargs`` share one engine on each event loop.
        ``kwargs`` go to the constructor.
        """
        source = (url, engine_kwargs or {})
        session = cls(session_id, engine=shared_engine(*source), **kwargs)
        session._url = source
        return session

    @property
    def engine(self) -> AsyncEngine:
        """The engine: the one passed in, or the running event loop's for the URL."""
        return self._engine if self._url is None else shared_engine(*self._url)

    async def aclose(self) -> None:
        """Close the connections that sessions of this URL share on this event loop.

        The next call of any of them opens new ones. An engine that was passed in is left alone.
        """
        if self._url is not None:
            database = Database(self.engine, self._tables)
            await end_purge(database)
            await database.return_kept()
            await close_shared_engine(*self._url)

    async def _perform(self, act: Callable[[Store, Place, *Ts], Awaitable[T]], *args: *Ts) -> T:
        database = Database(self.engine, self._tables)
        await database.ready(create=self._create_tables)
        return await act(Store(database), Place(self._key), *args)


def _operation(kind: Literal["append", "pop", "clear", "replace", "delete"]) -> Operation:
    return Operation(urandom(16).hex(), kind)


def _named_append(idempotency_key: object, data: list[str]) -> Operation:
    """The append that the caller has named.

    A caller's key is marked with one character, so that no op_id of ours can be it.
    """
    key = _checked_id(idempotency_key, "idempotency_key", MAX_KEY)
    digest = sha256()
    for item in data:
        digest.update(f"{len(item)}:".encode())
        digest.update(item.encode())
    return Operation(f"={key}", "append", digest.hexdigest())


def _checked_id(value: object, name: str, longest: int) -> str:
    """An id that every database can store."""
    if not isinstance(value, str) or not 1 <= len(value) <= longest:
        raise UsageError(f"{name} must be a str of 1 to {longest} characters")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise UsageError(f"{name} has U+0000 or a lone surrogate, which databases cannot store")
    return value


@cache
def _standalone_tables(sessions_table: str, messages_table: str) -> Tables:
    if sessions_table == messages_table:
        raise UsageError("sessions_table and messages_table must be two tables")
    return build_tables(TableNames.standalone(sessions_table, messages_table))


def _checked_limit(limit: object) -> int | None:
    if limit is None:
        return None
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise UsageError(f"limit must be an integer or None, not {type(limit).__name__}")
    if limit < 0:
        raise UsageError(f"limit must not be negative: {limit}; use 0 for no items, None for all")
    return min(int(limit), MAX_LIMIT)  # int: of a subclass of it, its text may be another one


def _checked_settings(
    settings: SessionSettings | dict[str, Any] | None,
) -> SessionSettings | dict[str, Any] | None:
    if isinstance(settings, dict):
        unknown = sorted(set(settings) - {"limit"})
        if unknown:
            raise UsageError(
                f"session_settings has no {', '.join(map(repr, unknown))}; it has 'limit'"
            )
        _checked_limit(settings.get("limit"))
        return _as_sdk_settings(settings)
    if settings is not None and not hasattr(settings, "limit"):
        raise UsageError(
            f"session_settings must be a SessionSettings, a dict or None, "
            f"not {type(settings).__name__}"
        )
    return settings


def _as_sdk_settings(settings: dict[str, Any]) -> SessionSettings | dict[str, Any]:
    """The SDK's own class where the SDK is loaded; it is never loaded from here."""
    sdk = sys.modules.get("agents.memory.session_settings")
    return dict(settings) if sdk is None else sdk.SessionSettings(**settings)
