"""What a review found, each seen once and not again."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.pool import StaticPool

from contract.doors import gateway_settings
from shardgate import (
    Gateway,
    OutcomeUnknown,
    ShardUnavailable,
    SQLAlchemySession,
    UsageError,
)
from shardgate.engines import make_engine as make_own_engine
from shardgate.items import decode
from shardgate.settling import settle
from shardgate.shards import Shard

if TYPE_CHECKING:
    from contract.doors import Door
    from harness.engines import EngineMaker
    from harness.servers import Database

SECONDS = 5
"""Less than a cancelled write is waited for; more than anything here takes."""
MYSQL = ("mariadb", "mysql")


def _session(engine: Any, session_id: str = "chat-1", **options: Any) -> Any:
    return SQLAlchemySession(session_id, engine=engine, create_tables=True, **options)


def _on(engine: Any, name: str, *statements: str) -> None:
    """Have a listener of the pool run statements, as applications do to set a connection up."""

    def run(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
            if statement.startswith("SELECT"):
                cursor.fetchall()
        cursor.close()

    event.listen(engine.sync_engine, name, run)


@pytest.mark.backends("postgresql")
@pytest.mark.parametrize("name", ["connect", "checkout"])
async def test_a_listener_that_leaves_a_transaction_open_loses_no_append(
    make_engine: EngineMaker, name: str
) -> None:
    engine = make_engine()
    _on(engine, name, "SET application_name = 'listened'")
    await _session(engine).get_items()
    # Each on a connection of its own, that appends before it does anything else.
    await asyncio.gather(*(_session(engine).add_items([{"n": n}]) for n in range(5)))
    async with engine.connect() as connection:
        shown = await connection.execute(text("SHOW application_name"))
        # SQLAlchemy itself rolls back what a "connect" listener left, when it first returns.
        assert shown.scalar_one() == ("listened" if name == "checkout" else "")
    await engine.dispose()
    stored = await _session(make_engine()).get_items()
    assert sorted(item["n"] for item in stored) == list(range(5))


@pytest.mark.backends(*MYSQL)
async def test_a_listener_that_reads_does_not_freeze_what_is_read(make_engine: EngineMaker) -> None:
    listened, plain = make_engine(pool_size=1, max_overflow=0, pool_reset_on_return=None), None
    await _session(listened).add_items([{"n": 0}])
    _on(listened, "checkout", "SELECT COUNT(*) FROM agent_sessions")
    plain = make_engine()
    for n in range(1, 4):
        assert len(await _session(listened).get_items()) == n
        await _session(plain).add_items([{"n": n}])
        assert (await _session(listened).get_items())[-1] == {"n": n}
    assert await _session(listened).pop_item() == {"n": 3}
    assert len(await _session(plain).get_items()) == 3


async def test_a_caller_cancelled_again_and_again_is_not_kept_for_longer() -> None:
    task = asyncio.ensure_future(settle(asyncio.sleep(3600), grace=0.2))
    await asyncio.sleep(0)
    times = 0
    while not task.done() and times < 500:
        task.cancel()
        times += 1
        await asyncio.wait([task], timeout=0.01)
    assert task.cancelled()
    assert times > 1


@pytest.mark.backends("postgresql", *MYSQL)
async def test_a_write_cancelled_before_it_was_sent_ends_at_once(make_engine: EngineMaker) -> None:
    engine = make_engine(pool_size=1, max_overflow=0)
    session = _session(engine)
    await session.add_items([{"n": 0}])
    async with engine.connect():
        task = asyncio.ensure_future(session.add_items([{"n": 1}]))
        await asyncio.wait([task], timeout=0.05)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=SECONDS)
        assert done
        assert task.cancelled()
    await session.add_items([{"n": 2}])
    assert await session.get_items() == [{"n": 0}, {"n": 2}]


@pytest.mark.backends("sqlite")
async def test_two_engines_on_one_connection(make_engine: EngineMaker) -> None:
    engine = make_engine("sqlite+aiosqlite://", poolclass=StaticPool)
    other = engine.execution_options(logging_token="other")  # noqa: S106 - a name for the log
    await _session(engine).add_items([])
    calls = [_session(one).add_items([{"n": n}]) for n in range(20) for one in (engine, other)]
    snapshots = [_session(one)._get_compaction_snapshot(3) for one in (engine, other)]
    await asyncio.gather(*calls, *snapshots)
    assert len(await _session(other).get_items()) == 40


@pytest.mark.backends("sqlite")
async def test_sqlalchemys_recipe_for_sqlite(database: Database, make_engine: EngineMaker) -> None:
    """The driver's own transactions off, and BEGIN by a listener."""
    engine = make_engine()

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    session = _session(engine)
    await session.add_items([{"n": n} for n in range(4)])
    snapshot = await session._get_compaction_snapshot(10)
    assert await snapshot.replace_suffix(1, [{"n": 9}])
    assert await session.get_items() == [{"n": 0}, {"n": 9}]
    async with Gateway(gateway_settings([database.url]), engines={"s0": engine}) as gateway:
        tenant: Any = gateway.tenant("acme")
        await tenant.session("chat-1").add_items([{"n": 1}])
        assert await tenant.delete_session("chat-1")
        assert await tenant.session("chat-1").get_items() == []


@pytest.mark.backends("sqlite")
async def test_what_is_no_list_of_items_is_refused(door: Door) -> None:
    session: Any = door.session()
    for wrong in ("abc", b"abc", {"role": "user", "content": "x"}, [None], [{"n": 1}, None], 7):
        with pytest.raises(UsageError):
            await session.add_items(wrong)
    assert await session.get_items() == []


async def test_an_integer_of_five_thousand_digits(door: Door) -> None:
    """Other programs may have stored what this interpreter does not write."""
    await door.session().add_items([{"n": 0}])
    await door.damage('{"n":' + "9" * 5000 + ',"m":-' + "7" * 4500 + "}")
    long = {"n": 10**5000 - 1, "m": -7 * (10**4500 - 1) // 9}
    assert await door.session().get_items() == [{"n": 0}, long]
    assert await door.session().pop_item() == long
    assert await door.session().get_items() == [{"n": 0}]


async def test_what_is_nested_deeper_than_can_be_read_is_kept(door: Door) -> None:
    await door.session().add_items([{"n": 0}, {"n": 1}])
    deep = "[" * 3000 + "]" * 3000
    with suppress(RecursionError):
        decode(deep)
        pytest.skip("this interpreter reads it")
    await door.damage(deep)
    assert await door.session().get_items() == [{"n": 0}, {"n": 1}]
    assert [await door.session().pop_item() for _ in range(3)] == [{"n": 1}, {"n": 0}, None]
    assert await door.stored() == [deep]


def _nested(depth: int, leaf: str) -> Any:
    item: Any = leaf
    for _ in range(depth):
        item = {"in": item}
    return item


@pytest.mark.backends(*MYSQL)
async def test_a_connection_of_another_character_set(
    database: Database, make_engine: EngineMaker
) -> None:
    url = make_url(database.url).update_query_dict({"charset": "latin1"})
    engine = make_engine(url.render_as_string(hide_password=False))
    session = _session(engine, ensure_ascii=False)
    items = [{"text": "日本語 🔑 é"}, {"text": "ї"}, _nested(40, "日本 🔑")]
    await session.add_items(items)
    assert await session.get_items() == items
    assert await session.pop_item() == items[2]
    snapshot = await session._get_compaction_snapshot(10)
    assert (snapshot.items, snapshot.complete) == (items[:2], True)
    assert await snapshot.replace_suffix(1, [{"text": "новый 🔑"}])
    expected = [items[0], {"text": "новый 🔑"}]
    assert await session.get_items() == expected
    assert await _session(make_engine()).get_items() == expected


async def test_one_table_of_sessions_with_two_of_messages(make_engine: EngineMaker) -> None:
    engine = make_engine()
    one = _session(engine, "one", messages_table="messages_1")
    two = _session(engine, "two", messages_table="messages_2")
    for n in range(3):
        await one.add_items([{"one": n}])
        await two.add_items([{"two": n}])
    assert await one.pop_item() == {"one": 2}
    assert await one.get_items() == [{"one": 0}, {"one": 1}]
    assert await two.get_items() == [{"two": 0}, {"two": 1}, {"two": 2}]


@pytest.mark.backends("postgresql")
@pytest.mark.parametrize(
    "option", [{"default_transaction_read_only": "on"}, {"statement_timeout": "50"}]
)
async def test_a_refusal_that_passes_is_unavailability(
    database: Database,
    make_engine: EngineMaker,
    monkeypatch: pytest.MonkeyPatch,
    option: dict[str, str],
) -> None:
    monkeypatch.setitem(Shard._run.__kwdefaults__, "outage", 0.3)  # bound when it was defined
    settings = gateway_settings([database.url])
    async with Gateway(settings) as plain:
        first: Any = plain.tenant("acme").session("chat-1")
        await first.add_items([{"n": 0}])
        engine = make_engine(connect_args={"server_settings": option})
        async with (
            Gateway(settings, engines={"s0": engine}) as gateway,
            plain.shards["s0"].engine.connect() as other,
        ):
            await other.execute(text("SELECT 1 FROM shardgate_sessions FOR UPDATE"))
            session: Any = gateway.tenant("acme").session("chat-1")
            with pytest.raises(ShardUnavailable, match="shard 's0'"):
                await session.add_items([{"n": 1}])
        assert await first.get_items() == [{"n": 0}]


@pytest.mark.backends("sqlite")
async def test_a_schema_translate_map_is_refused(make_engine: EngineMaker) -> None:
    engine = make_engine().execution_options(schema_translate_map={None: "other"})
    with pytest.raises(UsageError, match="schema_translate_map"):
        _session(engine)


async def test_a_limit_beyond_every_database(door: Door) -> None:
    await door.session().add_items([{"n": 0}])
    assert await door.session().get_items(10**30) == [{"n": 0}]


async def test_own_engines_hide_parameters() -> None:
    assert make_own_engine("sqlite+aiosqlite://", {}).sync_engine.hide_parameters
    chosen = make_own_engine("sqlite+aiosqlite://", {"hide_parameters": False})
    assert not chosen.sync_engine.hide_parameters


@pytest.mark.backends("sqlite")
async def test_a_deadline_within_a_long_transaction_leaves_no_lock(database: Database) -> None:
    async with Gateway(gateway_settings([database.url])) as gateway:
        session: Any = gateway.tenant("acme").session("chat-1")
        old = [{"n": n} for n in range(200)]
        await session.add_items(old)
        snapshot = await session._get_compaction_snapshot(1000)
        gateway.shards["s0"].deadline = 0.02
        new = [{"n": n, "new": "x" * 100} for n in range(20_000)]
        with pytest.raises(OutcomeUnknown) as caught:
            await snapshot.replace_suffix(0, new)
        async with Gateway(gateway_settings([database.url])) as other:
            theirs: Any = other.tenant("acme").session("chat-1")
            await theirs.add_items([{"n": "next"}])
            landed = await theirs.settle(caught.value.op_id)
            expected = [*(new if landed else old), {"n": "next"}]
            assert json.dumps(await theirs.get_items()) == json.dumps(expected)
