"""A database behind an ``AsyncEngine``, and what becomes of an operation on it.

Every operation runs here: a connection is taken from the engine's pool, the dialect runs one
statement on the driver's connection, and the connection goes back. What can happen in between is
decided in this module alone: retries after contention, deadlines, cancellation, lost connections.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import AssertionPool, SingletonThreadPool, StaticPool

from shardgate import greenlets
from shardgate.coalescing import ALONE, MOST_BYTES, Crowd, Lane, Ticket
from shardgate.engines import state_of
from shardgate.errors import (
    Contended,
    OperatorError,
    OutcomeUnknown,
    ShardgateError,
    ShardQuarantined,
    ShardUnavailable,
    TransientError,
)
from shardgate.leases import KEPT_SECONDS, Kept, Lease
from shardgate.settling import Deadlines, Underway, settle
from shardgate.sql.create import create_tables, transaction, verify_tables
from shardgate.sql.dialect import LONGEST_TAIL, Append, TailRead

if TYPE_CHECKING:
    import threading
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Coroutine,
        Iterator,
        Mapping,
        Sequence,
    )

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
    from sqlalchemy.pool import PoolProxiedConnection

    from shardgate.coalescing import Alone
    from shardgate.engines import LoopState
    from shardgate.items import Texts
    from shardgate.sql.dialect import Admission, Dialect, GatheringDialect, Outcome, Server
    from shardgate.sql.schema import TableNames, Tables

    Verify = Callable[["Shard", Admission], Coroutine[Any, Any, "Quarantine | None"]]

T = TypeVar("T")

CONTENTION_SECONDS = 30.0
"""How long an operation without a deadline tries again after contention."""
OUTAGE_SECONDS = 3.0
"""How long a lost connection is ridden over before the caller sees an error."""
QUARANTINE_SECONDS = 5.0
"""After how long what is in quarantine is looked at again, if it is asked for."""
CANCELLED_SECONDS = 10.0
"""How long a cancelled write without a deadline is waited for."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
_POLL = 0.005
_SINGLE_CONNECTION = (StaticPool, AssertionPool, SingletonThreadPool)
_ADMISSION = "shardgate.admission"

UNANSWERED: ContextVar[Unanswered | None] = ContextVar("UNANSWERED", default=None)
"""The last write of this context that was sent without an answer: whatever happens after that, it
may have taken effect. Who makes several operations that are one to his own caller looks whether it
has changed meanwhile."""

SEATS = 4
"""Statements of a kind that are under way at the same time, at most."""


class Unanswered:
    """A write that was sent to this shard without an answer."""

    __slots__ = ("shard",)

    def __init__(self, shard: str) -> None:
        self.shard = shard


class Attempt(Ticket[Any, Any]):
    """What an operation does, and how far it has come.

    ``load`` is done with a connection; where there is a ``kind``, it is a load of that kind, to be
    sent by itself or with others, as any of them of a ``database``. ``started``: when the operation
    began, ``began``: when the attempt under way did, by the event loop's clock. ``sent``: the
    attempt under way has reached the driver. ``lost``: an attempt that was sent has not been
    answered, so it may have taken effect. ``about_the_shard``: it asks what a shard is, or tells
    it, so it does not depend on the answer. ``server`` is the one that the attempt has led to.
    ``alone``: it was sent with others in vain, or is not to be sent so.
    """

    sent = lost = alone = False
    server: Server | None = None
    database: Database | None = None

    def __init__(
        self,
        now: float,
        load: Any = None,
        kind: Any = None,
        *,
        writes: bool = True,
        about_the_shard: bool = False,
    ) -> None:
        self.load = load
        self.kind = kind
        self.writes = writes
        self.started = self.began = now
        self.about_the_shard = about_the_shard

    def has_to_end(self) -> bool:
        """Whether to cancel it now would leave its outcome unknown."""
        return self.writes and self.sent

    def send(
        self, lane: Lane[Any, Any], together: Sequence[Ticket[Any, Any]]
    ) -> Coroutine[Any, Any, None]:
        assert self.database is not None, "it has been sent with others"  # noqa: S101 - for mypy
        return self.database._fly(self.kind, lane, together)

    def expire(self) -> None:
        """Its time is up, while it is sent with others."""
        if self.waits:
            self.fail(TimeoutError())
            self.leave()

    def give_up(self) -> None:
        """There is no caller any more who could be told."""
        with suppress(RuntimeError):  # the event loop is closed
            if self.answer is not None:
                self.answer.cancel()
            self.leave()


class UnverifiedError(ShardgateError):
    """A connection leads to a server that nobody has compared with the shard's peers yet.

    ``connection`` is what the pool remembers of it.
    """

    def __init__(self, admission: Admission, connection: dict[Any, Any]) -> None:
        self.admission = admission
        self.connection = connection
        super().__init__("the server has not been verified")


class OutdatedError(Exception):
    """More has been learnt of a shard since a connection to it was asked: it is asked again."""


class Appends:
    """How appends are sent: one, or several as one statement."""

    writes = True
    foreseen_bytes = 0

    @staticmethod
    async def one(dialect: Dialect, append: Append, connection: Any) -> Outcome:
        return await dialect.append(connection, append)

    @staticmethod
    async def many(
        dialect: GatheringDialect, appends: Sequence[Append], connection: Any
    ) -> list[Outcome | Alone]:
        outcomes = await dialect.append_many(connection, appends)
        return [ALONE if outcome is None else outcome for outcome in outcomes]

    @staticmethod
    def answer_bytes(_outcomes: Sequence[Outcome | Alone]) -> int:
        return 0


class TailReads:
    """How tails are read: one, or several as one statement. None where the guard fails."""

    writes = False
    foreseen_bytes = MOST_BYTES // 8  # until it is known, a few at a time

    @staticmethod
    async def one(dialect: Dialect, read: TailRead, connection: Any) -> Texts | None:
        return await dialect.tail(connection, read)

    @staticmethod
    async def many(
        dialect: GatheringDialect, reads: Sequence[TailRead], connection: Any
    ) -> list[tuple[int, str] | None]:
        return await dialect.tail_many(connection, reads)

    @staticmethod
    def answer_bytes(answers: Sequence[tuple[int, str] | None]) -> int:
        """How much one answer has, on average."""
        return sum([len(text) for _, text in filter(None, answers)]) // len(answers)


class Line:
    """How many of an event loop's operations wait for a connection of a pool.

    SQLAlchemy's pool gives what is returned to whoever asks first, and wakes in vain who has
    waited: a caller who has the next operation at hand would keep his connection from all others.
    """

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting = 0


class Patience:
    """How long an operation is tried again, and how long it waits before it is."""

    def __init__(self, give_up: float, *, outage: float) -> None:
        self._clock = asyncio.get_running_loop().time
        self._give_up = give_up
        self._outage = outage
        self._outage_began: float | None = None
        self._next = _FIRST_PAUSE

    def with_contention(self) -> bool:
        """Whether to try again because other writers were in the way."""
        return self._clock() + self._next < self._give_up

    def with_outage(self, answered: float) -> bool:
        """Whether to try again because the connection was lost: short trouble is ridden over.

        ``answered``: when the database last answered anybody. Since then at most, it is down.
        """
        if self._outage_began is None:
            self._outage_began = self._clock()
        ends = max(self._outage_began, answered) + self._outage
        return self._clock() + self._next < min(ends, self._give_up)

    async def pause(self) -> None:
        """Wait a little, longer each time, and not at the same moment as everybody else."""
        await asyncio.sleep(self._next * random.uniform(0.5, 1))  # noqa: S311 - jitter
        self._next = min(2 * self._next, _LONGEST_PAUSE)


class Outage:
    """A shard that does not answer: one operation at a time finds out whether it is back."""

    def __init__(self) -> None:
        self.probed = False

    @contextmanager
    def probe(self) -> Iterator[None]:
        """Be the one that asks."""
        self.probed = True
        try:
            yield
        finally:
            self.probed = False


class Database:
    """One set of tables behind one engine. Errors are SQLAlchemy's own.

    ``coalesce``: appends and short readings that would wait are sent together.

    A write that was sent is waited for before a cancellation is raised; a read that is cancelled
    gives its connection up. Neither leaks a connection.
    """

    deadline: float | None = None
    outage = OUTAGE_SECONDS
    coalesce = True
    map_version = 0

    def __init__(self, engine: AsyncEngine, tables: Tables) -> None:
        self.engine = engine
        self.tables = tables
        self.state = state_of(engine)
        self.dialect = self.state.dialect(engine, tables)
        self._deadlines: Deadlines | None = None

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that uses this; it is one."""
        return asyncio.get_running_loop()

    @cached_property
    def here(self) -> LoopState:
        """What this event loop has of the engine."""
        return self.state.of_loop()

    @cached_property
    def _now(self) -> Callable[[], float]:
        return self.loop.time

    def _attempt(self, load: Any = None, **more: Any) -> Attempt:
        return Attempt(self._now(), load, **more)

    def read(self, action: Callable[[Any], Awaitable[T]]) -> Coroutine[Any, Any, T]:
        """Run ``action`` on a driver's connection; it must not change anything."""
        return self._at_once(self._attempt(action, writes=False))

    def write(self, action: Callable[[Any], Awaitable[T]]) -> Coroutine[Any, Any, T]:
        """Run ``action`` on a driver's connection; it takes effect whole or not at all."""
        return self._at_once(self._attempt(action))

    def append(self, append: Append) -> Coroutine[Any, Any, Outcome]:
        """As :meth:`write`; sent together with others, where it would have to wait."""
        return self._at_once(Attempt(self._now(), append, Appends))

    def tail(self, read: TailRead) -> Coroutine[Any, Any, Texts | None]:
        """As :meth:`read`, the newest rows, newest first; together with others likewise.

        None where the guard fails.
        """
        attempt = Attempt(self._now(), read, TailReads, writes=False)
        if read.limit is None or read.limit > LONGEST_TAIL:
            attempt.alone = True
        return self._at_once(attempt)

    def _operate(self, attempt: Attempt) -> Coroutine[Any, Any, Any]:
        """Make an attempt: with others, where it may go with others, or by itself."""
        return self._gathered(attempt) if self._goes_with_others(attempt) else self._single(attempt)

    def _goes_with_others(self, attempt: Attempt) -> bool:
        """Whether it may be sent together with others.

        It may not where it may be under way already: two of the same in one statement, or in two
        that hold other sessions' rows, would be in each other's way.
        """
        return self._gathers and not (attempt.kind is None or attempt.alone or attempt.lost)

    async def _gathered(self, attempt: Attempt) -> Any:
        """Send one operation: at once if a seat is free, else with those who wait for one too."""
        lane = self._lane(attempt.kind)
        seat = lane.take_seat(attempt.load)
        if seat is not None:
            try:
                return await self._single(attempt)
            finally:
                lane.give_back(seat)
        attempt.database = self
        try:
            return await lane.wait(attempt)
        except asyncio.CancelledError:
            attempt.leave()
            raise
        finally:
            attempt.answer = None  # the traceback of its error leads here

    def _lane(self, kind: Any) -> Lane[Any, Any]:
        return self.here.own((kind, self.dialect), partial(_new_lane, kind, self._crowd))

    @cached_property
    def _crowd(self) -> Crowd:
        return self.here.own(("crowd", self.dialect), Crowd)

    def _single(self, attempt: Attempt) -> Coroutine[Any, Any, Any]:
        if attempt.writes and self.dialect.one_thread:
            return self._queued(attempt)
        return self._once(attempt)

    async def _fly(self, kind: Any, lane: Lane[Any, Any], tickets: Sequence[Any]) -> None:
        """Send several operations as one statement. Each has its own deadline: when that of the
        last one has passed, this is cancelled.

        Where it is not known whether it has arrived, or it could not be sent, each operation gets
        the error, and does about it what it would do by itself. Any other error may be another
        one's: each goes alone.
        """
        flight = tickets[0].flight
        aboard: list[Attempt] = []

        async def act(connection: Any) -> Sequence[Any]:
            aboard.extend([ticket for ticket in tickets if ticket.waits])
            for ticket in aboard:
                ticket.sent = True
            loads = [ticket.load for ticket in aboard]
            if not loads:
                return []
            if len(loads) == 1:
                return [await kind.one(self.dialect, loads[0], connection)]
            outcomes: Sequence[Any] = await kind.many(self.dialect, loads, connection)
            lane.answer_bytes = kind.answer_bytes(outcomes)
            return outcomes

        attempt = self._attempt(act, writes=kind.writes)
        try:
            outcomes = await self._once(attempt)
        except Exception as error:
            if len(aboard) < 2 or not attempt.sent or self._is_unanswered(error):
                raise
            outcomes = [ALONE] * len(aboard)
        if aboard:
            self._has_answered()
        told = list(zip(aboard, outcomes, strict=True))
        if ALONE in outcomes:
            alone = [ticket for ticket, outcome in told if outcome is ALONE]
            for ticket in alone:  # nothing has become of it
                ticket.alone, ticket.sent = True, False
            lane.send_alone(flight, alone)
        # Before anybody is told: who waits is to be under way while others see to their answers.
        if not flight.then:
            lane.give_back(flight.seat)
        for ticket, outcome in told:
            if outcome is not ALONE:
                ticket.give(outcome)

    def _is_unanswered(self, error: Exception) -> bool:
        """Whether a statement that was sent may have taken effect, for all that is known."""
        if not isinstance(error, DBAPIError):
            return isinstance(error, OSError)  # TimeoutError is one
        return error.connection_invalidated or self.dialect.is_lost(driver_error(error))

    async def transact(self, action: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run ``action`` in a transaction of several statements that locks before it reads."""
        return await self._settled(self._transaction, self._attempt(action))

    async def query(self, action: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run ``action``, which only reads, on a SQLAlchemy connection."""
        return await self._settled(self._query, self._attempt(action, writes=False))

    async def _query(self, attempt: Attempt) -> Any:
        async with self._only_user(), self.engine.connect() as connection:
            if self.dialect.begins:  # each statement sees what is committed, with it or without
                await connection.execution_options(isolation_level="AUTOCOMMIT")
            await self._admit_sqlalchemy(connection, attempt)
            attempt.sent = True
            return await attempt.load(connection)

    async def ready(self, *, create: bool, afresh: bool = False) -> None:
        """Create the tables if asked, and refuse those of somebody else; once per engine.

        ``afresh``: look again, whatever is remembered. Tables that do not exist are no error here:
        the statement that needs them says so.
        """
        names = (self.tables.metadata.schema, self.tables.names)
        if afresh:
            self.state.verified.discard(names)
        if names in self.state.verified:
            return
        prepare = partial(self._prepare, names, create=create)
        await self._settled(prepare, self._attempt(about_the_shard=True))

    async def _prepare(
        self, names: tuple[str | None, TableNames], attempt: Attempt, *, create: bool
    ) -> None:
        # One thread at a time: of several event loops that connect an engine for the first time at
        # once, SQLAlchemy wakes only its own loop's.
        tables = self.here.lock("tables")
        async with tables, _held(self.state.first_use), self._only_user():
            if names in self.state.verified:
                return
            if create:
                attempt.sent = True
                await create_tables(self.engine, self.tables)
            if create or await verify_tables(self.engine, self.tables):
                self.state.verified.add(names)

    async def _at_once(self, attempt: Attempt) -> Any:
        """Run an operation on a driver's connection: its first attempt in the caller's own task, or
        in one with others.

        Whatever is wrong with that is left to :meth:`_run`, and so is what has to go alone.
        """
        if not self._serves(attempt):
            return await self._settled(self._operate, attempt)
        lane = self._lane(attempt.kind) if self._goes_with_others(attempt) else None
        seat = None if lane is None else lane.take_seat(attempt.load)
        deadlines = self._deadlines
        if deadlines is None or deadlines.seconds != self.deadline:
            deadlines = self._deadlines_now()
        try:
            if lane is not None and seat is None:
                attempt.database = self
                if deadlines is not None:
                    deadlines.add(attempt, attempt.started)
                try:
                    answer = await lane.wait(attempt)
                except asyncio.CancelledError:
                    await self._see_out(attempt)
                    raise
                except GeneratorExit:  # its task is gone, and the event loop perhaps
                    attempt.give_up()
                    raise
                finally:
                    if deadlines is not None:
                        deadlines.remove(attempt)
                    attempt.answer = None  # the traceback of its error leads here
            else:
                try:
                    answer = await Underway(
                        self._single(attempt),
                        attempt,
                        self.loop,
                        grace=CANCELLED_SECONDS,
                        deadlines=deadlines,
                        began=attempt.started,
                    )
                finally:
                    if lane is not None and seat is not None:
                        lane.give_back(seat)
                self._has_answered()
        except Exception as error:  # noqa: BLE001 - _run sees to it
            return await self._settled(self._operate, attempt, failed=error)
        return answer

    async def _see_out(self, attempt: Attempt) -> None:
        """Wait for an operation that is under way with others though its caller is cancelled, if it
        has to end: until its deadline, and for as long as a cancelled write is waited for."""
        flight, end = attempt.flight, None
        give_up = self._now() + CANCELLED_SECONDS
        if self.deadline is not None:
            give_up = min(give_up, attempt.started + self.deadline)
        try:
            if attempt.has_to_end() and flight is not None and flight.task is not None:
                end = attempt.answer = self.loop.create_future()  # the caller's own is cancelled
                while not end.done() and (seconds := give_up - self._now()) > 0:
                    with suppress(asyncio.CancelledError):  # once is enough
                        await asyncio.wait([end], timeout=seconds)
        finally:
            if end is None or not end.done():
                attempt.give_up()

    @cached_property
    def _gathers(self) -> bool:
        """Whether operations are sent together with others."""
        return self.coalesce and self.dialect.gathers

    def _deadlines_now(self) -> Deadlines | None:
        if self.deadline is None:
            return None
        if self._deadlines is None or self._deadlines.seconds != self.deadline:
            self._deadlines = Deadlines(self.deadline)
        return self._deadlines

    def _serves(self, attempt: Attempt) -> bool:
        """Whether nothing is known that speaks against an attempt."""
        return True

    def _has_answered(self) -> None:
        self.state.answered = self.loop.time()

    async def _settled(
        self,
        once: Callable[[Attempt], Awaitable[T]],
        attempt: Attempt,
        *,
        failed: Exception | None = None,
    ) -> T:
        """Run an operation; from when it is sent, a cancelled caller waits for its outcome."""
        try:
            return await settle(
                self._run(once, attempt, failed=failed),
                grace=CANCELLED_SECONDS if attempt.writes else 0,
                begun=lambda: attempt.sent or attempt.lost,
            )
        finally:
            if attempt.lost and attempt.writes:
                self._note_unanswered()

    async def _run(
        self,
        once: Callable[[Attempt], Awaitable[T]],
        attempt: Attempt,
        *,
        failed: Exception | None = None,
        outage: float | None = None,
    ) -> T:
        """The one place where an operation is tried again, within bounds.

        ``failed``: what the first attempt has failed with, if it has been made.
        """
        ridden_over = self.outage if outage is None else outage
        deadline = None if self.deadline is None else attempt.started + self.deadline
        give_up = deadline or attempt.started + CONTENTION_SECONDS
        patience = Patience(give_up, outage=ridden_over)
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        if failed is not None:
                            before, failed = failed, None
                            raise before
                        attempt.began = self._now()
                        answer = await once(attempt)
                    except UnverifiedError as unknown:
                        if await self._verified(unknown, patience, attempt):
                            continue
                    except (DBAPIError, OSError) as error:
                        self._take(error, attempt, patience)
                    else:
                        self._has_answered()
                        return answer
                    await patience.pause()
        except Exception as error:
            foreseen = isinstance(error, DBAPIError | PoolTimeout | OSError)
            if not foreseen and (attempt.sent or isinstance(error, ShardgateError)):
                raise
            lost = attempt.lost or (attempt.sent and isinstance(error, TimeoutError))
            self._fail(error, sent=attempt.sent, unknown=lost and attempt.writes)

    def _note_unanswered(self) -> None:
        """Note that a write was sent without an answer, whatever has come of the attempts after."""

    async def _verified(
        self, unknown: UnverifiedError, patience: Patience, attempt: Attempt
    ) -> bool:
        """Whether a server may be used; False where it went away before that was found out."""
        try:
            await self._verify(unknown, attempt)
        except ShardUnavailable:
            if not patience.with_outage(self.state.answered):
                raise
            return False
        return True

    async def _verify(self, unknown: UnverifiedError, attempt: Attempt) -> None:
        """Find out whether a server may be used."""

    def _take(self, error: DBAPIError | OSError, attempt: Attempt, patience: Patience) -> None:
        """Note what an attempt's error means; raises it where another attempt is of no use.

        After contention nothing has taken effect. After a lost connection it may have: but every
        change carries its op_id, so that sending it again is safe, and lets it take effect once.
        """
        if isinstance(error, DBAPIError) and self._is_contention(error):
            if not patience.with_contention():
                raise error
        elif self._is_lost(error, attempt):
            answered = isinstance(error, DBAPIError) and not error.connection_invalidated
            attempt.lost |= attempt.sent and not answered
            self._connection_lost(attempt)
            if not patience.with_outage(self.state.answered):
                raise error
        else:
            raise error
        attempt.sent = False

    def _connection_lost(self, attempt: Attempt) -> None:
        """Note that a connection was lost: the next one may lead to another server."""

    def _is_lost(self, error: DBAPIError | OSError, attempt: Attempt) -> bool:
        """Whether the connection is gone, or could not be made."""
        if isinstance(error, TimeoutError):
            return False
        if isinstance(error, DBAPIError) and self.dialect.is_final(driver_error(error)):
            return False
        if not isinstance(error, DBAPIError) or not attempt.sent:
            return True
        known = error.connection_invalidated or self._is_passing(error)
        return known or self.dialect.is_lost(driver_error(error))

    def _is_passing(self, error: DBAPIError) -> bool:
        """Whether the server has refused for now: cancelled, or read-only after a failover."""
        return error.orig is not None and self.dialect.is_passing(driver_error(error))

    def _fail(self, error: Exception, *, sent: bool, unknown: bool) -> NoReturn:
        """Raise what the caller is to see. ``unknown``: a write was sent and its answer lost."""
        if isinstance(error, OSError):  # asyncpg's, where nobody answers
            raise OperationalError(None, None, error, connection_invalidated=True) from error
        raise error

    def _is_contention(self, error: DBAPIError) -> bool:
        return error.orig is not None and self.dialect.is_contention(driver_error(error))

    async def _queued(self, attempt: Attempt) -> Any:
        """SQLite has one writer: tasks of this loop queue in order instead of polling its lock."""
        async with self.here.lock("write"):
            return await self._once(attempt)

    def _once(self, attempt: Attempt) -> Coroutine[Any, Any, Any]:
        if isinstance(self.engine.sync_engine.pool, _SINGLE_CONNECTION):
            return self._by_itself(attempt)
        return self._connected(attempt)

    async def _by_itself(self, attempt: Attempt) -> Any:
        async with self._only_user():
            return await self._connected(attempt)

    async def _connected(self, attempt: Attempt) -> Any:
        """Make an attempt on a connection of the pool's."""
        lease = self._kept.take() or await self._check_out()
        connection = lease.connection
        try:
            answer = await self._act(lease, attempt)
        except Exception as error:
            translated = self.dialect.translate(error, connection.dbapi_connection)
            await self._give_back(connection, translated)
            if translated is error:
                raise
            raise translated from error
        except BaseException:
            await self._give_up(connection)
            raise
        if self._may_keep(lease):
            self._kept.keep(lease)
            return answer
        await lease.end()
        if self.state.keeps:
            await asyncio.sleep(0)  # whoever has waited at the pool has it now
        return answer

    @cached_property
    def _kept(self) -> Kept:
        return self.here.own("kept", partial(Kept, self.loop))

    async def return_kept(self) -> None:
        """Return the connections that the running event loop keeps, before the engine is closed."""
        loop = asyncio.get_running_loop()
        await self.state.of_loop().own("kept", partial(Kept, loop)).end()

    def _may_keep(self, lease: Lease) -> bool:
        """Whether the next operation may have the connection, before anybody else."""
        return (
            self.state.keeps
            and not self._line.waiting
            and self._now() - lease.since < KEPT_SECONDS
            and lease.is_current
        )

    async def _act(self, lease: Lease, attempt: Attempt) -> Any:
        driver = lease.driver
        if not lease.used and self.dialect.in_transaction(driver):
            # A listener of the pool has left one open; what it has set in it is to stay.
            adapted: Any = lease.connection.dbapi_connection
            await greenlets.run(adapted.commit)
        admission: Admission | None = lease.info.get(_ADMISSION)
        if admission is None or not self._is_verified(admission, lease.info, attempt):
            admission = await self._admit(lease.connection, attempt)
        if admission.read_committed:
            return await self._send(driver, attempt)
        async with driver.transaction(isolation="read_committed"):
            return await self._send(driver, attempt)

    def _send(self, driver: Any, attempt: Attempt) -> Awaitable[Any]:
        attempt.sent = True
        if attempt.kind is None:
            return attempt.load(driver)  # type: ignore[no-any-return]  # it acts, or it has a kind
        return attempt.kind.one(self.dialect, attempt.load, driver)  # type: ignore[no-any-return]

    async def _admit(self, connection: PoolProxiedConnection, attempt: Attempt) -> Admission:
        """What there is to know of a connection before it is used: asked once for each.

        A standby's is asked again each time: it may become another server without a new connection.
        So is that of a shard that was not created yet.
        """
        admission: Admission | None = connection.info.get(_ADMISSION)
        if admission is not None and self._is_verified(admission, connection.info, attempt):
            attempt.server = admission.server
            return admission
        admission = await self._ask_connection(connection)
        attempt.server = admission.server
        if not self._is_verified(admission, connection.info, attempt):
            raise UnverifiedError(admission, connection.info)
        return admission

    async def _ask_connection(self, connection: PoolProxiedConnection) -> Admission:
        expected = self.map_version
        try:
            said = await self.dialect.admit(connection.driver_connection)
        except Exception as error:
            raise self.dialect.translate(error, connection.dbapi_connection) from error
        admission = replace(said, expected=expected)
        created = admission.shard_uuid is not None or not self.tables.of_gateway
        if created and not admission.server.standby:
            connection.info[_ADMISSION] = admission
        return admission

    async def _admit_sqlalchemy(self, connection: AsyncConnection, attempt: Attempt) -> None:
        try:
            await self._admit(await connection.get_raw_connection(), attempt)
        except DBAPIError as error:
            if error.connection_invalidated:
                await connection.invalidate(error)  # it was not SQLAlchemy that has met the error
            raise

    def _is_verified(self, admission: Admission, info: dict[Any, Any], attempt: Attempt) -> bool:
        """Whether the connection may be used without a look at what it leads to."""
        return True

    @cached_property
    def _line(self) -> Line:
        return self.here.own("line", Line)

    async def _check_out(self) -> Lease:
        line = self._line
        if line.waiting:
            await asyncio.sleep(0)  # what was just returned is for whoever has waited for it
        pool = self.engine.sync_engine.pool
        line.waiting += 1
        try:
            connection = await greenlets.run(self.engine.sync_engine.raw_connection)
        except self.dialect.sqlalchemy_dialect.loaded_dbapi.Error as error:
            raise self.dialect.wrap(error, None) from error
        finally:
            line.waiting -= 1
        return Lease(connection, self.engine, pool, self._now())

    async def _give_back(self, connection: PoolProxiedConnection, error: Exception) -> None:
        """After an error: roll back and return the connection, or drop it if it is lost."""
        if not isinstance(error, DBAPIError | ShardgateError):
            connection.invalidate(error)  # the driver itself has failed, or the network
            return
        if isinstance(error, DBAPIError) and self._is_passing(error):
            connection.invalidate(error)  # the server may take another one
            return
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            # What ended this connection has ended its elders too: the next call gets a new one.
            self.engine.sync_engine.pool._invalidate(connection, error)
            self._kept.end_soon()
            return
        try:
            await self.dialect.abandon(connection.driver_connection)
        except BaseException as failure:  # whatever it is, the connection is no good
            connection.invalidate(failure)
            if not isinstance(failure, Exception):
                raise
        else:
            await greenlets.run(connection.close)

    async def _give_up(self, connection: PoolProxiedConnection) -> None:
        """After a cancellation, nobody knows what the driver was doing: close it hard.

        Not SQLite's: there the operation has run to its end on the connection's thread, and to
        close an in-memory database would be to lose it.
        """
        if self.dialect.one_thread:
            await greenlets.run(connection.close)
        else:
            connection.invalidate()

    @asynccontextmanager
    async def _only_user(self) -> AsyncIterator[None]:
        """Where the pool has one connection for everybody, one operation at a time uses it."""
        if not isinstance(self.engine.pool, _SINGLE_CONNECTION):
            yield
            return
        async with self.here.lock("single connection"), _held(self.state.single_connection):
            yield

    async def _transaction(self, attempt: Attempt) -> Any:
        if not self.dialect.one_thread:
            return await self._whole(attempt)
        async with self.here.lock("write"):
            # To its end, whatever the deadline: a SQLite connection that is dropped half-way keeps
            # the database's write lock until it is collected.
            return await settle(self._whole(attempt))

    async def _whole(self, attempt: Attempt) -> Any:
        async with self._only_user(), transaction(self.engine) as connection:
            await self._admit_sqlalchemy(connection, attempt)
            attempt.sent = True
            return await attempt.load(connection)


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


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Why a shard must not be written to, and since when (the event loop's time, in seconds).

    ``reads``: whether it may be read from.
    """

    reason: str
    reads: bool
    since: float


@dataclass(frozen=True, slots=True)
class Mark:
    """What was found out of a connection with this admission; None where nothing is wrong."""

    admission: Admission
    verdict: Quarantine | None

    def is_of(self, admission: Admission) -> bool:
        """Whether it was found out of such a connection: mostly it is the very one."""
        return self.admission is admission or self.admission.is_same(admission)


class Shard(Database):
    """A named database of a gateway: operations have a deadline, and errors name the shard.

    A connection that leads to another server than the last one that was looked at, to another shard
    than ``uuid``, or to one whose slot map has come less far than ``map_version``, carries nothing
    before ``verify`` has looked at it.

    Attributes:
        quarantine: why it must not be used, if that is so.
        uuid: which shard it is, as far as is known.
        map_version: how far its slot map has come at least.
        verify: looks at what a connection has said; puts the shard in quarantine if it contradicts
            its peers, and returns that; raises OutdatedError where it has to be asked again. None:
            any server will do.
    """

    def __init__(
        self,
        name: str,
        engine: AsyncEngine,
        tables: Tables,
        *,
        deadline: float,
        coalesce: bool = True,
    ) -> None:
        super().__init__(engine, tables)
        self.name = name
        self.deadline = deadline
        self.coalesce = coalesce
        self.quarantine: Quarantine | None = None
        self.uuid: str | None = None
        self.verify: Verify | None = None
        self._server: Server | None = None
        self._looked = 0.0
        self._looks: dict[Admission, asyncio.Task[Quarantine | None]] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._condemned: Mark | None = None
        self._lanes: dict[Any, Lane[Any, Any]] = {}
        self._mark = object()  # other shards may use the same pool
        self._outage: Outage | None = None

    def __repr__(self) -> str:
        return f"Shard({self.name!r})"

    async def ask(self, action: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """As :meth:`query`, of whoever answers there: to find out what it is."""
        answer, _ = await self.ask_where(action)
        return answer

    async def ask_where(
        self, action: Callable[[AsyncConnection], Awaitable[T]]
    ) -> tuple[T, Server | None]:
        """As :meth:`ask`, with the server that has answered."""
        attempt = self._attempt(action, writes=False, about_the_shard=True)
        return await self._settled(self._query, attempt), attempt.server

    async def tell(self, action: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """As :meth:`transact`, whatever answers there: to make it what it is to be."""
        attempt = self._attempt(action, about_the_shard=True)
        return await self._settled(self._transaction, attempt)

    def judge(self, quarantine: Quarantine | None, server: Server | None, *, began: float) -> None:
        """Take what was found out about the shard on a server, by a look that ``began`` then.

        A look that began before the last one has ended is out of date.
        """
        if began < self._looked:
            return
        self.quarantine = quarantine
        self._server = server
        self._looked = self._now()

    def in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin something that may outlive its caller, but not the shard."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._forget)
        return task

    async def close(self) -> None:
        """End what goes on in the background, and return the connections that are kept."""
        await self.return_kept()
        background = list(self._background)
        for task in background:
            task.cancel()
        if background:
            await asyncio.wait(background)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, in case that everybody who waited has gone

    async def _run(
        self,
        once: Callable[[Attempt], Awaitable[T]],
        attempt: Attempt,
        *,
        failed: Exception | None = None,
        outage: float | None = None,
    ) -> T:
        """Run an operation; while the shard is down, fail at once, but for one probe at a time."""
        if failed is not None:
            return await self._listen(attempt, super()._run(once, attempt, failed=failed))
        if self._serves(attempt):
            return await self._listen(attempt, super()._run(once, attempt, outage=outage))
        assert self._outage is not None, "else it serves"  # noqa: S101 - for mypy
        if self._outage.probed:
            raise ShardUnavailable(
                f"shard {self.name!r} is down: another operation is asking whether it is back, and "
                "until it answers, all others fail at once",
                shard=self.name,
            )
        with self._outage.probe():
            return await self._listen(attempt, super()._run(once, attempt, outage=0))

    def _serves(self, attempt: Attempt) -> bool:
        """Whether the shard is not known to be down; raises ShardQuarantined where it refuses."""
        if self.quarantine is not None and not attempt.about_the_shard:
            self._refuse(self.quarantine, writes=attempt.writes)
        return self._outage is None

    def _has_answered(self) -> None:
        self.state.answered = self.loop.time()
        self._outage = None

    def refuse(self, *, writes: bool) -> None:
        """Raise ShardQuarantined where the shard must not be used, or not be written to."""
        if self.quarantine is not None:
            self._refuse(self.quarantine, writes=writes)

    def _refuse(self, quarantine: Quarantine, *, writes: bool) -> None:
        if writes or not quarantine.reads:
            raise ShardQuarantined(
                f"shard {self.name!r} is in quarantine: {quarantine.reason} ('shardgate reconcile "
                f"{self.name}' says what can be done)",
                shard=self.name,
            )

    def _lane(self, kind: Any) -> Lane[Any, Any]:
        """Its own: what another gateway on the same engine has verified is that one's business."""
        lane = self._lanes.get(kind)
        if lane is None:
            lane = self._lanes[kind] = _new_lane(kind, self._crowd)
        return lane

    @cached_property
    def _crowd(self) -> Crowd:
        return Crowd()

    def _note_unanswered(self) -> None:
        UNANSWERED.set(Unanswered(self.name))

    def _connection_lost(self, attempt: Attempt) -> None:
        """An attempt from before the last look tells nothing new."""
        if attempt.began > self._looked:
            self._server = None

    def _is_verified(self, admission: Admission, info: dict[Any, Any], attempt: Attempt) -> bool:
        if self.verify is None or attempt.about_the_shard:
            return True
        own: Mark | None = info.get(self._mark)
        if own is not None and own.admission is admission and own.verdict is None:
            return True  # as nearly always
        for mark in (own, self._condemned):
            if mark is not None and mark.is_of(admission):
                return self._abides_by(mark.verdict, attempt)
        known = self._server is not None and admission.server.is_same(self._server)
        fits = admission.shard_uuid == self.uuid and admission.map_version >= self.map_version
        if known and fits:
            info[self._mark] = Mark(admission, None)
        return known and fits

    def _abides_by(self, verdict: Quarantine | None, attempt: Attempt) -> bool:
        """Whether what was found out still holds; raises ShardQuarantined where it refuses."""
        if verdict is None:
            return True
        if self._now() - verdict.since >= QUARANTINE_SECONDS:
            return False
        self._refuse(verdict, writes=attempt.writes)
        return True

    async def _verify(self, unknown: UnverifiedError, attempt: Attempt) -> None:
        """Have a connection's server looked at, once for all who have met it.

        The look goes on when its callers' time is up: else it might never come to an end. What it
        has found out holds for this connection, whatever is found out on others.
        """
        admission = unknown.admission
        look = self._looks.get(admission)
        if look is None:
            assert self.verify is not None, "nothing is unverified without it"  # noqa: S101 - for mypy
            look = self.in_background(self.verify(self, admission))
            self._looks[admission] = look
            look.add_done_callback(lambda _: self._looks.pop(admission))
        await asyncio.wait([look])
        if look.cancelled():
            raise ShardUnavailable(f"shard {self.name!r} has been closed", shard=self.name)
        try:
            verdict = look.result()
        except OutdatedError:
            return  # without a mark, the connection is asked again
        mark = unknown.connection[self._mark] = Mark(admission, verdict)
        if verdict is not None:
            self._condemned = mark
            self._refuse(verdict, writes=attempt.writes)
        self.refuse(writes=attempt.writes)

    async def _listen(self, attempt: Attempt, operation: Awaitable[T]) -> T:
        """Note whether the shard has answered, be it with an error of its own."""
        try:
            return await operation
        except (ShardUnavailable, OutcomeUnknown):
            if self.state.answered < attempt.started:  # nobody has had an answer meanwhile
                self._outage = self._outage or Outage()
            raise
        except Exception:
            self._has_answered()
            raise

    def _fail(self, error: Exception, *, sent: bool, unknown: bool) -> NoReturn:
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
        if sent and not error.connection_invalidated and not self._is_passing(error):
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


async def ask_all(
    operations: Mapping[str, Awaitable[T]],
) -> tuple[dict[str, T], dict[str, ShardgateError]]:
    """Ask several shards at the same time: the answers by name, and the shards without one.

    A shard that refuses, or is in quarantine, has not answered: that is its own trouble. Any other
    error is raised, once all have answered.
    """
    outcomes = await asyncio.gather(*operations.values(), return_exceptions=True)
    answers: dict[str, T] = {}
    down: dict[str, ShardgateError] = {}
    for name, outcome in zip(operations, outcomes, strict=True):
        if isinstance(outcome, TransientError | OperatorError):
            down[name] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            answers[name] = outcome
    return answers, down


def _new_lane(kind: Any, crowd: Crowd) -> Lane[Any, Any]:
    return Lane(crowd, seats=SEATS, answer_bytes=kind.foreseen_bytes)


def driver_error(error: DBAPIError) -> BaseException:
    """The driver's own error: SQLAlchemy's adapter for asyncpg has another in between."""
    original = error.orig or error
    return original.__cause__ or original


def _brief(error: Exception) -> str:
    original = error.orig if isinstance(error, DBAPIError) else error
    return f"{type(original).__name__}: {original}".splitlines()[0][:200]
