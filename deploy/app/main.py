"""The routes.

::

    POST   /tenants/{tenant}/sessions/{session}/messages   {"text": ...} -> {"answer": ...}
    GET    /tenants/{tenant}/sessions/{session}/messages   ?limit=50
    GET    /tenants/{tenant}/sessions                      ?limit=50&cursor=...&allow_partial=true
    DELETE /tenants/{tenant}/sessions/{session}
    GET    /healthz    the shards: 503 only when none of them serves
    GET    /livez      the process

It asks nobody who they are: a platform takes the tenant from a verified token, never from the path.
"""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from agents import Agent, RunConfig, Runner
from openai import OpenAIError
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from shardgate import (
    Gateway,
    OutcomeUnknown,
    ShardgateError,
    TablesMismatch,
    TenantRefused,
    TransientError,
    UsageError,
)
from shardgate.testing.model import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from shardgate import GatewaySession, SessionInfo, Tenant


class JSON(Response):
    """ASCII alone, because stored text may have what UTF-8 cannot carry, such as half an emoji."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content).encode("ascii")


@asynccontextmanager
async def opened_gateway(app: Starlette) -> AsyncIterator[None]:
    """Open the gateway that the environment describes, for as long as the application runs."""
    async with Gateway.from_env() as gateway:
        app.state.gateway = gateway
        yield


def echo(said: list[str]) -> str:
    """The scripted answer: it counts the messages that the session has kept."""
    return f"turn {len(said)}: {said[-1]}"


def make_agent() -> tuple[Agent[None], RunConfig]:
    """The agent: with the model of OPENAI_API_KEY, or without a key one that needs no network."""
    has_key = bool(os.environ.get("OPENAI_API_KEY"))
    model = (os.environ.get("APP_MODEL") or None) if has_key else ScriptedModel(echo)
    agent = Agent[None](name="assistant", instructions="Answer briefly.", model=model)
    return agent, RunConfig(tracing_disabled=not has_key)


async def post_message(request: Request) -> Response:
    text = _text_in(await request.body())
    agent, config = request.app.state.agent
    result = await Runner.run(agent, text, session=_session(request), run_config=config)
    return JSON({"answer": result.final_output})


async def get_messages(request: Request) -> Response:
    return JSON({"items": await _session(request).get_items(_limit(request))})


async def list_sessions(request: Request) -> Response:
    asked = request.query_params
    page = await _tenant(request).list_sessions(
        limit=_limit(request),
        cursor=asked.get("cursor"),
        allow_partial=asked.get("allow_partial") == "true",
    )
    return JSON(
        {
            "sessions": [_told(session) for session in page.sessions],
            "next_cursor": page.next_cursor,
            "unavailable_shards": list(page.unavailable_shards),
        }
    )


def _told(session: SessionInfo) -> dict[str, object]:
    return {
        "session_id": session.session_id,
        "item_count": session.item_count,
        "byte_count": session.byte_count,
        "created_at": f"{session.created_at.isoformat()}Z",
        "updated_at": f"{session.updated_at.isoformat()}Z",
    }


async def delete_session(request: Request) -> Response:
    await _tenant(request).delete_session(request.path_params["session"])
    return Response(status_code=204)


async def healthz(request: Request) -> Response:
    report = await _gateway(request).check()
    shards = {
        name: {"reachable": shard.reachable, "error": shard.error}
        for name, shard in report.shards.items()
    }
    # While one shard serves, so do we: taking the process away would lose its sessions too.
    serves = any(shard.ok for shard in report.shards.values())
    return JSON({"ok": report.ok, "shards": shards}, status_code=200 if serves else 503)


async def livez(_: Request) -> Response:
    return JSON({"ok": True})


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _tenant(request: Request) -> Tenant:
    return _gateway(request).tenant(request.path_params["tenant"])


def _session(request: Request) -> GatewaySession:
    return _tenant(request).session(request.path_params["session"])


def _text_in(body: bytes) -> str:
    try:
        message = json.loads(body)
    except ValueError:
        message = None
    text = message.get("text") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text:
        raise UsageError('the body must be a JSON object with a "text"')
    return text


def _limit(request: Request) -> int:
    written = request.query_params.get("limit", "50")
    try:
        return int(written)
    except ValueError:
        raise UsageError("limit must be a whole number") from None


async def answer_error(_: Request, error: Exception) -> Response:
    """Say what went wrong. Errors of Shardgate never hold a URL or a password."""
    if not isinstance(error, ShardgateError):
        return JSON({"error": "OpenAIError", "message": "the model did not answer"}, 502)
    told = {"error": type(error).__name__, "message": str(error)}
    shard = getattr(error, "shard", None)
    return JSON(told if shard is None else told | {"shard": shard}, _status(error))


def _status(error: ShardgateError) -> int:
    match error:
        case TenantRefused():
            return 403
        case TablesMismatch():
            return 500
        case UsageError():
            return 400
        case TransientError():
            return 503
        case OutcomeUnknown():
            return 504
        case _:
            return 500


def create_app() -> Starlette:
    """The application; it opens its gateway when it starts."""
    messages = "/tenants/{tenant}/sessions/{session}/messages"
    app = Starlette(
        routes=[
            Route(messages, post_message, methods=["POST"]),
            Route(messages, get_messages, methods=["GET"]),
            Route("/tenants/{tenant}/sessions", list_sessions, methods=["GET"]),
            Route("/tenants/{tenant}/sessions/{session}", delete_session, methods=["DELETE"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/livez", livez, methods=["GET"]),
        ],
        exception_handlers={ShardgateError: answer_error, OpenAIError: answer_error},
        lifespan=opened_gateway,
    )
    app.state.agent = make_agent()
    return app


app = create_app()
