"""Servers that are replaced: by an older copy of themselves, by a standby, by nothing.

A shard that was restored from before a recorded change is found out, by processes that are running
and by new ones, and nothing is written to it; a plain restart or failover is not noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from gateway.shards import content, execute, identity, item, session_on, settings_at
from harness.servers import LocalServer, SQLiteServer
from once.history import History
from once.wire import HoldingProxy
from ownership.mover import move
from shardgate import Gateway, OwnershipConflict, ShardQuarantined, UsageError
from shardgate.agreement import Plan
from shardgate.control import reconcile
from shardgate.engines import make_engine
from shardgate.records import publish, read_record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from conftest import MakeDatabases, StartServer
    from harness.servers import Backend
    from shardgate.session import GatewaySession

T = TypeVar("T")

SLOTS = 16

pytestmark = pytest.mark.backends("sqlite", "postgresql-18", "mariadb", "mysql")


class Copies(ABC):
    """A database that can be copied as a whole, and put back as it was."""

    url: str

    @abstractmethod
    async def save(self) -> Path: ...

    @abstractmethod
    async def restore(self, copy: Path) -> None: ...


@dataclass
class ServerCopies(Copies):
    """A server with a database: its data directory is copied while it does not run."""

    server: LocalServer
    url: str

    async def save(self) -> Path:
        await self.server.stop()
        copy = self.server.save()
        await self.server.start()
        return copy

    async def restore(self, copy: Path) -> None:
        await self.server.kill()
        self.server.restore(copy)
        await self.server.start()


@dataclass
class FileCopies(Copies):
    """A SQLite file. It is put back as another file, as any tool does that writes a whole one."""

    url: str

    @property
    def _file(self) -> Path:
        return Path(str(make_url(self.url).database))

    async def save(self) -> Path:
        copy = self._file.with_suffix(".copy")
        await content(self.url)  # the last connection to go writes the log back into the file
        shutil.copy(self._file, copy)
        return copy

    async def restore(self, copy: Path) -> None:
        self._remove_log()
        fresh = self._file.with_suffix(".new")
        shutil.copy(copy, fresh)
        fresh.replace(self._file)

    def remove(self) -> None:
        self._remove_log()
        self._file.unlink()

    def _remove_log(self) -> None:
        for end in ("-wal", "-shm"):
            Path(f"{self._file}{end}").unlink(missing_ok=True)


@pytest.fixture
async def copies(backend: Backend, databases: MakeDatabases, start_server: StartServer) -> Copies:
    if backend.family == "sqlite":
        (database,) = await databases(1)
        assert isinstance(database.server, SQLiteServer)
        return FileCopies(database.url)
    server = await start_server(backend)
    assert isinstance(server, LocalServer)
    return ServerCopies(server, await server.create_database())


@pytest.fixture
async def urls(databases: MakeDatabases, copies: Copies) -> dict[str, str]:
    """Three shards; b is the one that is copied and restored."""
    a, c = await databases(2)
    return {"a": a.url, "b": copies.url, "c": c.url}


@pytest.fixture(autouse=True)
def short_quarantine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardgate.shards.QUARANTINE_SECONDS", 0.1)


def settings(urls: dict[str, str]) -> Any:
    return settings_at(urls, slots=SLOTS, create_tables=True)


async def moved(urls: dict[str, str], slot: int, source: str, target: str) -> None:
    """Move a slot and have it recorded, as a mover does."""
    async with Gateway(settings(urls)) as mover:
        shards = mover.shards
        await move(shards[source], shards[target], slot, SLOTS)
        records = {name: await read_record(shard) for name, shard in shards.items()}
        await publish(shards, {name: record.identity for name, record in records.items() if record})


async def cold(gateway: Gateway, shard: str) -> None:
    """Have the next operation connect anew, where a file may have been exchanged unnoticed."""
    if gateway.shards[shard].dialect.one_thread:
        await gateway.shards[shard].engine.dispose()


def texts(items: list[Any]) -> list[str]:
    return [one["content"] for one in items]


@dataclass
class Restored:
    """A keyspace in which b is a copy from before one of its slots was moved.

    ``running`` has been open all the time and knows nothing of the move.
    """

    urls: dict[str, str]
    running: Gateway
    on_b: str
    moved: str
    slot: int

    def session(self, gateway: Gateway, session_id: str) -> GatewaySession:
        return gateway.tenant("acme").session(session_id)

    async def remedy(self) -> reconcile.Remedy:
        async with Gateway(settings(self.urls)) as gateway:
            plan = Plan.of(gateway.settings, "main")
            return await reconcile.examine(plan, gateway.shards, "b")

    async def apply(self, remedy: reconcile.Remedy, *, accept_loss: bool = False) -> None:
        async with Gateway(settings(self.urls)) as gateway:
            plan = Plan.of(gateway.settings, "main")
            await reconcile.apply(plan, gateway.shards, remedy, accept_loss=accept_loss)


def _two_slots(gateway: Gateway, shard: str) -> tuple[str, str]:
    """Two sessions of a shard in different slots."""
    first = session_on(gateway, shard)
    slot = gateway.route("acme", first).slot
    others = (f"other-{number}" for number in range(1000))
    routes = ((one, gateway.route("acme", one)) for one in others)
    return first, next(one for one, at in routes if at.shard == shard and at.slot != slot)


@pytest.fixture
async def restored(urls: dict[str, str], copies: Copies) -> AsyncIterator[Restored]:
    """b has lost the news that a slot was moved from it to a, with a session."""
    async with Gateway(settings(urls)) as running:
        on_b, moving = _two_slots(running, "b")
        slot = running.route("acme", moving).slot
        for session_id in (on_b, moving, session_on(running, "a"), session_on(running, "c")):
            await running.tenant("acme").session(session_id).add_items([item("one")])
        await cold(running, "b")
        copy = await copies.save()
        await moved(urls, slot, "b", "a")
        async with Gateway(settings(urls)) as informed:
            await informed.tenant("acme").session(moving).add_items([item("two")])
            assert informed.route("acme", moving).shard == "a"
        await cold(running, "b")
        await copies.restore(copy)
        yield Restored(urls, running, on_b, moving, slot)


async def _meets_the_new_server(session: GatewaySession) -> None:
    """A write's outcome would be unknown: it may have been sent on a connection that was dead."""
    with contextlib.suppress(ShardQuarantined):
        await session.get_items()


async def served_again(act: Callable[[], Awaitable[T]]) -> T:
    """The answer, once the quarantine has been looked at again."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await act()
            except ShardQuarantined:
                await asyncio.sleep(0.05)


async def refused(act: Callable[[], Awaitable[Any]]) -> None:
    with pytest.raises(ShardQuarantined, match=r"shard 'b' is in quarantine.*older copy") as caught:
        await act()
    assert caught.value.shard == "b"


@pytest.mark.parametrize("who", ["running", "new"])
async def test_an_older_copy_is_found_out(who: str, restored: Restored) -> None:
    before = await content(restored.urls["b"])
    if who == "running":
        await _is_found_out(restored, restored.running)
    else:
        async with Gateway(settings(restored.urls)) as new:
            await _is_found_out(restored, new)
    assert await content(restored.urls["b"]) == before


async def _is_found_out(restored: Restored, gateway: Gateway) -> None:
    session = restored.session(gateway, restored.moved)
    await session.add_items([item("three")])  # a running process believes that it is b's
    assert texts(await session.get_items()) == ["one", "two", "three"]
    assert gateway.route("acme", restored.moved).shard == "a"

    left = restored.session(gateway, restored.on_b)
    for act in (
        lambda: left.add_items([item("lost?")]),
        left.pop_item,
        left.clear_session,
        lambda: gateway.tenant("acme").delete_session(restored.on_b),
    ):
        await refused(act)
    assert texts(await left.get_items()) == ["one"]  # nobody else claims its slot
    for shard in "ac":
        other = restored.session(gateway, session_on(gateway, shard))
        await other.add_items([item("served")])
        assert texts(await other.get_items())[-1] == "served"

    page = await gateway.tenant("acme").list_sessions()
    assert sorted(info.session_id for info in page.sessions) == sorted(
        {restored.on_b, restored.moved, session_on(gateway, "a"), session_on(gateway, "c")}
    )
    count = {info.session_id: info.item_count for info in page.sessions}
    assert count[restored.moved] == 3
    report = await gateway.check()
    assert [name for name, health in report.shards.items() if not health.ok] == ["b"]
    assert "older copy" in str(report.shards["b"].error)


async def test_reconciling_gives_up_what_others_own(restored: Restored) -> None:
    before = await content(restored.urls["b"])
    await _meets_the_new_server(restored.session(restored.running, restored.on_b))
    await refused(lambda: restored.session(restored.running, restored.on_b).pop_item())
    remedy = await restored.remedy()
    assert "older copy" in str(remedy.problem)
    assert not remedy.loses
    assert remedy.steps[0] == f"give slots {restored.slot} up to shard 'a', which owns them"
    assert await content(restored.urls["b"]) == before

    await restored.apply(remedy)
    for gateway in (restored.running, Gateway(settings(restored.urls))):
        left = restored.session(gateway, restored.on_b)
        await served_again(partial(left.add_items, [item("more")]))
        assert texts(await left.get_items())[:2] == ["one", "more"]
        assert texts(await restored.session(gateway, restored.moved).get_items()) == ["one", "two"]
        assert (await gateway.check()).ok
        if gateway is not restored.running:
            await gateway.aclose()
    assert (await restored.remedy()).problem is None


async def test_a_remedy_that_is_out_of_date_does_nothing(restored: Restored) -> None:
    remedy = await restored.remedy()
    await restored.apply(remedy)
    before = await content(restored.urls["b"])
    with pytest.raises(Exception, match="changed meanwhile"):
        await restored.apply(remedy)
    assert await content(restored.urls["b"]) == before


async def test_a_slot_that_had_come_after_the_copy(urls: dict[str, str], copies: Copies) -> None:
    """Nobody has it now; it is taken again, without what was stored since, if that is accepted."""
    async with Gateway(settings(urls)) as running:
        coming = session_on(running, "a")
        slot = running.route("acme", coming).slot
        await running.tenant("acme").session(coming).add_items([item("one")])
        await cold(running, "b")
        copy = await copies.save()
        await moved(urls, slot, "a", "b")
        session = running.tenant("acme").session(coming)
        await session.add_items([item("two")])
        assert running.route("acme", coming).shard == "b"
        await cold(running, "b")
        await copies.restore(copy)
        with pytest.raises(ShardQuarantined, match="older copy"):
            await session.get_items()
        await refused(lambda: session.add_items([item("lost?")]))

        at = Restored(urls, running, coming, coming, slot)
        remedy = await at.remedy()
        assert remedy.loses
        assert remedy.steps[0].startswith(f"have it own slots {slot} again, without")
        with pytest.raises(UsageError, match="lost for good"):
            await at.apply(remedy)
        await at.apply(remedy, accept_loss=True)
        assert await served_again(session.get_items) == []
        await session.add_items([item("anew")])
        assert texts(await session.get_items()) == ["anew"]
        assert (await running.check()).ok


async def test_a_plain_restart_is_not_noticed(urls: dict[str, str], copies: Copies) -> None:
    async with Gateway(settings(urls)) as gateway:
        session = gateway.tenant("acme").session(session_on(gateway, "b"))
        await session.add_items([item("one")])
        await cold(gateway, "b")
        await copies.restore(await copies.save())
        await session.add_items([item("two")])
        assert texts(await session.get_items()) == ["one", "two"]
        assert gateway.shards["b"].quarantine is None


async def test_a_copy_from_after_the_last_change_is_believed(
    urls: dict[str, str], copies: Copies
) -> None:
    """It cannot be found out: who owns what is the same in both. This is said in the docs."""
    async with Gateway(settings(urls)) as gateway:
        session = gateway.tenant("acme").session(session_on(gateway, "b"))
        await session.add_items([item("one")])
        await cold(gateway, "b")
        copy = await copies.save()
        await session.add_items([item("two")])
        await cold(gateway, "b")
        await copies.restore(copy)
        assert texts(await session.get_items()) == ["one"]


@pytest.mark.backends("postgresql-18", "mariadb")
async def test_a_restart_while_every_peer_is_down(
    backend: Backend, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A dead shard takes down its own sessions only."""
    one, other = await start_server(backend), await start_server(backend)
    urls = {"a": await one.create_database(), "b": await other.create_database()}
    async with Gateway(settings(urls)) as gateway:
        session = gateway.tenant("acme").session(session_on(gateway, "b"))
        await session.add_items([item("one")])
        await one.kill()
        await other.kill()
        await other.start()
        await session.add_items([item("two")])
        assert texts(await session.get_items()) == ["one", "two"]
        assert "none of its peers answers" in caplog.text
        await one.start()


@pytest.mark.backends("sqlite")
async def test_a_shard_that_has_lost_everything(urls: dict[str, str], copies: Copies) -> None:
    """It is made again, empty, under its old identity, if that is accepted by name."""
    async with Gateway(settings(urls)) as gateway:
        on_b = session_on(gateway, "b")
        await gateway.tenant("acme").session(on_b).add_items([item("one")])
    known = await identity(urls["b"])
    assert isinstance(copies, FileCopies)
    copies.remove()
    async with Gateway(settings(urls)) as gateway:
        at = Restored(urls, gateway, on_b, on_b, 0)
        remedy = await at.remedy()
        assert remedy.loses
        with pytest.raises(UsageError, match="lost for good"):
            await at.apply(remedy)
        await at.apply(remedy, accept_loss=True)
        session = gateway.tenant("acme").session(on_b)
        assert await served_again(session.get_items) == []
        await session.add_items([item("anew")])
        assert texts(await session.get_items()) == ["anew"]
        assert (await gateway.check()).ok
    assert (await identity(urls["b"]))["shard_uuid"] == known["shard_uuid"]
    assert (await at.remedy()).problem is None


@pytest.mark.usefixtures("long_outages")
@pytest.mark.backends("postgresql-18")
async def test_a_failover_to_a_standby(
    databases: MakeDatabases, backend: Backend, start_server: StartServer
) -> None:
    """Commits are synchronous to it: it has everything, and goes on unaided."""
    from harness.postgresql import PostgreSQLServer

    (a,) = await databases(1)
    primary = await start_server(backend, durable=True)
    assert isinstance(primary, PostgreSQLServer)
    url = await primary.create_database()
    standby = await primary.standby()
    try:
        await standby.start()
        await primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await primary.execute("SELECT pg_reload_conf()")
        async with (
            HoldingProxy.in_front_of(url) as proxy,
            Gateway(settings({"a": a.url, "b": proxy.url(url)})) as gateway,
        ):
            await _fails_over(gateway, proxy, primary, standby)
    finally:
        await asyncio.to_thread(standby.close)


async def _fails_over(gateway: Gateway, proxy: HoldingProxy, primary: Any, standby: Any) -> None:
    session: Any = gateway.tenant("acme").session(session_on(gateway, "b"))
    history, ended = History(), asyncio.Event()

    async def append(writer: int) -> None:
        while not ended.is_set():
            await history.append(session, f"w{writer}")

    async def fail_over() -> None:
        while len(history.operations) < 50:  # noqa: ASYNC110 - every writer would set it
            await asyncio.sleep(0.01)
        await primary.kill()
        await standby.promote()
        proxy.target = ("127.0.0.1", standby.port)
        proxy.cut()
        before = len(history.operations)
        while len(history.operations) < before + 50:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        ended.set()

    async with asyncio.TaskGroup() as group:
        for writer in range(8):
            group.create_task(append(writer))
        group.create_task(fail_over())
    assert history.errors() == []
    assert history.problems(await session.get_items()) == []
    assert gateway.shards["b"].quarantine is None


def _attempts(session: GatewaySession, count: int) -> Any:
    return [session.add_items([item(f"lost {number}?")]) for number in range(count)]


@pytest.fixture
async def behind(urls: dict[str, str], copies: Copies) -> AsyncIterator[tuple[Gateway, str, Path]]:
    """A running gateway, a session on b, and a copy of b from before a recorded change."""
    async with Gateway(settings(urls)) as gateway:
        on_b, moving = _two_slots(gateway, "b")
        await gateway.tenant("acme").session(on_b).add_items([item("one")])
        await cold(gateway, "b")
        copy = await copies.save()
        await moved(urls, gateway.route("acme", moving).slot, "b", "a")
        yield gateway, on_b, copy


@pytest.mark.backends("sqlite")
async def test_each_connection_is_judged_by_what_it_says_itself(
    behind: tuple[Gateway, str, Path], urls: dict[str, str], copies: Copies
) -> None:
    """A connection of the pool leads to the file as it was, another one to the restored copy."""
    gateway, on_b, copy = behind
    session = gateway.tenant("acme").session(on_b)
    await session.get_items()
    engine = gateway.shards["b"].engine
    async with engine.connect() as old:
        await old.exec_driver_sql("SELECT 1")
        await copies.restore(copy)
        async with engine.connect() as new:
            await new.exec_driver_sql("SELECT 1")
    before = await content(urls["b"])
    await asyncio.gather(*_attempts(session, 6), return_exceptions=True)
    assert await content(urls["b"]) == before
    await cold(gateway, "b")


@pytest.mark.backends("sqlite")
async def test_two_gateways_on_one_engine_judge_for_themselves(
    urls: dict[str, str], copies: Copies
) -> None:
    engine = make_engine(urls["b"], {})
    try:
        async with (
            Gateway(settings(urls), engines={"b": engine}) as one,
            Gateway(settings(urls), engines={"b": engine}) as other,
        ):
            on_b, moving = _two_slots(one, "b")
            sessions = [gateway.tenant("acme").session(on_b) for gateway in (one, other)]
            await sessions[0].add_items([item("one")])
            await engine.dispose()
            copy = await copies.save()
            await moved(urls, one.route("acme", moving).slot, "b", "a")
            await copies.restore(copy)
            before = await content(urls["b"])
            for session in sessions:
                await refused(partial(session.add_items, [item("lost?")]))
                await refused(partial(session.add_items, [item("lost?")]))
            assert await content(urls["b"]) == before
    finally:
        await engine.dispose()


@pytest.mark.backends("sqlite")
async def test_a_quarantine_is_not_lifted_because_the_witnesses_are_away(
    urls: dict[str, str], copies: Copies, tmp_path: Path
) -> None:
    """The process has seen who b is; another deployment's b says nothing against itself."""
    staging = {name: f"sqlite+aiosqlite:///{tmp_path / name}.db" for name in "abc"}
    async with Gateway(settings(staging)):
        pass
    async with Gateway(settings(urls)) as gateway:
        session = gateway.tenant("acme").session(session_on(gateway, "b"))
        await session.add_items([item("one")])
        await cold(gateway, "b")
        other = Path(str(make_url(staging["b"]).database))
        await copies.restore(other)
        before = await content(urls["b"])
        wrong = pytest.raises(ShardQuarantined, match="shard 'b' says that its shard_uuid is")
        with wrong:
            await session.add_items([item("lost?")])
        for name in "ac":
            await cold(gateway, name)
            moved_away = Path(str(make_url(urls[name]).database))
            await asyncio.to_thread(moved_away.rename, moved_away.with_suffix(".away"))
            await asyncio.to_thread(moved_away.mkdir)
        for _ in range(5):
            await asyncio.sleep(0.15)  # longer than a quarantine stays unexamined
            with pytest.raises((ShardQuarantined, OwnershipConflict)):
                await session.add_items([item("lost?")])
        for name in "ac":
            moved_away = Path(str(make_url(urls[name]).database))
            await asyncio.to_thread(moved_away.rmdir)
            await asyncio.to_thread(moved_away.with_suffix(".away").rename, moved_away)
        assert await content(urls["b"]) == before


@pytest.mark.backends("sqlite")
async def test_a_peer_that_refuses_statements_takes_nobody_with_it(
    urls: dict[str, str], copies: Copies
) -> None:
    async with Gateway(settings(urls)) as gateway:
        on_b = gateway.tenant("acme").session(session_on(gateway, "b"))
        await on_b.add_items([item("one")])
        await execute(urls["a"], text("DROP TABLE shardgate_peers"))
        await cold(gateway, "b")
        await copies.restore(await copies.save())
        await on_b.add_items([item("two")])
        assert texts(await on_b.get_items()) == ["one", "two"]
        async with Gateway(settings(urls)) as new:
            await new.tenant("acme").session(on_b.key.session_id).add_items([item("three")])
            report = await new.check()
            assert [name for name, health in report.shards.items() if not health.ok] == ["a"]


@pytest.mark.backends("postgresql-18")
@pytest.mark.parametrize("deadline", [5, 10])
async def test_a_restart_beside_a_peer_that_hangs(
    deadline: int, databases: MakeDatabases, backend: Backend, start_server: StartServer
) -> None:
    """It is waited for, but for a part of the deadline only."""
    hanging, c = await databases(2)
    server = await start_server(backend)
    url = await server.create_database()
    async with HoldingProxy.in_front_of(hanging.url) as proxy:
        urls = {"a": proxy.url(hanging.url), "b": url, "c": c.url}
        values = settings_at(urls, slots=SLOTS, operation_deadline=deadline)
        async with Gateway(values) as gateway:
            session = gateway.tenant("acme").session(session_on(gateway, "b"))
            await session.add_items([item("one")])
            proxy.freeze()
            await server.kill()
            await server.start()
            await session.add_items([item("two")])
            assert texts(await session.get_items()) == ["one", "two"]
            proxy.resume()


@pytest.mark.backends("postgresql-18")
@pytest.mark.parametrize("pool", [{"pool_pre_ping": True}, {"poolclass": NullPool}], ids=str)
async def test_a_database_that_is_replaced_in_a_running_server(
    pool: dict[str, Any], databases: MakeDatabases, backend: Backend, start_server: StartServer
) -> None:
    """No connection is seen to be lost, and the server is the same run."""
    a, c = await databases(2)
    server = await start_server(backend)
    url = await server.create_database("tenants")
    urls = {"a": a.url, "b": url, "c": c.url}
    engine = create_async_engine(url, **pool)
    try:
        async with Gateway(settings(urls), engines={"b": engine}) as gateway:
            on_b, moving = _two_slots(gateway, "b")
            session = gateway.tenant("acme").session(on_b)
            await session.add_items([item("one")])
            await engine.dispose()
            await server._execute('CREATE DATABASE "copy" TEMPLATE "tenants"')
            await moved(urls, gateway.route("acme", moving).slot, "b", "a")
            await server._execute(
                'DROP DATABASE "tenants" WITH (FORCE)', 'CREATE DATABASE "tenants" TEMPLATE "copy"'
            )
            await refused(partial(session.add_items, [item("lost?")]))
            assert texts(await session.get_items()) == ["one"]
    finally:
        await engine.dispose()
