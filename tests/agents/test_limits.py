"""How much of the history the model is given: limits and the input callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from agents import RunConfig, SessionSettings, SQLiteSession
from sdk_runs.model import Call, Say, ScriptedModel
from sdk_runs.play import agent_with, run_plain, run_streamed, texts, weather

if TYPE_CHECKING:
    from agents import Session
    from sdk_runs.play import Run
    from sdk_runs.stores import Store

    from shardgate.session import StoredSession

pytestmark = pytest.mark.backends("sqlite")

SAID = ["first", "one", "second", "two", "third", "three"]


async def talk(run: Run, session: Session, **options: Any) -> list[Any]:
    """Three turns; what the model was given in the last."""
    model = ScriptedModel(Say("one"), Say("two"), Say("three"))
    for given in ("first", "second", "third"):
        await run(agent_with(model), given, session=session, **options)
    return model.received[-1]


@pytest.mark.parametrize("run", [run_plain, run_streamed])
@pytest.mark.parametrize("settings", [SessionSettings(limit=3), {"limit": 3}])
async def test_the_sessions_own_limit(settings: Any, run: Run, store: Store) -> None:
    session = store.session(session_settings=settings)
    assert texts(await talk(run, session)) == ["one", "second", "two", "third"]
    assert texts(await session.get_items()) == SAID[-3:]
    assert texts(await session.get_items(limit=5)) == SAID[-5:]
    assert texts(await store.session().get_items()) == SAID


async def test_a_dict_becomes_the_sdks_class(store: Store) -> None:
    session = store.session(session_settings={"limit": 3})
    assert session.session_settings == SessionSettings(limit=3)
    session.session_settings = {"limit": 2}
    assert session.session_settings == SessionSettings(limit=2)
    session.session_settings = None
    assert session.session_settings is None


@pytest.mark.parametrize("run", [run_plain, run_streamed])
async def test_the_limit_of_a_run(run: Run, session: StoredSession) -> None:
    config = RunConfig(session_settings=SessionSettings(limit=1))
    assert texts(await talk(run, session, run_config=config)) == ["two", "third"]
    assert texts(await session.get_items()) == SAID


@pytest.mark.parametrize("limit", [0, 1, 2, 4, 100])
async def test_the_runs_limit_goes_before_the_sessions(limit: int, store: Store) -> None:
    session = store.session(session_settings=SessionSettings(limit=2))
    config = RunConfig(session_settings=SessionSettings(limit=limit))
    seen = SAID[:4][-limit:] if limit else []
    assert texts(await talk(run_plain, session, run_config=config)) == [*seen, "third"]
    assert texts(await store.session().get_items()) == SAID


@pytest.mark.parametrize("limit", range(7))
async def test_a_limit_that_cuts_a_tool_call_off(limit: int, store: Store) -> None:
    async def play(session: Session) -> list[Any]:
        calls = [Call("weather", {"city": city}) for city in ("Bern", "Bonn")]
        model = ScriptedModel(calls, Say("Rain."), Say("Bye."))
        for given in ("How is the weather?", "Thanks."):
            await run_plain(agent_with(model, tools=[weather]), given, session=session)
        return model.received[-1]

    settings = SessionSettings(limit=limit)
    reference = SQLiteSession("chat-1", session_settings=settings)
    assert await play(store.session(session_settings=settings)) == await play(reference)
    reference.close()


def newest_two(history: list[Any], new: list[Any]) -> list[Any]:
    return history[-2:] + new


def backwards(history: list[Any], new: list[Any]) -> list[Any]:
    return new + history[::-1]


async def annotated(history: list[Any], new: list[Any]) -> list[Any]:
    note = {"role": "developer", "content": f"{len(history)} items before"}
    return [*history, note, *new]


def without_new(history: list[Any], new: list[Any]) -> list[Any]:
    return history or new


@pytest.mark.parametrize("callback", [newest_two, backwards, annotated, without_new])
@pytest.mark.parametrize("run", [run_plain, run_streamed])
async def test_the_input_callback(
    callback: Any, run: Run, session: StoredSession, reference: SQLiteSession
) -> None:
    config = RunConfig(session_input_callback=callback)
    ours = await talk(run, session, run_config=config)
    assert ours == await talk(run, reference, run_config=config)
    assert await session.get_items() == await reference.get_items()


async def test_the_input_callback_gets_the_whole_history(session: StoredSession) -> None:
    seen: list[list[str]] = []

    def look(history: list[Any], new: list[Any]) -> list[Any]:
        seen.append(texts(history) + texts(new))
        history.clear()
        return new

    await talk(run_plain, session, run_config=RunConfig(session_input_callback=look))
    assert seen == [SAID[:1], SAID[:3], SAID[:5]]
    assert texts(await session.get_items()) == SAID
