"""Tens of thousands of appends by many tasks of several processes over several shards."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from contract.doors import TENANT, gateway_settings
from contract.writers import assert_order_of_commits, assert_whole, batch_of
from harness.processes import Children
from shardgate.gateway import Gateway

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import MakeDatabases
    from contract.writers import Span

PROCESSES = 4
SESSIONS = 48
ENGINE_KWARGS = {"pool_size": 8, "max_overflow": 0}


async def append_in_process(argument: dict[str, Any]) -> list[tuple[str, Span]]:
    """Run in a child process: so many tasks append in turn to sessions that all processes share."""
    process, tasks, appends = argument["process"], argument["tasks"], argument["appends"]
    async with Gateway(gateway_settings(argument["urls"], ENGINE_KWARGS)) as gateway:
        tenant: Any = gateway.tenant(TENANT)
        spans: list[tuple[str, Span]] = []

        async def append(task: int) -> None:
            writer = f"{process}-{task}"
            for n in range(appends // tasks):
                session = _session_of(task, n)
                began = time.monotonic_ns()
                await tenant.session(session).add_items(batch_of(writer, n, 1))
                spans.append((session, (writer, n, began, time.monotonic_ns())))

        await asyncio.gather(*map(append, range(tasks)))
        return spans


def _session_of(task: int, append: int) -> str:
    """Half of all appends go to four hot sessions."""
    number = (task + append) % SESSIONS
    return f"chat-{number % 4 if append % 2 else number}"


async def _check(urls: Sequence[str], *, appends: int, tasks: int, seconds: float) -> None:
    """Each append is there once, whole, and in order, in the session that it went to."""
    share = {"urls": urls, "tasks": tasks // PROCESSES, "appends": appends // PROCESSES}
    arguments = [share | {"process": process} for process in range(PROCESSES)]
    async with Children(seconds=seconds) as children:
        results = await children.run("concurrency.test_appends:append_in_process", arguments)
    expected: dict[str, list[Span]] = defaultdict(list)
    for session, (writer, n, began, ended) in (pair for result in results for pair in result):
        expected[session].append((writer, n, began, ended))
    assert sum(map(len, expected.values())) == appends
    async with Gateway(gateway_settings(urls)) as gateway:
        tenant: Any = gateway.tenant(TENANT)
        shards = {gateway.route(TENANT, session).shard for session in expected}
        assert shards == set(gateway.shards)
        for session, spans in expected.items():
            history = await tenant.session(session).get_items()
            assert len(history) == len(spans)
            assert_whole(history)
            assert_order_of_commits(history, spans)
        page = await tenant.list_sessions(limit=SESSIONS + 1)
        counted = {info.session_id: info.item_count for info in page.sessions}
        assert counted == {session: len(spans) for session, spans in expected.items()}


@pytest.mark.processes
@pytest.mark.backends("postgresql-18")
@pytest.mark.timeout(400)
async def test_fifty_thousand_appends(databases: MakeDatabases) -> None:
    urls = [database.url for database in await databases(4, servers=2)]
    await _check(urls, appends=50_048, tasks=64, seconds=360)


@pytest.mark.processes
@pytest.mark.backends("sqlite", "postgresql-15", "mariadb", "mysql")
async def test_some_thousand_appends(databases: MakeDatabases, backend: Any) -> None:
    urls = [database.url for database in await databases(4)]
    appends = 1_024 if backend.family == "sqlite" else 5_056
    await _check(urls, appends=appends, tasks=64, seconds=100)
