"""Plain and streamed runs, tools, handoffs: the model sees the whole history, in order."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from agents import Agent, Runner, handoff
from sdk_runs.model import Call, Say, ScriptedModel, Think
from sdk_runs.play import Played, agent_with, play_on, run_plain, run_streamed, texts, weather

from shardgate.session import SQLAlchemySession

if TYPE_CHECKING:
    from pathlib import Path

    from agents import Session, SQLiteSession
    from sdk_runs.play import Play, Run
    from sdk_runs.stores import Store

    from shardgate.session import StoredSession

only_sqlite = pytest.mark.backends("sqlite")
every_server = pytest.mark.backends("postgresql", "mariadb", "mysql")

HARD_TEXT = "NUL \0, half a pair \ud83d, emoji 😀, quotes \"'`, \\ and \u2028, Zürich"


async def three_turns(run: Run, session: Session) -> ScriptedModel:
    model = ScriptedModel(Say("one"), Say("two"), Say("three"))
    for given in ("first", "second", "third"):
        await run(agent_with(model), given, session=session)
    return model


async def tool_calls(run: Run, session: Session) -> ScriptedModel:
    model = ScriptedModel(
        [Think(), Call("weather", {"city": "Bern"}), Call("weather", {"city": "Genève"})],
        Say("Rain in both."),
        Say("Goodbye."),
    )
    for given in ("How is the weather?", "Thanks."):
        await run(agent_with(model, tools=[weather]), given, session=session)
    return model


async def a_handoff(run: Run, session: Session) -> ScriptedModel:
    model = ScriptedModel(Call("transfer_to_billing"), Say("Billing here."), Say("It is paid."))
    billing = Agent(name="billing", model=model)
    triage = Agent(name="triage", model=model, handoffs=[handoff(billing)])
    result = await run(triage, "My invoice?", session=session)
    await run(result.last_agent, "Is it paid?", session=session)
    return model


async def hard_values(run: Run, session: Session) -> ScriptedModel:
    city = HARD_TEXT.replace("\ud83d", "")  # the SDK itself refuses half a pair in arguments
    model = ScriptedModel(Call("weather", {"city": city}), Say(HARD_TEXT), Say("ok"))
    given: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": HARD_TEXT}]},
        {"role": "user", "content": "twice"},
        {"role": "user", "content": "twice"},
    ]
    await run(agent_with(model, tools=[weather]), given, session=session)
    await run(agent_with(model, tools=[weather]), "again", session=session)
    return model


PLAYS = [three_turns, tool_calls, a_handoff, hard_values]


@only_sqlite
@pytest.mark.parametrize("run", [run_plain, run_streamed])
@pytest.mark.parametrize("play", PLAYS)
async def test_as_with_the_sdks_own_session(
    play: Play, run: Run, session: StoredSession, reference: SQLiteSession
) -> None:
    await _compare(play, run, session, reference)


@every_server
@pytest.mark.parametrize("play", PLAYS)
async def test_on_every_database(
    play: Play, session: StoredSession, reference: SQLiteSession
) -> None:
    await _compare(play, run_plain, session, reference)


async def _compare(play: Play, run: Run, session: Session, reference: Session) -> None:
    ours = await play_on(session, play, run)
    theirs = await play_on(reference, play, run)
    assert ours == theirs
    assert json.dumps(ours.stored) == json.dumps(theirs.stored)  # the order of keys, too
    _check_history(ours)


def _check_history(played: Played) -> None:
    """Each call was given the beginning of what is stored, longer every time."""
    lengths = [len(given) for given in played.received]
    assert lengths == sorted(set(lengths))
    for given in played.received:
        assert texts(given) == texts(played.stored[: len(given)])


@only_sqlite
@pytest.mark.parametrize("run", [run_plain, run_streamed])
async def test_history_is_what_was_said(run: Run, session: StoredSession) -> None:
    model = await three_turns(run, session)
    said = ["first", "one", "second", "two", "third", "three"]
    assert [texts(given) for given in model.received] == [said[:1], said[:3], said[:5]]
    assert texts(await session.get_items()) == said


@only_sqlite
async def test_tool_results_stand_where_they_happened(session: StoredSession) -> None:
    await tool_calls(run_plain, session)
    assert texts(await session.get_items()) == [
        "How is the weather?",
        "<reasoning>",
        'weather({"city": "Bern"})',
        'weather({"city": "Gen\\u00e8ve"})',
        "-> rain in Bern",
        "-> rain in Genève",
        "Rain in both.",
        "Thanks.",
        "Goodbye.",
    ]


async def test_a_conversation_goes_on_in_the_next_process(store: Store) -> None:
    await three_turns(run_plain, store.session())
    before = await store.session().get_items()
    await store.restart()
    model = ScriptedModel(Say("four"), name="later")
    await Runner.run(agent_with(model), "fourth", session=store.session())
    assert model.received[0][:-1] == before
    assert texts(model.received[0])[-2:] == ["three", "fourth"]


async def test_conversations_at_once_do_not_mix(store: Store) -> None:
    async def talk(name: str) -> list[str]:
        model = ScriptedModel(*(Say(f"{name} says {turn}") for turn in range(4)), name=name)
        for turn in range(4):
            await Runner.run(agent_with(model), f"{name} {turn}", session=store.session(name))
        return texts(await store.session(name).get_items())

    names = [f"chat-{number}" for number in range(8)]
    for name, stored in zip(names, await asyncio.gather(*map(talk, names)), strict=True):
        assert stored == [
            text for turn in range(4) for text in (f"{name} {turn}", f"{name} says {turn}")
        ]


@only_sqlite
async def test_run_sync_in_threads_with_event_loops_of_their_own(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'chat.db'}"
    session = SQLAlchemySession.from_url("chat-1", url=url, create_tables=True)

    def talk(turn: str) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        model = ScriptedModel(Say(f"answer {turn}"), name=turn)
        try:
            Runner.run_sync(agent_with(model), f"question {turn}", session=session)
            loop.run_until_complete(session.aclose())
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    for turn in ("a", "b"):
        await asyncio.to_thread(talk, turn)
    said = ["question a", "answer a", "question b", "answer b"]
    assert texts(await session.get_items()) == said
    await session.aclose()
