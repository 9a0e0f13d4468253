"""The application of ``deploy/app`` over real shards, with a real Runner and a scripted model."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import pytest_asyncio
from agents import RunConfig, Runner
from openai import OpenAIError

from shardgate import Gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from harness.servers import Database

HTTP = httpx2.AsyncClient
CHAT = "/tenants/acme/sessions/chat-1"


@asynccontextmanager
async def started(main: Any) -> AsyncIterator[HTTP]:
    """A client of the application, opened by the environment as a server would open it."""
    app = main.create_app()
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app)
        async with HTTP(transport=transport, base_url="http://app") as client:
            yield client


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The settings of compose.yaml, with SQLite in the place of its servers."""
    for name in ("PG_1", "PG_2", "MYSQL_1"):
        url = f"sqlite+aiosqlite:///{tmp_path}/{name}.db"
        monkeypatch.setenv(f"SHARDGATE_SHARDS__{name}__URL", url)
    monkeypatch.setenv("SHARDGATE_SHARDS__MYSQL_1__KEYSPACE", "eu")
    for keyspace in ("MAIN", "EU"):
        monkeypatch.setenv(f"SHARDGATE_KEYSPACES__{keyspace}__SLOTS", "64")
    monkeypatch.setenv("SHARDGATE_DEFAULT_KEYSPACE", "main")
    monkeypatch.setenv("SHARDGATE_TENANTS", '{"acme-eu": "eu"}')
    return monkeypatch


@pytest_asyncio.fixture
async def http(main: Any, environment: pytest.MonkeyPatch) -> AsyncIterator[HTTP]:
    await create_tables()
    async with started(main) as client:
        yield client


async def create_tables() -> None:
    gateway = Gateway.from_env()
    await gateway.create_tables()
    await gateway.aclose()


async def say(http: HTTP, session: str, text: str) -> str:
    answer = await http.post(f"{session}/messages", json={"text": text})
    assert answer.status_code == 200, answer.text
    said: str = answer.json()["answer"]
    return said


async def listed(http: HTTP, tenant: str, **asked: str | int) -> dict[str, Any]:
    answer = await http.get(f"/tenants/{tenant}/sessions", params=asked)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


def expect_error(answer: httpx2.Response, status: int, name: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    told: dict[str, Any] = answer.json()
    assert told["error"] == name
    assert told["message"]
    return told


async def test_a_conversation_continues(http: HTTP) -> None:
    assert await say(http, CHAT, "Hello") == "turn 1: Hello"
    assert await say(http, CHAT, "Still there?") == "turn 2: Still there?"


async def test_a_conversation_continues_in_another_process(
    main: Any, environment: pytest.MonkeyPatch
) -> None:
    await create_tables()
    async with started(main) as first:
        await say(first, CHAT, "Hello")
    async with started(main) as second:
        assert await say(second, CHAT, "Back again") == "turn 2: Back again"


async def test_two_tenants_may_use_one_session_id(http: HTTP) -> None:
    await say(http, CHAT, "Hello")
    assert await say(http, CHAT.replace("acme", "acme-eu"), "Hi") == "turn 1: Hi"
    assert await say(http, CHAT, "More") == "turn 2: More"


async def test_history_is_told_oldest_first_and_may_be_limited(http: HTTP) -> None:
    for text in ("one", "two"):
        await say(http, CHAT, text)
    whole = (await http.get(f"{CHAT}/messages")).json()["items"]
    assert [item["role"] for item in whole] == ["user", "assistant"] * 2
    assert [item["content"] for item in whole if item["role"] == "user"] == ["one", "two"]
    newest = await http.get(f"{CHAT}/messages", params={"limit": 2})
    assert newest.json()["items"] == whole[2:]


async def test_half_an_emoji_comes_back(http: HTTP) -> None:
    body = rb'{"text": "\ud83d"}'
    answer = await http.post(f"{CHAT}/messages", content=body)
    assert answer.json() == {"answer": "turn 1: \ud83d"}
    items = (await http.get(f"{CHAT}/messages")).json()["items"]
    assert items[0]["content"] == "\ud83d"


async def test_a_session_that_was_never_used_has_no_history(http: HTTP) -> None:
    assert (await http.get(f"{CHAT}/messages")).json() == {"items": []}


async def test_sessions_are_listed_page_by_page_over_the_shards(http: HTTP) -> None:
    made = {f"chat-{number}" for number in range(7)}
    for session in made:
        await say(http, f"/tenants/acme/sessions/{session}", "Hello")
    await say(http, "/tenants/globex/sessions/another", "Hello")

    found: list[str] = []
    page = await listed(http, "acme", limit=3)
    while page["next_cursor"]:
        found += [session["session_id"] for session in page["sessions"]]
        page = await listed(http, "acme", limit=3, cursor=page["next_cursor"])
    found += [session["session_id"] for session in page["sessions"]]

    assert sorted(found) == sorted(made)
    assert page["unavailable_shards"] == []


async def test_a_listed_session_tells_its_size(http: HTTP) -> None:
    await say(http, CHAT, "Hello")
    (session,) = (await listed(http, "acme"))["sessions"]
    assert set(session) == {"session_id", "item_count", "byte_count", "created_at", "updated_at"}
    assert session["session_id"] == "chat-1"
    assert session["item_count"] == 2
    assert session["byte_count"] > 0
    created = datetime.fromisoformat(session["created_at"])
    updated = datetime.fromisoformat(session["updated_at"])
    assert created <= updated
    assert abs(datetime.now(UTC) - updated) < timedelta(minutes=10)  # in UTC, and says so


async def test_a_deleted_session_is_gone_and_deleting_it_again_is_no_error(http: HTTP) -> None:
    await say(http, CHAT, "Hello")
    for _ in range(2):
        answer = await http.delete(CHAT)
        assert (answer.status_code, answer.content) == (204, b"")
    assert (await http.get(f"{CHAT}/messages")).json() == {"items": []}
    assert (await listed(http, "acme"))["sessions"] == []


@pytest.mark.parametrize(
    "body", [b"", b"no json", b'"text"', b"{}", b'{"text": 1}', b'{"text": ""}', b"\xff"]
)
async def test_a_message_without_text_is_refused(http: HTTP, body: bytes) -> None:
    expect_error(await http.post(f"{CHAT}/messages", content=body), 400, "UsageError")
    assert (await listed(http, "acme"))["sessions"] == []


@pytest.mark.parametrize(
    "path",
    [
        "/tenants/white space/sessions",
        "/tenants/acme/sessions?limit=many",
        "/tenants/acme/sessions?limit=0",
        "/tenants/acme/sessions?cursor=made-up",
        f"{CHAT}/messages?limit=-1",
        f"/tenants/acme/sessions/{'x' * 256}/messages",
    ],
)
async def test_wrong_input_is_told(http: HTTP, path: str) -> None:
    expect_error(await http.get(path), 400, "UsageError")


async def test_a_tenant_without_a_keyspace_is_refused(
    main: Any, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("SHARDGATE_DEFAULT_KEYSPACE", "")
    await create_tables()
    async with started(main) as http:
        assert await say(http, CHAT.replace("acme", "acme-eu"), "Hello") == "turn 1: Hello"
        refused = await http.post(f"{CHAT}/messages", json={"text": "Hi"})
        told = expect_error(refused, 403, "TenantRefused")
        assert "acme" in told["message"]


async def test_health_tells_every_shard(http: HTTP) -> None:
    answer = await http.get("/healthz")
    assert answer.status_code == 200
    well = {"reachable": True, "error": None}
    assert answer.json() == {
        "ok": True,
        "shards": dict.fromkeys(("pg_1", "pg_2", "mysql_1"), well),
    }
    assert (await http.get("/livez")).json() == {"ok": True}


@pytest.mark.backends("postgresql")
async def test_a_dead_shard_fails_its_own_sessions_and_is_named(
    main: Any, environment: pytest.MonkeyPatch, database: Database, unused_tcp_port: int
) -> None:
    environment.setenv("SHARDGATE_SHARDS__MYSQL_1__URL", database.url)
    await create_tables()
    async with started(main) as http:
        await say(http, CHAT.replace("acme", "acme-eu"), "Hello")
    dead = f"postgresql+asyncpg://nobody:hunter2@127.0.0.1:{unused_tcp_port}/nothing"
    environment.setenv("SHARDGATE_SHARDS__MYSQL_1__URL", dead)

    async with started(main) as http:
        assert await say(http, CHAT, "Hello") == "turn 1: Hello"
        asked = CHAT.replace("acme", "acme-eu")
        for answer in (
            await http.post(f"{asked}/messages", json={"text": "Hi"}),
            await http.get(f"{asked}/messages"),
            await http.delete(asked),
        ):
            told = expect_error(answer, 503, "ShardUnavailable")
            assert told["shard"] == "mysql_1"
            assert "hunter2" not in answer.text
        health = await http.get("/healthz")
        assert health.status_code == 200
        assert health.json()["ok"] is False
        assert [n for n, s in health.json()["shards"].items() if not s["reachable"]] == ["mysql_1"]
        assert "hunter2" not in health.text
        assert (await http.get("/livez")).status_code == 200


async def test_without_any_shard_the_process_is_not_ready_but_alive(
    main: Any, environment: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    for name in ("PG_1", "PG_2", "MYSQL_1"):
        dead = f"postgresql+asyncpg://nobody:hunter2@127.0.0.1:{unused_tcp_port}/{name}"
        environment.setenv(f"SHARDGATE_SHARDS__{name}__URL", dead)
    async with started(main) as http:
        assert (await http.get("/healthz")).status_code == 503
        assert (await http.get("/livez")).status_code == 200


async def test_a_page_may_leave_out_dead_shards(
    main: Any, http: HTTP, environment: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    for number in range(12):
        await say(http, f"/tenants/acme/sessions/chat-{number}", "Hello")
    dead = f"postgresql+asyncpg://nobody@127.0.0.1:{unused_tcp_port}/nothing"
    environment.setenv("SHARDGATE_SHARDS__PG_2__URL", dead)
    async with started(main) as half:
        told = expect_error(await half.get("/tenants/acme/sessions"), 503, "ShardUnavailable")
        assert told["shard"] == "pg_2"
        page = await listed(half, "acme", allow_partial="true")
        assert page["unavailable_shards"] == ["pg_2"]
        assert 0 < len(page["sessions"]) < 12


async def test_a_model_that_does_not_answer_is_no_fault_of_a_shard(
    http: HTTP, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise OpenAIError("secret details")

    monkeypatch.setattr(Runner, "run", fail)
    answer = await http.post(f"{CHAT}/messages", json={"text": "Hello"})
    expect_error(answer, 502, "OpenAIError")
    assert "secret details" not in answer.text


@pytest.mark.parametrize(("model", "used"), [("", None), ("gpt-test", "gpt-test")])
def test_a_key_chooses_the_real_model(
    main: Any, monkeypatch: pytest.MonkeyPatch, model: str, used: str | None
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("APP_MODEL", model)
    agent, config = main.make_agent()
    assert agent.model == used
    assert config.tracing_disabled is False


def test_without_a_key_nothing_is_sent_anywhere(main: Any) -> None:
    agent, config = main.make_agent()
    assert type(agent.model).__name__ == "ScriptedModel"
    assert isinstance(config, RunConfig)
    assert config.tracing_disabled is True
