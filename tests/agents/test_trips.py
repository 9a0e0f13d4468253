"""Runs that end badly: guardrails, errors, retries. The history stays whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import agents
import pytest
from agents import (
    GuardrailFunctionOutput,
    InputGuardrail,
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    ModelSettings,
    OutputGuardrail,
    OutputGuardrailTripwireTriggered,
    function_tool,
)
from agents.run_internal.session_persistence import rewind_session_items
from sdk_runs.model import Call, Say, ScriptedModel
from sdk_runs.play import agent_with, play_on, run_plain, run_streamed, texts, weather

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agents import Session, SQLiteSession
    from sdk_runs.play import Play, Run
    from sdk_runs.stores import Store

    from shardgate.session import StoredSession

pytestmark = pytest.mark.backends("sqlite")


async def _trips(*_: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered=True)


async def input_refused(run: Run, session: Session) -> ScriptedModel:
    model = ScriptedModel(Say("Hello."), Say("Still here."))
    await run(agent_with(model), "Hi!", session=session)
    guard = InputGuardrail(_trips, run_in_parallel=False)
    with pytest.raises(InputGuardrailTripwireTriggered):
        await run(agent_with(model, input_guardrails=[guard]), "Something bad", session=session)
    await run(agent_with(model), "Anybody there?", session=session)
    return model


async def output_refused(run: Run, session: Session) -> ScriptedModel:
    model = ScriptedModel(Call("weather", {"city": "Bern"}), Say("Secret!"), Say("Still here."))
    guard = OutputGuardrail(_trips)
    agent = agent_with(model, tools=[weather], output_guardrails=[guard])
    with pytest.raises(OutputGuardrailTripwireTriggered):
        await run(agent, "How is the weather?", session=session)
    await run(agent_with(model), "Anybody there?", session=session)
    return model


async def model_fails(run: Run, session: Session) -> ScriptedModel:
    model = ScriptedModel(
        Call("weather", {"city": "Bern"}), ConnectionError("the model"), Say("Still here.")
    )
    with pytest.raises(ConnectionError):
        await run(agent_with(model, tools=[weather]), "How is the weather?", session=session)
    await run(agent_with(model), "Anybody there?", session=session)
    return model


async def tool_fails(run: Run, session: Session) -> ScriptedModel:
    @function_tool(failure_error_function=None)
    def explode() -> str:
        raise ZeroDivisionError

    model = ScriptedModel(Call("explode"), Say("Still here."))
    with pytest.raises((ZeroDivisionError, agents.UserError)):
        await run(agent_with(model, tools=[explode]), "Go!", session=session)
    await run(agent_with(model), "Anybody there?", session=session)
    return model


async def too_many_turns(run: Run, session: Session) -> ScriptedModel:
    calls = [Call("weather", {"city": city}) for city in ("Bern", "Bonn")]
    model = ScriptedModel(*calls, Say("Still here."))
    agent = agent_with(model, tools=[weather])
    with pytest.raises(MaxTurnsExceeded):
        await run(agent, "How is the weather?", session=session, max_turns=2)
    await run(agent, "Anybody there?", session=session)
    return model


async def model_is_asked_again(run: Run, session: Session) -> ScriptedModel:
    from agents import ModelRetrySettings

    retry = ModelRetrySettings(max_retries=2, backoff={"initial_delay": 0}, policy=lambda _: True)
    failure = ConnectionError("the model")
    model = ScriptedModel(failure, failure, Say("At last."), Say("Bye."))
    agent = agent_with(model, model_settings=ModelSettings(retry=retry))
    for given in ("Hi!", "Thanks."):
        await run(agent, given, session=session)
    return model


PLAYS = [input_refused, output_refused, model_fails, tool_fails, too_many_turns]
if hasattr(agents, "ModelRetrySettings"):
    PLAYS.append(model_is_asked_again)


@pytest.mark.parametrize("run", [run_plain, run_streamed])
@pytest.mark.parametrize("play", PLAYS)
async def test_as_with_the_sdks_own_session(
    play: Play, run: Run, session: StoredSession, reference: SQLiteSession
) -> None:
    ours = await play_on(session, play, run)
    assert ours == await play_on(reference, play, run)
    assert texts(ours.stored)[-2] in ("Anybody there?", "Thanks.")


def items(*contents: str) -> list[Any]:
    return [{"role": "user", "content": content} for content in contents]


async def test_a_rewind_takes_the_newest_items_back(session: StoredSession) -> None:
    await session.add_items(items("one", "two", "two"))
    await rewind_session_items(session, items("two", "two"))
    assert texts(await session.get_items()) == ["one"]


async def test_a_rewind_takes_nothing_of_others(store: Store) -> None:
    session = store.session()
    await session.add_items(items("one", "two"))
    await store.session().add_items(items("from elsewhere"))
    await rewind_session_items(session, items("two"))
    assert texts(await session.get_items()) == ["one", "two", "from elsewhere"]


async def test_a_rewind_that_fails_puts_the_items_back(
    session: StoredSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    await session.add_items(items("one", "two", "three"))
    pop_item: Callable[[], Awaitable[Any]] = session.pop_item
    popped: list[Any] = []

    async def failing() -> Any:
        if popped:
            raise ConnectionError
        popped.append(await pop_item())
        return popped[0]

    monkeypatch.setattr(session, "pop_item", failing)
    await rewind_session_items(session, items("two", "three"))
    assert texts(popped) == ["three"]
    assert texts(await session.get_items()) == ["one", "two", "three"]
