"""What a slot holds: read on one database, compared and written on another one.

A slot is a range of ``h``. Sessions are walked in the order of (h, tenant, session), operations in
that of their key; the order is that of bytes on every database, so two walks can be compared.

Messages have no ``h``: they are found through their session's row. So on a shard that does not own
the slot yet, or any more, the session's row is written before its messages and removed after them,
with revision 0 as long as they are not complete: no session that is served has that.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sqlalchemy import (
    BigInteger,
    Integer,
    String,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from shardgate.errors import OperatorError
from shardgate.sql.purge import OpKey, beyond

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import Column, ColumnElement, Table
    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.sql.schema import Tables

T = TypeVar("T")

_LOCK_WAIT = {"55P03", 1205}
"""How PostgreSQL, and MySQL and MariaDB, say that a lock was waited for too long."""
INCOMPLETE = 0
"""The revision of a session whose messages are not all here."""
_PART_BITS = 8
_MODULUS = 2**31
_NUMBER_DIGITS = 8
_BATCH = 500
_REST_OF_A_PACKET = 1 << 16
_PACKET = 1 << 19
"""Characters of rows that are sent together to MySQL and MariaDB, in which they get longer."""


class SessionKey(NamedTuple):
    """Which session; in this order a slot is walked."""

    h: int
    tenant_id: str
    session_id: str


@dataclass(frozen=True, slots=True)
class Version:
    """How far a session is. Of one incarnation, equal revisions are equal contents."""

    incarnation: int
    revision: int
    next_seq: int
    floor_seq: int
    item_count: int
    byte_count: int

    def has_only_grown_since(self, older: Version) -> bool:
        """Whether this is ``older`` with items appended to it: then these are the only difference.

        Appending is the only change that raises the count as much as the next number.
        """
        return (
            self.incarnation == older.incarnation
            and older.revision != INCOMPLETE
            and self.floor_seq == older.floor_seq
            and self.next_seq - older.next_seq == self.item_count - older.item_count
        )


_VERSION = tuple(Version.__dataclass_fields__)


def version_of(row: Mapping[str, Any]) -> Version:
    """How far a session is, by its row."""
    return Version(**{field: row[field] for field in _VERSION})


@dataclass(frozen=True, slots=True)
class Span:
    """The ``h`` of a slot, signed, both ends included."""

    first: int
    last: int


class text_digest(FunctionElement[str]):  # noqa: N801 - an SQL function, named as those are
    """The SHA-256 of a text in UTF-8, as hexadecimal digits; on SQLite, the text itself."""

    type = String()
    inherit_cache = True


@compiles(text_digest, "postgresql")
def _postgresql_digest(element: text_digest, compiler: Any, **options: Any) -> str:
    value = compiler.process(element.clauses, **options)
    return f"encode(sha256(convert_to({value}, 'UTF8')), 'hex')"


@compiles(text_digest, "mysql")
@compiles(text_digest, "mariadb")
def _mysql_digest(element: text_digest, compiler: Any, **options: Any) -> str:
    return f"SHA2({compiler.process(element.clauses, **options)}, 256)"


@compiles(text_digest, "sqlite")
def _sqlite_digest(element: text_digest, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


class text_number(FunctionElement[int]):  # noqa: N801 - an SQL function, named as those are
    """The first digits of ``text_digest``, as a number; not on SQLite."""

    type = BigInteger()
    inherit_cache = True


@compiles(text_number, "postgresql")
def _postgresql_number(element: text_number, compiler: Any, **options: Any) -> str:
    digest = compiler.process(text_digest(*element.clauses), **options)
    return f"('x' || left({digest}, {_NUMBER_DIGITS}))::bit({4 * _NUMBER_DIGITS})::bigint"


@compiles(text_number, "mysql")
@compiles(text_number, "mariadb")
def _mysql_number(element: text_number, compiler: Any, **options: Any) -> str:
    digest = compiler.process(text_digest(*element.clauses), **options)
    return f"CAST(CONV(LEFT({digest}, {_NUMBER_DIGITS}), 16, 10) AS UNSIGNED)"


@asynccontextmanager
async def limit_lock_wait(
    connection: AsyncConnection, seconds: float, late: type[Exception]
) -> AsyncIterator[None]:
    """Raise ``late`` where a lock is waited for longer than that, on MySQL and MariaDB in whole
    seconds. On SQLite there is nothing to wait for: a transaction has the only lock there is."""
    name = connection.dialect.name
    if name == "sqlite":
        yield
        return
    if name == "postgresql":
        limit = func.set_config("lock_timeout", f"{max(1, round(seconds * 1000))}ms", True)
        await connection.execute(select(limit))
        with _raised_as(late):
            yield
        return
    usual = (await connection.execute(text("SELECT @@innodb_lock_wait_timeout"))).scalar_one()
    wait = text("SET innodb_lock_wait_timeout = :seconds")
    await connection.execute(wait, {"seconds": max(1, round(seconds))})
    try:
        with _raised_as(late):
            yield
    finally:
        if not connection.invalidated:
            await connection.execute(wait, {"seconds": usual})


@contextmanager
def _raised_as(late: type[Exception]) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        original = error.orig
        told = (getattr(original, "sqlstate", None), *(original.args[:1] if original else ()))
        if not _LOCK_WAIT.intersection(told):
            raise
        raise late from error


async def read_versions(
    connection: AsyncConnection,
    tables: Tables,
    span: Span,
    *,
    after: SessionKey | None = None,
    limit: int | None = None,
) -> dict[SessionKey, Version]:
    """The sessions of a slot after a key, in order, ``limit`` at most."""
    sessions = tables.sessions
    key = [sessions.c[field] for field in SessionKey._fields]
    statement = select(*key, *(sessions.c[field] for field in _VERSION))
    rows = await connection.execute(_walk(statement, key, span, after, limit))
    return {SessionKey(*row[:3]): Version(*row[3:]) for row in rows}


async def read_op_times(
    connection: AsyncConnection,
    tables: Tables,
    span: Span,
    *,
    after: OpKey | None = None,
    limit: int | None = None,
) -> dict[OpKey, datetime]:
    """The operations of a slot after a key, in order, ``limit`` at most, and when each was
    recorded: a key that was forgotten can be used again."""
    key = _op_key(tables)
    statement = select(*key, tables.ops.c.created_at)
    rows = await connection.execute(_walk(statement, key, span, after, limit))
    return {OpKey(*row[:-1]): row[-1] for row in rows}


async def read_op_sizes(
    connection: AsyncConnection, tables: Tables, first: OpKey, last: OpKey
) -> dict[OpKey, int]:
    """About how many bytes each operation from one key to another one has kept, in order."""
    # PostgreSQL would have to unpack a value to count its characters; SQLite knows no bytes.
    size = func.length if connection.dialect.name == "sqlite" else func.octet_length
    key = _op_key(tables)
    statement = select(*key, func.coalesce(size(tables.ops.c.result), 0))
    rows = await connection.execute(statement.where(_between(tables, first, last)).order_by(*key))
    return {OpKey(*row[:-1]): row[-1] for row in rows}


def _op_key(tables: Tables) -> list[Column[Any]]:
    return [tables.ops.c[field] for field in OpKey._fields]


def _walk(
    statement: Any,
    key: Sequence[Column[Any]],
    span: Span,
    after: tuple[Any, ...] | None,
    limit: int | None,
) -> Any:
    first = span.first if after is None else after[0]
    statement = statement.where(key[0].between(first, span.last))
    if after is not None:
        statement = statement.where(beyond(key, after))
    return statement.order_by(*key).limit(limit)


class Print(NamedTuple):
    """What the rows of a part of a slot come to: equal prints are of equal rows.

    The rows' ``h`` lie between ``first`` and ``last``.
    """

    first: int
    last: int
    rows: int
    total: int


Prints = dict[tuple[str, int], Print]
"""By table and number of the part."""


async def read_prints(connection: AsyncConnection, tables: Tables, *, span: Span) -> Prints:
    """The prints of the parts of a slot that are not empty.

    A session's row tells by its incarnation, a random number, and its revision whether it has
    changed; an operation by its id.
    """
    sessions, ops = tables.sessions.c, tables.ops.c
    version = sessions.incarnation % _MODULUS + sessions.revision
    shift = max(0, (span.last - span.first).bit_length() - _PART_BITS)
    found: Prints = {}
    for table, h, number in (
        ("sessions", sessions.h, version),
        ("ops", ops.h, text_number(ops.op_id)),
    ):
        part = h.bitwise_rshift(literal(shift, Integer())).bitwise_and(2**_PART_BITS - 1)
        if connection.dialect.name == "sqlite" and table == "ops":
            rows = await connection.execute(
                select(part, h, ops.op_id).where(h.between(span.first, span.last))
            )
            _add_up(found, table, [(at, place, _number_of(op_id)) for at, place, op_id in rows])
            continue
        statement = select(part, func.min(h), func.max(h), func.count(), func.sum(number))
        rows = await connection.execute(
            statement.where(h.between(span.first, span.last)).group_by(part)
        )
        for at, *values in rows:
            found[table, at] = Print(*map(int, values))
    return found


def _add_up(found: Prints, table: str, rows: Iterable[tuple[int, int, int]]) -> None:
    for at, h, number in rows:
        known = found.get((table, at), Print(h, h, 0, 0))
        found[table, at] = Print(
            min(known.first, h), max(known.last, h), known.rows + 1, known.total + number
        )


def _number_of(text: str) -> int:
    """What ``text_number`` gives."""
    return int(digest_of(text)[:_NUMBER_DIGITS], 16)


@dataclass(frozen=True, slots=True)
class Content:
    """What was read of a session: its row, and its items from number ``since`` on and ``below``
    another one (None: to the end), as columns by name.

    ``whole``: with these, all of them are there.
    """

    row: Mapping[str, Any]
    items: Sequence[Mapping[str, Any]]
    since: int
    below: int | None = None
    whole: bool = True

    @property
    def key(self) -> SessionKey:
        """Which session it is."""
        return _key_of(self.row)

    @property
    def nbytes(self) -> int:
        """The size of the items, in bytes."""
        return sum(item["nbytes"] for item in self.items)


def _key_of(row: Mapping[str, Any]) -> SessionKey:
    return SessionKey(*(row[field] for field in SessionKey._fields))


async def read_sessions(
    connection: AsyncConnection, tables: Tables, keys: Iterable[SessionKey]
) -> dict[SessionKey, Mapping[str, Any]]:
    """The rows of these sessions, as columns by name; not those that are gone."""
    wanted = set(keys)
    statement = select(tables.sessions).where(_among(tables, wanted))
    rows = (await connection.execute(statement)).mappings().all()
    found = {_key_of(row): row for row in map(dict, rows)}
    return {key: row for key, row in found.items() if key in wanted}


async def read_items(
    connection: AsyncConnection, tables: Tables, keys: Iterable[SessionKey]
) -> dict[SessionKey, list[Mapping[str, Any]]]:
    """All items of these sessions that can be seen, as columns by name."""
    items: dict[SessionKey, list[Mapping[str, Any]]] = {key: [] for key in keys}
    by_key = {tuple(key): own for key, own in items.items()}
    found = await connection.execute(_items_of(tables, items, tables.messages.c))
    names = tuple(found.keys())[1:]
    tenant, session = names.index("tenant_id"), names.index("session_id")
    for h, *item in found:
        known = by_key.get((h, item[tenant], item[session]))
        if known is not None:
            known.append(dict(zip(names, item, strict=True)))
    return items


async def read_items_from(
    connection: AsyncConnection, tables: Tables, key: SessionKey, *, since: int, limit: int
) -> list[Mapping[str, Any]]:
    """A session's items from number ``since`` on, oldest first, as columns by name."""
    messages = tables.messages
    statement = select(messages).where(_of(messages, key), messages.c.seq >= since)
    rows = await connection.execute(statement.order_by(messages.c.seq).limit(limit))
    return [dict(row) for row in rows.mappings()]


async def read_digests(
    connection: AsyncConnection, tables: Tables, keys: Iterable[SessionKey]
) -> dict[SessionKey, Digests]:
    """The digests of these sessions' items, as one statement saw them."""
    sessions, messages = tables.sessions, tables.messages
    found: dict[tuple[Any, ...], Digests] = {}
    wanted = {tuple(key): key for key in keys}
    columns = (
        *(sessions.c.tenant_id, sessions.c.session_id, sessions.c.incarnation, sessions.c.revision),
        *(messages.c.seq, text_digest(messages.c.message_data)),
    )
    for h, tenant, session, incarnation, revision, seq, digest in await connection.execute(
        _items_of(tables, wanted.values(), columns, also_empty=True)
    ):
        key = (h, tenant, session)
        known = found.get(key)
        if known is None:
            if key not in wanted:
                continue
            known = found[key] = Digests(incarnation, revision, {})
        if seq is not None:
            known.of[seq] = _digest(connection, digest)
    return {wanted[key]: digests for key, digests in found.items()}


async def read_digests_from(
    connection: AsyncConnection, tables: Tables, key: SessionKey, *, since: int, limit: int
) -> dict[int, str]:
    """The digests of a session's items from number ``since`` on, by number, in order."""
    messages = tables.messages
    statement = select(messages.c.seq, text_digest(messages.c.message_data)).where(
        _of(messages, key), messages.c.seq >= since
    )
    rows = await connection.execute(statement.order_by(messages.c.seq).limit(limit))
    return {seq: _digest(connection, digest) for seq, digest in rows}


@dataclass(frozen=True, slots=True)
class Digests:
    """The SHA-256 of a session's items by number, and how far the session was."""

    incarnation: int
    revision: int
    of: dict[int, str]

    def contradict(self, other: Digests) -> bool:
        """Whether one of the two cannot be a copy of the other, older or not.

        What has a number within an incarnation never changes.
        """
        if self.incarnation != other.incarnation:
            return False
        if self.revision == other.revision:
            return self.of != other.of
        return any(other.of.get(seq, digest) != digest for seq, digest in self.of.items())


def digest_of(data: str) -> str:
    """What ``text_digest`` gives."""
    return sha256(data.encode()).hexdigest()


def _digest(connection: AsyncConnection, value: Any) -> str:
    if connection.dialect.name == "sqlite":
        return digest_of(str(value))  # others may have stored bytes there
    return value.decode() if isinstance(value, bytes) else str(value)


def _items_of(
    tables: Tables, keys: Iterable[SessionKey], columns: Iterable[Any], *, also_empty: bool = False
) -> Any:
    sessions, messages = tables.sessions, tables.messages
    own = (
        messages.c.tenant_id == sessions.c.tenant_id,
        messages.c.session_id == sessions.c.session_id,
        messages.c.seq >= sessions.c.floor_seq,
    )
    items = select(sessions.c.h, *columns).join_from(
        sessions, messages, and_(*own), isouter=also_empty
    )
    return items.where(_among(tables, keys))


def _among(tables: Tables, keys: Iterable[SessionKey]) -> ColumnElement[bool]:
    """Sessions that may be among these: others may share their ``h``."""
    return tables.sessions.c.h.in_(sorted({key.h for key in keys}))


def _of(table: Table, key: SessionKey) -> ColumnElement[bool]:
    return and_(table.c.tenant_id == key.tenant_id, table.c.session_id == key.session_id)


async def put_sessions(
    connection: AsyncConnection, tables: Tables, contents: Sequence[Content]
) -> list[SessionKey]:
    """Bring sessions level with what was read of them elsewhere.

    To be called by the only one who writes there: what is there already is compared first, so it
    may be done again. What is missing is inserted, what is too much removed; another incarnation
    is replaced.

    Returns:
        Those that do not have as many items as their rows say: what was read of them was of
        different moments, or it was only their end, and more than that is missing. They are left
        incomplete.
    """
    here = await read_sessions(connection, tables, (content.key for content in contents))
    added: list[Mapping[str, Any]] = []
    for content in contents:
        row = here.get(content.key)
        if row is not None:
            await _delete_unseen(connection, tables, content, before=row)
        present = set() if row is None else await _seqs(connection, tables, content)
        wanted = {item["seq"] for item in content.items}
        for seqs in _parts(sorted(present - wanted)):
            of = _of(tables.messages, content.key)
            await connection.execute(
                delete(tables.messages).where(of, tables.messages.c.seq.in_(seqs))
            )
        added += [item for item in content.items if item["seq"] not in present]
    rows = [
        {**content.row, **({} if content.whole else {"revision": INCOMPLETE})}
        for content in contents
    ]
    await _put_rows(connection, tables.sessions, rows, known=here.keys())
    for part in _parts(added):
        await _insert(connection, tables.messages, part)
    return await _mark_uneven(connection, tables, [one.key for one in contents if one.whole])


async def _mark_uneven(
    connection: AsyncConnection, tables: Tables, keys: Sequence[SessionKey]
) -> list[SessionKey]:
    """Those of these sessions whose items are not as many as their rows say; now incomplete."""
    sessions, messages = tables.sessions, tables.messages
    seen = _items_of(tables, keys, (sessions.c.tenant_id, sessions.c.session_id), also_empty=True)
    counted = seen.group_by(
        sessions.c.h, sessions.c.tenant_id, sessions.c.session_id, sessions.c.item_count
    ).having(func.count(messages.c.seq) != sessions.c.item_count)
    wanted = set(keys)
    uneven = [SessionKey(*row) for row in await connection.execute(counted)] if keys else []
    uneven = [key for key in uneven if key in wanted]
    for key in uneven:
        of = _of(sessions, key)
        await connection.execute(update(sessions).where(of).values(revision=INCOMPLETE))
    return uneven


async def _put_rows(
    connection: AsyncConnection,
    table: Table,
    rows: Iterable[Mapping[str, Any]],
    *,
    known: Iterable[SessionKey],
) -> None:
    there = set(known)
    new = [dict(row) for row in rows if _key_of(row) not in there]
    old = [row for row in rows if _key_of(row) in there]
    if new:
        await _insert(connection, table, new)
    for row in old:
        await connection.execute(update(table).where(_of(table, _key_of(row))).values(**row))


async def _seqs(connection: AsyncConnection, tables: Tables, content: Content) -> set[int]:
    """The numbers that a session has here where ``content`` tells which ones it should have."""
    seq = tables.messages.c.seq
    statement = select(seq).where(_of(tables.messages, content.key), seq >= content.since)
    if content.below is not None:
        statement = statement.where(seq < content.below)
    return set((await connection.execute(statement)).scalars())


async def _delete_unseen(
    connection: AsyncConnection, tables: Tables, content: Content, *, before: Mapping[str, Any]
) -> None:
    """Remove what is of another incarnation, or has been cleared meanwhile."""
    unseen = delete(tables.messages).where(_of(tables.messages, content.key))
    if before["incarnation"] == content.row["incarnation"]:
        if before["floor_seq"] == content.row["floor_seq"]:
            return
        unseen = unseen.where(tables.messages.c.seq < content.row["floor_seq"])
    await connection.execute(unseen)


async def remove_sessions(
    connection: AsyncConnection, tables: Tables, keys: Iterable[SessionKey]
) -> None:
    """Remove sessions with their items."""
    values = [{"tenant": key.tenant_id, "session": key.session_id} for key in keys]
    for table in (tables.messages, tables.sessions) if values else ():
        of = (
            table.c.tenant_id == bindparam("tenant", type_=table.c.tenant_id.type),
            table.c.session_id == bindparam("session", type_=table.c.session_id.type),
        )
        await connection.execute(delete(table).where(*of), values)


async def shorten_session(
    connection: AsyncConnection, tables: Tables, key: SessionKey, *, items: int
) -> bool:
    """Remove the first ``items`` of a session that is not served; whether there may be more."""
    messages, sessions = tables.messages, tables.sessions
    of = _of(messages, key)
    await connection.execute(update(sessions).where(_of(sessions, key)).values(revision=INCOMPLETE))
    beyond = select(messages.c.seq).where(of).order_by(messages.c.seq).offset(items).limit(1)
    first_left = (await connection.execute(beyond)).scalar_one_or_none()
    if first_left is not None:
        await connection.execute(delete(messages).where(of, messages.c.seq < first_left))
    return first_left is not None


async def read_ops(
    connection: AsyncConnection, tables: Tables, first: OpKey, last: OpKey
) -> list[Mapping[str, Any]]:
    """The operations from one key to another one, as columns by name."""
    statement = select(tables.ops).where(_between(tables, first, last)).order_by(*_op_key(tables))
    return [dict(row) for row in (await connection.execute(statement)).mappings()]


def _between(tables: Tables, first: OpKey, last: OpKey) -> ColumnElement[bool]:
    key = _op_key(tables)
    is_first = and_(*(column == value for column, value in zip(key, first, strict=True)))
    return and_(
        key[0].between(first.h, last.h), or_(is_first, beyond(key, first)), ~beyond(key, last)
    )


async def put_ops(
    connection: AsyncConnection, tables: Tables, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Insert those of these operations (in order) that are not here yet."""
    if not rows:
        return
    keys = [OpKey(*(row[field] for field in OpKey._fields)) for row in rows]
    known = select(*_op_key(tables)).where(_between(tables, keys[0], keys[-1]))
    here = {OpKey(*row) for row in await connection.execute(known)}
    new = [dict(row) for key, row in zip(keys, rows, strict=True) if key not in here]
    for part in _parts(new):
        await _insert(connection, tables.ops, part)


async def remove_ops(connection: AsyncConnection, tables: Tables, keys: Iterable[OpKey]) -> None:
    """Remove operations."""
    columns = _op_key(tables)
    of = [column == bindparam(f"key_{column.name}", type_=column.type) for column in columns]
    values = [{f"key_{field}": value for field, value in key._asdict().items()} for key in keys]
    if values:
        await connection.execute(delete(tables.ops).where(*of), values)


async def read_tenants(
    connection: AsyncConnection, tables: Tables, tenant_ids: Iterable[str]
) -> list[Mapping[str, Any]]:
    """The rows of these tenants, as columns by name."""
    known = tables.tenants.c.tenant_id.in_(sorted(tenant_ids))
    rows = await connection.execute(select(tables.tenants).where(known))
    return [dict(row) for row in rows.mappings()]


async def put_tenants(
    connection: AsyncConnection, tables: Tables, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Insert those of these tenants that are not known here; others may do the same meanwhile."""
    ids = {row["tenant_id"] for row in rows}
    known = {row["tenant_id"] for row in await read_tenants(connection, tables, ids)}
    new = [dict(row) for row in rows if row["tenant_id"] not in known]
    if new:
        await connection.execute(_insert_unless_there(connection, tables.tenants), new)


def _insert_unless_there(connection: AsyncConnection, table: Table) -> Any:
    name = connection.dialect.name
    if name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return insert(table).prefix_with("OR IGNORE" if name == "sqlite" else "IGNORE")


async def _insert(
    connection: AsyncConnection, table: Table, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Insert rows with the same columns.

    On MySQL and MariaDB as one statement: the driver would send one for each row, as their values
    hold function calls.
    """
    if connection.dialect.name not in ("mysql", "mariadb"):
        await connection.execute(insert(table), list(rows))
        return
    compiled: Any = insert(table).compile(dialect=connection.dialect, column_keys=list(rows[0]))
    head, values = str(compiled).split(" VALUES ", 1)
    columns = [(name, compiled._bind_processors.get(name)) for name in compiled.positiontup]
    for part in _packets(rows):
        bound = [
            row[name] if process is None else process(row[name])
            for row in part
            for name, process in columns
        ]
        size = sum(len(value) for value in bound if isinstance(value, str))
        if size > 2 * _PACKET:
            await _check_packet(connection, part[0], size)
        together = f"{head} VALUES {', '.join([values] * len(part))}"
        await connection.exec_driver_sql(together, tuple(bound))


async def _check_packet(connection: AsyncConnection, row: Mapping[str, Any], size: int) -> None:
    """Refuse what the server would hang up on: text travels as hexadecimal digits."""
    most = (await connection.execute(text("SELECT @@max_allowed_packet"))).scalar_one()
    if size + _REST_OF_A_PACKET > most:
        raise OperatorError(
            f"what one item of session {row['session_id']!r} of tenant {row['tenant_id']!r} needs "
            f"to be moved is a packet of about {size} bytes, and max_allowed_packet is {most} "
            "there: raise it"
        )


def _packets(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Rows in portions that fit into a packet, wherever a single one does."""
    part: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        own = sum(len(value) for value in row.values() if isinstance(value, str))
        if part and size + own > _PACKET:
            yield part
            part, size = [], 0
        part.append(row)
        size += own
    if part:
        yield part


def _parts(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(rows), _BATCH):
        yield rows[start : start + _BATCH]
