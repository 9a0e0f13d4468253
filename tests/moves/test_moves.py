"""A slot moves with all that it has, between any two databases, as it was to the last column."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import delete, select, text, update

from contract.test_ids import EXACT
from contract.test_values import FIXED, same
from gateway.shards import engine_at, item, named, session_on, settings_at
from moves.moving import (
    LostAnswers,
    Told,
    mover_of,
    places,
    rows_of_slots,
    stored,
)
from shardgate import Gateway, TenantRefused
from shardgate.control import copying
from shardgate.errors import (
    Contended,
    FreezeTooLong,
    MoveBusy,
    MoveLost,
    OperatorError,
    StandbysNotSafe,
    VerificationFailed,
)
from shardgate.handover import DRAINING, ELSEWHERE, OWNED, RELEASED
from shardgate.items import encode
from shardgate.session import _operation
from shardgate.slots import slot_range
from shardgate.sql import moving
from shardgate.sql.create import transaction
from shardgate.sql.moving import (
    INCOMPLETE,
    Span,
    put_sessions,
    read_items,
    read_prints,
    read_sessions,
    read_versions,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncConnection

    from conftest import MakeDatabases, StartServer
    from harness.servers import Backend
    from moves.conftest import Apart
    from moves.moving import Row
    from shardgate.shards import Shard
    from shardgate.sql.moving import Prints

SLOTS = 4
EVERYTHING = Span(-(2**63), 2**63 - 1)
KINDS = [
    ("sqlite", "postgresql"),
    ("sqlite", "mariadb"),
    ("mariadb", "postgresql"),
    ("postgresql", "mariadb"),
    pytest.param(("postgresql", "sqlite"), marks=pytest.mark.soak),
    pytest.param(("mariadb", "sqlite"), marks=pytest.mark.soak),
    ("mysql", "postgresql"),
    ("sqlite", "mysql"),
]
MANY = 25
"""Items of a session that is copied in portions, where portions are small."""


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little content has many pages, and sessions that are copied in portions."""
    monkeypatch.setattr(copying, "PAGE", 7)
    monkeypatch.setattr(copying, "OPS_PAGE", 11)
    monkeypatch.setattr(copying, "MOST_ITEMS", 8)
    monkeypatch.setattr(copying, "MOST_BYTES", 100_000)


class Content:
    """Sessions of all kinds on two shards, what they held, and operations to be repeated."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.acme = gateway.tenant("acme")
        self.held: dict[tuple[str, str], list[Any]] = {}
        self.popped: list[tuple[str, Any, Any]] = []

    async def fill(self) -> None:
        for number, session_id in enumerate(EXACT):
            await self._keep(session_id, [{"n": number}, {"id": session_id}])
        for number in range(12):
            await self._keep(f"many-{number}", [item(f"é{n}") for n in range(MANY + number)])
            await self._keep(f"other-{number}", [item("of another tenant")], "ACME")
            await self._end_otherwise(number)
            await self._pop(f"popped-{number}")
            await self._with_key(f"keyed-{number}")
        for number in range(3):
            await self._keep(f"values-{number}", FIXED)
            await self._keep(f"mega-{number}", [{"x": "é" * 500_000, "n": number}, item("small")])
        await self._mark_rows()

    async def _keep(self, session_id: str, items: list[Any], tenant: str = "acme") -> None:
        await self.gateway.tenant(tenant).session(session_id).add_items(items)
        self.held[tenant, session_id] = items

    async def _end_otherwise(self, number: int) -> None:
        items: list[Any] = [item(f"{number} {n}") for n in range(3 * number)]
        for kind in ("cleared", "deleted", "again", "refilled", "empty"):
            session = self.acme.session(f"{kind}-{number}")
            await session.add_items(items or [item("one")])
            if kind in ("deleted", "again"):
                await self.acme.delete_session(f"{kind}-{number}")
            elif kind == "empty":
                while await session.pop_item() is not None:
                    pass
            else:
                await session.clear_session()
            later = [item("later")] if kind in ("again", "refilled") else []
            await session.add_items(later)
            self.held["acme", f"{kind}-{number}"] = later

    async def _pop(self, session_id: str) -> None:
        await self._keep(session_id, [item("kept"), item("popped"), item("popped first")])
        session, operation = self.acme.session(session_id), _operation("pop")
        await session.pop_item()
        self.popped.append((session_id, operation, await self._pop_as(session_id, operation)))
        self.held["acme", session_id] = [item("kept")]

    async def _pop_as(self, session_id: str, operation: Any) -> Any:
        session = self.acme.session(session_id)
        return await session._perform(
            lambda store, place: store.pop(place, operation, session._codec)
        )

    async def _with_key(self, session_id: str) -> None:
        await self.acme.session(session_id).add_items([item("once")], idempotency_key="a key é")
        self.held["acme", session_id] = [item("once")]

    async def _mark_rows(self) -> None:
        """Columns that nothing writes to yet, and moments that tell a copy from a new row."""
        values: dict[str, dict[str, Any]] = {
            "sessions": {
                "status": "held",
                "expires_at": datetime(2031, 2, 3, 4, 5, 6, 789012),
                "hold": 1,
                "metadata": json.dumps({"tags": ["ü", "😀"]}, ensure_ascii=False),
                "created_at": datetime(2020, 1, 1, 0, 0, 0, 1),
                "updated_at": datetime(2021, 1, 1, 23, 59, 59, 999999),
                "listed_at": datetime(2022, 1, 1),
            },
            "messages": {"codec": "zstd/1", "key_id": "key-7"},
        }
        for shard in self.gateway.shards.values():
            for name, changes in values.items():
                table = getattr(shard.tables, name)
                some = table.c.session_id.like("keyed-%")
                await shard.transact(
                    lambda connection, table=table, some=some, changes=changes: connection.execute(
                        update(table).where(some).values(changes)
                    )
                )

    async def check(self) -> None:
        """AssertionError where anything is not as it was, or an operation takes effect again."""
        for (tenant, session_id), items in self.held.items():
            found = await self.gateway.tenant(tenant).session(session_id).get_items()
            assert same(found) == same(items), (tenant, session_id)
        for session_id, operation, popped in self.popped:
            assert popped == item("popped")
            assert await self._pop_as(session_id, operation) == popped
            assert await self.acme.session(session_id).settle(operation.op_id)
        for session_id in (id_ for _, id_ in self.held if id_.startswith("keyed-")):
            session = self.acme.session(session_id)
            await session.add_items([item("once")], idempotency_key="a key é")
            assert await session.settle("=a key é")
            assert not await session.settle(f"never sent {len(self.held)}")
            assert await session.get_items() == [item("once")]
        await self._check_listing()

    async def _check_listing(self) -> None:
        listed, cursor = [], None
        while True:
            page = await self.acme.list_sessions(limit=50, cursor=cursor)
            listed += [found.session_id for found in page.sessions]
            if (cursor := page.next_cursor) is None:
                break
        # Those that nothing was added to again are listed too, but for the ones that were deleted.
        expected = [id_ for tenant, id_ in self.held if tenant == "acme"]
        expected = [id_ for id_ in expected if not id_.startswith("deleted-")]
        assert sorted(listed) == sorted(expected)


async def move_all(gateway: Gateway, source: str, target: str) -> list[int]:
    """Move all slots of a shard; AssertionError unless all rows are then as they were there."""
    mover, moved = mover_of(gateway), []
    shards = gateway.shards
    for slot, owner in (await places(shards)).items():
        if owner != source:
            continue
        before = await stored(shards[source], SLOTS, slot)
        event = await mover.move(slot, source, target)
        assert event.phase.value == "moved"
        after = await stored(shards[target], SLOTS, slot)
        for table, rows in before.items():
            assert after[table] == rows, table
        ours, theirs = [await prints(shards[name], slot) for name in (target, source)]
        assert ours == theirs
        assert sum(one.rows for one in ours.values()) == len(before["sessions"] + before["ops"])
        moved.append(slot)
    assert source not in (await places(shards)).values()
    return moved


async def prints(shard: Shard, slot: int) -> Prints:
    span = Span(*slot_range(slot, SLOTS))
    return await shard.query(partial(read_prints, tables=shard.tables, span=span))


def check_complete(rows: list[dict[str, list[Row]]], shard: Shard) -> None:
    """AssertionError unless the content has rows of every table and a value in every column."""
    for table in shard.tables.slot_owned:
        of = [row for part in rows for row in part[table.name.removeprefix("shardgate_")]]
        empty = [name for name in table.c.keys() if all(row[name] is None for row in of)]  # noqa: SIM118 - columns are no strings
        assert of, f"the tests have no content for {table.name}"
        assert not empty, f"the tests have no content for {empty} of {table.name}"


async def moves_to_and_fro(urls: dict[str, str]) -> None:
    async with Gateway(settings_at(urls, slots=SLOTS)) as gateway:
        content = Content(gateway)
        await content.fill()
        owners = await places(gateway.shards)
        assert set(owners.values()) == {"a", "b"}
        shards = gateway.shards
        rows = [await stored(shards[owner], SLOTS, slot) for slot, owner in owners.items()]
        check_complete(rows, shards["a"])
        assert await move_all(gateway, "a", "b")
        await content.check()
        assert await move_all(gateway, "b", "a") == list(range(SLOTS))
        await content.check()
        assert (await gateway.check()).ok
    async with Gateway(settings_at(urls, slots=SLOTS)) as fresh:
        content.gateway, content.acme = fresh, fresh.tenant("acme")
        await content.check()


@pytest.mark.usefixtures("small_pages")
async def test_all_that_a_slot_has_moves_with_it(
    databases: MakeDatabases, backend: Backend
) -> None:
    await moves_to_and_fro(named(await databases(2)))


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
async def test_between_databases_of_two_kinds(apart: Apart, kinds: tuple[str, str]) -> None:
    await moves_to_and_fro(await apart(*kinds))


# One slot with little in it, and what may go wrong.


class Small:
    """A session with three items on shard a, whose slot is to be moved to b."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.shards = gateway.shards
        self.session_id = session_on(gateway, "a")
        self.session = gateway.tenant("acme").session(self.session_id)
        self.slot = gateway.route("acme", self.session_id).slot
        self.items = [item(f"{n}") for n in range(3)]

    async def serves(self, shard: str) -> None:
        """AssertionError unless this shard serves the session with all that it had, and writes."""
        assert (await places(self.shards))[self.slot] == shard
        assert await self.session.get_items() == self.items
        self.items.append(item(f"{len(self.items)}"))
        await self.session.add_items(self.items[-1:])
        assert await self.session.get_items() == self.items
        assert self.gateway.route("acme", self.session_id).shard == shard
        assert (await self.gateway.check()).ok

    async def states(self) -> dict[str, tuple[str, str]]:
        """What each shard says of the slot: the state, and the owner by name."""
        names = {shard.uuid: name for name, shard in self.shards.items()}
        rows = {name: (await rows_of_slots(at))[self.slot] for name, at in self.shards.items()}
        return {name: (row["state"], names[row["owner"]]) for name, row in rows.items()}

    async def change(self, shard: str, *statements: Any) -> None:
        async def act(connection: AsyncConnection) -> None:
            for statement in statements:
                await connection.execute(statement)

        await self.shards[shard].transact(act)


async def small_at(urls: dict[str, str]) -> AsyncIterator[Small]:
    async with Gateway(settings_at(urls, slots=SLOTS)) as gateway:
        small = Small(gateway)
        await small.session.add_items(small.items)
        yield small


@pytest.fixture
async def small(databases: MakeDatabases) -> AsyncIterator[Small]:
    async for one in small_at(named(await databases(2))):
        yield one


@pytest.fixture
async def small_of_three(databases: MakeDatabases) -> AsyncIterator[Small]:
    async for one in small_at(named(await databases(3))):
        yield one


NEWEST = pytest.mark.backends("sqlite", "postgresql-18", "mariadb", "mysql")


@NEWEST
async def test_what_a_move_tells(small: Small) -> None:
    told = Told()
    event = await mover_of(small.gateway, told).move(small.slot, "a", "b")
    assert told.phases == ["copying", "verifying", "frozen", "moved"]
    assert event == told.events[-1]
    assert (event.slot, event.source, event.target) == (small.slot, "a", "b")
    assert (event.sessions, event.items, event.verified) == (1, 3, 3)
    assert event.nbytes == sum(
        row["nbytes"] for row in (await stored(small.shards["b"], SLOTS, small.slot))["messages"]
    )
    assert event.frozen is not None
    assert 0 < event.frozen < 20
    assert await small.states() == {"a": (RELEASED, "b"), "b": (OWNED, "b")}
    await small.serves("b")


@NEWEST
async def test_there_and_back_and_there(small: Small) -> None:
    """What was left behind the first time is not taken for what is there now."""
    mover = mover_of(small.gateway)
    for source, target in ("ab", "ba", "ab"):
        await small.session.pop_item()
        small.items.pop()
        await small.serves(source)
        await mover.move(small.slot, source, target)
        await small.serves(target)
        await small.session.clear_session()
        small.items = [item("after a clear"), item("popped later")]
        await small.session.add_items(small.items)
        await small.serves(target)


@NEWEST
async def test_back_to_where_another_session_of_that_id_was(small: Small) -> None:
    """Deleted and made again on the other shard: as many changes, and not the same session."""
    mover = mover_of(small.gateway)
    await mover.move(small.slot, "a", "b")
    await small.gateway.tenant("acme").delete_session(small.session_id)
    small.items = [item(f"again {n}") for n in range(3)]
    await small.session.add_items(small.items)
    await mover.move(small.slot, "b", "a")
    await small.serves("a")


@NEWEST
async def test_back_without_a_session_that_was_deleted_meanwhile(small: Small) -> None:
    mover = mover_of(small.gateway)
    await mover.move(small.slot, "a", "b")
    await small.gateway.tenant("acme").delete_session(small.session_id)
    await mover.move(small.slot, "b", "a")
    small.items = []
    await small.serves("a")


@NEWEST
async def test_on_to_a_third_shard_and_home(small_of_three: Small) -> None:
    small = small_of_three
    mover = mover_of(small.gateway)
    async with Gateway(small.gateway.settings) as other:
        late = other.tenant("acme").session(small.session_id)
        assert await late.get_items() == small.items
        for source, target in ("ab", "bc", "ca"):
            await mover.move(small.slot, source, target)
        await small.serves("a")
        assert await late.get_items() == small.items
        for source, target in ("ab", "bc"):
            await mover.move(small.slot, source, target)
        assert await late.get_items() == small.items
    await small.serves("c")


@NEWEST
async def test_a_slot_without_anything(small: Small) -> None:
    (empty,) = [
        slot
        for slot, owner in (await places(small.shards)).items()
        if owner == "a" and slot != small.slot
    ]
    event = await mover_of(small.gateway).move(empty, "a", "b")
    assert (event.sessions, event.items, event.nbytes, event.verified) == (0, 0, 0, 0)
    assert (await places(small.shards))[empty] == "b"
    await small.serves("a")


@NEWEST
async def test_a_move_that_has_been_made_is_made(small: Small) -> None:
    mover = mover_of(small.gateway)
    await mover.move(small.slot, "a", "b")
    event = await mover.move(small.slot, "a", "b")
    assert (event.phase.value, event.items, event.frozen) == ("moved", 0, None)
    await mover.end(small.slot, "a", "b")
    await small.serves("b")


@pytest.mark.backends("mariadb", "mysql")
async def test_many_rows_are_one_statement(small: Small) -> None:
    """One for each item would be as many round trips."""
    for number in range(5):
        small.items += [item(f"{number} {n}") for n in range(100)]
        await small.session.add_items(small.items[-100:])
    before = await _inserts(small.shards["b"])
    await mover_of(small.gateway).move(small.slot, "a", "b")
    assert 0 < await _inserts(small.shards["b"]) - before < 20
    await small.serves("b")


async def _inserts(shard: Shard) -> int:
    async def act(connection: AsyncConnection) -> int:
        row = await connection.execute(text("SHOW GLOBAL STATUS LIKE 'Com_insert'"))
        return int(row.one()[1])

    return await shard.query(act)


# A copy that is not one


def _another_item(shard: Shard) -> Any:
    messages = shard.tables.messages
    return update(messages).where(messages.c.seq == 2).values(message_data='{"another": 1}')


def _one_item_less(shard: Shard) -> Any:
    return delete(shard.tables.messages).where(shard.tables.messages.c.seq == 2)


@NEWEST
@pytest.mark.parametrize("tamper", [_another_item, _one_item_less])
@pytest.mark.parametrize("portions", [False, True])
async def test_a_copy_that_is_not_the_same_is_found(
    small: Small, monkeypatch: pytest.MonkeyPatch, *, tamper: Any, portions: bool
) -> None:
    verify = copying.Copying.verify
    if portions:
        monkeypatch.setattr(copying, "MOST_ITEMS", 2)

    async def tampered(self: copying.Copying) -> None:
        await small.change("b", tamper(small.shards["b"]))
        await verify(self)

    with monkeypatch.context() as patched:
        patched.setattr(copying.Copying, "verify", tampered)
        with pytest.raises(VerificationFailed, match="not the same on shard 'b'"):
            await mover_of(small.gateway).move(small.slot, "a", "b")
    assert (await small.states())["a"] == (OWNED, "a")
    await small.serves("a")


@NEWEST
@pytest.mark.parametrize("portions", [False, True])
async def test_what_the_last_pass_writes_is_read_again(
    small: Small, monkeypatch: pytest.MonkeyPatch, *, portions: bool
) -> None:
    if portions:
        monkeypatch.setattr(copying, "MOST_ITEMS", 2)
    mover, fence, put = mover_of(small.gateway), None, copying.put_sessions
    fence = mover._fence

    async def fence_after_a_change(run: Any) -> Any:
        small.items.append(item("late"))
        await small.session.add_items(small.items[-1:])
        return await fence(run)

    async def put_another(connection: AsyncConnection, **what: Any) -> None:
        await put(connection, **what)
        messages = what["tables"].messages
        late = messages.c.message_data == encode(item("late"))
        await connection.execute(update(messages).where(late).values(message_data='"later"'))

    monkeypatch.setattr(mover, "_fence", fence_after_a_change)
    monkeypatch.setattr(copying, "put_sessions", put_another)
    with pytest.raises(VerificationFailed):
        await mover.move(small.slot, "a", "b")
    await small.serves("a")
    monkeypatch.setattr(copying, "put_sessions", put)
    await mover.move(small.slot, "a", "b")
    await small.serves("b")


# Tenants


@NEWEST
@pytest.mark.parametrize("left", ["items", "operations"])
async def test_a_suspended_tenant_stays_suspended(small: Small, left: str) -> None:
    """Also one of whom there are only operations: the next session would admit a stranger."""
    session_id = next(
        id_
        for id_ in (f"p-{n}" for n in range(1000))
        if small.gateway.route("paused", id_).slot == small.slot
    )
    tenant = small.gateway.tenant("paused")
    await tenant.session(session_id).add_items([item("kept")])
    if left == "operations":
        await tenant.delete_session(session_id)
    tenants = small.shards["a"].tables.tenants
    suspend = update(tenants).where(tenants.c.tenant_id == "paused").values(status="suspended")
    await small.change("a", suspend)
    before = await tenant_row(small.shards["a"], "paused")
    await mover_of(small.gateway).move(small.slot, "a", "b")
    assert await tenant_row(small.shards["b"], "paused") == before
    with pytest.raises(TenantRefused, match="suspended"):
        await tenant.session(session_id).add_items([item("more")])


async def tenant_row(shard: Shard, tenant_id: str) -> Row | None:
    tenants = shard.tables.tenants

    async def act(connection: AsyncConnection) -> Row | None:
        rows = await connection.execute(select(tenants).where(tenants.c.tenant_id == tenant_id))
        row = rows.mappings().one_or_none()
        return None if row is None else dict(row)

    return await shard.query(act)


@pytest.mark.backends("postgresql-18", "mariadb", "mysql")
@pytest.mark.parametrize("last_pass", [False, True])
async def test_a_tenant_who_is_admitted_on_the_target_meanwhile(
    small: Small, monkeypatch: pytest.MonkeyPatch, *, last_pass: bool
) -> None:
    """By his first use of it, or by the move of another slot."""
    from shardgate.sql import moving

    read, admitted, target = moving.read_tenants, [], small.shards["b"]
    on_b = session_on(small.gateway, "b")
    mover = mover_of(small.gateway)
    if last_pass:
        await small.gateway.tenant("acme").delete_session(small.session_id)
        small.items = []
        fence = mover._fence

        async def fence_after_a_change(run: Any) -> Any:
            run.copying.tenants.clear()
            await small.change("b", delete(target.tables.tenants))
            small.items = [item("late")]
            await small.session.add_items(small.items)
            return await fence(run)

        monkeypatch.setattr(mover, "_fence", fence_after_a_change)

    async def read_and_be_late(connection: AsyncConnection, tables: Any, ids: Any) -> Any:
        rows = await read(connection, tables, ids)
        if tables is target.tables and not rows and not admitted:
            admitted.append(True)
            await small.gateway.tenant("acme").session(on_b).add_items([item("first use")])
        return rows

    monkeypatch.setattr(moving, "read_tenants", read_and_be_late)
    await mover.move(small.slot, "a", "b")
    assert admitted
    await small.serves("b")


# Somebody else, and answers that are lost


class Gate:
    """Holds a mover up before it copies."""

    def __init__(self, mover: Any) -> None:
        self.reached, self.open = asyncio.Event(), asyncio.Event()
        self._copy = mover._copy
        mover._copy = self._hold

    async def _hold(self, run: Any) -> None:
        self.reached.set()
        await self.open.wait()
        await self._copy(run)


@NEWEST
async def test_two_movers(small: Small) -> None:
    """The second one is refused, unless it takes over."""
    first, second = mover_of(small.gateway), mover_of(small.gateway)
    gate = Gate(first)
    moving = asyncio.create_task(first.move(small.slot, "a", "b"))
    await gate.reached.wait()
    with pytest.raises(MoveBusy, match="by somebody else"):
        await second.move(small.slot, "a", "b")
    await small.serves("a")
    await second.move(small.slot, "a", "b", takes_over=True)
    gate.open.set()
    assert (await moving).frozen is None, "it finds the slot where it was to be"
    await small.serves("b")


@NEWEST
async def test_two_movers_to_two_targets(small_of_three: Small) -> None:
    small = small_of_three
    first, second = mover_of(small.gateway), mover_of(small.gateway)
    gate = Gate(first)
    moving = asyncio.create_task(first.move(small.slot, "a", "b"))
    await gate.reached.wait()
    await second.move(small.slot, "a", "c", takes_over=True)
    gate.open.set()
    with pytest.raises(MoveLost):
        await moving
    await small.serves("c")
    await mover_of(small.gateway).move(small.slot, "c", "b")
    await small.serves("b")


@NEWEST
async def test_a_move_that_is_ended_by_somebody_else(small: Small) -> None:
    mover = mover_of(small.gateway)
    gate = Gate(mover)
    moving = asyncio.create_task(mover.move(small.slot, "a", "b"))
    await gate.reached.wait()
    await mover_of(small.gateway).end(small.slot, "a", "b")
    gate.open.set()
    with pytest.raises(MoveLost):
        await moving
    await small.serves("a")
    await mover_of(small.gateway).move(small.slot, "a", "b")
    await small.serves("b")


@NEWEST
async def test_one_that_nobody_was_seen_at_is_taken_over(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = mover_of(small.gateway)
    gate = Gate(gone)
    moving = asyncio.create_task(gone.move(small.slot, "a", "b"))
    await gate.reached.wait()
    monkeypatch.setattr("shardgate.control.moves.STUCK_SECONDS", -1)
    await mover_of(small.gateway).move(small.slot, "a", "b")
    gate.open.set()
    assert (await moving).items == 0
    await small.serves("b")


@NEWEST
async def test_a_mover_that_is_cancelled_steps_back(small: Small) -> None:
    told = Told()
    mover = mover_of(small.gateway, told)
    gate = Gate(mover)
    moving = asyncio.create_task(mover.move(small.slot, "a", "b"))
    await gate.reached.wait()
    moving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await moving
    assert told.phases == ["stepped back"]
    await small.serves("a")


@NEWEST
async def test_from_a_shard_that_does_not_own_the_slot(small: Small) -> None:
    with pytest.raises(MoveLost):
        await mover_of(small.gateway).move(small.slot, "b", "a")
    await small.serves("a")


@NEWEST
@pytest.mark.parametrize("what", ["answer", "request"])
async def test_the_answer_to_any_of_its_transactions_may_be_lost(small: Small, what: str) -> None:
    shards, source, target = list(small.shards.values()), "a", "b"
    lossless = LostAnswers(lambda _: None)
    async with lossless.on(*shards):
        await mover_of(small.gateway).move(small.slot, source, target)
    for lost in range(lossless.number - len(shards)):  # to tell all of it does not matter so much
        source, target = target, source
        async with LostAnswers(lambda number, lost=lost: what if number == lost else None).on(
            *shards
        ):
            await mover_of(small.gateway).move(small.slot, source, target)
        await small.serves(target)


@NEWEST
@pytest.mark.parametrize("what", ["answer", "request"])
async def test_the_answers_to_all_of_its_transactions_may_be_lost_once(
    small: Small, what: str
) -> None:
    lossy = LostAnswers(lambda number: what if number % 2 == 0 and number < 30 else None)
    async with lossy.on(*small.shards.values()):
        await mover_of(small.gateway).move(small.slot, "a", "b")
    await small.serves("b")


@NEWEST
async def test_a_mark_whose_answer_was_lost_is_not_made_again(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the mover would go on with what it has done under the mark that it has lost."""
    mover, ended = mover_of(small.gateway), []
    decide = mover._decide

    async def decide_too_late(run: Any) -> None:
        if not ended:
            ended.append(await mover_of(small.gateway).end(small.slot, "a", "b"))
        await decide(run)

    monkeypatch.setattr(mover, "_decide", decide_too_late)
    mark_and_claim = LostAnswers(lambda number: "answer" if number < 2 else None)
    async with mark_and_claim.on(*small.shards.values()):
        with pytest.raises(MoveLost):
            await mover.move(small.slot, "a", "b")
    assert ended
    await small.serves("a")


# The time without service


@NEWEST
async def test_out_of_time_it_steps_back(small: Small) -> None:
    told = Told()
    mover = mover_of(small.gateway, told, freeze_seconds=0.0, attempts=2)
    with pytest.raises(FreezeTooLong, match="2 times"):
        await mover.move(small.slot, "a", "b")
    assert [event.phase.value for event in told.events].count("stepped back") == 2
    await small.serves("a")
    await mover_of(small.gateway).move(small.slot, "a", "b")
    await small.serves("b")


_HOLD = {
    "postgresql": "SELECT 1 FROM {} WHERE slot = :slot FOR KEY SHARE",
    "mysql": "SELECT 1 FROM {} WHERE slot = :slot LOCK IN SHARE MODE",
}


@pytest.mark.backends("postgresql-18", "mariadb", "mysql")
async def test_it_waits_no_longer_for_a_long_statement_than_it_may(small: Small) -> None:
    shard = small.shards["a"]
    hold = _HOLD[shard.engine.dialect.name.replace("mariadb", "mysql")]
    mover = mover_of(small.gateway, freeze_seconds=0.3, attempts=2, patience_seconds=2)
    url = shard.engine.url.render_as_string(hide_password=False)
    async with engine_at(url) as engine, transaction(engine) as connection:
        await connection.execute(text(hold.format(shard.tables.slots.name)), {"slot": small.slot})
        moving = asyncio.create_task(mover.move(small.slot, "a", "b"))
        while not moving.done():
            await small.session.add_items([item("meanwhile")])
            small.items.append(item("meanwhile"))
        with pytest.raises((FreezeTooLong, Contended)):
            await moving
        await small.serves("a")
    await mover_of(small.gateway).move(small.slot, "a", "b")
    await small.serves("b")


# Standbys


@pytest.mark.backends("postgresql-18")
async def test_standbys_have_to_confirm_commits(
    databases: MakeDatabases, backend: Backend, start_server: StartServer
) -> None:
    from harness.postgresql import PostgreSQLServer

    (other,) = await databases(1)
    primary = await start_server(backend)
    assert isinstance(primary, PostgreSQLServer)
    urls = {"a": other.url, "b": await primary.create_database()}
    standby = await primary.standby()
    try:
        await standby.start()
        async for small in small_at(urls):
            await _standby_counts(small, primary)
    finally:
        await asyncio.to_thread(standby.close)


async def _standby_counts(small: Small, primary: Any) -> None:
    with pytest.raises(StandbysNotSafe, match="shard 'b' has 1 standbys"):
        await mover_of(small.gateway).move(small.slot, "a", "b")
    assert await small.states() == {"a": (OWNED, "a"), "b": (ELSEWHERE, "a")}
    await mover_of(small.gateway, accept_async_standbys=True).move(small.slot, "a", "b")
    await small.serves("b")
    with pytest.raises(StandbysNotSafe):
        await mover_of(small.gateway).move(small.slot, "b", "a")
    await primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    await primary.execute("SELECT pg_reload_conf()")
    mover = mover_of(small.gateway)
    async with asyncio.timeout(20):
        while True:
            try:
                await mover.move(small.slot, "b", "a")
                break
            except StandbysNotSafe:  # the server has not read its settings again yet
                await asyncio.sleep(0.05)
    await small.serves("a")


@NEWEST
async def test_prints_tell_what_has_changed(small: Small) -> None:
    a = small.shards["a"]
    before = await prints(a, small.slot)
    assert await prints(a, small.slot) == before
    assert [one.rows for one in before.values()] == [1, 1]
    await small.session.pop_item()
    after = await prints(a, small.slot)
    assert {key for key in before if before[key] != after[key]} == set(before)
    await small.change("a", delete(a.tables.ops))
    left = await prints(a, small.slot)
    assert left == {key: value for key, value in after.items() if key[0] == "sessions"}


@pytest.mark.usefixtures("small_pages")
@pytest.mark.backends("sqlite", "postgresql-18")
async def test_a_slot_that_takes_too_long_to_be_compared(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last pass is broken off in the middle, not found to have been too long afterwards."""
    for number in range(40):
        await small.session.add_items([item(f"more {number}")])
        small.items.append(item(f"more {number}"))
    read_op_times, asked = copying.read_op_times, 0

    async def slowly(*values: Any, **more: Any) -> Any:
        nonlocal asked
        row = (await rows_of_slots(small.shards["a"]))[small.slot]
        if row["state"] == DRAINING:
            asked += 1
            await asyncio.sleep(1)
        return await read_op_times(*values, **more)

    async def all_differ(connection: Any, tables: Any, *, span: Any) -> Any:
        found = await read_prints(connection, tables, span=span)
        own = connection.engine is small.shards["a"].engine
        return {(table, at + 300 * own): one for (table, at), one in found.items()}

    monkeypatch.setattr(copying, "read_op_times", slowly)
    monkeypatch.setattr(copying, "read_prints", all_differ)
    with pytest.raises(FreezeTooLong):
        await mover_of(small.gateway, freeze_seconds=2, attempts=1).move(small.slot, "a", "b")
    assert 0 < asked < 8
    await small.serves("a")


@NEWEST
async def test_a_key_that_is_used_again_on_the_way_back(small: Small) -> None:
    """The other shard has forgotten it by then, as it may, and this one has not."""
    mover = mover_of(small.gateway)
    await small.session.add_items([item("once")], idempotency_key="key")
    await mover.move(small.slot, "a", "b")
    ops = small.shards["b"].tables.ops
    await small.change("b", delete(ops).where(ops.c.op_id == "=key"))
    await small.session.add_items([item("once more")], idempotency_key="key")
    await mover.move(small.slot, "b", "a")
    await small.session.add_items([item("once more")], idempotency_key="key")
    small.items += [item("once"), item("once more")]
    await small.serves("a")


@NEWEST
async def test_a_session_of_which_items_are_missing_is_not_complete(small: Small) -> None:
    a = small.shards["a"]
    key = next(iter(await a.query(partial(read_versions, tables=a.tables, span=EVERYTHING))))
    rows = await a.query(partial(read_sessions, tables=a.tables, keys=[key]))
    items = (await a.query(partial(read_items, tables=a.tables, keys=[key])))[key]
    b = small.shards["b"]
    for part, uneven in ((items[1:], [key]), (items, [])):
        content = moving.Content(rows[key], part, since=rows[key]["floor_seq"])
        put = partial(put_sessions, tables=b.tables, contents=[content])
        assert await b.transact(put) == uneven
        stored_there = await b.query(partial(read_versions, tables=b.tables, span=EVERYTHING))
        assert (stored_there[key].revision == INCOMPLETE) is bool(uneven)


async def test_an_item_that_is_too_large_for_the_other_database(apart: Apart) -> None:
    urls = await apart("postgresql", "mariadb")
    async with allowed_packet(urls["b"], 4 << 20), aclosing(small_at(urls)) as smalls:
        small = await anext(smalls)
        small.items.append(item("x" * (2 << 20)))
        await small.session.add_items(small.items[-1:])
        with pytest.raises(OperatorError, match="max_allowed_packet") as told:
            await mover_of(small.gateway).move(small.slot, "a", "b")
        assert repr(small.session_id) in str(told.value)
        await small.serves("a")


@asynccontextmanager
async def allowed_packet(url: str, nbytes: int) -> AsyncIterator[None]:
    """Have connections that are made to this MariaDB meanwhile take packets up to this size."""
    async with engine_at(url) as engine, engine.connect() as connection:
        usual = await connection.scalar(text("SELECT @@max_allowed_packet"))
        set_to = text("SET GLOBAL max_allowed_packet = :nbytes")
        await connection.execute(set_to, {"nbytes": nbytes})
        try:
            yield
        finally:
            await connection.execute(set_to, {"nbytes": usual})
