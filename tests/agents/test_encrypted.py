"""The SDK's EncryptedSession around ours: sealed in the database, and forgotten in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from agents.extensions.memory import EncryptedSession
from sdk_runs.model import Call, Say, ScriptedModel
from sdk_runs.play import agent_with, play_on, run_plain, run_streamed, texts, weather
from sdk_runs.stores import stored_rows

if TYPE_CHECKING:
    from agents import Session, SQLiteSession
    from sdk_runs.play import Run
    from sdk_runs.stores import Store

    from conftest import Clock
    from shardgate.session import StoredSession

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
TTL = 60

only_sqlite = pytest.mark.backends("sqlite")


def sealed(session: Any, *, key: str = KEY) -> EncryptedSession:
    return EncryptedSession("chat-1", session, encryption_key=key, ttl=TTL)


async def two_turns(run: Run, session: Session) -> ScriptedModel:
    model = ScriptedModel(Call("weather", {"city": "Zürich \0 😀"}), Say("Wet."), Say("Bye."))
    for given in ("How is the weather?", "Thanks."):
        await run(agent_with(model, tools=[weather]), given, session=session)
    return model


def items(*contents: str) -> list[Any]:
    return [{"role": "user", "content": content} for content in contents]


@only_sqlite
@pytest.mark.parametrize("run", [run_plain, run_streamed])
async def test_as_with_the_sdks_own_session(
    run: Run, session: StoredSession, reference: SQLiteSession
) -> None:
    ours = await play_on(sealed(session), two_turns, run)
    assert ours == await play_on(sealed(reference), two_turns, run)
    assert ours.received[-1] == ours.stored[:-1]


async def test_the_next_process_reads_it_with_the_key(store: Store) -> None:
    await two_turns(run_plain, sealed(store.session()))
    before = await sealed(store.session()).get_items()
    await store.restart()
    assert await sealed(store.session()).get_items() == before
    assert await sealed(store.session(), key="another key").get_items() == []


@only_sqlite
async def test_nothing_readable_is_stored(store: Store) -> None:
    await two_turns(run_plain, sealed(store.session()))
    rows = await stored_rows(store)
    assert len(rows) == 6
    for word in ("weather", "Thanks", "assistant"):  # long: short ones occur in ciphers by chance
        assert not [row for row in rows if word in row]


@only_sqlite
async def test_what_expired_is_forgotten(
    store: Store, reference: SQLiteSession, clock: Clock
) -> None:
    async def play(session: EncryptedSession) -> list[Any]:
        model = ScriptedModel(Say("one"), Say("two"), Say("three"))
        for given in ("first", "second", "third"):
            await run_plain(agent_with(model), given, session=session)
            clock.advance(TTL - 20)
        return [texts(given) for given in model.received]

    seen = [["first"], ["first", "one", "second"], ["second", "two", "third"]]
    assert await play(sealed(store.session())) == seen
    assert await play(sealed(reference)) == seen
    assert len(await store.session().get_items()) == 6


@only_sqlite
async def test_a_limit_counts_what_is_readable(session: StoredSession, clock: Clock) -> None:
    secret = sealed(session)
    await secret.add_items(items("early", "before"))
    clock.advance(TTL + 1)
    await secret.add_items(items("now"))
    assert texts(await secret.get_items(limit=3)) == ["now"]
    assert texts(await secret.get_items()) == ["now"]


@only_sqlite
async def test_pop_and_clear(session: StoredSession) -> None:
    secret = sealed(session)
    await secret.add_items(items("first", "second"))
    popped = await secret.pop_item()
    assert popped is not None
    assert texts([popped]) == ["second"]
    await secret.clear_session()
    assert await secret.pop_item() is None
    assert await session.get_items() == []
