"""Tables of other makers are told apart and named, and tables may have any name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from agents.extensions.memory import SQLAlchemySession as SDKSession
from sqlalchemy import text

from contract.doors import TENANT, gateway_settings
from shardgate.errors import KeyspaceNotCreated, TablesMismatch, UsageError
from shardgate.gateway import Gateway
from shardgate.session import SQLAlchemySession

if TYPE_CHECKING:
    from harness.engines import EngineMaker
    from harness.servers import Database

NAMES = [
    ("Sessions", "Messages"),
    ("select", "order"),
    ("chat sessions", "chat-messages"),
    ("50% sessions", "50%s messages"),
    ("s{0}", "m{now}"),
    ("with:colon", "with$dollar"),
    ('quo"te', "back`tick"),
    ("apo'strophe", "ünïcode"),
]


async def _refused(session: Any) -> list[str]:
    messages = []
    for call in (session.get_items, session.pop_item, session.clear_session):
        with pytest.raises(TablesMismatch) as caught:
            await call()
        messages.append(str(caught.value))
    with pytest.raises(TablesMismatch):
        await session.add_items([{"n": 1}])
    return messages


@pytest.mark.backends("sqlite", "postgresql")
@pytest.mark.parametrize("create", [True, False])
async def test_tables_of_the_sdks_own_class(
    database: Database, make_engine: EngineMaker, create: bool
) -> None:
    engine = make_engine()
    theirs = SDKSession("chat-1", engine=engine, create_tables=True)
    await theirs.add_items([{"role": "user", "content": "hello"}])
    ours = SQLAlchemySession("chat-1", engine=engine, create_tables=create)
    for message in await _refused(ours):
        assert "'agent_sessions'" in message
        assert "OpenAI Agents SDK" in message
        assert "sessions_table=" in message
    assert await theirs.get_items() == [{"role": "user", "content": "hello"}]
    beside: Any = SQLAlchemySession(
        "chat-1", engine=engine, create_tables=True, sessions_table="s", messages_table="m"
    )
    await beside.add_items([{"n": 1}])
    assert await beside.get_items() == [{"n": 1}]


@pytest.mark.parametrize("create", [True, False])
async def test_tables_of_a_gateway(
    database: Database, make_engine: EngineMaker, create: bool
) -> None:
    async with Gateway(gateway_settings([database.url])) as gateway:
        tenant: Any = gateway.tenant(TENANT).session("chat-1")
        await tenant.add_items([{"n": 1}])
        alone = SQLAlchemySession(
            "chat-1",
            engine=make_engine(),
            create_tables=create,
            sessions_table="shardgate_sessions",
            messages_table="shardgate_messages",
        )
        for message in await _refused(alone):
            assert "gateway" in message
            assert "'shardgate_sessions'" in message
        assert await tenant.get_items() == [{"n": 1}]


@pytest.mark.parametrize("create", [True, False])
async def test_tables_of_the_standalone_class(
    database: Database, make_engine: EngineMaker, create: bool
) -> None:
    alone: Any = SQLAlchemySession(
        "chat-1",
        engine=make_engine(),
        create_tables=True,
        sessions_table="shardgate_sessions",
        messages_table="shardgate_messages",
    )
    await alone.add_items([{"n": 1}])
    settings = gateway_settings([database.url], create_tables=create)
    gateway = Gateway(settings, engines={"s0": make_engine()})
    refusal = TablesMismatch if create else KeyspaceNotCreated
    with pytest.raises(refusal, match="stand-alone" if create else "has not been created"):
        await gateway.tenant(TENANT).session("chat-1").get_items()
    await gateway.aclose()
    assert await alone.get_items() == [{"n": 1}]


async def test_a_table_that_is_something_else(database: Database, make_engine: EngineMaker) -> None:
    engine = make_engine()
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE agent_sessions (id INTEGER PRIMARY KEY)"))
    for create in (True, False):
        session = SQLAlchemySession("chat-1", engine=engine, create_tables=create)
        for message in await _refused(session):
            assert "'agent_sessions'" in message


@pytest.mark.parametrize(("sessions", "messages"), NAMES, ids=[names[0] for names in NAMES])
async def test_tables_may_have_any_name(
    make_engine: EngineMaker, sessions: str, messages: str
) -> None:
    session: Any = SQLAlchemySession(
        "chat-1",
        engine=make_engine(),
        create_tables=True,
        sessions_table=sessions,
        messages_table=messages,
    )
    await session.add_items([{"n": 1}, {"text": "%s %% é"}])
    assert await session.get_items(1) == [{"text": "%s %% é"}]
    assert await session.pop_item() == {"text": "%s %% é"}
    snapshot = await session._get_compaction_snapshot(5)
    assert await snapshot.replace_suffix(0, [{"n": 2}])
    assert await session.get_items() == [{"n": 2}]
    await session.clear_session()
    assert await session.get_items() == []


async def test_two_sets_of_tables_beside_each_other(make_engine: EngineMaker) -> None:
    engine = make_engine()
    sets: list[Any] = [
        SQLAlchemySession(
            "chat-1",
            engine=engine,
            create_tables=True,
            sessions_table=f"s{n}",
            messages_table=f"m{n}",
        )
        for n in range(2)
    ]
    for n, session in enumerate(sets):
        await session.add_items([{"set": n}])
    for n, session in enumerate(sets):
        assert await session.get_items() == [{"set": n}]


@pytest.mark.backends("sqlite")
def test_one_name_for_both_is_an_error(make_engine: EngineMaker) -> None:
    with pytest.raises(UsageError, match="messages_table"):
        SQLAlchemySession("x", engine=make_engine(), sessions_table="t", messages_table="t")
