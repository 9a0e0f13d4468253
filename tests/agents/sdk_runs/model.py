"""A model that says what a script tells it: the SDK's own interface, and no network."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agents import Model, ModelResponse, Usage
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agents import TResponseInputItem


@dataclass(frozen=True, slots=True)
class Say:
    """The model answers with a text."""

    text: str

    def build(self, number: str) -> ResponseOutputMessage:
        content = ResponseOutputText(
            text=self.text, type="output_text", annotations=[], logprobs=[]
        )
        return ResponseOutputMessage(
            id=f"msg_{number}",
            type="message",
            role="assistant",
            content=[content],
            status="completed",
        )


@dataclass(frozen=True, slots=True)
class Call:
    """The model calls a tool, or hands over by calling ``transfer_to_…``."""

    tool: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, number: str) -> ResponseFunctionToolCall:
        return ResponseFunctionToolCall(
            id=f"fc_{number}",
            call_id=f"call_{number}",
            type="function_call",
            name=self.tool,
            arguments=json.dumps(self.arguments),
            status="completed",
        )


@dataclass(frozen=True, slots=True)
class Think:
    """The model emits a reasoning item; something else follows in the same turn."""

    def build(self, number: str) -> ResponseReasoningItem:
        return ResponseReasoningItem(
            id=f"rs_{number}", type="reasoning", summary=[], encrypted_content="c2VhbGVk"
        )


Part = Say | Call | Think
Act = Callable[[], Awaitable[None] | None]


class ScriptedModel(Model):
    """Plays its turns, one for each call; ``received`` keeps what each call was given.

    A turn is a part or a list of parts. An exception in place of a turn is raised, and a function
    is called first, with the turn after it following in the same call. ``name`` goes into the ids,
    which must differ within a conversation.
    """

    def __init__(self, *turns: Part | list[Part] | BaseException | Act, name: str = "a") -> None:
        self.received: list[list[TResponseInputItem]] = []
        self._turns = list(turns)
        self._name = name
        self._items = 0

    @property
    def unplayed(self) -> int:
        return len(self._turns)

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002 - the interface names it so
        *_: Any,
        **__: Any,
    ) -> ModelResponse:
        output = await self._answer(input)
        return ModelResponse(output=output, usage=Usage(), response_id=self._response_id())

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002 - the interface names it so
        *_: Any,
        **__: Any,
    ) -> AsyncIterator[ResponseCompletedEvent]:
        output = await self._answer(input)
        response = Response(
            id=self._response_id(),
            created_at=0,
            model="scripted",
            object="response",
            output=output,
            tool_choice="none",
            tools=[],
            parallel_tool_calls=False,
        )
        yield ResponseCompletedEvent(
            type="response.completed", response=response, sequence_number=0
        )

    def _response_id(self) -> str:
        return f"resp_{self._name}_{len(self.received)}"

    async def _answer(self, given: str | list[TResponseInputItem]) -> list[Any]:
        assert not isinstance(given, str)
        self.received.append(copy.deepcopy(given))
        turn = self._turns.pop(0)
        while callable(turn):
            waiting = turn()
            if inspect.isawaitable(waiting):
                await waiting
            turn = self._turns.pop(0)
        if isinstance(turn, BaseException):
            raise turn
        return [self._build(part) for part in (turn if isinstance(turn, list) else [turn])]

    def _build(self, part: Part) -> Any:
        self._items += 1
        return part.build(f"{self._name}_{self._items}")
