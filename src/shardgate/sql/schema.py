"""The tables of one shard, complete: sessions, messages, ops, and what a gateway adds.

Rules that every statement keeps:

- ``next_seq`` and ``revision`` never go backwards within an ``incarnation``; (incarnation, seq)
  never changes its content, and a ``seq`` is never given again.
- Reads take ``seq >= floor_seq``: clearing raises the floor, so a row that was appended while its
  session was being cleared can stay behind without ever being seen.
- Ids are compared byte by byte on every database: ``COLLATE "C"`` on PostgreSQL, ``VARBINARY`` on
  MySQL and MariaDB (their binary collations still pad spaces), SQLite's default.
- A CHECK on ``tenant_id`` parts the stand-alone class (reserved tenant ``''``) from gateways, so
  that neither can write into the other's tables.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    type_coerce,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine

if TYPE_CHECKING:
    from sqlalchemy import BindParameter, ColumnElement
    from sqlalchemy.engine import Dialect as SQLAlchemyDialect

SCHEMA_VERSION = 1
STANDALONE_TENANT = ""

_TENANT_CHARACTERS = 64
_SESSION_CHARACTERS = 255
_OP_CHARACTERS = 128
_BYTES_PER_CHARACTER = 4
_MYSQL = ("mysql", "mariadb")
_TABLE_OPTIONS: dict[str, Any] = {
    f"{dialect}_{option}": value
    for dialect in _MYSQL
    for option, value in (
        ("engine", "InnoDB"),
        ("charset", "utf8mb4"),
        ("collate", "utf8mb4_bin"),
        ("row_format", "DYNAMIC"),
    )
}


def _wrapped_on_mysql(template: str) -> type[FunctionElement[Any]]:
    """An SQL function that wraps its argument on MySQL and MariaDB, and is nothing elsewhere."""

    class Wrapped(FunctionElement[Any]):
        inherit_cache = True

    @compiles(Wrapped)
    def plain(element: Wrapped, compiler: Any, **options: Any) -> str:
        return str(compiler.process(element.clauses.clauses[0], **options))

    @compiles(Wrapped, "mysql")
    @compiles(Wrapped, "mariadb")
    def wrapped(element: Wrapped, compiler: Any, **options: Any) -> str:
        return template.format(plain(element, compiler, **options))

    return Wrapped


_id_bytes = _wrapped_on_mysql("UNHEX({})")
_stored_text = _wrapped_on_mysql("CONVERT(UNHEX({}) USING utf8mb4)")
_read_bytes = _wrapped_on_mysql("CAST({} AS BINARY)")


class _HexadecimalText(TypeDecorator[str]):
    """Text that travels as hexadecimal to MySQL and MariaDB, and comes back as bytes."""

    impl = String
    cache_ok = True

    def bind_processor(self, dialect: SQLAlchemyDialect) -> Any:
        """In place of the column type's own, which may make bytes again of the text."""
        if dialect.name in _MYSQL:
            return lambda value: None if value is None else value.encode().hex()
        return super().bind_processor(dialect)

    def result_processor(self, dialect: SQLAlchemyDialect, coltype: object) -> Any:
        """None elsewhere: copying a slot reads many values."""
        if dialect.name in _MYSQL:
            return lambda value: value.decode() if isinstance(value, bytes) else value
        return super().result_processor(dialect, coltype)


class ExactText(_HexadecimalText):
    """Text compared byte by byte, whatever the database's default collation."""

    cache_ok = True

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters = characters

    def load_dialect_impl(self, dialect: SQLAlchemyDialect) -> TypeEngine[Any]:
        if dialect.name in _MYSQL:
            return dialect.type_descriptor(mysql.VARBINARY(self.characters * _BYTES_PER_CHARACTER))
        collation = "C" if dialect.name == "postgresql" else None
        return dialect.type_descriptor(String(self.characters, collation=collation))

    def bind_expression(self, bindvalue: BindParameter[str]) -> ColumnElement[str] | None:
        """Bytes travel as hexadecimal text: aiomysql cannot send them with every PyMySQL."""
        return _id_bytes(bindvalue)


class ItemText(_HexadecimalText):
    """An item's text: on MySQL and MariaDB, whatever the connection's character set."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: SQLAlchemyDialect) -> TypeEngine[Any]:
        long = dialect.name in _MYSQL
        return dialect.type_descriptor(mysql.LONGTEXT() if long else Text())

    def bind_expression(self, bindvalue: BindParameter[str]) -> ColumnElement[str] | None:
        """Back from hexadecimal, in the column's character set whatever the connection's is."""
        return _stored_text(bindvalue)

    def column_expression(self, column: ColumnElement[str]) -> ColumnElement[str] | None:
        """As bytes, which no connection's character set changes."""
        return type_coerce(_read_bytes(column), self)


def _long_text() -> TypeEngine[str]:
    return Text().with_variant(mysql.LONGTEXT(), *_MYSQL)


def _timestamp() -> TypeEngine[Any]:
    """UTC, to the microsecond, without a zone."""
    return DateTime().with_variant(mysql.DATETIME(fsp=6), *_MYSQL)


@dataclass(frozen=True, slots=True)
class TableNames:
    """The names of a set of tables. A gateway's tables all begin with one prefix."""

    sessions: str
    messages: str
    ops: str
    slots: str | None = None
    shard: str | None = None
    peers: str | None = None
    tenants: str | None = None

    @classmethod
    def standalone(cls, sessions: str, messages: str) -> TableNames:
        return cls(sessions=sessions, messages=messages, ops=f"{sessions}_ops")

    @classmethod
    def gateway(cls, prefix: str) -> TableNames:
        return cls(**{field.name: f"{prefix}{field.name}" for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one shard, or of the stand-alone class (which has only the first three)."""

    names: TableNames
    metadata: MetaData
    sessions: Table
    messages: Table
    ops: Table

    @property
    def of_gateway(self) -> bool:
        return self.names.slots is not None

    @property
    def slot_owned(self) -> tuple[Table, ...]:
        """Tables whose rows belong to a session and move, are purged and erased with its slot."""
        return (self.sessions, self.messages, self.ops)

    @property
    def tenant_owned(self) -> tuple[Table, ...]:
        """Tables whose rows belong to a tenant as a whole."""
        return (self.tenants,) if self.of_gateway else ()

    @property
    def slots(self) -> Table:
        return self._gateway_table(self.names.slots)

    @property
    def shard(self) -> Table:
        return self._gateway_table(self.names.shard)

    @property
    def peers(self) -> Table:
        return self._gateway_table(self.names.peers)

    @property
    def tenants(self) -> Table:
        return self._gateway_table(self.names.tenants)

    def _gateway_table(self, name: str | None) -> Table:
        if name is None:
            raise LookupError("the stand-alone class has no slot map")
        schema = self.metadata.schema
        return self.metadata.tables[name if schema is None else f"{schema}.{name}"]


def ownership_check_name(sessions_table: str, *, gateway: bool) -> str:
    """The CHECK constraint that tells a gateway's table from a stand-alone one."""
    return f"{sessions_table}_of_{'gateway' if gateway else 'standalone'}"


def _tenant_check(table: str, *, gateway: bool) -> CheckConstraint:
    comparison = "<>" if gateway else "="
    return CheckConstraint(
        f"tenant_id {comparison} ''", name=ownership_check_name(table, gateway=gateway)
    )


def _key_columns() -> list[Column[Any]]:
    return [
        Column("tenant_id", ExactText(_TENANT_CHARACTERS), primary_key=True),
        Column("session_id", ExactText(_SESSION_CHARACTERS), primary_key=True),
    ]


def _big(name: str, **options: Any) -> Column[Any]:
    return Column(name, BigInteger, autoincrement=False, nullable=False, **options)


def _sessions(name: str, metadata: MetaData, *, gateway: bool) -> Table:
    return Table(
        name,
        metadata,
        *_key_columns(),
        _big("h"),
        _big("incarnation"),
        _big("next_seq"),
        _big("floor_seq"),
        _big("revision"),
        _big("item_count"),
        _big("byte_count"),
        Column("status", String(16), nullable=False, server_default="active"),
        Column("expires_at", _timestamp()),
        Column("hold", SmallInteger, nullable=False, server_default="0"),
        Column("metadata", _long_text()),
        Column("created_at", _timestamp(), nullable=False),
        Column("updated_at", _timestamp(), nullable=False),
        Column("listed_at", _timestamp(), nullable=False),
        Index(f"{name}_by_h", "h"),
        Index(f"{name}_by_listed", "tenant_id", "listed_at", "session_id"),
        _tenant_check(name, gateway=gateway),
        **_TABLE_OPTIONS,
    )


def _messages(name: str, metadata: MetaData) -> Table:
    return Table(
        name,
        metadata,
        *_key_columns(),
        _big("seq", primary_key=True),
        Column("message_data", ItemText(), nullable=False),
        Column("op_id", ExactText(_OP_CHARACTERS)),
        _big("nbytes"),
        Column("codec", String(16)),
        Column("key_id", String(64)),
        Column("created_at", _timestamp(), nullable=False),
        **_TABLE_OPTIONS,
    )


def _ops(name: str, metadata: MetaData) -> Table:
    """Operations that took effect, or were burnt. ``h`` leads the key: ops outlive their session,
    so a move finds a slot's ops by their own range of ``h``, without a second index."""
    return Table(
        name,
        metadata,
        _big("h", primary_key=True),
        *_key_columns(),
        Column("op_id", ExactText(_OP_CHARACTERS), primary_key=True),
        Column("kind", String(16), nullable=False),
        Column("fingerprint", String(64)),
        Column("first_seq", BigInteger),
        Column("n", Integer),
        Column("result", ItemText()),
        Column("created_at", _timestamp(), nullable=False),
        **_TABLE_OPTIONS,
    )


def _uuid(name: str, **options: Any) -> Column[Any]:
    return Column(name, String(36), **options)


def _slots(name: str, metadata: MetaData) -> Table:
    return Table(
        name,
        metadata,
        Column("slot", Integer, primary_key=True, autoincrement=False),
        _uuid("owner", nullable=False),
        Column("state", String(16), nullable=False),
        _big("epoch"),
        _uuid("move_id"),
        _uuid("peer"),
        Column("changed_at", _timestamp()),
        **_TABLE_OPTIONS,
    )


def _shard(name: str, metadata: MetaData) -> Table:
    return Table(
        name,
        metadata,
        Column("one", SmallInteger, primary_key=True, autoincrement=False),
        _uuid("shard_uuid", nullable=False),
        Column("name", String(63), nullable=False),
        Column("keyspace", String(63), nullable=False),
        _uuid("keyspace_uuid", nullable=False),
        Column("slots", Integer, nullable=False),
        Column("spread", Integer),
        Column("hash", String(63), nullable=False),
        Column("schema_version", Integer, nullable=False),
        _big("map_version"),
        Column("created_at", _timestamp(), nullable=False),
        CheckConstraint("one = 1", name=f"{name}_is_one"),
        **_TABLE_OPTIONS,
    )


def _peers(name: str, metadata: MetaData) -> Table:
    return Table(
        name,
        metadata,
        _uuid("shard_uuid", primary_key=True),
        Column("name", String(63), nullable=False),
        _big("map_version"),
        Column("server_identity", String(255)),
        Column("high_water", String(255)),
        Column("updated_at", _timestamp(), nullable=False),
        **_TABLE_OPTIONS,
    )


def _tenants(name: str, metadata: MetaData) -> Table:
    return Table(
        name,
        metadata,
        Column("tenant_id", ExactText(_TENANT_CHARACTERS), primary_key=True),
        Column("status", String(16), nullable=False),
        Column("created_at", _timestamp(), nullable=False),
        Column("updated_at", _timestamp(), nullable=False),
        **_TABLE_OPTIONS,
    )


def build_tables(
    names: TableNames, *, schema: str | None = None, metadata: MetaData | None = None
) -> Tables:
    """Declare the tables, in ``metadata`` (whose own ``schema`` counts) or a new one."""
    metadata = MetaData(schema=schema) if metadata is None else metadata
    gateway = names.slots is not None
    tables = Tables(
        names=names,
        metadata=metadata,
        sessions=_sessions(names.sessions, metadata, gateway=gateway),
        messages=_messages(names.messages, metadata),
        ops=_ops(names.ops, metadata),
    )
    for name, declare in (
        (names.slots, _slots),
        (names.shard, _shard),
        (names.peers, _peers),
        (names.tenants, _tenants),
    ):
        if name is not None:
            declare(name, metadata)
    return tables


def ddl(tables: Tables, dialect: SQLAlchemyDialect) -> list[str]:
    """The CREATE statements for ``dialect``, each without its final semicolon."""
    statements = []
    for table in tables.metadata.sorted_tables:
        statements.append(str(CreateTable(table).compile(dialect=dialect)).strip())
        statements += [
            str(CreateIndex(index).compile(dialect=dialect))
            for index in sorted(table.indexes, key=lambda index: str(index.name))
        ]
    return statements
