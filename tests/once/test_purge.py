"""Old operations are removed, young ones stay, and nobody else notices: on every database."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, insert, select, text, update

from once.wire import SECONDS
from shardgate import UsageError
from shardgate import purge as purge_module
from shardgate.purge import end_purge, purge_all, purge_of
from shardgate.sql.create import transaction
from shardgate.sql.purge import START, Chunk, OpKey, purge_chunk, seconds_ago
from shardgate.sql.transactions import utc_now
from shardgate.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.ext.asyncio import AsyncConnection

    from contract.conftest import OpenDoor
    from contract.doors import Door
    from harness.servers import Backend
    from shardgate.store import Place

NETWORKED = pytest.mark.backends("postgresql", "mariadb", "mysql")
STANDALONE = pytest.mark.parametrize("kind", ["standalone"], indirect=True)
HOUR = 3600.0
LONG_AGO = datetime(2001, 2, 3)
AB: list[Any] = [{"id": "a"}, {"id": "b"}]


async def store_of(door: Door, memory: float = HOUR) -> Store:
    async def act(store: Store, _place: Place) -> Store:
        return Store(store.database, operation_memory=memory)

    return await door.session()._perform(act)


def some_keys(door: Door, count: int, seed: int = 1) -> list[OpKey]:
    """Keys of a few sessions, some of which have the same ``h``, with all kinds of text."""
    chance = random.Random(seed)
    places = [chance.choice([7, -7, chance.randrange(-(2**63), 2**63)]) for _ in range(count // 9)]
    sessions = ["", "a", "A", "a ", "é", "日本", "%'\\"]
    return [
        OpKey(chance.choice(places), door.tenant, chance.choice(sessions), f"={seed}é{n}")
        for n in range(count)
    ]


async def record(door: Door, keys: list[OpKey], created_at: Any) -> None:
    async with door.engine().begin() as connection:
        await connection.execute(
            insert(door.tables.ops).values(kind="append", created_at=created_at),
            [key._asdict() for key in keys],
        )


async def recorded(door: Door) -> list[OpKey]:
    columns = [door.tables.ops.c[field] for field in OpKey._fields]
    async with door.engine().connect() as connection:
        rows = await connection.execute(select(*columns).order_by(*columns))
        return [OpKey(*row) for row in rows]


async def test_old_ones_go_and_young_ones_stay(door: Door) -> None:
    store = await store_of(door)
    old, young = some_keys(door, 900), some_keys(door, 700, seed=2)
    await record(door, old, LONG_AGO)
    await record(door, young, utc_now())
    assert await purge_all(store) == len(old)
    assert sorted(await recorded(door)) == sorted(young)
    assert await purge_all(store) == 0


async def test_of_an_empty_table(door: Door) -> None:
    assert await purge_all(await store_of(door)) == 0


async def test_the_databases_clock_decides(door: Door) -> None:
    keys = some_keys(door, 18)
    await record(door, keys[:9], seconds_ago(50.5))
    await record(door, keys[9:], seconds_ago(71))
    assert await purge_all(await store_of(door, 60.5)) == 9
    assert sorted(await recorded(door)) == sorted(keys[:9])
    assert await purge_all(await store_of(door, 1e-6)) == 9


async def test_a_memory_beyond_every_date(door: Door) -> None:
    await record(door, some_keys(door, 9), LONG_AGO)
    assert await purge_all(await store_of(door, 1e300)) == 0
    assert await purge_all(await store_of(door, 1e9 * 0.8)) == 9


async def test_the_walk_sees_each_key_once_and_no_more_than_so_many(door: Door) -> None:
    store, keys = await store_of(door), some_keys(door, 200)
    await record(door, keys[:100], LONG_AGO)
    await record(door, keys[100:], utc_now())
    ordered, place, lasts = await recorded(door), START, []
    removed = []
    while True:
        chunk = await store.database.transact(
            lambda connection, at=place: purge_chunk(
                connection, door.tables, at, memory=HOUR, keys=7
            )
        )
        removed.append(chunk.removed)
        if chunk.last is None:
            break
        place = chunk.last
        lasts.append(place)
    assert lasts == ordered[6::7]
    expected = [sum(key in keys[:100] for key in ordered[n : n + 7]) for n in range(0, 200, 7)]
    assert removed == expected
    assert sorted(await recorded(door)) == sorted(keys[100:])


async def test_a_key_is_accepted_anew_after_the_window(door: Door) -> None:
    session: Any = door.session()
    await session.add_items(AB, idempotency_key="k")
    store = await store_of(door)
    assert await purge_all(store) == 0
    with pytest.raises(UsageError, match="'k' was used before"):
        await session.add_items(AB[:1], idempotency_key="k")
    async with door.engine().begin() as connection:
        await connection.execute(update(door.tables.ops).values(created_at=LONG_AGO))
    await session.add_items(AB, idempotency_key="k")
    assert await session.get_items() == AB
    assert await purge_all(store) == 1
    await session.add_items(AB[:1], idempotency_key="k")
    assert await session.get_items() == [*AB, AB[0]]


async def test_what_is_used_anew_before_it_is_deleted_stays(door: Door) -> None:
    store, keys = await store_of(door), some_keys(door, 9)
    await record(door, keys, LONG_AGO)

    class Meanwhile:
        """A connection on which somebody comes between the look at the keys and their deletion."""

        def __init__(self, connection: AsyncConnection) -> None:
            self._connection = connection
            self.dialect = connection.dialect

        async def execute(self, statement: Any, **options: Any) -> Any:
            if statement.is_delete:
                anew = update(door.tables.ops).values(created_at=utc_now())
                await self._connection.execute(anew)
            return await self._connection.execute(statement, **options)

    async def purge(connection: Any) -> Chunk:
        between = Meanwhile(connection)
        return await purge_chunk(between, door.tables, START, memory=HOUR, keys=20)

    assert await store.database.transact(purge) == Chunk(None, 0)
    assert len(await recorded(door)) == 9


async def test_several_at_once_while_appends_go_on(door: Door, open_door: OpenDoor) -> None:
    other = await open_door()
    old, young = some_keys(door, 1500), some_keys(door, 300, seed=2)
    await record(door, old, LONG_AGO)
    await record(door, young, utc_now())
    stores = [await store_of(one) for one in (door, other)]

    async def write(writer: int) -> None:
        session: Any = (door, other)[writer % 2].session()
        for n in range(15):
            await session.add_items([{"id": f"{writer} {n}"}], idempotency_key=f"{writer} {n}")

    *removed, _, _, _ = await asyncio.gather(
        *(purge_all(stores[n % 2]) for n in range(4)), *(write(n) for n in range(3))
    )
    assert sum(removed) == len(old)
    left = await recorded(door)
    assert len(left) == len(young) + 45
    assert set(young) <= set(left)
    found = [item["id"] for item in await door.session().get_items()]
    assert Counter(found) == Counter(f"{writer} {n}" for writer in range(3) for n in range(15))


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step after 8 writes, of 40 keys in transactions of 10."""
    for name, value in {"PURGE_EVERY": 8, "STEP": 40, "_chunk": lambda _: 10}.items():
        monkeypatch.setattr(purge_module, name, value)


async def write_often(door: Door, times: int) -> None:
    for n in range(times):
        await door.session().add_items([{"n": n}])


async def step_done(store: Store) -> None:
    task = purge_of(store.database).task
    assert task is not None
    await asyncio.wait_for(asyncio.wait([task]), SECONDS)
    await asyncio.sleep(0)  # and what is done when it is done
    assert purge_of(store.database).task is None


@pytest.mark.usefixtures("small_steps")
async def test_writes_drive_it(door: Door) -> None:
    store = await store_of(door)
    await record(door, some_keys(door, 18), LONG_AGO)
    await write_often(door, 7)
    assert purge_of(store.database).task is None
    await door.session().get_items()
    assert purge_of(store.database).task is None
    await door.session().pop_item()
    await step_done(store)
    assert len(await recorded(door)) == 8  # the writes themselves
    assert len(await door.session().get_items()) == 6


@pytest.mark.usefixtures("small_steps")
async def test_a_step_is_bounded_and_the_walk_comes_round(door: Door) -> None:
    store = await store_of(door)
    await record(door, some_keys(door, 180), LONG_AGO)
    counts = [180]
    while counts[-1] > 8 * len(counts):
        await write_often(door, 8)
        await step_done(store)
        counts.append(len(await recorded(door)))
        assert counts[-2] + 8 - 40 <= counts[-1], counts
        assert len(counts) < 20, counts
    assert len(counts) > 4


@pytest.mark.usefixtures("small_steps")
async def test_one_step_at_a_time(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate, entered = await store_of(door), asyncio.Event(), []
    real: Any = purge_module._purge_chunk

    async def held(*arguments: Any) -> Any:
        entered.append(arguments)
        await gate.wait()
        return await real(*arguments)

    monkeypatch.setattr(purge_module, "_purge_chunk", held)
    await write_often(door, 30)
    assert len(entered) == 1
    gate.set()
    await step_done(store)
    await door.session().add_items(AB)  # long due
    await step_done(store)


@pytest.mark.usefixtures("small_steps")
async def test_what_fails_is_logged_and_tried_again_there(
    door: Door, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, places = await store_of(door), []

    async def fail(_database: object, place: OpKey, _memory: float) -> Any:
        places.append(place)
        if len(places) % 2 == 0:
            raise ConnectionResetError("secret")
        return Chunk(OpKey(len(places)), 0)

    monkeypatch.setattr(purge_module, "_purge_chunk", fail)
    for _ in range(2):
        await write_often(door, 8)
        await step_done(store)
    assert places[1:] == [OpKey(1), OpKey(1), OpKey(3)]
    logged = [text for _, level, text in caplog.record_tuples if level == logging.WARNING]
    assert logged == ["old operations were not removed for now: ConnectionResetError"] * 2


@pytest.mark.usefixtures("small_steps")
async def test_it_is_ended_before_the_engine(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate, entered = await store_of(door), asyncio.Event(), asyncio.Event()
    real: Any = purge_module.purge_chunk

    async def held(connection: Any, **options: Any) -> Any:
        entered.set()
        await gate.wait()
        return await real(connection, **options)

    monkeypatch.setattr(purge_module, "purge_chunk", held)
    await record(door, some_keys(door, 9), LONG_AGO)
    await write_often(door, 8)
    await asyncio.wait_for(entered.wait(), SECONDS)
    task = purge_of(store.database).task
    ending = asyncio.ensure_future(end_purge(store.database))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.wait_for(ending, SECONDS)
    assert task is not None
    assert task.cancelled()
    await end_purge(store.database)


@STANDALONE
async def test_closing_in_the_middle(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purge_module, "PURGE_EVERY", 1)
    for n in range(10):
        await record_if_made(door, n)
        await door.session().add_items(AB)
        for _ in range(n):
            await asyncio.sleep(0)
        await door.close()
    assert len(await door.session().get_items()) == 20
    await door.close()


async def record_if_made(door: Door, n: int) -> None:
    if n:
        await record(door, some_keys(door, 18, seed=10 + n), LONG_AGO)


# Who holds what. The open transaction is as the purge's own.


@asynccontextmanager
async def purging(door: Door) -> AsyncIterator[int]:
    """A chunk that has been purged and is not committed yet; how many operations were old."""
    async with transaction(door.engine()) as connection:
        chunk = await purge_chunk(connection, door.tables, START, memory=HOUR, keys=500)
        yield chunk.removed


@NETWORKED
async def test_nobody_waits_for_it(door: Door) -> None:
    """Appends before, between and after what is deleted, and one of a young neighbour's again."""
    h = (await store_keys(door))[0].h
    near = [h - 1, h, h + 1]
    old = [OpKey(n, door.tenant, "chat-1", f"{a}") for n in near for a in ("!", "=a", "zzz")]
    await record(door, old, LONG_AGO)
    session: Any = door.session()
    await session.add_items(AB, idempotency_key="b")
    async with purging(door) as removed:
        assert removed == len(old)
        for key in ("b", "0", "aa", "z", "zzzz"):
            adding = session.add_items(AB, idempotency_key=key)
            await asyncio.wait_for(adding, SECONDS)
    assert len(await session.get_items()) == 2 * 5


async def store_keys(door: Door) -> list[OpKey]:
    """The keys as a first append to the session makes them; they are removed again."""
    await door.session().add_items(AB)
    keys = await recorded(door)
    await door.session().clear_session()
    assert await purge_all(await store_of(door, 1e-6)) == 2
    return keys


@NETWORKED
async def test_it_waits_for_nobody(door: Door, backend: Backend) -> None:
    """Not for an operation that is being recorded, and not for a young one that is locked."""
    store, ops = await store_of(door), door.tables.ops
    keys = some_keys(door, 60)
    await record(door, keys[:20], LONG_AGO)
    await record(door, keys[20:40], utc_now())
    async with door.engine().begin() as connection:
        await connection.execute(
            select(ops.c.h).where(ops.c.created_at > LONG_AGO).with_for_update()
            if backend.family == "postgresql"
            else select(ops.c.h).where(ops.c.op_id == keys[20].op_id, *equal(ops, keys[20]))
        )
        await connection.execute(
            insert(ops).values(kind="append", created_at=utc_now()),
            [key._asdict() for key in keys[40:]],
        )
        assert await asyncio.wait_for(purge_all(store), SECONDS) == 20
    assert sorted(await recorded(door)) == sorted(keys[20:])


def equal(ops: Any, key: OpKey) -> Iterator[Any]:
    return (ops.c[field] == value for field, value in key._asdict().items())


# Plans.


async def statements(door: Door) -> list[tuple[str, Any]]:
    """What the purge of a large table sends, with its parameters; nothing is deleted."""
    sent: list[tuple[str, Any]] = []

    def note(_c: object, _cursor: object, sql: str, values: Any, *_: object) -> None:
        if "_ops" in sql:
            sent.append((sql, values))

    engine = door.engine().sync_engine
    event.listen(engine, "before_cursor_execute", note)
    keys = await recorded(door)
    sent.clear()
    async with door.engine().connect() as connection:
        for place in (START, keys[len(keys) // 2], OpKey(7, door.tenant, "a", "=1")):
            await purge_chunk(connection, door.tables, place, memory=HOUR, keys=200)
        await connection.rollback()
    event.remove(engine, "before_cursor_execute", note)
    assert {sql.split()[0] for sql, _ in sent} == {"SELECT", "DELETE"}
    return sent


@pytest.fixture
async def full(door: Door) -> Door:
    await store_of(door)  # creates the tables
    await record(door, some_keys(door, 6000), LONG_AGO)
    name = door.tables.ops.name
    verb = "ANALYZE" if door.engine().dialect.name in ("postgresql", "sqlite") else "ANALYZE TABLE"
    async with door.engine().begin() as connection:
        await connection.execute(text(f"{verb} {name}"))
    return door


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes(inner)


@pytest.mark.backends("postgresql")
async def test_plans_on_postgresql(full: Door) -> None:
    async with full.engine().connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        for mode in ("force_custom_plan", "force_generic_plan"):
            await driver.execute(f"SET plan_cache_mode = {mode}")
            for sql, values in await statements(full):
                ((told,),) = await driver.fetch(f"EXPLAIN (FORMAT JSON) {sql}", *values)
                found = list(nodes(told[0]["Plan"]))
                scans = {node["Node Type"] for node in found}
                assert not scans & {"Seq Scan", "Sort", "Incremental Sort"}, told
                by_index = [node for node in found if "Index Name" in node]
                assert {node["Index Name"] for node in by_index} == {f"{full.tables.ops.name}_pkey"}
                for node in by_index:  # the whole key, not its beginning alone
                    assert all(field in node["Index Cond"] for field in OpKey._fields), str(told)
        await driver.execute("RESET plan_cache_mode")


@pytest.mark.backends("mariadb", "mysql")
async def test_plans_on_mysql(full: Door) -> None:
    lengths = []
    async with full.engine().connect() as connection:
        for sql, values in await statements(full):
            told = (await connection.exec_driver_sql(f"EXPLAIN {sql}", values)).mappings()
            (row,) = told
            assert (row["type"], row["key"]) == ("range", "PRIMARY"), (sql, row)
            assert "filesort" not in row["Extra"], (sql, row)
            lengths.append(row["key_len"])
    assert len(set(lengths)) == 1  # always the whole key


@pytest.mark.backends("sqlite")
async def test_plans_on_sqlite(full: Door) -> None:
    async with full.engine().connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        for sql, values in await statements(full):
            rows = await driver.execute_fetchall(f"EXPLAIN QUERY PLAN {sql}", values)
            lines = [row[3] for row in rows]
            assert any("USING" in line and "INDEX" in line for line in lines), lines
            assert not any("SCAN" in line or "TEMP B-TREE" in line for line in lines), lines
