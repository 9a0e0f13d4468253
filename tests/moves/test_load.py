"""What slots carry is counted where they are owned, along the index, and compared with the rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, insert, text

from gateway.shards import SLOTS, execute, item, named, records, settings_at
from ownership.test_plans import nodes
from shardgate import Gateway, OwnershipConflict, ShardUnavailable, metadata
from shardgate.agreement import Plan
from shardgate.control.load import measure
from shardgate.control.rebalance import Load
from shardgate.slots import slot_of_stored, slot_range
from shardgate.sql.load import parameters, tally_statement
from shardgate.sql.transactions import utc_now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from conftest import MakeDatabases
    from harness.servers import Database
    from shardgate import GatewaySettings
    from shardgate.shards import Shard
    from shardgate.topology import KeyspaceMap

MANY, SESSIONS, PLACES = 4096, 20_000, 64
TABLE = metadata().tables["shardgate_sessions"]
INDEX = f"{TABLE.name}_by_h"
TIMES = dict.fromkeys(("created_at", "updated_at", "listed_at"), utc_now())


def known(gateway: Gateway) -> KeyspaceMap:
    found = gateway._keyspaces["main"].map
    assert found is not None
    return found


async def measured(gateway: Gateway, settings: GatewaySettings, **options: Any) -> list[Load]:
    plan = Plan.of(settings, "main")
    loads, down = await measure(plan, gateway.shards, known(gateway), **options)
    assert not down
    return loads


async def stored(urls: dict[str, str], owners: tuple[str, ...], slots: int) -> list[Load]:
    """The loads by the rows themselves, added up here."""
    found: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for name, url in urls.items():
        for row in await records(url, "sessions"):
            slot = slot_of_stored(row["h"], slots)
            if owners[slot] == name:
                found[slot].append(row)
    return [
        Load(
            sessions=len(found[slot]),
            items=sum(row["item_count"] for row in found[slot]),
            nbytes=sum(row["byte_count"] for row in found[slot]),
        )
        for slot in range(slots)
    ]


async def fill(gateway: Gateway) -> None:
    for number in range(40):
        session = gateway.tenant("acme").session(f"chat-{number}")
        await session.add_items([item("x" * number)] * (1 + number % 5))


@pytest.mark.parametrize("slots", [SLOTS, 256, MANY])
async def test_every_slot_is_counted(databases: MakeDatabases, slots: int) -> None:
    """By statements of one slot, of a few, and of many."""
    urls = named(await databases(3))
    settings = settings_at(urls, slots=slots)
    async with Gateway(settings) as gateway:
        await fill(gateway)
        loads = await measured(gateway, settings)
        assert loads == await stored(urls, known(gateway).owners, slots)
        assert sum(load.sessions for load in loads) == 40
        assert sum(load.items for load in loads) == 120


async def test_rows_of_slots_that_are_owned_elsewhere_do_not_count(
    databases: MakeDatabases,
) -> None:
    urls = named(await databases(2))
    settings = settings_at(urls)
    async with Gateway(settings) as gateway:
        await fill(gateway)
        there = next(
            slot for slot, load in enumerate(await measured(gateway, settings)) if load.items
        )
        left = {"a": "b", "b": "a"}[known(gateway).owners[there]]
        first, _ = slot_range(there, SLOTS)
        await execute(urls[left], insert(TABLE).values(row("left", first) | TIMES))
        assert await measured(gateway, settings) == await stored(urls, known(gateway).owners, SLOTS)


def row(session_id: str, h: int) -> dict[str, Any]:
    counters = ("incarnation", "next_seq", "floor_seq", "revision", "item_count", "byte_count")
    return {"tenant_id": "acme", "session_id": session_id, "h": h} | dict.fromkeys(counters, 1)


class Wait:
    """Stands in for the event loop's clock and for waiting: what is waited for is done, and time
    passes in no other way."""

    def __init__(self, *actions: Callable[[], Awaitable[object]]) -> None:
        self._actions = actions
        self._now = 0.0

    def time(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        for action in self._actions:
            await action()
        self._now += seconds


async def test_writes_are_what_has_changed_meanwhile(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_at({"a": database.url}, slots=MANY)
    async with Gateway(settings) as gateway:
        await fill(gateway)
        names = [f"chat-{number}" for number in range(4)]
        slots = [gateway.route("acme", name).slot for name in names]
        assert len(set(slots)) == 4
        tenant = gateway.tenant("acme")
        adds = [
            partial(tenant.session(names[number]).add_items, [item("more")])
            for number in (1, 2, 2, 2)
        ]
        wait = Wait(*adds, partial(tenant.delete_session, names[3]))
        before = await measured(gateway, settings)
        monkeypatch.setattr("shardgate.control.load.get_running_loop", lambda: wait)
        monkeypatch.setattr("shardgate.control.load.sleep", wait.sleep)
        loads = await measured(gateway, settings, seconds=2)
    assert not any(load.writes for load in before)
    assert [loads[slot].writes for slot in slots] == [0, 0.5, 1.5, 0]
    assert sum(load.writes for load in loads) == 2
    assert [loads[slot].items - before[slot].items for slot in slots] == [0, 1, 3, -4]


async def test_a_shard_that_cannot_be_asked_is_named(
    databases: MakeDatabases, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = named(await databases(3))
    settings = settings_at(urls)
    async with Gateway(settings) as gateway:
        await fill(gateway)
        plan, owners = Plan.of(settings, "main"), known(gateway).owners
        shards = {name: shard for name, shard in gateway.shards.items() if name != "c"}

        async def refuse(_: object) -> None:
            raise ShardUnavailable("shard 'b' is down", shard="b")

        monkeypatch.setattr(shards["b"], "query", refuse)
        loads, down = await measure(plan, shards, known(gateway))
    assert sorted(down) == ["b", "c"]
    assert isinstance(down["b"], ShardUnavailable)
    assert isinstance(down["c"], OwnershipConflict)
    all_of_them = await stored(urls, owners, SLOTS)
    assert loads == [
        load if owner == "a" else Load() for load, owner in zip(all_of_them, owners, strict=True)
    ]


async def test_a_shard_is_asked_one_statement_at_a_time_and_always_the_same(
    database: Database,
) -> None:
    settings = settings_at({"a": database.url}, slots=MANY)
    async with Gateway(settings) as gateway:
        await gateway.open()
        sent: list[str] = []
        under_way: set[str] = set()

        def begin(*call: Any) -> None:
            assert not under_way
            under_way.add(call[2])
            sent.append(call[2])

        engine = gateway.shards["a"].engine.sync_engine
        event.listen(engine, "before_cursor_execute", begin)
        event.listen(engine, "after_cursor_execute", lambda *call: under_way.remove(call[2]))
        await measured(gateway, settings)
    assert len(sent) == MANY // PLACES
    assert len(set(sent)) == 1


# --- along the index


@pytest.fixture
async def full(database: Database) -> AsyncIterator[Shard]:
    """A shard with sessions in all slots; its statistics are fresh."""
    async with Gateway(settings_at({"a": database.url}, slots=MANY)) as gateway:
        await gateway.open()
        shard = gateway.shards["a"]
        step = 2**64 // SESSIONS
        rows = [row(f"s{number}", number * step - 2**63) for number in range(SESSIONS)]
        async with shard.engine.begin() as connection:
            await connection.execute(insert(TABLE).values(TIMES), rows)
        verb = (
            "ANALYZE" if shard.engine.dialect.name in ("postgresql", "sqlite") else "ANALYZE TABLE"
        )
        async with shard.engine.begin() as connection:
            await connection.execute(text(f"{verb} {TABLE.name}"))
        yield shard


async def explained(shard: Shard, verb: str, *, mode: str | None = None) -> list[Any]:
    """What the database says of how it runs the statement, for the first slots."""
    compiled = tally_statement(shard.tables, PLACES).compile(dialect=shard.engine.dialect)
    values = parameters([slot_range(slot, MANY) for slot in range(PLACES)], places=PLACES)
    ordered = tuple(values[name] for name in compiled.positiontup or ())
    async with shard.engine.connect() as connection:
        if mode is not None:
            await connection.exec_driver_sql(f"SET LOCAL plan_cache_mode = {mode}")
        told = await connection.exec_driver_sql(f"{verb} {compiled}", ordered)
        return list(told.mappings())


@pytest.mark.backends("postgresql")
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_postgresql_goes_along_the_index(full: Shard, mode: str) -> None:
    ((told,),) = [
        line.values() for line in await explained(full, "EXPLAIN (FORMAT JSON)", mode=mode)
    ]
    found = list(nodes(told[0]["Plan"]))
    scans = [node for node in found if node.get("Relation Name") == TABLE.name]
    assert {node["Node Type"] for node in scans} <= {"Index Scan", "Bitmap Heap Scan"}, told
    assert Counter(node.get("Index Name") for node in found)[INDEX] == PLACES


@pytest.mark.backends("mariadb", "mysql")
async def test_mysql_goes_along_the_index(full: Shard) -> None:
    lines = [line for line in await explained(full, "EXPLAIN") if line["table"] == TABLE.name]
    assert [(line["type"], line["key"]) for line in lines] == [("range", INDEX)] * PLACES


@pytest.mark.backends("sqlite")
async def test_sqlite_goes_along_the_index(full: Shard) -> None:
    lines = [line["detail"] for line in await explained(full, "EXPLAIN QUERY PLAN")]
    searches = [line for line in lines if TABLE.name in line]
    assert searches == [f"SEARCH {TABLE.name} USING INDEX {INDEX} (h>? AND h<?)"] * PLACES
