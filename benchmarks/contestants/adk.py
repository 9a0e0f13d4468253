"""Google ADK's DatabaseSessionService."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.contestants.base import TENANTS, Contestant, Session, engine_options, names
from benchmarks.contestants.bulk import load_adk
from benchmarks.load import ANSWER
from benchmarks.servers import require

if TYPE_CHECKING:
    from benchmarks.contestants.base import Name

_APP = "bench"
_TEMPLATE = "template"


class ADK(Contestant):
    """An item is an event, a tenant a user. It takes one event a call, so an append is two."""

    key: ClassVar[str] = "adk"
    title: ClassVar[str] = "Google ADK DatabaseSessionService"
    durability: ClassVar[str] = "the server's: each append is on disk before it returns"

    async def open(self) -> None:
        sessions: Any = require("google.adk.sessions")
        base: Any = require("google.adk.sessions.base_session_service")
        self.event: Any = require("google.adk.events").Event
        self.types: Any = require("google.genai").types
        self.recent = base.GetSessionConfig
        url, new = await self.stage.database("adk")
        self.service: Any = sessions.DatabaseSessionService(url, **engine_options(self.connections))
        if new:
            await self._fill(url)

    async def _fill(self, url: str) -> None:
        for number in range(TENANTS):
            made = await self.service.create_session(
                app_name=_APP, user_id=names(TENANTS)[number].tenant, session_id=f"first-{number}"
            )
        template = await self.service.create_session(
            app_name=_APP, user_id=made.user_id, session_id=_TEMPLATE
        )
        for item in ANSWER:
            await self.service.append_event(template, self.as_event(item))
        await load_adk(url, self.names, self.stage.history, _TEMPLATE)

    def session(self, name: Name) -> Session:
        return ADKSession(self, name)

    def as_event(self, item: dict[str, Any]) -> Any:
        """An event that carries an item's text."""
        part = self.types.Part(text=item["content"])
        content = self.types.Content(role=item["role"], parts=[part])
        return self.event(author=item["role"], invocation_id="bench", content=content)

    async def close(self) -> None:
        await self.service.close()


class ADKSession:
    """What ADK wants: the session that was read is the one that is appended to."""

    def __init__(self, adk: ADK, name: Name) -> None:
        self._adk = adk
        self._name = name
        self._read: Any = None

    async def get_items(self, limit: int | None = None) -> list[Any]:
        config = self._adk.recent(num_recent_events=limit)
        where = {"app_name": _APP, "user_id": self._name.tenant, "session_id": self._name.session}
        self._read = await self._adk.service.get_session(config=config, **where)
        return [_as_item(event) for event in self._read.events]

    async def add_items(self, items: list[Any]) -> None:
        for item in items:
            await self._adk.service.append_event(self._read, self._adk.as_event(item))


def _as_item(event: Any) -> dict[str, Any]:
    return {"role": event.content.role, "content": event.content.parts[0].text}
