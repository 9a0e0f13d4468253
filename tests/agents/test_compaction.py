"""The SDK's OpenAIResponsesCompactionSession around ours.

Automatic compaction replaces the newest items in one transaction, or steps back.
"""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from agents import OpenAIResponsesCompactionSession, SessionSettings
from agents.extensions.memory import EncryptedSession
from agents.extensions.memory import SQLAlchemySession as SDKSession
from agents.memory import session as sdk_session
from sdk_runs.model import Call, Say, ScriptedModel
from sdk_runs.play import agent_with, run_plain, run_streamed, texts, weather
from sqlalchemy import event

from shardgate.errors import ShardUnavailable
from shardgate.session import SQLAlchemySession

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from sdk_runs.play import Run
    from sdk_runs.stores import Standalone, Store
    from sqlalchemy.ext.asyncio import AsyncEngine

    from conftest import Clock
    from harness.engines import EngineMaker
    from shardgate.session import StoredSession

SUMMARY: list[Any] = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "in short"}]},
    {"type": "compaction", "id": "cmp_1", "encrypted_content": "c2VhbGVk 😀"},
]
SHORT = ["in short", "<compaction>"]
KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
TTL = 60

only_sqlite = pytest.mark.backends("sqlite")
every_server = pytest.mark.backends("postgresql", "mariadb", "mysql")
replaces_suffixes = pytest.mark.skipif(
    not hasattr(sdk_session, "_CompactionSnapshot"),
    reason="this version of the SDK replaces whole histories only, by clear and add",
)


class FakeClient:
    """Answers ``responses.compact`` with SUMMARY, after doing what it was told to do meanwhile."""

    def __init__(self, meanwhile: Callable[[], Awaitable[None]] | None = None) -> None:
        self.responses = self
        self.asked: list[dict[str, Any]] = []
        self._meanwhile = meanwhile

    async def compact(self, **asked: Any) -> SimpleNamespace:
        self.asked.append(asked)
        if self._meanwhile is not None:
            await self._meanwhile()
        return SimpleNamespace(output=SUMMARY, usage=None)


def compacting(session: Any, client: FakeClient, *, after: int = 4) -> Any:
    """Compacts when ``after`` items are stored."""
    return OpenAIResponsesCompactionSession(
        "chat-1",
        session,
        client=client,  # type: ignore[arg-type]  # it has what is used of one
        compaction_mode="input",
        should_trigger_compaction=lambda asked: len(asked["session_items"]) >= after,
    )


def sealed(session: Any) -> EncryptedSession:
    return EncryptedSession("chat-1", session, encryption_key=KEY, ttl=TTL)


async def talk(session: Any, *turns: str, run: Run = run_plain, name: str = "a") -> ScriptedModel:
    model = ScriptedModel(*(Say(f"re: {given}") for given in turns), name=name)
    for given in turns:
        await run(agent_with(model), given, session=session)
    return model


def items(*contents: str) -> list[Any]:
    return [{"role": "user", "content": content} for content in contents]


@pytest_asyncio.fixture
async def reference(make_engine: EngineMaker, tmp_path: Path) -> SDKSession:
    """The SDK's own session that replaces suffixes in one transaction."""
    engine = make_engine(f"sqlite+aiosqlite:///{tmp_path / 'reference.db'}")
    return SDKSession("chat-1", engine=engine, create_tables=True)


class Packed(SQLAlchemySession):
    """Stores base64 instead of JSON."""

    async def _serialize_item(self, item: Any) -> str:
        return base64.b64encode((await super()._serialize_item(item)).encode()).decode()

    async def _deserialize_item(self, item: str) -> Any:
        return await super()._deserialize_item(base64.b64decode(item).decode())


@only_sqlite
@pytest.mark.parametrize("run", [run_plain, run_streamed])
async def test_a_run_compacts_by_itself(
    run: Run, session: StoredSession, reference: SDKSession
) -> None:
    await _three_turns(run, session, reference)


@every_server
async def test_on_every_database(session: StoredSession, reference: SDKSession) -> None:
    await _three_turns(run_plain, session, reference)


async def _three_turns(run: Run, session: StoredSession, reference: SDKSession) -> None:
    async def play(underlying: Any) -> tuple[Any, ...]:
        client = FakeClient()
        model = await talk(compacting(underlying, client), "one", "two", "three", run=run)
        return model.received, client.asked, await underlying.get_items()

    received, asked, stored = await play(session)
    assert texts(received[-1]) == [*SHORT, "three"]
    assert [texts(one["input"]) for one in asked] == [
        ["one", "re: one", "two", "re: two"],
        [*SHORT, "three", "re: three"],
    ]
    assert stored == SUMMARY
    assert (received, asked, stored) == await play(reference)


@only_sqlite
async def test_tool_calls_wait_for_the_answer(
    session: StoredSession, reference: SDKSession
) -> None:
    async def play(underlying: Any) -> tuple[Any, ...]:
        client = FakeClient()
        model = ScriptedModel(Call("weather", {"city": "Bern"}), Say("Wet."), Say("Bye."))
        for given in ("How is the weather?", "Thanks."):
            agent = agent_with(model, tools=[weather])
            await run_plain(agent, given, session=compacting(underlying, client, after=3))
        return model.received, client.asked, await underlying.get_items()

    ours = await play(session)
    assert ours == await play(reference)
    assert len(ours[1]) == 2


@replaces_suffixes
async def test_what_the_model_did_not_see_stays(store: Store, reference: SDKSession) -> None:
    async def play(underlying: Any) -> tuple[Any, ...]:
        client = FakeClient()
        await talk(underlying, "one", "two", "three", "four")
        underlying.session_settings = SessionSettings(limit=4)
        await talk(compacting(underlying, client), "five", name="b")
        return client.asked, await underlying.get_items(limit=100)

    asked, stored = await play(store.session())
    assert [texts(one["input"]) for one in asked] == [
        ["three", "re: three", "four", "re: four", "five", "re: five"]
    ]
    assert texts(stored) == ["one", "re: one", "two", "re: two", *SHORT]
    assert (asked, stored) == await play(reference)


@replaces_suffixes
@only_sqlite
@pytest.mark.parametrize("change", ["add", "pop", "clear", "new"])
async def test_a_change_meanwhile_makes_it_step_back(change: str, store: Store) -> None:
    other = store.session()

    async def meanwhile() -> None:
        if change == "add":
            await other.add_items(items("from elsewhere"))
        elif change == "pop":
            await other.pop_item()
        else:
            await other.clear_session()
        if change == "new":
            await other.add_items(items("a", "b", "c", "d"))

    session = store.session()
    await talk(compacting(session, FakeClient(meanwhile)), "one", "two")
    said = ["one", "re: one", "two", "re: two"]
    kept = {"add": [*said, "from elsewhere"], "pop": said[:3], "clear": [], "new": list("abcd")}
    assert texts(await session.get_items()) == kept[change]
    await talk(session, "three", name="b")
    assert texts(await other.get_items()) == [*kept[change], "three", "re: three"]


@only_sqlite
async def test_the_rest_may_change_meanwhile(store: Store) -> None:
    """Only the items that are replaced must be the same."""
    session = store.session()
    await session.add_items(items("one", "two", "three"))
    snapshot = await session._get_compaction_snapshot(2)
    assert snapshot is not None
    assert texts(snapshot.items) == ["two", "three"]
    assert not snapshot.complete
    other = await store.session()._get_compaction_snapshot(3)
    assert other is not None
    assert other.complete
    assert await snapshot.replace_suffix(1, SUMMARY)
    assert not await snapshot.replace_suffix(1, SUMMARY)
    assert not await other.replace_suffix(0, SUMMARY)
    assert texts(await session.get_items()) == ["one", "two", *SHORT]


async def test_appends_at_once_are_neither_lost_nor_covered(store: Store) -> None:
    """Each replacement finds the items that it was meant for, or steps back."""
    session = store.session()
    await session.add_items(items("start"))

    async def append(name: str) -> None:
        for number in range(10):
            await store.session().add_items(items(f"{name} {number}"))

    replaced: list[str] = []

    async def compact() -> None:
        for number in range(10):
            snapshot = await store.session()._get_compaction_snapshot(3)
            assert snapshot is not None
            if await snapshot.replace_suffix(0, items(f"short {number}")):
                replaced.extend([*texts(snapshot.items), f"short {number}"])

    await asyncio.gather(append("a"), append("b"), compact())
    kept = texts(await session.get_items())
    made = ["start", *(f"{name} {number}" for name in "ab" for number in range(10))]
    made += [word for word in replaced if word.startswith("short")]
    gone = [word for word in replaced if word not in kept]
    assert sorted(kept + gone) == sorted(made)


class Trap:
    """Springs at one statement that is about to be executed on the store's engines."""

    def __init__(self, engines: Sequence[AsyncEngine]) -> None:
        self._engines = [engine.sync_engine for engine in engines]
        self._spring: Callable[[], object] = bool
        self._left = -1

    def __enter__(self) -> Trap:
        for engine in self._engines:
            event.listen(engine, "before_cursor_execute", self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines:
            event.remove(engine, "before_cursor_execute", self._count)

    def arm(self, statement: int, spring: Callable[[], object]) -> None:
        self._left, self._spring = statement, spring

    @property
    def sprung(self) -> bool:
        return self._left < 0

    def _count(self, *_: object) -> None:
        self._left -= 1
        if self._left == -1:
            self._spring()


class BrokenOffError(Exception):
    """What a test throws into the middle of a transaction."""


def throw(_: asyncio.Task[Any]) -> None:
    raise BrokenOffError


def cancel(caller: asyncio.Task[Any]) -> None:
    caller.cancel()


@pytest.mark.parametrize("spring", [throw, cancel])
async def test_broken_off_at_any_statement_it_is_all_or_nothing(
    spring: Callable[[asyncio.Task[Any]], None], store: Store
) -> None:
    before = items("one", "two", "three", "four")
    after = [*before[:1], *SUMMARY]
    with Trap(store.engines) as trap:
        for statement in range(100):
            session = store.session(f"chat-{statement}")
            await session.add_items(before)
            snapshot = await session._get_compaction_snapshot(10)
            assert snapshot is not None
            replacing = asyncio.ensure_future(snapshot.replace_suffix(1, SUMMARY))
            trap.arm(statement, partial(spring, replacing))
            outcome = (await asyncio.gather(replacing, return_exceptions=True))[0]
            if not trap.sprung:
                break
            # Before anything was sent, a gateway takes it for a shard that cannot be reached.
            reason = outcome.__cause__ if isinstance(outcome, ShardUnavailable) else outcome
            assert isinstance(reason, BrokenOffError | asyncio.CancelledError)
            assert await session.get_items() in (before, after)
    assert statement >= 4  # the trap was in the middle
    assert outcome is True
    assert await session.get_items() == after


async def test_by_hand(session: StoredSession, reference: SDKSession) -> None:
    async def play(underlying: Any) -> tuple[Any, ...]:
        client = FakeClient()
        around = compacting(underlying, client, after=1000)
        await talk(around, "one", "two")
        await around.run_compaction({"force": True, "compaction_mode": "input"})
        await talk(around, "three", name="b")
        return client.asked, await underlying.get_items()

    asked, stored = await play(session)
    assert texts(stored) == [*SHORT, "three", "re: three"]
    assert (asked, stored) == await play(reference)


@replaces_suffixes
@only_sqlite
async def test_by_hand_and_sealed(session: StoredSession, reference: SDKSession) -> None:
    async def play(underlying: Any) -> tuple[Any, ...]:
        client = FakeClient()
        around = sealed(compacting(underlying, client, after=1000))
        await talk(around, "one", "two")
        await around.run_compaction({"force": True, "compaction_mode": "input"})
        await talk(around, "three", name="b")
        return client.asked, await around.get_items(), len(await underlying.get_items())

    ours = await play(session)
    assert texts(ours[1]) == [*SHORT, "three", "re: three"]
    assert ours == await play(reference)


@only_sqlite
async def test_by_hand_and_failing(session: StoredSession) -> None:
    async def fail() -> None:
        raise BrokenOffError

    around = compacting(session, FakeClient(fail), after=1000)
    await talk(around, "one", "two")
    with pytest.raises(BrokenOffError):
        await around.run_compaction({"force": True, "compaction_mode": "input"})
    assert texts(await session.get_items()) == ["one", "re: one", "two", "re: two"]


@replaces_suffixes
async def test_sealed_with_the_expired_pruned(
    store: Store, reference: SDKSession, clock: Clock
) -> None:
    async def play(underlying: Any) -> tuple[Any, ...]:
        client = FakeClient()
        await sealed(underlying).add_items(items(*(f"old {number}" for number in range(250))))
        clock.advance(TTL + 1)
        session = sealed(compacting(underlying, client))
        model = await talk(session, "one", "two", "three")
        return model.received, client.asked, await session.get_items()

    ours = await play(store.session())
    assert texts(ours[0][-1]) == [*SHORT, "three"]
    assert ours[2] == SUMMARY
    assert len(await store.session().get_items()) == len(SUMMARY)
    assert ours == await play(reference)


@replaces_suffixes
@only_sqlite
async def test_pruning_ends_at_what_has_not_expired(store: Store, clock: Clock) -> None:
    underlying = store.session()
    await sealed(underlying).add_items(items("old"))
    clock.advance(TTL + 1)
    await underlying.add_items(items("not sealed"))
    await sealed(underlying).add_items(items("fresh"))
    session = sealed(compacting(underlying, FakeClient(), after=5))
    await talk(session, "one", "two")
    assert texts(await session.get_items()) == SHORT
    kept = await underlying.get_items()
    assert texts(kept[:1]) == ["not sealed"]
    assert len(kept) == 1 + len(SUMMARY)


@replaces_suffixes
@pytest.mark.parametrize("store", ["standalone"], indirect=True)
async def test_a_subclass_with_a_format_of_its_own(store: Standalone) -> None:
    underlying = store.session_of(Packed)
    client = FakeClient()
    await talk(compacting(underlying, client), "one", "two")
    assert len(client.asked) == 1
    assert await store.session_of(Packed).get_items() == SUMMARY
    assert await store.session().get_items() == []  # nothing that is JSON


@only_sqlite
@pytest.mark.parametrize("store", ["standalone"], indirect=True)
async def test_a_damaged_row_is_kept(store: Standalone) -> None:
    """It cannot be summed up, so what it belongs to is not replaced."""
    plain, packed = store.session(), store.session_of(Packed)
    await packed.add_items(items("zero"))
    await plain.add_items(items("no base64!"))
    await packed.add_items(items("one"))
    snapshot = await packed._get_compaction_snapshot(10)
    assert snapshot is not None
    assert not snapshot.complete
    assert texts(snapshot.items) == ["one"]
    assert await snapshot.replace_suffix(0, SUMMARY)
    assert texts(await packed.get_items()) == ["zero", *SHORT]
    assert texts(await plain.get_items()) == ["no base64!"]
