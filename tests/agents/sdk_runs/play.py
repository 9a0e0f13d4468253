"""Runs to play on our sessions and on the SDK's own, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agents import Agent, Runner, TResponseInputItem, function_tool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agents import Model, Session

    from sdk_runs.model import ScriptedModel

    Run = Callable[..., Awaitable[Any]]
    Play = Callable[[Run, Session], Awaitable[ScriptedModel]]

Items = list[TResponseInputItem]


async def run_plain(agent: Agent[Any], given: Any, **options: Any) -> Any:
    return await Runner.run(agent, given, **options)


async def run_streamed(agent: Agent[Any], given: Any, **options: Any) -> Any:
    result = Runner.run_streamed(agent, given, **options)
    async for _ in result.stream_events():
        pass
    return result


@dataclass(frozen=True)
class Played:
    """What each call of the model was given, and what the session holds in the end."""

    received: list[Items]
    stored: Items


async def play_on(session: Session, play: Play, run: Run) -> Played:
    model = await play(run, session)
    assert model.unplayed == 0
    return Played(model.received, await session.get_items())


@function_tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"rain in {city}"


def agent_with(model: Model, **options: Any) -> Agent[Any]:
    return Agent(name="assistant", model=model, **options)


def texts(items: Items) -> list[str]:
    """The texts of messages and outputs, the names of calls: what a person would read."""
    return [_text(item) for item in items]


def _text(item: Any) -> str:
    kind = item.get("type", "message")
    if kind == "function_call":
        return f"{item['name']}({item['arguments']})"
    if kind == "function_call_output":
        return f"-> {item['output']}"
    if kind != "message":
        return f"<{kind}>"
    content = item["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
