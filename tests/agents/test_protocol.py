"""The SDK's session protocol, kept without ever importing the SDK."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agents import RunContextWrapper, Session
from agents.extensions.memory import EncryptedSession
from agents.memory import session as sdk_session
from sdk_runs.model import Call, Say, ScriptedModel
from sdk_runs.play import agent_with, run_plain, run_streamed, weather

import shardgate

if TYPE_CHECKING:
    from sdk_runs.play import Run

    from shardgate.session import StoredSession

pytestmark = pytest.mark.backends("sqlite")

METHODS = ("get_items", "add_items", "pop_item", "clear_session")

hands_over_a_wrapper = pytest.mark.skipif(
    not hasattr(sdk_session, "_session_accepts_wrapper"),
    reason="this version of the SDK does not hand its run context to sessions",
)


def test_it_is_a_session(session: StoredSession) -> None:
    assert isinstance(session, Session)
    assert session.session_settings is None


@pytest.mark.parametrize("name", METHODS)
def test_the_parameters_are_the_sdks_and_the_wrapper(name: str, session: StoredSession) -> None:
    ours = inspect.signature(getattr(session, name)).parameters
    theirs = inspect.signature(getattr(Session, name)).parameters
    own = ["idempotency_key"] if name == "add_items" else []
    assert list(ours) == [*(set(theirs) - {"self"}), *own, "wrapper"]
    assert all(ours[extra].kind is inspect.Parameter.KEYWORD_ONLY for extra in own)
    assert ours["wrapper"].kind is inspect.Parameter.KEYWORD_ONLY
    assert ours["wrapper"].default is None


async def test_all_methods_take_a_wrapper(session: StoredSession) -> None:
    context = RunContextWrapper(context="anything")
    await session.add_items([{"role": "user", "content": "Hi!"}] * 2, wrapper=context)
    assert len(await session.get_items(wrapper=context)) == 2
    assert len(await session.get_items(limit=1, wrapper=context)) == 1
    assert await session.pop_item(wrapper=context) == {"role": "user", "content": "Hi!"}
    await session.clear_session(wrapper=context)
    assert await session.get_items() == []


def spy_on(session: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The wrappers that each method was called with from now on."""
    seen: dict[str, list[Any]] = {name: [] for name in METHODS}

    def spied(name: str) -> Any:
        method = getattr(session, name)

        @functools.wraps(method)
        async def call(*arguments: Any, wrapper: Any = None, **options: Any) -> Any:
            seen[name].append(wrapper)
            return await method(*arguments, wrapper=wrapper, **options)

        return call

    for name in METHODS:
        monkeypatch.setattr(session, name, spied(name))
    return seen


@hands_over_a_wrapper
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("run", [run_plain, run_streamed])
async def test_a_run_hands_its_context_over(
    run: Run, sealed: bool, session: StoredSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sdk_session._session_accepts_wrapper(session)
    seen = spy_on(session, monkeypatch)
    used = EncryptedSession("chat-1", session, encryption_key="key") if sealed else session
    model = ScriptedModel(Call("weather", {"city": "Bern"}), Say("Rain."))
    agent = agent_with(model, tools=[weather])
    await run(agent, "How is the weather?", session=used, context="acme")
    assert seen["get_items"]
    assert seen["add_items"]
    for wrapper in itertools.chain(*seen.values()):
        assert isinstance(wrapper, RunContextWrapper)
        assert wrapper.context == "acme"


WITHOUT_THE_SDK = """
import asyncio, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("agents", "openai"):
            raise AssertionError(f"{name} was imported")

if sys.argv[1] == "refused":
    sys.meta_path.insert(0, Refuse())

from shardgate import Gateway, GatewaySettings, SQLAlchemySession

async def use(session):
    await session.add_items([{"role": "user", "content": "Hi!"}] * 3)
    assert len(await session.get_items()) == 2
    assert await session.pop_item() == {"role": "user", "content": "Hi!"}
    snapshot = await session._get_compaction_snapshot(10)
    assert await snapshot.replace_suffix(1, [{"role": "user", "content": "Hello!"}])
    assert (await session.get_items())[-1]["content"] == "Hello!"
    await session.clear_session()
    assert await session.get_items() == []

async def main():
    options = {"session_settings": {"limit": 2}}
    url = "sqlite+aiosqlite:///alone.db"
    alone = SQLAlchemySession.from_url("chat-1", url=url, create_tables=True, **options)
    await use(alone)
    await alone.aclose()
    settings = GatewaySettings.from_dict(
        {
            "shards": {name: {"url": f"sqlite+aiosqlite:///{name}.db"} for name in ("a", "b")},
            "keyspaces": {"main": {"slots": 16}},
            "default_keyspace": "main",
            "create_tables": True,
        }
    )
    async with Gateway(settings) as gateway:
        await use(gateway.tenant("acme").session("chat-1", **options))

asyncio.run(main())
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"agents", "openai"}, loaded
"""


@pytest.mark.processes
@pytest.mark.parametrize("imports", ["watched", "refused"])
def test_the_sdk_is_never_imported(imports: str, tmp_path: Path) -> None:
    source = str(Path(shardgate.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_THE_SDK, imports],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
