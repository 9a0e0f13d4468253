"""For the type checker alone: our sessions are accepted wherever the SDK accepts one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

from agents import (
    Agent,
    OpenAIResponsesCompactionSession,
    RunConfig,
    Runner,
    RunState,
    Session,
    SessionSettings,
    TResponseInputItem,
)
from agents.extensions.memory import EncryptedSession

from shardgate import Gateway, GatewaySession, SQLAlchemySession
from shardgate.session import CompactionSnapshot

if TYPE_CHECKING:
    from agents import RunContextWrapper, SessionABC, SQLiteSession
    from sqlalchemy.ext.asyncio import AsyncEngine


def takes_a_session(session: Session) -> None: ...


def takes_a_session_of_the_sdks_base(session: SessionABC) -> None: ...


def made(engine: AsyncEngine, gateway: Gateway) -> None:
    alone = SQLAlchemySession("chat-1", engine=engine)
    assert_type(SQLAlchemySession.from_url("chat-1", url="sqlite+aiosqlite://"), SQLAlchemySession)
    through = gateway.tenant("acme").session("chat-1")
    assert_type(through, GatewaySession)
    takes_a_session(alone)
    takes_a_session(through)
    takes_a_session_of_the_sdks_base(alone)
    takes_a_session_of_the_sdks_base(through)
    sessions: list[Session] = [alone, through]
    assert_type(sessions[0].session_id, str)


async def run(agent: Agent[Any], alone: SQLAlchemySession, through: GatewaySession) -> None:
    await Runner.run(agent, "Hi!", session=alone)
    await Runner.run(agent, "Hi!", session=through)
    Runner.run_sync(agent, "Hi!", session=alone)
    Runner.run_streamed(agent, "Hi!", session=through, run_config=RunConfig())


async def resumed(agent: Agent[Any], state: RunState[Any], session: GatewaySession) -> None:
    await Runner.run(agent, state, session=session)


def wrapped(alone: SQLAlchemySession, through: GatewaySession) -> None:
    for session in (alone, through):
        compacting = OpenAIResponsesCompactionSession("chat-1", session)
        EncryptedSession("chat-1", session, encryption_key="key")
        EncryptedSession("chat-1", compacting, encryption_key="key")
    OpenAIResponsesCompactionSession("chat-1", underlying_session=alone)
    EncryptedSession("chat-1", underlying_session=through, encryption_key="key")


async def what_comes_back(session: SQLAlchemySession | GatewaySession) -> None:
    assert_type(session.session_id, str)
    assert_type(session.session_settings, SessionSettings | None)
    assert_type(await session.get_items(), list[TResponseInputItem])
    assert_type(await session.get_items(limit=3), list[TResponseInputItem])
    assert_type(await session.pop_item(), TResponseInputItem | None)
    await session.add_items([{"role": "user", "content": "Hi!"}])
    await session.add_items(["Hi!"])  # type: ignore[list-item]  # an item is no text
    await session.clear_session()
    snapshot = await session._get_compaction_snapshot(10, prune_prefix=lambda item: bool(item))
    assert_type(snapshot, CompactionSnapshot | None)
    if snapshot is not None:
        assert_type(snapshot.items, list[TResponseInputItem])
        assert_type(snapshot.complete, bool)
        assert_type(await snapshot.replace_suffix(0, snapshot.items), bool)


async def with_a_wrapper(session: GatewaySession, wrapper: RunContextWrapper[Any]) -> None:
    await session.get_items(wrapper=wrapper)
    await session.add_items([], wrapper=wrapper)
    await session.pop_item(wrapper=wrapper)
    await session.clear_session(wrapper=wrapper)


def settings(gateway: Gateway, engine: AsyncEngine, chosen: SessionSettings) -> None:
    session = gateway.tenant("acme").session("chat-1", session_settings=chosen)
    session.session_settings = None
    session.session_settings = SessionSettings(limit=3)
    SQLAlchemySession("chat-1", engine=engine, session_settings={"limit": 3})
    SQLAlchemySession("chat-1", engine=engine, session_settings=chosen, ensure_ascii=False)


class Packed(SQLAlchemySession):
    """A subclass with a format of its own."""

    async def _serialize_item(self, item: TResponseInputItem) -> str:
        return assert_type(await super()._serialize_item(item), str)

    async def _deserialize_item(self, item: str) -> TResponseInputItem:
        return await super()._deserialize_item(item)


def either(condition: bool, ours: SQLAlchemySession, theirs: SQLiteSession) -> Session:
    return ours if condition else theirs
