"""The SDK tests: every run with the real ``agents.Runner``, a scripted model and no network.

Fixtures
    store      a `sdk_runs.stores.Store`, stand-alone and through a gateway, on every database
               unless the test is marked ``backends("sqlite")``
    session    the session "chat-1" of the store
    reference  the SDK's own in-memory session of that name, to be compared with
    clock      ``clock.advance(seconds)``: what the SDK takes for the time
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))  # see sdk_runs/__init__.py

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from agents import SQLiteSession
    from sdk_runs.stores import Store

    from conftest import MakeDatabases
    from harness.engines import EngineMaker
    from shardgate.session import StoredSession

collect_ignore_glob: list[str] = []
if find_spec("agents") is None:
    collect_ignore_glob.append("test_*.py")


@pytest.fixture(scope="session", autouse=True)
def no_tracing() -> None:
    from agents import set_tracing_disabled

    set_tracing_disabled(True)


@pytest_asyncio.fixture(params=["standalone", "gateway"])
async def store(
    request: pytest.FixtureRequest, databases: MakeDatabases, make_engine: EngineMaker
) -> AsyncIterator[Store]:
    from sdk_runs.stores import Standalone, ThroughGateway

    if request.param == "standalone":
        made: Store = Standalone(make_engine)
    else:
        made = ThroughGateway([database.url for database in await databases(2)])
    async with made:
        yield made


@pytest.fixture
def session(store: Store) -> StoredSession:
    return store.session()


@pytest.fixture
def reference() -> Iterator[SQLiteSession]:
    from agents import SQLiteSession
    from sdk_runs.stores import SESSION_ID

    made = SQLiteSession(SESSION_ID)
    yield made
    made.close()


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stops ``time.time``, which nothing but timestamps is taken from."""
    clock = Clock(time.time())
    monkeypatch.setattr(time, "time", lambda: clock.now)
    return clock
