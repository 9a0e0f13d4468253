"""Runs that are cancelled: whole batches are stored, and the conversation goes on."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from agents import Runner
from sdk_runs.model import Call, Say, ScriptedModel
from sdk_runs.play import agent_with, run_plain, texts, weather

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agents import Session, SQLiteSession
    from sdk_runs.stores import Store

    from shardgate.session import StoredSession

pytestmark = [
    pytest.mark.backends("sqlite"),
    # The SDK drops coroutines of a cancelled run without awaiting them. They are collected here,
    # and not in the middle of another test.
    pytest.mark.filterwarnings("ignore:coroutine 'run_single_turn.*' was never awaited"),
    pytest.mark.usefixtures("collect_garbage"),
]

BATCHES = [
    ["How is the weather?"],
    ['weather({"city": "Bern"})', "-> rain in Bern"],
    ["Rain."],
]


def _is_whole(said: list[str]) -> bool:
    """Whether nothing is missing in the middle, doubled, or half of a batch."""
    whole: list[str] = []
    for batch in BATCHES:
        if said == whole:
            return True
        whole += batch
    return said == whole


@pytest.fixture
def collect_garbage() -> Iterator[None]:
    yield
    gc.collect()


class Canceller:
    """Cancels a task some steps of the event loop after one call of a session has begun."""

    def __init__(self, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.call = self.steps = self.begun = 0
        for name in ("get_items", "add_items"):
            monkeypatch.setattr(session, name, self._watch(getattr(session, name)))

    def _watch(self, method: Any) -> Any:
        @functools.wraps(method)
        async def watched(*arguments: Any, **options: Any) -> Any:
            if self.task is not None and self.begun == self.call:
                asyncio.get_running_loop().call_soon(self._step, self.task, self.steps)
            self.begun += 1
            return await method(*arguments, **options)

        return watched

    def _step(self, task: asyncio.Task[Any], left: int) -> None:
        if left:
            asyncio.get_running_loop().call_soon(self._step, task, left - 1)
        else:
            task.cancel()


@pytest.mark.parametrize("steps", [*range(6), 12, 25, 50])
async def test_cancelled_anywhere(
    steps: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far it came, whole batches are stored, and the conversation goes on."""
    outcomes: list[list[str]] = []
    for call in range(20):
        session = store.session(f"chat-{call}")
        canceller = Canceller(session, monkeypatch)
        canceller.call, canceller.steps = call, steps
        model = ScriptedModel(Call("weather", {"city": "Bern"}), Say("Rain."), name=f"n{call}")
        run = run_plain(agent_with(model, tools=[weather]), "How is the weather?", session=session)
        canceller.task = asyncio.ensure_future(run)
        await asyncio.gather(canceller.task, return_exceptions=True)
        outcomes.append(await _said_and_continued(session))
        if canceller.begun <= call:
            break
    assert all(map(_is_whole, outcomes)), outcomes
    assert call >= 3
    assert outcomes[-1] == [*itertools.chain(*BATCHES)]


async def _said_and_continued(session: StoredSession) -> list[str]:
    said = texts(await session.get_items())
    model = ScriptedModel(Say("Bye."), name="later")
    await run_plain(agent_with(model), "Thanks.", session=session)
    assert texts(await session.get_items()) == [*said, "Thanks.", "Bye."]
    return said


async def _cancel_stream(session: Session, mode: Any) -> ScriptedModel:
    """Cancel a stream as soon as it has said something."""
    model = ScriptedModel(Call("weather", {"city": "Bern"}), Say("Rain."))
    agent = agent_with(model, tools=[weather])
    result = Runner.run_streamed(agent, "How is the weather?", session=session)
    async for happened in result.stream_events():
        if happened.type == "run_item_stream_event":
            result.cancel(mode=mode)
    return model


async def test_a_stream_cancelled_after_its_turn(
    session: StoredSession, reference: SQLiteSession
) -> None:
    await _cancel_stream(session, "after_turn")
    await _cancel_stream(reference, "after_turn")
    assert await session.get_items() == await reference.get_items()
    said = await _said_and_continued(session)
    assert said == [*itertools.chain(*BATCHES[:2])]


async def test_a_stream_cancelled_at_once(session: StoredSession) -> None:
    await _cancel_stream(session, "immediate")
    assert _is_whole(await _said_and_continued(session))
