"""The hot statements of a gateway find every row by its primary key, in tables that are full."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, text

from gateway.shards import settings_at
from shardgate import Gateway
from shardgate.coalescing import MOST_TOGETHER
from shardgate.sql.dialect import Append, Guard, Key, Operation, TailRead
from shardgate.sql.transactions import utc_now
from shardgate.store import Place, Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from harness.servers import Database
    from shardgate.shards import Shard

SLOTS, SESSIONS, ITEMS, TENANTS = 4096, 2000, 5000, 500
TABLES = ("sessions", "messages", "ops", "slots", "tenants")


class Recorder:
    """Stands in for a driver's connection, and notes what a dialect sends."""

    charset = "utf8mb4"

    def get_server_info(self) -> str:
        """As MySQL: the statements of a change, not yet wrapped into one for MariaDB."""
        return "8.4.0"

    def __init__(self) -> None:
        self.sent: list[tuple[str, tuple[Any, ...]]] = []

    async def fetch(self, statement: str, *values: Any) -> list[Any]:
        self.sent.append((statement, values))
        return [(True, None, None)] if "unnest" not in statement else []

    async def fetchval(self, statement: str, *values: Any) -> str:
        self.sent.append((statement, values))
        return ""

    async def fetchrow(self, statement: str, *values: Any) -> tuple[Any, ...]:
        self.sent.append((statement, values))
        return (True, True, None)[: 3 if "newest" in statement else 2]

    def is_in_transaction(self) -> bool:
        return False

    def cursor(self, _kind: object) -> Recorder:
        return self

    async def __aenter__(self) -> Recorder:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""

    async def execute(self, packet: str) -> None:
        self.sent.append((packet, ()))

    async def fetchall(self) -> list[tuple[int | None, ...]]:
        """As for an append and a clear that took effect, an empty pop and an empty read."""
        packet, _ = self.sent[-1]
        return [
            (1, 1) if "newest" not in packet and "JSON_VALID" not in packet else (1, None, None)
        ]

    async def nextset(self) -> bool:
        return False

    def escape(self, value: str) -> str:
        return f"'{value}'"


@pytest.fixture(params=["small tenant", "large tenant"])
async def filled(
    database: Database, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[Shard, Place]]:
    """A shard with much on it, and a long session there; statistics are fresh."""
    settings = settings_at({"one": database.url}, slots=SLOTS)
    async with Gateway(settings) as gateway:
        shard = gateway.shards["one"]
        known = gateway._keyspaces["main"].map
        assert known is not None
        route = gateway.route("acme", "chat")
        place = Place(Key("acme", "chat", route.h), Guard(route.slot, known.uuids["one"]))
        await _fill(shard, "acme" if request.param == "large tenant" else "t0")
        await gateway.tenant("acme").session("chat").get_items(1)  # admits the tenant
        await Store(shard).append(place, Operation("first", "append"), ['{"n": 1}'] * ITEMS)
        await _analyse(shard)
        yield shard, place


async def _fill(shard: Shard, largest: str) -> None:
    """Half of the sessions are the largest tenant's."""
    tables, now = shard.tables, utc_now()
    of = [
        {"tenant_id": f"t{n % TENANTS}" if n % 2 else largest, "session_id": f"s{n}"}
        for n in range(SESSIONS)
    ]
    counts = {"incarnation": 1, "next_seq": 2, "floor_seq": 1, "revision": 1, "item_count": 1}
    times = {"created_at": now, "updated_at": now}
    async with shard.engine.begin() as connection:
        await connection.execute(
            insert(tables.sessions).values(**times, listed_at=now),
            [row | counts | {"h": h, "byte_count": 2} for h, row in enumerate(of)],
        )
        await connection.execute(
            insert(tables.messages).values(created_at=now, message_data="{}"),
            [row | {"seq": 1, "nbytes": 2} for row in of],
        )
        await connection.execute(
            insert(tables.ops).values(created_at=now, kind="append"),
            [row | {"h": h, "op_id": f"op{h}"} for h, row in enumerate(of)],
        )
        await connection.execute(
            insert(tables.tenants).values(**times, status="admitted"),
            [{"tenant_id": f"t{number}"} for number in range(TENANTS)],
        )


async def _analyse(shard: Shard) -> None:
    verb = "ANALYZE" if shard.engine.dialect.name == "postgresql" else "ANALYZE TABLE"
    async with shard.engine.connect() as connection:
        for name in TABLES:
            await connection.execute(text(f"{verb} shardgate_{name}"))
        await connection.commit()


async def hot_statements(shard: Shard, place: Place) -> list[tuple[str, tuple[Any, ...]]]:
    """The real statements of the four hot operations, with their real parameters."""
    recorder, dialect = Recorder(), shard.dialect
    new = Operation("new append", "append")
    await dialect.append(recorder, Append(place.key, place.guard, new, ['{"n": 2}']))
    await dialect.pop(recorder, place.key, place.guard, Operation("new pop", "pop"))
    await dialect.clear(recorder, place.key, place.guard, Operation("new clear", "clear"))
    await dialect.tail(recorder, TailRead(place.key, place.guard, 20))
    assert len(recorder.sent) == 4
    return recorder.sent


async def gathered_statements(shard: Shard, place: Place) -> list[tuple[str, tuple[Any, ...]]]:
    """The real statements of appends and readings sent together, some of new sessions."""
    recorder, dialect = Recorder(), shard.dialect
    appends, reads = [], []
    for number in range(MOST_TOGETHER):
        key = place.key if number == 0 else place.key._replace(session_id=f"s{number}", h=number)
        operation = Operation(f"new append {number}", "append")
        appends.append(Append(key, place.guard, operation, ['{"n": 2}'] * 2))
        reads.append(TailRead(key, place.guard, 20))
    await dialect.append_many(recorder, appends)
    await dialect.tail_many(recorder, reads)
    return recorder.sent


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes(inner)


@pytest.mark.backends("postgresql")
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_postgresql(filled: tuple[Shard, Place], mode: str) -> None:
    shard, place = filled
    keys = {f"shardgate_{name}_pkey" for name in TABLES}
    used: set[str] = set()
    async with shard.engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.execute(f"SET plan_cache_mode = {mode}")
        for statement, values in await hot_statements(shard, place):
            ((told,),) = await driver.fetch(f"EXPLAIN (FORMAT JSON) {statement}", *values)
            found = list(nodes(told[0]["Plan"]))
            scans = {node["Node Type"] for node in found if "Relation Name" in node}
            assert scans <= {"Index Scan", "Index Only Scan", "ModifyTable", "Bitmap Heap Scan"}, (
                statement,
                told,
            )
            assert "Sort" not in {node["Node Type"] for node in found}, statement
            indexes = {node["Index Name"] for node in found if "Index Name" in node}
            assert indexes <= keys, statement
            assert all("Index Cond" in node for node in found if "Index Name" in node), told
            used |= indexes
        await driver.execute("RESET plan_cache_mode")
    assert used == keys - {"shardgate_ops_pkey"}  # an insert looks there by itself


@pytest.mark.backends("postgresql")
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_postgresql_together(filled: tuple[Shard, Place], mode: str) -> None:
    """The tables that grow are only looked up by key, whatever is guessed of how many are wanted;
    of the two that do not, it may be cheaper to read all."""
    shard, place = filled
    small = {"shardgate_slots", "shardgate_tenants"}
    async with shard.engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.execute(f"SET plan_cache_mode = {mode}")
        for statement, values in await gathered_statements(shard, place):
            ((told,),) = await driver.fetch(f"EXPLAIN (FORMAT JSON) {statement}", *values)
            found = [
                node
                for node in nodes(told[0]["Plan"])
                if "Index Name" in node or node.get("Relation Name") not in {None, *small}
            ]
            for node in found:
                by_key = {"Index Scan", "Index Only Scan", "ModifyTable"}
                if node.get("Index Name") == "shardgate_tenants_pkey":  # many at once
                    by_key.add("Bitmap Index Scan")
                assert node["Node Type"] in by_key, told
                assert ("Index Cond" in node) == ("Index Name" in node), told
            used = {node["Index Name"] for node in found if "Index Name" in node}
            assert used >= {"shardgate_sessions_pkey"}
            assert used <= {f"shardgate_{name}_pkey" for name in TABLES}
        await driver.execute("RESET plan_cache_mode")


_LONG = """
    INSERT INTO shardgate_messages
        (tenant_id, session_id, seq, message_data, nbytes, created_at)
    SELECT 'acme', 'chat', number, '{}', 2, now() AT TIME ZONE 'UTC'
    FROM generate_series(1000000, 1003000) AS number
"""


@pytest.mark.backends("postgresql")
async def test_postgresql_makes_a_plan_for_good(filled: tuple[Shard, Place]) -> None:
    """After five executions, also where sessions are long: a plan that counts on the values, such
    as how few of many rows are wanted, would be made anew each time."""
    shard, place = filled
    plans = "SELECT custom_plans, generic_plans FROM pg_prepared_statements WHERE statement = $1"
    async with shard.engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        transaction = driver.transaction()
        await transaction.start()
        await driver.execute("DELETE FROM shardgate_messages WHERE session_id <> 'chat'")
        await driver.execute(_LONG)
        await driver.execute("ANALYZE shardgate_messages")
        hot, gathered = await hot_statements(shard, place), await gathered_statements(shard, place)
        for statement, values in hot + gathered:
            for _ in range(9):
                await driver.fetch(statement, *values)
            custom, generic = await driver.fetchrow(plans, statement)
            assert (custom, generic >= 4) == (5, True), statement
        await transaction.rollback()


@pytest.mark.backends("mariadb", "mysql")
async def test_mysql(filled: tuple[Shard, Place]) -> None:
    shard, place = filled
    explained = set()
    async with shard.engine.connect() as connection:
        values = "@shardgate_floor = 1, @shardgate_seq = 5000, @shardgate_json = 1"
        await connection.exec_driver_sql(
            f"SET {values}, @shardgate_here = 1, @shardgate_new = 1, @shardgate_size = 2"
        )
        for packet, _ in await hot_statements(shard, place):
            for statement in parts(packet):
                told = await connection.exec_driver_sql("EXPLAIN " + statement.replace("%", "%%"))
                for row in told.mappings():
                    if row["table"] is None or str(row["table"]).startswith("<derived"):
                        continue
                    if row["type"] in (None, "ALL") and statement.startswith("INSERT"):
                        assert row["select_type"] == "INSERT", (statement, row)
                        continue
                    assert row["type"] in ("const", "eq_ref", "ref", "range"), (statement, row)
                    assert row["key"] == "PRIMARY", (statement, row)
                    assert "filesort" not in (row["Extra"] or ""), (statement, row)
                    explained.add(row["table"])
    names = {str(table).removeprefix("shardgate_") for table in explained}
    assert names >= {"sessions", "messages", "slots", "tenants"}


def parts(packet: str) -> list[str]:
    """The statements of a packet that read or change tables, as EXPLAIN takes them."""
    found = [re.sub(r"INTO @\w+(, @\w+)*", "", one).strip() for one in packet.split("; ")]
    return [one for one in found if re.match(r"SELECT .*FROM|INSERT|UPDATE|DELETE", one)]
