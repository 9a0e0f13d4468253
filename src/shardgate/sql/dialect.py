"""What a database has to be able to do for a session: four operations, each one statement.

A dialect runs on the *driver's* connection (asyncpg's, aiomysql's, aiosqlite's), reached through
the engine's pool: its statements are text, so nothing is compiled per call, and an operation is
one round trip. Rare operations are written once for all databases, in ``transactions.py``.

What is made anew for each operation is no frozen dataclass: these take three times as long to make.
"""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Table
    from sqlalchemy.engine import Dialect as SQLAlchemyDialect

    from shardgate.items import Texts
    from shardgate.sql.schema import Tables


class Key(NamedTuple):
    """Which session: ``h`` (signed, as stored) places it, the two ids identify it."""

    tenant_id: str
    session_id: str
    h: int


class Guard(NamedTuple):
    """What has to be true on this very shard for a statement to see or change anything.

    The shard's own record says that ``owner`` (the UUID of the shard that the caller means) owns
    ``slot``, and that the tenant is admitted. The stand-alone class has no guard.
    """

    slot: int
    owner: str


@dataclass(slots=True)
class Operation:
    """Which change: it takes effect once, however often it is sent.

    ``fingerprint`` is of what it changes, where the caller chose the ``op_id``. ``sendings`` counts
    how often it has been sent.
    """

    op_id: str
    kind: Literal["append", "pop", "clear", "replace", "delete", "void"]
    fingerprint: str | None = None
    sendings: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One stored item."""

    seq: int
    data: str


@dataclass(slots=True)
class Append:
    """One append."""

    key: Key
    guard: Guard | None
    operation: Operation
    items: Sequence[str]

    @property
    def weight(self) -> int:
        """About how many bytes it sends."""
        return sum(map(len, self.items))

    @property
    def identity(self) -> str:
        """Two that may be the same one must not be in one statement."""
        return self.operation.op_id

    @property
    def turn(self) -> int:
        """Those of one session keep their order."""
        return self.key.h


@dataclass(slots=True)
class TailRead:
    """A reading of a session's newest ``limit`` rows (None: all)."""

    key: Key
    guard: Guard | None
    limit: int | None

    weight: ClassVar[int] = 0
    turn: ClassVar[None] = None
    identity: ClassVar[None] = None


def new_incarnation() -> int:
    """A random number for sessions that a statement makes: by it a session is told from one that
    was removed before."""
    return secrets.randbits(63)


class Outcome(Enum):
    """What became of one attempt at a change. Only DONE has changed anything."""

    DONE = "done"
    REFUSED = "refused"
    """The guard did not hold: the session lives elsewhere, or its tenant is not admitted here."""
    REPEATED = "repeated"
    """An operation of this op_id took effect before, or was burnt."""
    EMPTY = "empty"
    """There was nothing to remove."""
    CONTENDED = "contended"
    """Another writer was faster."""
    UNDECODABLE = "undecodable"
    """The newest row is not JSON, by the database's judgement."""


_CLOCK_SECONDS = 1
"""How exactly a server tells when it was started."""


@dataclass(frozen=True, slots=True)
class Server:
    """Which run of which server a connection leads to: a restored copy cannot be the same run.

    ``started`` is when it was started, in seconds of its own clock, where ``name`` does not say so.
    ``standby``: it can only be read from so far.
    """

    name: str
    started: float = 0
    standby: bool = False

    def is_same(self, other: Server) -> bool:
        """Whether both are one run of one server."""
        alike = (self.name, self.standby) == (other.name, other.standby)
        return alike and abs(self.started - other.started) <= _CLOCK_SECONDS


@dataclass(frozen=True, slots=True)
class Admission:
    """What a new connection was asked before it is used: which server it leads to, which shard
    that says it is, how far its slot map has come, and whether a statement by itself runs at READ
    COMMITTED. The stand-alone class and a shard that was not created yet have no UUID.

    ``expected``: how far its slot map had come by what was known when it was asked. A slot may have
    moved since, so what is learnt later does not contradict the answer."""

    server: Server
    read_committed: bool = True
    shard_uuid: str | None = None
    map_version: int = 0
    expected: int = 0

    def is_same(self, other: Admission) -> bool:
        """Whether both tell of the same run of the same server, and the same of the shard."""
        shard = self.shard_uuid, self.map_version
        return shard == (other.shard_uuid, other.map_version) and self.server.is_same(other.server)


LONGEST_TAIL = 100
"""Rows of a short reading: one that comes in one piece, and may be sent together with others."""
LISTED_AT_SECONDS = 60
"""How coarse ``listed_at`` is: it follows ``updated_at`` at most once in this many seconds."""


def nbytes(data: str) -> int:
    """The size of a stored item in bytes of UTF-8."""
    return len(data) if data.isascii() else len(data.encode())


class Dialect(ABC):
    """The statements of one database, for one set of tables.

    ``connection`` is always the driver's own connection, outside any transaction. Every method
    either takes effect whole or not at all, and leaves the connection without a transaction.
    Methods raise the driver's exceptions; :meth:`translate` turns them into SQLAlchemy's.
    """

    driver: ClassVar[str]
    gathers: ClassVar[bool] = False
    """Whether operations that wait can be sent together."""
    one_thread: ClassVar[bool] = False
    """Whether the driver runs an operation whole on a thread of its own connection."""
    begins: ClassVar[bool] = False
    """Whether SQLAlchemy sends a BEGIN and a ROLLBACK around what is only read, unless told not to,
    and telling it sends nothing."""

    def __init__(self, tables: Tables, sqlalchemy_dialect: SQLAlchemyDialect) -> None:
        self.tables = tables
        self.sqlalchemy_dialect = sqlalchemy_dialect
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Write the statements, once."""

    @abstractmethod
    async def append(self, connection: Any, append: Append) -> Outcome:
        """Append items in their order, as one."""

    @abstractmethod
    async def tail(self, connection: Any, read: TailRead) -> Texts | None:
        """What a session's newest rows hold, newest first; None where the guard fails."""

    @abstractmethod
    async def pop(
        self, connection: Any, key: Key, guard: Guard | None, operation: Operation
    ) -> tuple[Outcome, str | None]:
        """Remove the newest row if the database can tell that it is JSON, and record it."""

    @abstractmethod
    async def clear(
        self, connection: Any, key: Key, guard: Guard | None, operation: Operation
    ) -> Outcome:
        """Remove every item; the session's row stays and its numbers go on."""

    @abstractmethod
    async def abandon(self, connection: Any) -> None:
        """Roll back what a failed operation may have left open."""

    @abstractmethod
    def is_contention(self, error: BaseException) -> bool:
        """Whether the database rolled the statement back because of other writers."""

    @abstractmethod
    def is_passing(self, error: BaseException) -> bool:
        """Whether the server has refused the statement for reasons that pass; nothing changed."""

    def is_final(self, error: BaseException) -> bool:
        """Whether the server will never let us in: a wrong password, no such database."""
        return False

    def in_transaction(self, connection: Any) -> bool:
        """Whether a transaction is open on a connection that has just been checked out."""
        return False

    def is_lost(self, error: BaseException) -> bool:
        """Whether ``error`` says that the connection is gone, where SQLAlchemy does not know it."""
        return False

    @abstractmethod
    async def admit(self, connection: Any) -> Admission:
        """Ask a new connection what there is to know before it is used, in one round trip."""

    def name(self, table: Table) -> str:
        """The table's name as SQL, quoted where needed, with its schema."""
        return self.sqlalchemy_dialect.identifier_preparer.format_table(table)

    def names(self) -> dict[str, str]:
        """The SQL names of the tables that hot statements use, to be put into them."""
        tables = {
            "sessions": self.tables.sessions,
            "messages": self.tables.messages,
            "ops": self.tables.ops,
        }
        if self.tables.of_gateway:
            gateway = self.tables
            tables |= {"slots": gateway.slots, "tenants": gateway.tenants, "shard": gateway.shard}
        return {word: self.name(table) for word, table in tables.items()}

    def translate(self, error: Exception, adapted: Any) -> Exception:
        """The SQLAlchemy exception for a driver's ``error`` on the adapted connection."""
        try:
            adapted._handle_exception(error)
        except Exception as raised:  # noqa: BLE001 - to raise is the adapter's way to translate
            return self.wrap(raised, adapted)
        return error

    def wrap(self, error: Exception, adapted: Any) -> Exception:
        """A DBAPI exception as SQLAlchemy's execution layer would have raised it."""
        lost = self.is_lost(error)
        return as_sqlalchemy(error, self.sqlalchemy_dialect, adapted=adapted, lost=lost)


class GatheringDialect(Dialect):
    """A dialect whose operations that wait can be sent together."""

    gathers: ClassVar[bool] = True

    @abstractmethod
    async def append_many(self, connection: Any, appends: Sequence[Append]) -> list[Outcome | None]:
        """Several appends as one statement; of a session's, the earlier one goes first.

        None: somebody else holds the session; nothing has become of this append.
        """

    @abstractmethod
    async def tail_many(
        self, connection: Any, reads: Sequence[TailRead]
    ) -> list[tuple[int, str] | None]:
        """Several tails, of so many rows each, as one statement. None where the guard fails."""


def as_sqlalchemy(
    error: Exception, dialect: SQLAlchemyDialect, *, adapted: Any = None, lost: bool = False
) -> Exception:
    """The SQLAlchemy exception for a DBAPI one; any other comes back as it is.

    ``lost``: the connection is known to be gone, whatever SQLAlchemy makes of the error.
    """
    base: Any = dialect.loaded_dbapi.Error
    if not isinstance(error, base):
        return error
    translated: Exception = DBAPIError.instance(
        statement=None,
        params=None,
        orig=error,
        dbapi_base_err=base,
        hide_parameters=True,
        connection_invalidated=lost or dialect.is_disconnect(error, adapted, None),
        dialect=dialect,
    )
    return translated


_INDENT = re.compile(r"\s*\n\s*")


def one_line(statement: str) -> str:
    """A statement without its source's line breaks: what a server logs should be one line."""
    return _INDENT.sub(" ", statement).strip()
