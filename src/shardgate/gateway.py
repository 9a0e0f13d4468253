"""The gateway: where everything is put together, and the door that platforms come in by."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sqlalchemy import text

from shardgate.agreement import Plan
from shardgate.engines import make_engine
from shardgate.errors import OwnershipConflict, ShardgateError, ShardUnavailable, UsageError
from shardgate.keyspace import Keyspace
from shardgate.listing import SessionPage, check_limit, merge, read_cursor, write_cursor
from shardgate.router import Route, route
from shardgate.session import GatewaySession
from shardgate.settings import GatewaySettings
from shardgate.settling import together
from shardgate.shards import Shard
from shardgate.slotmap import conflict, map_of, unnamed_owners, unserved
from shardgate.slots import check_session_id, check_tenant_id
from shardgate.sql.schema import TableNames, build_tables

T = TypeVar("T")

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agents.memory import SessionSettings
    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from shardgate.slotmap import Reading
    from shardgate.sql.transactions import SessionInfo

    EngineFactory = Callable[[str, URL, dict[str, Any]], AsyncEngine]
    """Makes a shard's engine from its name, its URL and its engine options."""


@dataclass(frozen=True, slots=True)
class ShardHealth:
    """How a shard is. ``latency`` is of one round trip, in seconds; ``slots`` those it owns.

    ``map_version`` counts the changes of the keyspace that the shard was part of.
    """

    name: str
    keyspace: str
    reachable: bool
    server: str | None = None
    latency: float | None = None
    slots: int | None = None
    map_version: int | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the shard serves."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class HealthReport:
    """How the shards are, by name, and what is wrong with a keyspace as a whole."""

    shards: Mapping[str, ShardHealth]
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every shard serves, and every keyspace is whole."""
        return not self.problems and all(shard.ok for shard in self.shards.values())


class Gateway:
    """Sessions of many tenants over the shards that the settings name.

    Use it with ``async with``, or just use it: it opens itself at the first operation, and
    ``aclose`` closes it. It belongs to the event loop of its first operation. Shards that are down
    are no obstacle to opening it; only their own sessions fail.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        engines: Mapping[str, AsyncEngine] | None = None,
        engine_factory: EngineFactory | None = None,
    ) -> None:
        """Put a gateway together; no I/O.

        Args:
            settings: which shards there are, and everything else.
            engines: engines to use for shards, by name. They are never closed here.
            engine_factory: makes the engines of the other shards; these are closed here.

        Raises:
            UsageError: an engine is for no shard, or of a driver that is not supported.
        """
        self.settings = settings
        engines = dict(engines or {})
        if unknown := sorted(engines.keys() - settings.shards.keys()):
            raise UsageError(f"engines names {', '.join(unknown)}, which the settings do not have")
        factory = engine_factory or (lambda _name, url, options: make_engine(url, options))
        self._own_engines: list[AsyncEngine] = []
        self._shards: dict[str, Shard] = {}
        for name, shard in settings.shards.items():
            engine = engines.get(name)
            if engine is None:
                engine = factory(name, shard.parsed_url, settings.engine_options(name))
                self._own_engines.append(engine)
            names = TableNames.gateway(settings.table_prefix)
            tables = build_tables(names, schema=shard.schema_)
            deadline = settings.operation_deadline
            try:
                self._shards[name] = Shard(
                    name, engine, tables, deadline=deadline, coalesce=settings.coalesce
                )
            except UsageError as error:
                raise UsageError(f"shard {name!r}: {error}") from None
        self._keyspaces = {
            name: Keyspace(
                Plan.of(settings, name),
                {shard: self._shards[shard] for shard in settings.shards_of(name)},
                creates=settings.create_tables,
                deadline=settings.operation_deadline,
                operation_memory=settings.operation_memory,
            )
            for name in settings.keyspaces
        }
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """A gateway of the environment's settings; ``options`` as for the constructor."""
        return cls(GatewaySettings(), **options)

    @property
    def shards(self) -> Mapping[str, Shard]:
        """The shards by name; each has its ``engine``."""
        return MappingProxyType(self._shards)

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.aclose()  # nobody else will: the block is never entered
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Learn who owns what from the shards that answer; the rest is learnt when it is needed.

        A shard that contradicts its peers is put in quarantine, and named in the log.

        Raises:
            OperatorError: a keyspace was not created, or none of its shards is the right one.
        """
        self._check_use()
        answers = await asyncio.gather(
            *(keyspace.known() for keyspace in self._keyspaces.values()), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ShardUnavailable):
                raise answer

    async def aclose(self) -> None:
        """Close the engines that were made here. The gateway cannot be used again."""
        self._closed = True
        await together(keyspace.close() for keyspace in self._keyspaces.values())
        await together(engine.dispose() for engine in self._own_engines)

    async def create_tables(self) -> None:
        """Create the tables and the keyspaces of the settings, or what is missing of them.

        Safe to run at any time and by many processes at once.

        Raises:
            ShardUnavailable: a shard does not answer; run it again.
            OwnershipConflict: a shard is not the one that it is taken for; nothing was written.
        """
        self._check_use()
        for keyspace in self._keyspaces.values():
            await keyspace.create()

    async def purge_operations(self) -> dict[str, int]:
        """Remove the records of operations that are older than ``operation_memory``, now.

        Writes see to that as they come in; this is for shards that get no more of them.

        Returns:
            How many records were removed, by shard.

        Raises:
            ShardUnavailable: a shard does not answer; the others have been seen to.
        """
        self._check_use()
        removed = await together(keyspace.purge() for keyspace in self._keyspaces.values())
        return {name: count for part in removed for name, count in part.items()}

    def tenant(self, tenant_id: str, *, keyspace: str | None = None) -> Tenant:
        """A tenant, in its keyspace: the one given, else the one that the settings say.

        Raises:
            UsageError: the id is not one, or there is no such keyspace.
            TenantRefused: the settings have no keyspace for this tenant.
        """
        tenant_id = check_tenant_id(tenant_id)
        if keyspace is None:
            keyspace = self.settings.keyspace_of(tenant_id)
        if keyspace not in self._keyspaces:
            self.settings.keyspace(keyspace)  # it refuses
        return Tenant(self, tenant_id, keyspace)

    def route(self, tenant_id: str, session_id: str, *, keyspace: str | None = None) -> Route:
        """Where a session lives, by what has been learnt so far; no I/O.

        Raises:
            UsageError: an id is not one, or the gateway has not been opened.
        """
        tenant = self.tenant(tenant_id, keyspace=keyspace)
        known = self._keyspaces[tenant.keyspace].map
        if known is None:
            raise UsageError(
                f"the map of keyspace {tenant.keyspace!r} has not been read yet: open the gateway, "
                "or use a session of this keyspace, while one of its shards answers"
            )
        return route(known, tenant_id, check_session_id(session_id))

    async def check(self) -> HealthReport:
        """Ask every shard how it is and whether it is the right one, all at the same time."""
        self._check_use()
        readings = await together(keyspace.examine() for keyspace in self._keyspaces.values())
        health: dict[str, ShardHealth] = {}
        problems: list[str] = []
        for keyspace, reading in zip(self._keyspaces.values(), readings, strict=True):
            answers = await together(
                self._check_shard(keyspace.plan.keyspace, shard, reading)
                for shard in keyspace.shards.values()
            )
            health |= {answer.name: answer for answer in answers}
            problems += await _lasting_problems(keyspace, reading)
        ordered = {name: health[name] for name in self._shards}
        return HealthReport(MappingProxyType(ordered), tuple(problems))

    async def _check_shard(self, keyspace: str, shard: Shard, reading: Reading) -> ShardHealth:
        health = partial(ShardHealth, shard.name, keyspace)
        try:
            server, latency = await shard.ask(_measure)
        except ShardgateError as error:
            return health(reachable=False, error=str(error))
        known = partial(health, reachable=True, server=server, latency=latency)
        if shard.name in reading.down:
            return known(error=str(reading.down[shard.name]))
        if shard.name in reading.wrong:
            known = partial(known, error=f"in quarantine: {reading.wrong[shard.name].reason}")
        record = reading.records[shard.name]
        if record is None:
            missing = f"shard {shard.name!r} is not created yet: run 'shardgate create-tables'"
            return known(**({"error": missing} | known.keywords))
        owned = sum(row.owner == record.uuid for row in record.rows)
        return known(slots=owned, map_version=record.identity.map_version)

    def _in_use(self, keyspace: str) -> Keyspace:
        """The keyspace, for an operation that begins now."""
        if self._closed or self._loop is not asyncio.get_running_loop():
            self._check_use()
        return self._keyspaces[keyspace]

    async def _list(
        self, keyspace: str, tenant_id: str, limit: int, after: Any, *, partial_: bool
    ) -> tuple[list[list[SessionInfo]], tuple[str, ...]]:
        survey = self._in_use(keyspace).survey
        return await survey(tenant_id, limit=limit, after=after, partial_=partial_)

    def _check_use(self) -> None:
        if self._closed:
            raise UsageError("the gateway has been closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise UsageError(
                "a gateway belongs to one event loop, and this is another one: make a gateway for "
                "each event loop"
            )


async def _lasting_problems(keyspace: Keyspace, reading: Reading) -> list[str]:
    """What is wrong with a keyspace as a whole, and still is when its shards are read again.

    They are not read in one moment: a slot that moves meanwhile may seem to be nobody's.
    """
    problems = _problems(keyspace.plan, reading)
    if not problems:
        return []
    again = _problems(keyspace.plan, await keyspace.examine())
    return [problem for problem in problems if problem in again]


def _problems(plan: Plan, reading: Reading) -> list[str]:
    if not reading.usable:
        return []
    try:
        known = map_of(plan, reading)
    except OwnershipConflict as error:
        return [str(error)]
    what = [*unnamed_owners(plan, known).values()]
    if not reading.down:
        what += [
            f"{problem}: run 'shardgate reconcile {name}'"
            for name, problem in unserved(plan, reading.usable).items()
        ]
    return [str(conflict(plan, problem)) for problem in what]


async def _measure(connection: AsyncConnection) -> tuple[str, float]:
    """The server's version, and how long it takes to answer."""
    await connection.execute(text("SELECT 1"))
    began = perf_counter()
    await connection.execute(text("SELECT 1"))
    latency = perf_counter() - began
    version = ".".join(map(str, connection.dialect.server_version_info or ()))
    return f"{connection.dialect.name} {version}", latency


class Tenant:
    """One tenant of a gateway. Nothing that can be reached from here is another tenant's."""

    def __init__(self, gateway: Gateway, tenant_id: str, keyspace: str) -> None:
        self._gateway = gateway
        self.tenant_id = tenant_id
        self.keyspace = keyspace

    def __repr__(self) -> str:
        return f"Tenant({self.tenant_id!r}, keyspace={self.keyspace!r})"

    def session(
        self,
        session_id: str,
        *,
        session_settings: SessionSettings | dict[str, Any] | None = None,
        ensure_ascii: bool = True,
    ) -> GatewaySession:
        """A session of this tenant, to be handed to ``Runner.run``; no I/O.

        Raises:
            UsageError: the id is not one.
        """
        return GatewaySession(
            self.tenant_id,
            session_id,
            gateway=self._gateway,
            keyspace=self.keyspace,
            session_settings=session_settings,
            ensure_ascii=ensure_ascii,
        )

    async def list_sessions(
        self, *, limit: int = 50, cursor: str | None = None, allow_partial: bool = False
    ) -> SessionPage:
        """A page of at most ``limit`` (1 to 1000) sessions, most recently used first.

        Args:
            limit: how many at most.
            cursor: the page before's ``next_cursor``.
            allow_partial: return what the shards that answer have, and name the others.

        Raises:
            UsageError: the limit or the cursor is not one.
            ShardUnavailable: a shard does not answer, and ``allow_partial`` is not set.
        """
        limit = check_limit(limit)
        after = None if cursor is None else read_cursor(self.tenant_id, self.keyspace, cursor)
        pages, unavailable = await self._gateway._list(
            self.keyspace, self.tenant_id, limit + 1, after, partial_=allow_partial
        )
        found = merge(pages, limit + 1)
        more = len(found) > limit
        return SessionPage(
            sessions=found[:limit],
            next_cursor=(
                write_cursor(self.tenant_id, self.keyspace, found[limit - 1]) if more else None
            ),
            unavailable_shards=unavailable,
        )

    async def delete_session(self, session_id: str) -> bool:
        """Remove a session with all its items; whether there was one.

        Raises:
            UsageError: the id is not one.
            ShardUnavailable: its shard does not answer.
            OutcomeUnknown: its shard's answer was lost; ``settle`` of the session takes the op_id.
        """
        return await self.session(session_id)._delete()
