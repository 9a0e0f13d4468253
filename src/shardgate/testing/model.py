"""A model that needs no network and no key: a function of the conversation so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from agents import Model, ModelResponse, Usage
from openai.types.responses import ResponseOutputMessage, ResponseOutputText

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agents.items import TResponseInputItem, TResponseStreamEvent


class ScriptedModel(Model):
    """A real ``agents.Model`` whose answer is ``answer(what the user has said so far)``.

    What it is given is what the session kept, so its answers show whether the session works.
    """

    def __init__(self, answer: Callable[[list[str]], str]) -> None:
        self._answer = answer

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002 - the SDK's name for it
        *_: Any,
        **__: Any,
    ) -> ModelResponse:
        """Answer in one message."""
        said = [input] if isinstance(input, str) else said_by_user(input)
        return ModelResponse(output=[_message(self._answer(said))], usage=Usage(), response_id=None)

    def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[TResponseStreamEvent]:
        """Refuse: the script has whole answers only."""
        raise TypeError("a ScriptedModel does not stream: use Runner.run")


def said_by_user(items: list[TResponseInputItem]) -> list[str]:
    """The texts of the user's messages in a conversation."""
    messages = cast("list[dict[str, object]]", items)
    return [str(message["content"]) for message in messages if message.get("role") == "user"]


def _message(text: str) -> ResponseOutputMessage:
    return ResponseOutputMessage(
        id=f"msg_{uuid4().hex}",
        type="message",
        role="assistant",
        status="completed",
        content=[ResponseOutputText(type="output_text", text=text, annotations=[])],
    )
