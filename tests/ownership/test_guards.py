"""Every statement proves ownership: stale gateways, foreign rows, tenants, exchanged databases."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, update
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from gateway.shards import content, execute, item, named, patient, records, session_on, settings_at
from ownership.mover import decide, fence, finish, move, pass_barrier, read_slot, release, uuid_of
from shardgate import (
    Gateway,
    GatewaySettings,
    OwnershipConflict,
    ShardQuarantined,
    TenantRefused,
    metadata,
)
from shardgate.keyspace import Keyspace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from conftest import MakeDatabases
    from harness.processes import Children
    from shardgate.session import GatewaySession
    from shardgate.shards import Shard

SLOTS = 16
TABLES = metadata().tables
SLOT_ROWS, TENANT_ROWS = TABLES["shardgate_slots"], TABLES["shardgate_tenants"]
TASKS = 20

one_of_each = pytest.mark.backends("sqlite", "postgresql-15", "mariadb", "mysql")
only_sqlite = pytest.mark.backends("sqlite")


def texts(items: list[Any]) -> list[str]:
    return [item["content"] for item in items]


@dataclass
class Moved:
    """A session of three items on shard a, a gateway that knows it there, and who moves it."""

    stale: Gateway
    mover: Gateway
    urls: dict[str, str]
    session_id: str
    slot: int

    @property
    def session(self) -> GatewaySession:
        return self.stale.tenant("acme").session(self.session_id)

    @property
    def source(self) -> Shard:
        return self.mover.shards["a"]

    @property
    def target(self) -> Shard:
        return self.mover.shards["b"]

    async def move(self) -> None:
        await move(self.source, self.target, self.slot, SLOTS)
        assert self.stale.route("acme", self.session_id).shard == "a"

    async def stored(self, name: str, table: str = "messages") -> list[dict[str, Any]]:
        rows = await records(self.urls[name], table)
        return [row for row in rows if row["session_id"] == self.session_id]


@pytest.fixture
async def moved(databases: MakeDatabases) -> AsyncIterator[Moved]:
    urls = named(await databases(2))
    settings = settings_at(urls, slots=SLOTS)
    async with Gateway(settings) as stale, Gateway(settings) as mover:
        session_id = session_on(stale, "a")
        slot = stale.route("acme", session_id).slot
        await (
            stale.tenant("acme")
            .session(session_id)
            .add_items([item("one"), item("two"), item("three")])
        )
        yield Moved(stale, mover, urls, session_id, slot)


async def append(at: Moved) -> list[str]:
    await at.session.add_items([item("four")])
    return ["one", "two", "three", "four"]


async def read(at: Moved) -> list[str]:
    assert texts(await at.session.get_items(2)) == ["two", "three"]
    return ["one", "two", "three"]


async def pop(at: Moved) -> list[str]:
    assert texts([await at.session.pop_item()]) == ["three"]
    return ["one", "two"]


async def clear(at: Moved) -> list[str]:
    await at.session.clear_session()
    return []


async def replace(at: Moved) -> list[str]:
    assert await at.session._atomic_replace_items([item("in short")])
    return ["in short"]


async def compact(at: Moved) -> list[str]:
    snapshot = await at.session._get_compaction_snapshot(10)
    assert snapshot is not None
    assert texts(snapshot.items) == ["one", "two", "three"]
    assert await snapshot.replace_suffix(1, [item("in short")])
    return ["one", "in short"]


async def delete(at: Moved) -> list[str]:
    assert await at.stale.tenant("acme").delete_session(at.session_id)
    return []


async def list_sessions(at: Moved) -> list[str]:
    page = await at.stale.tenant("acme").list_sessions()
    assert [info.session_id for info in page.sessions] == [at.session_id]
    return ["one", "two", "three"]


ACTS = [append, read, pop, clear, replace, compact, delete, list_sessions]


@one_of_each
@pytest.mark.parametrize("act", ACTS)
async def test_a_stale_gateway_finds_the_new_place(
    moved: Moved, act: Callable[[Moved], Awaitable[list[str]]]
) -> None:
    await moved.move()
    left = await moved.stored("a"), await moved.stored("a", "sessions")
    expected = await act(moved)
    assert texts(await moved.session.get_items()) == expected
    fresh = moved.mover.tenant("acme").session(moved.session_id)
    assert texts(await fresh.get_items()) == expected
    assert moved.stale.route("acme", moved.session_id).shard == "b"
    assert (await moved.stored("a"), await moved.stored("a", "sessions")) == left


@one_of_each
async def test_a_move_between_the_reading_and_the_replacing(moved: Moved) -> None:
    snapshot = await moved.session._get_compaction_snapshot(10)
    assert snapshot is not None
    await moved.move()
    assert await snapshot.replace_suffix(1, [item("in short")])
    assert texts(await moved.session.get_items()) == ["one", "in short"]


@one_of_each
async def test_a_draining_slot_makes_callers_wait(moved: Moved) -> None:
    """Readers as well: the target may own the slot already."""
    epoch = await fence(moved.source, moved.slot)
    await pass_barrier(moved.source, moved.slot)
    asked = asyncio.Event()
    event.listen(
        moved.stale.shards["a"].engine.sync_engine,
        "before_cursor_execute",
        lambda *_: asked.set(),
    )
    async with asyncio.TaskGroup() as group:
        adding = group.create_task(moved.session.add_items([item("four")]))
        await _looked(asked)
        reading = group.create_task(moved.session.get_items())
        listing = group.create_task(moved.stale.tenant("acme").list_sessions())
        await _looked(asked)
        await _looked(asked)
        assert not [task for task in (adding, reading, listing) if task.done()]
        owner = await uuid_of(moved.target)
        await finish(moved.source, moved.target, moved.slot, SLOTS, owner, epoch)
    assert texts(reading.result())[:3] == ["one", "two", "three"]
    assert len(listing.result().sessions) == 1
    assert texts(await moved.session.get_items()) == ["one", "two", "three", "four"]
    assert len(await moved.stored("a")) == 3


async def _looked(asked: asyncio.Event) -> None:
    """Wait until a caller has asked the source why its guard failed, once more."""
    asked.clear()
    await asked.wait()


@one_of_each
async def test_a_drain_that_is_called_off_lets_callers_go_on(moved: Moved) -> None:
    epoch = await fence(moved.source, moved.slot)
    adding = asyncio.create_task(moved.session.add_items([item("four")]))
    here = SLOT_ROWS.c.slot == moved.slot
    reopened = update(SLOT_ROWS).where(here).values(state="owned", epoch=epoch + 1)
    await execute(moved.urls["a"], reopened)
    await adding
    assert len(await moved.stored("a")) == 4


@one_of_each
async def test_rows_copied_ahead_are_not_seen(moved: Moved) -> None:
    """A copy on the target, with an older state, before the slot is its own."""
    rows = await read_slot(moved.source, moved.slot, SLOTS)
    own = await uuid_of(moved.source)
    await decide(moved.target, moved.slot, own, 1, rows, SLOTS)
    await release(moved.target, moved.slot, own, 1)
    await moved.session.add_items([item("four")])
    for gateway in (moved.stale, moved.mover):
        tenant = gateway.tenant("acme")
        assert len(await tenant.session(moved.session_id).get_items()) == 4
        page = await tenant.list_sessions()
        assert [info.item_count for info in page.sessions] == [4]
    assert texts([await moved.session.pop_item()]) == ["four"]
    assert len(await moved.stored("b")) == 3


@one_of_each
async def test_rows_left_behind_are_not_seen_on_any_page(moved: Moved) -> None:
    tenant = moved.stale.tenant("acme")
    for number in range(40):
        await tenant.session(f"more-{number}").add_items([item("more")])
    before = {info.session_id for info in (await tenant.list_sessions(limit=100)).sessions}
    assert len(before) == 41
    owners = moved.stale._keyspaces["main"].map
    assert owners is not None
    for slot in [slot for slot, owner in enumerate(owners.owners) if owner == "a"][::2]:
        await move(moved.source, moved.target, slot, SLOTS)
    for gateway in (moved.stale, moved.mover):
        found: list[str] = []
        cursor = None
        while True:
            page = await gateway.tenant("acme").list_sessions(limit=3, cursor=cursor)
            found += [info.session_id for info in page.sessions]
            cursor = page.next_cursor
            if cursor is None:
                break
        assert len(found) == len(before)
        assert set(found) == before
    kept = {row["session_id"] for row in await records(moved.urls["a"], "sessions")}
    gone = {row["session_id"] for row in await records(moved.urls["b"], "sessions")}
    assert kept & gone  # otherwise nothing was left behind


@one_of_each
async def test_a_suspended_tenant_is_refused(moved: Moved) -> None:
    await execute(moved.urls["a"], update(TENANT_ROWS).values(status="suspended"))
    acts: list[Callable[[Moved], Awaitable[Any]]] = [append, read, pop, clear, replace, delete]
    for act in acts:
        with pytest.raises(TenantRefused, match="suspended") as caught:
            await act(moved)
        assert caught.value.tenant == "acme"
    assert len(await moved.stored("a")) == 3
    other = moved.stale.tenant("globex").session(moved.session_id)
    await other.add_items([item("not concerned")])
    await execute(moved.urls["a"], update(TENANT_ROWS).values(status="admitted"))
    assert len(await moved.session.get_items()) == 3


async def first_use(argument: dict[str, Any]) -> int:
    """Use a tenant for the first time, by many tasks at once, on every slot."""
    async with Gateway(GatewaySettings.from_dict(argument["settings"])) as gateway:
        tenant = gateway.tenant("new")
        await asyncio.gather(
            *(tenant.session(f"chat-{n}").add_items([item("first")]) for n in range(TASKS))
        )
        return TASKS


def _settings(urls: dict[str, str]) -> dict[str, Any]:
    return {
        "shards": {name: {"url": url} for name, url in urls.items()},
        "keyspaces": {"main": {"slots": SLOTS}},
        "operation_deadline": 20,
    }


@one_of_each
async def test_first_use_admits_a_tenant_once_on_each_shard(moved: Moved) -> None:
    await first_use({"settings": _settings(moved.urls)})
    for url in moved.urls.values():
        rows = [row for row in await records(url, "tenants") if row["tenant_id"] == "new"]
        assert [row["status"] for row in rows] == ["admitted"]


@one_of_each
@pytest.mark.processes
async def test_first_use_by_two_processes(moved: Moved, children: Children) -> None:
    argument = {"settings": _settings(moved.urls)}
    await children.run("ownership.test_guards:first_use", [argument, argument])
    for url in moved.urls.values():
        rows = [row for row in await records(url, "tenants") if row["tenant_id"] == "new"]
        assert [row["status"] for row in rows] == ["admitted"]
    for number in range(TASKS):
        session = moved.stale.tenant("new").session(f"chat-{number}")
        assert len(await session.get_items()) == 2


@pytest.mark.backends("sqlite", "postgresql-15", "mariadb", "mysql")
async def test_databases_exchanged_under_an_open_gateway(moved: Moved) -> None:
    """Where the pools' new connections lead is not where the settings say, and nobody was told."""
    engines = {
        name: create_async_engine(url, poolclass=NullPool) for name, url in moved.urls.items()
    }
    try:
        async with Gateway(settings_at(moved.urls, slots=SLOTS), engines=engines) as gateway:
            tenant = gateway.tenant("acme")
            session = tenant.session(moved.session_id)
            assert len(await session.get_items()) == 3
            assert len((await tenant.list_sessions()).sessions) == 1
            before = [await content(url) for url in moved.urls.values()]
            _exchange(engines["a"].sync_engine, engines["b"].sync_engine)
            acts: list[Callable[[], Awaitable[Any]]] = [
                lambda: session.add_items([item("lost?")]),
                session.get_items,
                session.pop_item,
                session.clear_session,
                lambda: session._atomic_replace_items([item("lost?")]),
                lambda: tenant.delete_session(moved.session_id),
                lambda: tenant.session("new one").add_items([item("lost?")]),
                tenant.list_sessions,
            ]
            for act in acts:
                with pytest.raises(
                    (OwnershipConflict, ShardQuarantined), match=r"shard '[ab]'.*URL"
                ):
                    await act()
            assert [await content(url) for url in moved.urls.values()] == before
    finally:
        for engine in engines.values():
            await engine.dispose()


def _exchange(one: Any, other: Any) -> None:
    """Let each engine's pool connect to where the other's did."""
    one.pool._creator, other.pool._creator = other.pool._creator, one.pool._creator
    one.pool._invoke_creator = one.pool._should_wrap_creator(one.pool._creator)
    other.pool._invoke_creator = other.pool._should_wrap_creator(other.pool._creator)


@only_sqlite
async def test_a_hint_that_leads_nowhere(moved: Moved) -> None:
    """Both shards say that the other one has it."""
    target = await uuid_of(moved.target)
    epoch = await fence(moved.source, moved.slot)
    await release(moved.source, moved.slot, target, epoch)
    settings = settings_at(moved.urls, slots=SLOTS, operation_deadline=1, create_tables=False)
    async with patient(Gateway(settings)) as gateway:
        session = gateway.tenant("acme").session(moved.session_id)
        async with asyncio.timeout(10):
            with pytest.raises(OwnershipConflict, match=f"slot {moved.slot} .*no shard") as caught:
                await session.add_items([item("lost?")])
            assert caught.value.keyspace == "main"
            with pytest.raises(OwnershipConflict, match="owned by no shard"):
                await gateway.tenant("acme").list_sessions()
    assert len(await moved.stored("a")) == 3
    assert await moved.stored("b") == []


@only_sqlite
async def test_a_last_look_without_time_does_not_make_it_a_move(
    moved: Moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = await fence(moved.source, moved.slot)
    await release(moved.source, moved.slot, await uuid_of(moved.target), epoch)
    look, looks = Keyspace._wait_for_move, 0

    async def in_haste(keyspace: Keyspace, name: str, slot: int, seconds: float) -> Any:
        nonlocal looks
        looks += 1
        return await look(keyspace, name, slot, seconds if looks == 1 else 0)

    monkeypatch.setattr(Keyspace, "_wait_for_move", in_haste)
    settings = settings_at(moved.urls, slots=SLOTS, operation_deadline=60, create_tables=False)
    async with Gateway(settings) as gateway:
        with pytest.raises(OwnershipConflict, match="owned by no shard"):
            await gateway.tenant("acme").list_sessions()
    assert looks == 2
