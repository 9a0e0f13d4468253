"""Runs that pause for a person, become JSON, and go on in another process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from agents import Agent, RunState, UserError, function_tool
from agents.extensions.memory import EncryptedSession
from sdk_runs.model import Call, Say, ScriptedModel, Think
from sdk_runs.play import agent_with, run_plain, run_streamed, texts
from sdk_runs.stores import Reference

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agents import SQLiteSession
    from sdk_runs.play import Run
    from sdk_runs.stores import Store

    from shardgate.session import StoredSession

RECEIPT = "refunded: NUL \0, 😀, 1e400, Zürich"
PAYS_BACK = 'pay_back({"amount": 5})'

only_sqlite = pytest.mark.backends("sqlite")
needs_checkpoints = pytest.mark.skipif(
    "_pending_session_write" not in RunState.__dataclass_fields__,
    reason="this version of the SDK has no checkpoints of unfinished session writes",
)


class Clerk:
    """An agent with a tool that needs approval, and what it did."""

    def __init__(self, *turns: Any, name: str) -> None:
        self.model = ScriptedModel(*turns, name=name)
        self.paid: list[int] = []

        @function_tool(needs_approval=True)
        def pay_back(amount: int) -> str:
            """Pay money back."""
            self.paid.append(amount)
            return RECEIPT

        self.agent = agent_with(self.model, tools=[pay_back])


def asking(*amounts: int) -> Clerk:
    calls = [Call("pay_back", {"amount": amount}) for amount in amounts]
    return Clerk(Say("Hello."), [Think(), *calls], name="asking")


async def pause(clerk: Clerk, run: Run, session: Any) -> str:
    """A turn, and one that pauses: its state as text."""
    await run(clerk.agent, "Hi!", session=session)
    result = await run(clerk.agent, "My money, please.", session=session)
    assert result.interruptions
    assert clerk.paid == []
    return json.dumps(result.to_state().to_json())


async def load(agent: Agent[Any], text: str, *, approve: bool) -> RunState[Any]:
    state = await RunState.from_json(agent, json.loads(text))
    for item in state.get_interruptions():
        if approve:
            state.approve(item)
        else:
            state.reject(item)
    return state


async def decide(
    store: Store | Reference | Sealed, run: Run, *amounts: int, approve: bool
) -> tuple[list[Any], list[int], list[Any]]:
    """A pause, a restart, a decision: what the model was given, what was paid, what is stored."""
    text = await pause(asking(*amounts), run, store.session())
    await store.restart()
    clerk = Clerk(Say("Done."), Say("Bye."), name="deciding")
    state = await load(clerk.agent, text, approve=approve)
    await run(clerk.agent, state, session=store.session())
    await run(clerk.agent, "Thanks.", session=store.session())
    return clerk.model.received, clerk.paid, await store.session().get_items()


@only_sqlite
@pytest.mark.parametrize("run", [run_plain, run_streamed])
@pytest.mark.parametrize("approve", [True, False])
async def test_as_with_the_sdks_own_session(
    approve: bool, run: Run, store: Store, reference: SQLiteSession
) -> None:
    ours = await decide(store, run, 5, 7, approve=approve)
    assert ours == await decide(Reference(reference), run, 5, 7, approve=approve)
    assert sorted(ours[1]) == ([5, 7] if approve else [])


async def test_approved_in_another_process(store: Store) -> None:
    received, paid, stored = await decide(store, run_plain, 5, approve=True)
    said = ["Hi!", "Hello.", "My money, please.", "<reasoning>", PAYS_BACK, f"-> {RECEIPT}"]
    assert paid == [5]
    assert texts(received[0]) == said
    assert texts(stored) == [*said, "Done.", "Thanks.", "Bye."]


@only_sqlite
async def test_pauses_one_after_the_other(store: Store, reference: SQLiteSession) -> None:
    async def play(store: Store | Reference) -> tuple[list[Any], list[Any]]:
        text = await pause(asking(1), run_plain, store.session())
        received = []
        for amount in (2, 3):
            await store.restart()
            clerk = Clerk(Call("pay_back", {"amount": amount}), name=f"after{amount}")
            state = await load(clerk.agent, text, approve=True)
            result = await run_plain(clerk.agent, state, session=store.session())
            text = json.dumps(result.to_state().to_json())
            received += clerk.model.received
        await store.restart()
        clerk = Clerk(Say("Enough."), name="end")
        state = await load(clerk.agent, text, approve=False)
        await run_plain(clerk.agent, state, session=store.session())
        return received + clerk.model.received, await store.session().get_items()

    assert await play(store) == await play(Reference(reference))


class Sealed:
    """A store whose sessions are the SDK's EncryptedSession around another store's."""

    def __init__(self, store: Store | Reference) -> None:
        self._store = store

    async def restart(self) -> None:
        await self._store.restart()

    def session(self) -> EncryptedSession:
        return EncryptedSession("chat-1", self._store.session(), encryption_key="key")


@only_sqlite
@pytest.mark.parametrize("approve", [True, False])
async def test_sealed(approve: bool, store: Store, reference: SQLiteSession) -> None:
    ours = await decide(Sealed(store), run_plain, 5, approve=approve)
    assert ours == await decide(Sealed(Reference(reference)), run_plain, 5, approve=approve)


class LostError(Exception):
    """The connection was lost, and with it the answer."""


def lose_the_answer(session: Any, monkeypatch: pytest.MonkeyPatch, *, stored: bool) -> None:
    """The next append fails: after it was stored, or before."""
    add_items: Callable[..., Awaitable[None]] = session.add_items

    async def failing(items: list[Any]) -> None:
        monkeypatch.setattr(session, "add_items", add_items)
        if stored:
            await add_items(items)
        raise LostError

    monkeypatch.setattr(session, "add_items", failing)


async def break_off(store: Store | Reference, monkeypatch: pytest.MonkeyPatch, **how: bool) -> str:
    """A pause, an approval, and a failure to store what the tool gave: the state as text."""
    clerk = asking(5)
    text = await pause(clerk, run_plain, store.session())
    state = await load(clerk.agent, text, approve=True)
    session = store.session()
    lose_the_answer(session, monkeypatch, **how)
    with pytest.raises(LostError):
        await run_plain(clerk.agent, state, session=session)
    assert clerk.paid == [5]
    text = json.dumps(state.to_json())
    assert json.loads(text)["pending_session_write"]
    await store.restart()
    return text


@needs_checkpoints
@pytest.mark.parametrize("stored", [True, False])
async def test_a_lost_answer_is_settled_by_the_hash_of_the_tail(
    stored: bool, store: Store, reference: SQLiteSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(store: Store | Reference) -> list[Any]:
        text = await break_off(store, monkeypatch, stored=stored)
        clerk = Clerk(Say("Done."), name="settling")
        state = await RunState.from_json(clerk.agent, json.loads(text))
        await run_plain(clerk.agent, state, session=store.session())
        assert clerk.paid == []
        return await store.session().get_items()

    ours = await play(store)
    assert texts(ours)[-3:] == [PAYS_BACK, f"-> {RECEIPT}", "Done."]
    assert ours == await play(Reference(reference))


@needs_checkpoints
@only_sqlite
@pytest.mark.parametrize("stored", [True, False])
async def test_a_tail_that_somebody_changed_is_found_out(
    stored: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = await break_off(store, monkeypatch, stored=stored)
    await store.session().add_items([{"role": "user", "content": "Still there?"}])
    before = await store.session().get_items()
    clerk = Clerk(name="settling")
    state = await RunState.from_json(clerk.agent, json.loads(text))
    with pytest.raises(UserError, match="history changed"):
        await run_plain(clerk.agent, state, session=store.session())
    assert await store.session().get_items() == before


@only_sqlite
async def test_a_pause_without_restart(session: StoredSession) -> None:
    """The live state, resumed with the same session object."""
    clerk = Clerk(Call("pay_back", {"amount": 5}), Say("Done."), name="live")
    result = await run_plain(clerk.agent, "My money, please.", session=session)
    state = result.to_state()
    state.approve(state.get_interruptions()[0])
    await run_plain(clerk.agent, state, session=session)
    said = ["My money, please.", PAYS_BACK, f"-> {RECEIPT}", "Done."]
    assert texts(await session.get_items()) == said
