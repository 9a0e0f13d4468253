"""A database behind an ``AsyncEngine``, and what becomes of an operation on it.

Every operation runs here: a connection is taken from the engine's pool, the dialect runs one
statement on the driver's connection, and the connection goes back. What can happen in between is
decided in this module alone: retries after contention, deadlines, cancellation, lost connections.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import AssertionPool, SingletonThreadPool, StaticPool
from sqlalchemy.util import greenlet_spawn

from shardgate.engines import state_of
from shardgate.errors import (
    Contended,
    OperatorError,
    OutcomeUnknown,
    ShardgateError,
    ShardUnavailable,
)
from shardgate.settling import settle
from shardgate.sql.create import create_tables, transaction, verify_tables

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
    from sqlalchemy.pool import PoolProxiedConnection

    from shardgate.sql.schema import Tables

T = TypeVar("T")

CONTENTION_SECONDS = 30.0
"""How long an operation without a deadline tries again after contention."""
CANCELLED_SECONDS = 10.0
"""How long a cancelled write without a deadline is waited for."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
_POLL = 0.005
_SINGLE_CONNECTION = (StaticPool, AssertionPool, SingletonThreadPool)
_READ_COMMITTED = "shardgate.read_committed"


class Attempt:
    """How far an attempt has come: before ``sent``, nothing can have taken effect."""

    __slots__ = ("sent",)

    def __init__(self) -> None:
        self.sent = False


class Database:
    """One set of tables behind one engine. Errors are SQLAlchemy's own.

    A write that was sent is waited for before a cancellation is raised; a read that is cancelled
    gives its connection up. Neither leaks a connection.
    """

    deadline: float | None = None

    def __init__(self, engine: AsyncEngine, tables: Tables) -> None:
        self.engine = engine
        self.tables = tables
        self.state = state_of(engine)
        self.dialect = self.state.dialect(engine, tables)

    async def read(self, action: Callable[[Any], Awaitable[T]]) -> T:
        """Run ``action`` on a driver's connection; it must not change anything."""
        return await self._run(lambda attempt: self._once(action, attempt), writes=False)

    async def write(self, action: Callable[[Any], Awaitable[T]]) -> T:
        """Run ``action`` on a driver's connection; it takes effect whole or not at all."""
        return await settle(
            self._run(lambda attempt: self._alone(action, attempt), writes=True),
            grace=CANCELLED_SECONDS,
        )

    async def transact(self, action: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run ``action`` in a transaction of several statements that locks before it reads."""
        return await settle(
            self._run(lambda attempt: self._transaction(action, attempt), writes=True),
            grace=CANCELLED_SECONDS,
        )

    async def query(self, action: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run ``action``, which only reads, on a SQLAlchemy connection."""
        return await settle(
            self._run(lambda attempt: self._query(action, attempt), writes=False),
            grace=CANCELLED_SECONDS,
        )

    async def _query(
        self, action: Callable[[AsyncConnection], Awaitable[T]], attempt: Attempt
    ) -> T:
        async with self._only_user(), self.engine.connect() as connection:
            attempt.sent = True
            return await action(connection)

    async def ready(self, *, create: bool, afresh: bool = False) -> None:
        """Create the tables if asked, and refuse those of somebody else; once per engine.

        ``afresh``: look again, whatever is remembered. Tables that do not exist are no error here:
        the statement that needs them says so.
        """
        names = (self.tables.metadata.schema, self.tables.names.sessions)
        if afresh:
            self.state.verified.discard(names)
        if names in self.state.verified:
            return
        await settle(
            self._run(lambda attempt: self._prepare(names, create=create), writes=True),
            grace=CANCELLED_SECONDS,
        )

    async def _prepare(self, names: tuple[str | None, str], *, create: bool) -> None:
        # One thread at a time: of several event loops that connect an engine for the first time at
        # once, SQLAlchemy wakes only its own loop's.
        tables = self.state.lock("tables")
        async with tables, _held(self.state.first_use), self._only_user():
            if names in self.state.verified:
                return
            if create:
                await create_tables(self.engine, self.tables)
            if create or await verify_tables(self.engine, self.tables):
                self.state.verified.add(names)

    async def _run(self, once: Callable[[Attempt], Awaitable[T]], *, writes: bool) -> T:
        """The one place where an operation is tried again: only where nothing took effect."""
        attempt, pause = Attempt(), _FIRST_PAUSE
        rereads = 0 if writes else 1  # a connection in the pool may have died since its last use
        clock = asyncio.get_running_loop().time
        give_up = clock() + (self.deadline or CONTENTION_SECONDS)
        try:
            async with asyncio.timeout(self.deadline):
                while True:
                    try:
                        return await once(attempt)
                    except DBAPIError as error:
                        if error.connection_invalidated and rereads:
                            rereads -= 1
                        elif not self._is_contention(error) or clock() + pause > give_up:
                            raise
                    attempt.sent = False
                    await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - jitter
                    pause = min(2 * pause, _LONGEST_PAUSE)
        except (DBAPIError, PoolTimeout, OSError) as error:
            self._fail(error, sent=attempt.sent, writes=writes)

    def _fail(self, error: Exception, *, sent: bool, writes: bool) -> NoReturn:
        """Raise what the caller is to see of an operation that was ``sent``, or was not."""
        if isinstance(error, OSError):  # asyncpg's, where nobody answers
            raise OperationalError(None, None, error, connection_invalidated=True) from error
        raise error

    def _is_contention(self, error: DBAPIError) -> bool:
        original = error.orig
        if original is None:
            return False
        return any(map(self.dialect.is_contention, (original, original.__cause__ or original)))

    async def _alone(self, action: Callable[[Any], Awaitable[T]], attempt: Attempt) -> T:
        """SQLite has one writer: tasks of this loop queue in order instead of polling its lock."""
        if not self.dialect.one_thread:
            return await self._once(action, attempt)
        async with self.state.lock("write"):
            return await self._once(action, attempt)

    async def _once(self, action: Callable[[Any], Awaitable[T]], attempt: Attempt) -> T:
        async with self._only_user(), self._checked_out(attempt) as connection:
            return await self._act(action, connection, attempt)

    async def _act(
        self, action: Callable[[Any], Awaitable[T]], connection: PoolProxiedConnection, attempt: Any
    ) -> T:
        driver: Any = connection.driver_connection
        if await self._is_read_committed(connection):
            attempt.sent = True
            return await action(driver)
        async with driver.transaction(isolation="read_committed"):
            attempt.sent = True
            return await action(driver)

    async def _is_read_committed(self, connection: PoolProxiedConnection) -> bool:
        """Whether the server's default is READ COMMITTED: asked once for each connection."""
        if self.dialect.one_thread:
            return True
        known = connection.info.get(_READ_COMMITTED)
        if known is None:
            known = await self.dialect.admit(connection.driver_connection)
            connection.info[_READ_COMMITTED] = known
        return bool(known)

    @asynccontextmanager
    async def _checked_out(self, attempt: Attempt) -> AsyncIterator[PoolProxiedConnection]:
        connection = await self._check_out()
        try:
            yield connection
        except Exception as error:
            translated = self.dialect.translate(error, connection.dbapi_connection)
            await self._give_back(connection, translated)
            if translated is error:
                raise
            raise translated from error
        except BaseException:
            await self._give_up(connection)
            raise
        else:
            await greenlet_spawn(connection.close)

    async def _check_out(self) -> PoolProxiedConnection:
        try:
            return await self.engine.raw_connection()
        except self.dialect.sqlalchemy_dialect.loaded_dbapi.Error as error:
            raise self.dialect.wrap(error, None) from error

    async def _give_back(self, connection: PoolProxiedConnection, error: Exception) -> None:
        """After an error: roll back and return the connection, or drop it if it is lost."""
        if not isinstance(error, DBAPIError | ShardgateError):
            connection.invalidate(error)  # the driver itself has failed, or the network
            return
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            # What ended this connection has ended its elders too: the next call gets a new one.
            self.engine.sync_engine.pool._invalidate(connection, error)
            return
        try:
            await self.dialect.abandon(connection.driver_connection)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the connection is no good
            connection.invalidate(failure)
        else:
            await greenlet_spawn(connection.close)

    async def _give_up(self, connection: PoolProxiedConnection) -> None:
        """After a cancellation, nobody knows what the driver was doing: close it hard.

        Not SQLite's: there the operation has run to its end on the connection's thread, and to
        close an in-memory database would be to lose it.
        """
        if self.dialect.one_thread:
            await greenlet_spawn(connection.close)
        else:
            connection.invalidate()

    @asynccontextmanager
    async def _only_user(self) -> AsyncIterator[None]:
        """Where the pool has one connection for everybody, one operation at a time uses it."""
        if not isinstance(self.engine.pool, _SINGLE_CONNECTION):
            yield
            return
        async with self.state.lock("single connection"), _held(self.state.single_connection):
            yield

    async def _transaction(
        self, action: Callable[[AsyncConnection], Awaitable[T]], attempt: Attempt
    ) -> T:
        async with AsyncExitStack() as stack:
            if self.dialect.one_thread:
                await stack.enter_async_context(self.state.lock("write"))
            await stack.enter_async_context(self._only_user())
            connection = await stack.enter_async_context(transaction(self.engine))
            attempt.sent = True
            return await action(connection)


@asynccontextmanager
async def _held(lock: threading.Lock) -> AsyncIterator[None]:
    """Hold a lock across event loops.

    It is polled: whoever waits for it in a thread of its own could be cancelled and take it all
    the same.
    """
    # No event of this loop tells that another loop's thread let go.
    while not lock.acquire(blocking=False):  # noqa: ASYNC110
        await asyncio.sleep(_POLL)
    try:
        yield
    finally:
        lock.release()


class Shard(Database):
    """A named database of a gateway: operations have a deadline, and errors name the shard."""

    def __init__(self, name: str, engine: AsyncEngine, tables: Tables, *, deadline: float) -> None:
        super().__init__(engine, tables)
        self.name = name
        self.deadline = deadline

    def __repr__(self) -> str:
        return f"Shard({self.name!r})"

    def _fail(self, error: Exception, *, sent: bool, writes: bool) -> NoReturn:
        unknown = sent and writes
        if isinstance(error, TimeoutError):
            late = f"did not answer within {self.deadline:g} seconds"
            raise self._unavailable(late, unknown=unknown) from error
        if not isinstance(error, DBAPIError):
            unreachable = f"cannot be reached ({_brief(error)})"
            raise self._unavailable(unreachable, unknown=unknown) from error
        if self._is_contention(error):
            raise Contended(
                f"shard {self.name!r} kept refusing because of other writers: {_brief(error)}"
            ) from error
        if sent and not error.connection_invalidated:
            raise OperatorError(
                f"shard {self.name!r} refused a statement: {_brief(error)}"
            ) from error
        raise self._unavailable(f"does not serve ({_brief(error)})", unknown=unknown) from error

    def _unavailable(self, what: str, *, unknown: bool) -> Exception:
        message = f"shard {self.name!r} {what}"
        if unknown:
            return OutcomeUnknown(
                f"{message}, after a write was sent: it may or may not have taken effect",
                shard=self.name,
            )
        return ShardUnavailable(message, shard=self.name)


def _brief(error: Exception) -> str:
    original = error.orig if isinstance(error, DBAPIError) else error
    return f"{type(original).__name__}: {original}".splitlines()[0][:200]
