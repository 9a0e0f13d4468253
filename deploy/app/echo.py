"""A model that needs no network: it repeats what was said and counts the turns it can see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from agents import Model, ModelResponse, Usage
from openai.types.responses import ResponseOutputMessage, ResponseOutputText

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agents.items import TResponseInputItem, TResponseStreamEvent


class EchoModel(Model):
    """Answers ``turn N: TEXT``. N counts the user's messages, so it shows what the session kept."""

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002  # the SDK's name for it
        *_: Any,
        **__: Any,
    ) -> ModelResponse:
        said = [input] if isinstance(input, str) else _messages_of_user(input)
        return ModelResponse(
            output=[_message(f"turn {len(said)}: {said[-1]}")], usage=Usage(), response_id=None
        )

    def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[TResponseStreamEvent]:
        raise NotImplementedError("the application does not stream")


def _messages_of_user(items: list[TResponseInputItem]) -> list[str]:
    return [str(item.get("content")) for item in items if item.get("role") == "user"]


def _message(text: str) -> ResponseOutputMessage:
    return ResponseOutputMessage(
        id=f"msg_{uuid4().hex}",
        type="message",
        role="assistant",
        status="completed",
        content=[ResponseOutputText(type="output_text", text=text, annotations=[])],
    )
