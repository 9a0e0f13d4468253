"""Operations that are sent together have every guarantee that they have by themselves."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from sqlalchemy import select, update

from gateway.shards import engine_at, item, settings_at
from once.wire import HoldingProxy
from ownership import test_fences
from shardgate import Gateway, OperatorError, OutcomeUnknown, ShardUnavailable, UsageError, shards
from shardgate.items import joined
from shardgate.sql.dialect import Append, Guard, Key, Operation, Outcome, TailRead
from shardgate.sql.postgresql import PostgreSQL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakeDatabases
    from harness.servers import Backend, Database
    from shardgate.shards import Shard

pytestmark = pytest.mark.backends("postgresql")

CALLERS = 64
POOL = {"pool_size": 8, "max_overflow": 0}
NO_HANG = 30


class Statements:
    """How many operations each statement of a kind had, in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.appends: list[int] = []
        self.reads: list[int] = []
        for name, sizes in (("append", self.appends), ("tail", self.reads)):
            monkeypatch.setattr(PostgreSQL, name, _counting(name, sizes))
            monkeypatch.setattr(PostgreSQL, f"{name}_many", _counting(f"{name}_many", sizes))

    def clear(self) -> None:
        self.appends.clear()
        self.reads.clear()


def _counting(name: str, sizes: list[int]) -> Any:
    original = getattr(PostgreSQL, name)

    async def counting(self: PostgreSQL, connection: Any, first: Any, *more: Any) -> Any:
        sizes.append(len(first) if isinstance(first, list) else 1)
        return await original(self, connection, first, *more)

    return counting


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Statements:
    return Statements(monkeypatch)


@pytest_asyncio.fixture
async def gateway(database: Database) -> AsyncIterator[Gateway]:
    async with Gateway(settings_at({"one": database.url}, engine_kwargs=POOL)) as gateway:
        await gateway.tenant("acme").session("warm").add_items([item("warm")])
        await _all_idle(gateway)
        yield gateway
        await _all_idle(gateway)


async def _all_idle(gateway: Gateway) -> None:
    """Nothing of an operation is left behind: no connection out, no seat taken, no task."""
    for shard in gateway.shards.values():
        pool: Any = shard.engine.pool
        async with asyncio.timeout(NO_HANG):
            # What is awaited belongs to SQLAlchemy.
            while pool.checkedout() or any(lane._taken for lane in lanes(shard)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not any(lane._flights for lane in lanes(shard))


def lanes(shard: Shard) -> list[Any]:
    """The shard's lanes: there are some."""
    assert shard._lanes
    return list(shard._lanes.values())


def session(gateway: Gateway, name: object = "chat") -> Any:
    return gateway.tenant("acme").session(f"{name}")


async def contents(gateway: Gateway, name: object = "chat") -> list[str]:
    return [found["content"] for found in await session(gateway, name).get_items()]


@asynccontextmanager
async def row_locked(gateway: Gateway, url: str, name: str) -> AsyncIterator[None]:
    """Somebody holds the session's row."""
    sessions = gateway.shards["one"].tables.sessions
    async with engine_at(url) as engine, engine.begin() as connection:
        row = select(sessions.c.h).where(sessions.c.session_id == name).with_for_update()
        assert (await connection.execute(row)).one_or_none() is not None
        yield


async def test_one_caller_sends_one_statement_for_each(
    gateway: Gateway, statements: Statements
) -> None:
    for number in range(5):
        await session(gateway).add_items([item(str(number))])
        await session(gateway).get_items(20)
    assert (statements.appends, statements.reads) == ([1] * 5, [1] * 5)


async def test_many_callers_share_statements(gateway: Gateway, statements: Statements) -> None:
    async def call(number: int) -> None:
        for more in range(4):
            await session(gateway, number).add_items([item(f"{more} a"), item(f"{more} b")])
            found = await session(gateway, number).get_items(3)
            assert [one["content"] for one in found][-2:] == [f"{more} a", f"{more} b"]

    await asyncio.gather(*map(call, range(CALLERS)))
    for sizes in (statements.appends, statements.reads):
        assert sum(sizes) == 4 * CALLERS
        assert len(sizes) < 2 * CALLERS
    for number in range(CALLERS):
        expected = [f"{more} {letter}" for more in range(4) for letter in "ab"]
        assert await contents(gateway, number) == expected


async def test_the_setting_turns_it_off(database: Database, statements: Statements) -> None:
    async with Gateway(settings_at({"one": database.url}, coalesce=False)) as gateway:
        await asyncio.gather(*(session(gateway, n).add_items([item("x")]) for n in range(CALLERS)))
        await asyncio.gather(*(session(gateway, n).get_items(9) for n in range(CALLERS)))
    assert set(statements.appends + statements.reads) == {1}


async def test_appends_to_one_session_keep_their_order_and_have_no_gap(gateway: Gateway) -> None:
    """Whoever is asked first is first: here all wait in one line."""
    appends = [session(gateway).add_items([item(f"{n} a"), item(f"{n} b")]) for n in range(CALLERS)]
    await asyncio.gather(*appends)
    assert await contents(gateway) == [f"{n} {letter}" for n in range(CALLERS) for letter in "ab"]
    messages = gateway.shards["one"].tables.messages
    async with gateway.shards["one"].engine.connect() as connection:
        rows = await connection.scalars(
            select(messages.c.seq).where(messages.c.session_id == "chat").order_by(messages.c.seq)
        )
        assert list(rows) == list(range(1, 2 * CALLERS + 1))


async def test_nobody_keeps_a_connection_from_those_who_wait(database: Database) -> None:
    """Whoever has returned a connection, and comes again at once, comes last."""
    settings = settings_at(
        {"one": database.url}, engine_kwargs={"pool_size": 1, "max_overflow": 0}, coalesce=False
    )
    turns = [0] * 4
    async with Gateway(settings) as gateway:

        async def call(number: int) -> None:
            while min(turns) < 5:
                await session(gateway, number).get_items(1)
                turns[number] += 1
                assert max(turns) - min(turns) < 5, turns

        await asyncio.wait_for(asyncio.gather(*map(call, range(4))), NO_HANG)


async def test_a_blocked_session_does_not_hold_up_the_others(
    gateway: Gateway, database: Database
) -> None:
    for number in range(CALLERS):
        await session(gateway, number).add_items([item("first")])
    async with row_locked(gateway, database.url, "7"):
        appends = [
            asyncio.create_task(session(gateway, number).add_items([item("second")]))
            for number in range(CALLERS)
        ]
        others = [append for number, append in enumerate(appends) if number != 7]
        async with asyncio.timeout(10):
            await asyncio.gather(*others)
        assert not appends[7].done()
    await appends[7]
    for number in range(CALLERS):
        assert await contents(gateway, number) == ["first", "second"]


async def test_who_goes_alone_and_is_blocked_holds_nobody_up(
    gateway: Gateway, database: Database
) -> None:
    async with row_locked(gateway, database.url, "warm"):
        blocked = asyncio.create_task(session(gateway, "warm").add_items([item("late")]))
        async with asyncio.timeout(10):
            for number in range(4):
                others = (session(gateway, other).add_items([item("x")]) for other in range(8))
                await asyncio.gather(*others)
                assert len(await contents(gateway, 0)) == number + 1
        assert not blocked.done()
    await blocked


async def test_a_poisoned_append_fails_alone(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unencoded(type(session(gateway))):  # type: ignore[misc]  # the class of a handle
        async def _serialize_item(self, item: Any) -> str:
            return "nul \0"

    monkeypatch.setattr("shardgate.session.check_text", lambda text: text)
    handles = [session(gateway, number) for number in range(CALLERS)]
    handles[9].__class__ = Unencoded
    answers = await asyncio.gather(
        *(handle.add_items([item("x")]) for handle in handles), return_exceptions=True
    )
    assert [number for number, answer in enumerate(answers) if answer is not None] == [9]
    assert isinstance(answers[9], OperatorError), answers[9]
    for number in range(CALLERS):
        assert await contents(gateway, number) == ([] if number == 9 else ["x"])


async def _pairs(gateway: Gateway, number: int) -> None:
    """Two appends to one session, the second while the first is under way with others."""
    others = [session(gateway, f"o{n}").add_items([item("x")]) for n in range(8)]
    first = asyncio.gather(*others, session(gateway).add_items([item(f"{number} a")]))
    for _ in range(3):
        await asyncio.sleep(0)
    more = [session(gateway, f"p{n}").add_items([item("x")]) for n in range(number % 9)]
    await asyncio.gather(session(gateway).add_items([item(f"{number} b")]), *more, first)


async def test_the_order_is_kept_where_a_statement_fails_because_of_somebody_else(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails, original = False, PostgreSQL.append_many

    async def failing(self: PostgreSQL, connection: Any, appends: Any) -> Any:
        nonlocal fails
        if fails:
            fails = False
            await connection.fetchval("SELECT 1 / 0")
        return await original(self, connection, appends)

    monkeypatch.setattr(PostgreSQL, "append_many", failing)
    for number in range(30):
        fails = True
        await _pairs(gateway, number)
        assert not fails
    assert await contents(gateway) == [f"{number} {of}" for number in range(30) for of in "ab"]


async def test_the_order_is_kept_where_somebody_holds_the_session(
    gateway: Gateway, database: Database
) -> None:
    await session(gateway).add_items([item("first")])
    for number in range(10):
        async with row_locked(gateway, database.url, "chat"):
            pair = asyncio.create_task(_pairs(gateway, number))
            await asyncio.sleep(0.02 * number / 3)
        await pair
    expected = [f"{number} {of}" for number in range(10) for of in "ab"]
    assert await contents(gateway) == ["first", *expected]


async def test_one_key_twice_at_once(gateway: Gateway) -> None:
    async def append(n: int) -> None:
        await session(gateway, n % 4).add_items([item("x")], idempotency_key="k")

    await asyncio.gather(*map(append, range(CALLERS)))
    for number in range(4):
        assert await contents(gateway, number) == ["x"]


async def test_one_key_for_two_things_at_once(gateway: Gateway) -> None:
    answers = await asyncio.gather(
        *(session(gateway).add_items([item(f"{n % 2}")], idempotency_key="k") for n in range(16)),
        return_exceptions=True,
    )
    refused = [isinstance(answer, UsageError) for answer in answers]
    assert refused in ([False, True] * 8, [True, False] * 8)
    assert len(await contents(gateway)) == 1


_SPECIAL = ['"', "\\", '","', "{", "}", "NULL", "None", ",", " ", "\n", "'", "é", "\U0001f600"]


async def test_ids_may_hold_whatever_arrays_are_written_with(
    gateway: Gateway, statements: Statements
) -> None:
    """Of some of them all, since who has none is written in another way."""
    pairs = list({f"{one}{other}" for one in _SPECIAL for other in _SPECIAL})
    plain = [f"plain {number}" for number in range(CALLERS)]
    for names in (pairs, plain, _SPECIAL):
        statements.clear()
        appends = (
            session(gateway, name).add_items([item(name)], idempotency_key=f"{name}{given}")
            if given
            else session(gateway, name).add_items([item(name)])
            for name in names
            for given in ("", "key")
        )
        await asyncio.gather(*appends)
        assert max(statements.appends) > len(_SPECIAL) // 2
        statements.clear()
        found = await asyncio.gather(*(contents(gateway, name) for name in names))
        assert max(statements.reads) == 1  # of all items, they are read one by one
        newest = await asyncio.gather(*(session(gateway, name).get_items(9) for name in names))
        assert max(statements.reads) > len(_SPECIAL) // 2
        assert [[one["content"] for one in items] for items in newest] == found
        assert found == [[name, name] for name in names]


async def test_guards_fail_each_for_itself(gateway: Gateway) -> None:
    """Sent as one statement by hand: some slots are not here any more."""
    shard = gateway.shards["one"]
    known = gateway._keyspaces["main"].map
    assert known is not None
    slots = shard.tables.slots
    async with shard.engine.begin() as connection:
        await connection.execute(
            update(slots).where(slots.c.slot % 2 == 1).values(state="draining")
        )
    appends, reads, expected = [], [], []
    for number in range(32):
        route = gateway.route("acme", f"g{number}")
        key = Key("acme", f"g{number}", route.h)
        guard = Guard(route.slot, known.uuids["one"] if number % 5 else "somebody else")
        appends.append(Append(key, guard, Operation(f"op{number}", "append"), ["1", "2"]))
        reads.append(TailRead(key, guard, 1))
        expected.append(route.slot % 2 == 0 and number % 5 != 0)
    assert set(expected) == {True, False}
    dialect: Any = shard.dialect
    outcomes = await shard.write(lambda connection: dialect.append_many(connection, appends))
    assert outcomes == [Outcome.DONE if here else Outcome.REFUSED for here in expected]
    rows = await shard.read(lambda connection: dialect.tail_many(connection, reads))
    assert rows == [joined(["2"]) if here else None for here in expected]
    again = await shard.write(lambda connection: dialect.append_many(connection, appends))
    assert again == [Outcome.REPEATED if here else Outcome.REFUSED for here in expected]


async def test_cancelled_and_late_callers_leave_nothing_behind(database: Database) -> None:
    """Some wait and some are under way when they are cancelled, and when the deadline passes."""
    async with HoldingProxy.in_front_of(database.url) as proxy:
        pool = {"pool_size": 1, "max_overflow": 0}
        settings = settings_at({"one": proxy.url(database.url)}, engine_kwargs=pool)
        async with Gateway(settings) as gateway:
            await session(gateway, "warm").add_items([item("warm")])
            gateway.shards["one"].deadline = 2
            proxy.hold_next()
            flying = asyncio.create_task(session(gateway, "warm").add_items([item("late")]))
            await proxy.is_holding()
            waiting = [
                asyncio.create_task(session(gateway, n).add_items([item("x")])) for n in range(8)
            ]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            cancelled = waiting[:4]
            for task in cancelled:
                task.cancel()
            answers = await asyncio.wait_for(
                asyncio.gather(flying, *waiting, return_exceptions=True), NO_HANG
            )
            assert isinstance(answers[0], OutcomeUnknown)
            assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[1:5])
            assert all(type(answer) is ShardUnavailable for answer in answers[5:]), answers
            proxy.release()
            await _all_idle(gateway)
            for number in range(8):
                assert await contents(gateway, number) == []


async def test_a_cut_in_the_air(database: Database) -> None:
    """Whatever had arrived when the connections were cut: every append is there once."""
    async with HoldingProxy.in_front_of(database.url) as proxy:
        settings = settings_at({"one": proxy.url(database.url)}, engine_kwargs=POOL)
        async with Gateway(settings) as gateway:
            await session(gateway, "warm").add_items([item("warm")])
            for round_ in range(4):
                writers = [
                    asyncio.create_task(session(gateway, n % 40).add_items([item(f"{round_} {n}")]))
                    for n in range(CALLERS)
                ]
                proxy.hold_next()
                await proxy.is_holding()
                proxy.drop_clients()
                proxy.release()
                await asyncio.wait_for(asyncio.gather(*writers), NO_HANG)
            found = [text for n in range(40) for text in await contents(gateway, n)]
            assert sorted(found) == sorted(f"{r} {n}" for r in range(4) for n in range(CALLERS))
            await _all_idle(gateway)


async def test_a_race_against_a_mover_where_statements_are_shared(
    databases: MakeDatabases, backend: Backend, statements: Statements
) -> None:
    """One seat is all there is, and more writers than usual: so they wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_fences, "SHARERS", 32)
        patch.setattr(test_fences, "LONERS", 16)
        patch.setattr(test_fences, "PACE", 0.002)
        patch.setattr(shards, "SEATS", 1)
        urls = {name: one.url for name, one in zip("ab", await databases(2), strict=True)}
        await test_fences.run_race(urls, 16)
    assert max(statements.appends) > 1
    assert max(statements.reads) > 1


async def test_a_caller_whose_task_is_gone_leaves_nothing_behind(
    gateway: Gateway, database: Database
) -> None:
    """Closed where it waits, as a task is that is collected: that is no time to be cancelled."""
    shard = gateway.shards["one"]
    place = gateway.route("acme", "warm")
    assert gateway._keyspaces["main"].map is not None
    guard = Guard(place.slot, gateway._keyspaces["main"].map.uuids["one"])
    async with row_locked(gateway, database.url, "warm"):
        key = Key("acme", "warm", place.h)
        lane = shard._lane(shards.Appends)
        lane._seats = 0  # whoever comes has to wait
        append = shard.append(Append(key, guard, Operation("gone", "append"), ["1"]))
        append.send(None)
        (attempt,) = lane._waiting
        assert attempt.waits
        append.close()
        assert not attempt.waits
        lane._seats = shards.SEATS
    assert shard._deadlines is not None
    assert attempt not in shard._deadlines._ends
