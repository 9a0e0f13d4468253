"""Writers against a mover: what is acknowledged is where its slot's owner is, once and in order.

The forms that are known to lose writes are run through the same checks, which have to find them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import delete, event, select, text, update
from sqlalchemy.ext.asyncio import create_async_engine

from gateway.shards import engine_at, named, session_on, settings_at
from ownership.mover import bump, decide, finish, move, pass_barrier, read_slot, uuid_of
from shardgate import Gateway
from shardgate.sql.create import transaction
from shardgate.sql.dialect import Outcome
from shardgate.sql.sqlite import SQLite

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from conftest import MakeDatabases
    from harness.servers import Backend
    from shardgate import Route
    from shardgate.session import GatewaySession
    from shardgate.shards import Shard
    from shardgate.sql.dialect import Append

SLOTS = 4
SHARERS, SHARED, LONERS = 8, 4, 4
"""Tasks that append to shared sessions, those sessions, and tasks with a session of their own."""
LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
POLL = 0.02
SECONDS = 30
"""Bounds a wait that has gone wrong."""

HEAT = 8
"""Rounds after which everything is checked and removed: what is copied has to stay small."""
PACE = 0.02
"""A writer's longest pause, in seconds, for the same reason."""


def written(writer: int, number: int) -> Any:
    return {"role": "user", "content": f"{writer} {number}"}


class Race:
    """Writers through two gateways with maps of their own, and what was acknowledged to them."""

    def __init__(self, doors: list[Gateway], *, seed: int) -> None:
        self._doors = doors
        self._random = random.Random(seed)
        self._ended = asyncio.Event()
        self.acknowledged: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.kept: dict[str, list[str]] = defaultdict(list)
        self.wrong: list[str] = []
        self._answers = 0

    async def run(self, moves: Callable[[Race], Awaitable[None]]) -> None:
        """Let the writers write for as long as ``moves`` takes."""
        async with asyncio.TaskGroup() as group:
            for writer in range(SHARERS):
                group.create_task(self._share(writer, f"shared-{writer % SHARED}"))
            for writer in range(SHARERS, SHARERS + LONERS):
                group.create_task(self._live_alone(writer, f"alone-{writer}"))
            await moves(self)
            self._ended.set()

    async def next_answers(self) -> None:
        """Wait until every writer could have had an answer since."""
        wanted = self._answers + SHARERS + LONERS
        while self._answers < wanted:  # noqa: ASYNC110 - every answer would have to set an event
            await asyncio.sleep(0.001)

    def _session(self, session_id: str) -> GatewaySession:
        return self._random.choice(self._doors).tenant("acme").session(session_id)

    async def _share(self, writer: int, session_id: str) -> None:
        number = 0
        while not self._ended.is_set():
            item = written(writer, number)
            await self._session(session_id).add_items([item])
            self.acknowledged[session_id][writer].append(str(item["content"]))
            number += 1
            await self._breathe()

    async def _live_alone(self, writer: int, session_id: str) -> None:
        """Nobody else writes here, so every answer is foreseen."""
        kept, number = self.kept[session_id], 0
        while not self._ended.is_set():
            session = self._session(session_id)
            act = self._random.choices(["add", "pop", "read", "clear"], [8, 3, 3, 1])[0]
            if act == "add":
                items = [written(writer, number + more) for more in range(3)]
                await session.add_items(items)
                kept += [str(item["content"]) for item in items]
                number += len(items)
            elif act == "pop":
                self._expect(act, contents([await session.pop_item()]), kept[-1:])
                del kept[-1:]
            elif act == "read":
                self._expect(act, contents(await session.get_items(2)), kept[-2:])
            else:
                await session.clear_session()
                kept.clear()
            await self._breathe()

    async def _breathe(self) -> None:
        self._answers += 1
        await asyncio.sleep(self._random.uniform(0, PACE))

    def _expect(self, act: str, found: list[str], expected: list[str]) -> None:
        if found != expected:
            self.wrong.append(f"{act}: {found}, not {expected}")

    async def faults(self) -> list[str]:
        """What is not as it was acknowledged, by reading through the gateway and in the tables."""
        faults = list(self.wrong)
        for session_id, writers in self.acknowledged.items():
            found = contents(await self._session(session_id).get_items())
            for writer, contents_ in writers.items():
                own = [content for content in found if content.startswith(f"{writer} ")]
                if own != contents_:
                    faults.append(f"{session_id}: {len(own)} of {len(contents_)} of {writer}")
            if len(found) != sum(map(len, writers.values())):
                faults.append(f"{session_id}: {len(found)} items altogether")
            faults += [
                f"{session_id}: {text} is with {name} and not with the owner"
                for name, door in self._doors[0].shards.items()
                for text in set(await stored(door, session_id)) - set(found)
            ]
        for session_id, kept in self.kept.items():
            if contents(await self._session(session_id).get_items()) != kept:
                faults.append(f"{session_id}: not as its only writer left it")
        return faults


def contents(items: list[Any]) -> list[str]:
    return [item["content"] for item in items if item is not None]


async def stored(shard: Shard, session_id: str) -> list[str]:
    """A session's items in a shard's tables, whoever owns the slot."""
    messages = shard.tables.messages

    async def act(connection: AsyncConnection) -> list[str]:
        rows = await connection.execute(
            select(messages.c.message_data).where(messages.c.session_id == session_id)
        )
        return [json.loads(data)["content"] for data in rows.scalars()]

    return await shard.query(act)


async def run_race(
    urls: dict[str, str], rounds: int, *, make: Callable[[str], AsyncEngine] | None = None
) -> None:
    """Race on two shards; AssertionError where anything acknowledged is not as it should be."""
    settings = settings_at(urls, slots=SLOTS)
    async with AsyncGateways() as gateways:
        *doors, mover = [await gateways.open(settings, urls, make) for _ in range(3)]
        known = mover._keyspaces["main"].map
        assert known is not None
        places = dict(enumerate(known.owners))
        for start in range(0, rounds, HEAT):
            race = Race(doors, seed=start)
            await race.run(partial(move_around, mover.shards, places, range(start, start + HEAT)))
            assert await race.faults() == []
            await check_places(race, doors[0], places)
            await asyncio.gather(*map(empty, mover.shards.values()))


async def move_around(
    shards: Mapping[str, Shard], places: dict[int, str], rounds: range, race: Race
) -> None:
    """Move the slots to and fro, one after the other; ``places`` says where they are."""
    for number in rounds:
        slot = number % SLOTS
        source = places[slot]
        (target,) = shards.keys() - {source}
        await move(shards[source], shards[target], slot, SLOTS)
        places[slot] = target
        await race.next_answers()


async def check_places(race: Race, door: Gateway, places: dict[int, str]) -> None:
    """AssertionError unless each slot had sessions, and they are where it was moved to."""
    assert min(len(race.acknowledged[f"shared-{n}"][n]) for n in range(SHARED)) > 1
    routes = [await settled_route(door, name) for name in race.acknowledged | race.kept]
    assert {route.slot: route.shard for route in routes} == places


async def empty(shard: Shard) -> None:
    async def act(connection: AsyncConnection) -> None:
        for table in shard.tables.slot_owned:
            await connection.execute(delete(table))

    await shard.transact(act)


async def settled_route(gateway: Gateway, session_id: str) -> Route:
    await gateway.tenant("acme").session(session_id).get_items(1)
    return gateway.route("acme", session_id)


class AsyncGateways:
    """Gateways that end together, with the engines that were made for them."""

    def __init__(self) -> None:
        self._gateways: list[Gateway] = []
        self._engines: list[AsyncEngine] = []

    async def __aenter__(self) -> AsyncGateways:
        return self

    async def __aexit__(self, *_: object) -> None:
        for gateway in self._gateways:
            await gateway.aclose()
        for engine in self._engines:
            await engine.dispose()

    async def open(
        self,
        settings: Any,
        urls: dict[str, str],
        make: Callable[[str], AsyncEngine] | None = None,
    ) -> Gateway:
        engines = {} if make is None else {name: make(url) for name, url in urls.items()}
        self._engines += engines.values()
        gateway = Gateway(settings, engines=engines)
        self._gateways.append(gateway)
        await gateway.open()
        return gateway


@pytest.mark.backends("sqlite", "postgresql-15", "mariadb", "mysql")
async def test_nothing_acknowledged_is_in_the_wrong_place(
    databases: MakeDatabases, backend: Backend
) -> None:
    await run_race(named(await databases(2)), 40)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.backends("sqlite", "postgresql", "mariadb", "mysql")
async def test_nothing_acknowledged_is_in_the_wrong_place_for_long(
    databases: MakeDatabases, backend: Backend
) -> None:
    await run_race(named(await databases(2)), 300)


def engine_of(level: str, family: str) -> Callable[[str], AsyncEngine]:
    """Makes engines on which this level is the default of engine and connection alike."""
    arguments: dict[str, Any] = {
        "postgresql": {"server_settings": {"default_transaction_isolation": level.lower()}},
        "mariadb": {"init_command": f"SET SESSION TRANSACTION ISOLATION LEVEL {level}"},
    }
    arguments["mysql"] = arguments["mariadb"]

    def make(url: str) -> AsyncEngine:
        return create_async_engine(url, isolation_level=level, connect_args=arguments[family])

    return make


@pytest.mark.backends("postgresql-15", "mariadb", "mysql")
@pytest.mark.parametrize("level", LEVELS)
async def test_at_every_isolation_level(
    databases: MakeDatabases, backend: Backend, level: str
) -> None:
    urls = named(await databases(2))
    await run_race(urls, 8, make=engine_of(level, backend.family))


# One interleaving, forced: the session's row is locked by somebody else, so that an append has
# passed its guard and has not written yet, while the mover comes.


class Interleaving:
    """A session with one item on shard a, to be moved to b, with its row locked by a third one."""

    def __init__(self, gateway: Gateway, urls: dict[str, str], session_id: str) -> None:
        self.gateway = gateway
        self.urls = urls
        self.session = gateway.tenant("acme").session(session_id)
        self.slot = gateway.route("acme", session_id).slot
        self.session_id = session_id
        self.source, self.target = gateway.shards["a"], gateway.shards["b"]

    @asynccontextmanager
    async def row_locked(self) -> AsyncIterator[None]:
        sessions = self.source.tables.sessions
        async with engine_at(self.urls["a"]) as engine, engine.begin() as connection:
            found = await connection.execute(
                select(sessions.c.h)
                .where(sessions.c.tenant_id == "acme", sessions.c.session_id == self.session_id)
                .with_for_update()
            )
            assert found.one_or_none() is not None
            yield

    async def waiting(self, count: int, *, unless: asyncio.Task[Any] | None = None) -> bool:
        """Wait until so many statements on shard a wait for a lock; False where ``unless`` ends."""
        family = self.source.engine.dialect.name
        query = text(_WAITING["postgresql" if family == "postgresql" else "mysql"])
        async with engine_at(self.urls["a"]) as engine:
            while unless is None or not unless.done():
                async with engine.connect() as connection:
                    if (await connection.execute(query)).scalar_one() >= count:
                        return True
                # InnoDB shows its waits anew if nobody has looked for 0.1 s.
                await asyncio.sleep(POLL if family == "postgresql" else 0.15)
        return False

    async def lost(self) -> bool:
        """Whether the acknowledged append is not where its session now lives."""
        found = contents(await self.session.get_items())
        assert self.gateway.route("acme", self.session_id).shard == "b"
        assert found in (["0 0", "0 1"], ["0 0"])
        return found == ["0 0"]

    async def meet(self, *, barrier: bool) -> bool:
        """Move while an append is between its guard and its write; whether the move waited."""
        async with self.row_locked():
            appending = asyncio.create_task(self.session.add_items([written(0, 1)]))
            await self.waiting(1)
            moving = asyncio.create_task(
                move(self.source, self.target, self.slot, SLOTS, barrier=barrier)
            )
            waited = await self.waiting(2, unless=moving)
            assert not appending.done()
        await appending
        await moving
        return waited


_WAITING = {
    "postgresql": (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ),
    "mysql": (
        "SELECT count(*) FROM information_schema.innodb_trx AS t"
        " JOIN information_schema.processlist AS p ON p.id = t.trx_mysql_thread_id"
        " WHERE t.trx_state = 'LOCK WAIT' AND p.db = DATABASE()"
    ),
}


@pytest.fixture
async def interleaving(databases: MakeDatabases) -> AsyncIterator[Interleaving]:
    urls = named(await databases(2))
    async with Gateway(settings_at(urls, slots=SLOTS)) as gateway:
        session_id = session_on(gateway, "a")
        await gateway.tenant("acme").session(session_id).add_items([written(0, 0)])
        yield Interleaving(gateway, urls, session_id)


def change_statement(shard: Shard, old: str, new: str) -> None:
    dialect: Any = shard.dialect
    assert old in dialect.append_sql
    dialect.append_sql = dialect.append_sql.replace(old, new)


@pytest.mark.backends("postgresql", "mariadb", "mysql")
async def test_a_move_waits_for_an_append_that_has_passed_its_guard(
    interleaving: Interleaving,
) -> None:
    assert await interleaving.meet(barrier=True)
    assert not await interleaving.lost()


@pytest.mark.backends("postgresql")
async def test_without_a_barrier_an_append_is_lost(interleaving: Interleaving) -> None:
    assert not await interleaving.meet(barrier=False)
    assert await interleaving.lost()


@pytest.mark.backends("mariadb", "mysql")
async def test_on_innodb_the_fence_itself_waits(interleaving: Interleaving) -> None:
    assert await interleaving.meet(barrier=False)
    assert not await interleaving.lost()


@pytest.mark.backends("postgresql", "mariadb", "mysql")
async def test_with_a_guard_that_locks_nothing_an_append_is_lost(
    interleaving: Interleaving, backend: Backend
) -> None:
    lock = " FOR KEY SHARE" if backend.family == "postgresql" else " LOCK IN SHARE MODE"
    change_statement(interleaving.source, lock, "")
    assert not await interleaving.meet(barrier=True)
    assert await interleaving.lost()


# The same on SQLite, where the mover has the database's write lock until the slot is away, and an
# append comes to its own BEGIN IMMEDIATE meanwhile. What a guard has read before is out of date.


class GuardedBefore(SQLite):
    """Known to be bad: the guard is read in a transaction of its own, before the append's."""

    def _append(self, connection: Any, append: Append) -> Outcome:
        if not self._holds(connection._conn, append.key, append.guard):
            return Outcome.REFUSED
        return super()._append(connection, replace(append, guard=None))


class Begun:
    """Is told when a connection to a shard begins to wait for the database's write lock."""

    def __init__(self, shard: Shard) -> None:
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        event.listen(shard.engine.sync_engine, "checkout", self._watch)

    def _watch(self, adapted: Any, *_: object) -> None:
        adapted.run_async(lambda connection: connection.set_trace_callback(self._note))

    def _note(self, statement: str) -> None:
        if statement == "BEGIN IMMEDIATE":
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await asyncio.wait_for(self._event.wait(), SECONDS)


async def moved_under_the_write_lock(at: Interleaving) -> None:
    """Move the slot while an append is on its way; the source's rows change in one commit."""
    slots, owner = at.source.tables.slots, await uuid_of(at.target)
    here, epoch = slots.c.slot == at.slot, 7
    away = {"state": "released", "owner": owner, "epoch": epoch}
    begun = Begun(at.source)
    async with engine_at(at.urls["a"]) as engine:
        async with transaction(engine) as connection:
            appending = asyncio.create_task(at.session.add_items([written(0, 1)]))
            await begun.wait()
            rows = await read_slot(at.source, at.slot, SLOTS)
            await decide(at.target, at.slot, owner, epoch, rows, SLOTS)
            await connection.execute(update(slots).where(here).values(away))
            await bump(connection, at.source)
        await asyncio.wait_for(appending, SECONDS)


@pytest.mark.backends("sqlite")
async def test_an_append_that_waits_for_the_write_lock_sees_the_fence(
    interleaving: Interleaving,
) -> None:
    await moved_under_the_write_lock(interleaving)
    assert not await interleaving.lost()
    assert await stored(interleaving.source, interleaving.session_id) == ["0 0"]


@pytest.mark.backends("sqlite")
async def test_a_guard_in_a_transaction_of_its_own_does_not_see_it(
    interleaving: Interleaving,
) -> None:
    source = interleaving.source
    source.dialect = GuardedBefore(source.tables, source.engine.dialect)
    await moved_under_the_write_lock(interleaving)
    assert await interleaving.lost()
    assert await stored(source, interleaving.session_id) == ["0 0", "0 1"]


# An append that looked at the slot's row before the fence's commit, and is held up there. To have a
# place where it can be held up, the fence locks the new version of the row, too.

_ADVISORY = "pg_advisory_xact_lock{shared}(4711)"
_SOMEBODY_WAITS = (
    "SELECT pid FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


@pytest.fixture
def local_processes(backend: Backend) -> None:
    if backend.how.startswith(("Docker", "TEST_")):
        pytest.skip("the server's processes are not on this machine")


class Straggler:
    """An append whose server process stands still while the slot is moved away."""

    def __init__(self, interleaving: Interleaving) -> None:
        self._at = interleaving
        self._process = 0

    @asynccontextmanager
    async def moved_past(self, barrier: Callable[[Shard, int], Awaitable[None]]) -> Any:
        at = self._at
        owner = await uuid_of(at.target)
        async with asyncio.TaskGroup() as group:
            epoch = await self._fence(group)
            try:
                await barrier(at.source, at.slot)
                await finish(at.source, at.target, at.slot, SLOTS, owner, epoch)
            finally:
                os.kill(self._process, signal.SIGCONT)
        yield

    async def _fence(self, group: asyncio.TaskGroup) -> int:
        """The fence, committed once the append waits at the slot's row and stands still."""
        at, slots = self._at, self._at.source.tables.slots
        here = slots.c.slot == at.slot
        change = {"state": "draining", "epoch": slots.c.epoch + 1}
        async with engine_at(at.urls["a"]) as engine, engine.begin() as connection:
            await connection.execute(text(f"SELECT {_ADVISORY.format(shared='')}"))
            await connection.execute(update(slots).where(here).values(change))
            locked = await connection.execute(select(slots.c.epoch).where(here).with_for_update())
            group.create_task(at.session.add_items([written(0, 1)]))
            await at.waiting(1)
            process = await connection.execute(text(_SOMEBODY_WAITS))
            self._process = int(process.scalar_one())
            os.kill(self._process, signal.SIGSTOP)
        return int(locked.scalar_one())


async def lock_only(shard: Shard, slot: int) -> None:
    slots = shard.tables.slots

    async def act(connection: AsyncConnection) -> None:
        await connection.execute(select(slots.c.slot).where(slots.c.slot == slot).with_for_update())

    await shard.transact(act)


@pytest.mark.usefixtures("local_processes")
@pytest.mark.backends("postgresql")
async def test_an_append_that_is_held_up_at_its_guard_sees_the_fence(
    interleaving: Interleaving,
) -> None:
    async with Straggler(interleaving).moved_past(pass_barrier):
        assert not await interleaving.lost()
    assert await stored(interleaving.source, interleaving.session_id) == ["0 0"]


@pytest.mark.usefixtures("local_processes")
@pytest.mark.backends("postgresql")
async def test_a_barrier_that_only_locks_lets_it_by(interleaving: Interleaving) -> None:
    async with Straggler(interleaving).moved_past(lock_only):
        assert await interleaving.lost()
    assert await stored(interleaving.source, interleaving.session_id) == ["0 0", "0 1"]


@pytest.mark.usefixtures("local_processes")
@pytest.mark.backends("postgresql")
async def test_an_advisory_lock_in_the_same_statement_does_not_see_the_fence(
    interleaving: Interleaving,
) -> None:
    """Its snapshot is from before the lock."""
    advisory = f" AND {_ADVISORY.format(shared='_shared')} IS NOT NULL"
    change_statement(interleaving.source, " FOR KEY SHARE", advisory)
    async with Straggler(interleaving).moved_past(pass_barrier):
        assert await interleaving.lost()
