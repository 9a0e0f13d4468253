"""Two pops that meet at the newest item each return one of their own; naive forms do not.

One interleaving, forced: somebody else has the newest item locked until both pops wait, so that
neither has removed it before the other has come.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select

from gateway.shards import engine_at, named, session_on, settings_at
from ownership.test_fences import SLOTS, Interleaving, contents, engine_of, written
from shardgate import Gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import MakeDatabases
    from harness.servers import Backend

ITEMS = 4

POSTGRESQL = pytest.mark.backends("postgresql")
INNODB = pytest.mark.backends("mariadb", "mysql")

# The newest item is found by one look and deleted by what was found, and the one that comes second
# has nothing to delete. The parameters that it does not need have to have a type.
_DELETE_THE_NEWEST = """
    WITH given AS (SELECT $3::int, $4::text, $5::bigint, $6::text, $7::text), removed AS (
        DELETE FROM shardgate_messages WHERE tenant_id = $1 AND session_id = $2 AND seq = (
            SELECT max(seq) FROM shardgate_messages WHERE tenant_id = $1 AND session_id = $2)
        RETURNING message_data
    )
    SELECT true, EXISTS (SELECT FROM removed), (SELECT message_data FROM removed)
"""


class Meeting:
    """A session with some items, and what two pops of it at the same time return."""

    def __init__(self, at: Interleaving) -> None:
        self._at = at
        self._dialect: Any = at.source.dialect

    def change_pop(self, change: Callable[[str], str]) -> None:
        """Have pops of this session's shard sent in another form."""
        changed = change(self._dialect.pop_sql)
        assert changed != self._dialect.pop_sql
        self._dialect.pop_sql = changed

    def leave_out(self, condition: str) -> None:
        assert self._dialect.pop_sql.count(condition) == 1
        self.change_pop(lambda statement: statement.replace(condition, " "))

    async def faults(self) -> list[str]:
        """Have two pops meet until there is nothing left; what was not as it should be."""
        at, faults = self._at, []
        for left in range(ITEMS, 0, -2):
            popped = contents(await self._pop_twice())
            expected = {f"0 {left - 1}", f"0 {left - 2}"}
            if len(popped) < 2:
                faults.append(f"None, with {left} items there")
            elif set(popped) != expected:
                faults.append(f"{popped} of {sorted(expected)}")
        remaining = contents(await at.session.get_items())
        return faults + [f"{text} is left" for text in remaining]

    async def _pop_twice(self) -> list[Any]:
        at, messages = self._at, self._at.source.tables.messages
        of_session = messages.c.tenant_id == "acme", messages.c.session_id == at.session_id
        newest = select(func.max(messages.c.seq)).where(*of_session)
        async with engine_at(at.urls["a"]) as engine, engine.begin() as connection:
            seq = (await connection.execute(newest)).scalar_one()
            chosen = select(messages.c.seq).where(*of_session, messages.c.seq == seq)
            assert (await connection.execute(chosen.with_for_update())).one_or_none() is not None
            pops = [asyncio.create_task(at.session.pop_item()) for _ in range(2)]
            await at.waiting(2)
        return await asyncio.gather(*pops)


@pytest.fixture(params=["READ COMMITTED", "its own"])
async def meeting(
    databases: MakeDatabases, backend: Backend, request: pytest.FixtureRequest
) -> AsyncIterator[Meeting]:
    urls = named(await databases(2))
    engines = {}
    if request.param != "its own":
        make = engine_of(request.param, backend.family)
        engines = {name: make(url) for name, url in urls.items()}
    async with Gateway(settings_at(urls, slots=SLOTS), engines=engines) as gateway:
        session_id = session_on(gateway, "a")
        session = gateway.tenant("acme").session(session_id)
        await session.add_items([written(0, number) for number in range(ITEMS)])
        yield Meeting(Interleaving(gateway, urls, session_id))
    for engine in engines.values():
        await engine.dispose()


@pytest.mark.backends("postgresql", "mariadb", "mysql")
async def test_two_pops_that_meet_return_two_items(meeting: Meeting) -> None:
    assert await meeting.faults() == []


@POSTGRESQL
async def test_the_naive_pop_returns_none_with_items_left(meeting: Meeting) -> None:
    meeting.change_pop(lambda _: _DELETE_THE_NEWEST)
    assert "None, with 4 items there" in await meeting.faults()


@POSTGRESQL
async def test_without_a_look_at_the_revision_an_item_is_given_twice(meeting: Meeting) -> None:
    meeting.leave_out(" held.revision = seen.revision AND ")
    assert "['0 3', '0 3'] of ['0 2', '0 3']" in await meeting.faults()


@INNODB
async def test_without_the_sessions_lock_an_item_is_given_twice(
    meeting: Meeting, request: pytest.FixtureRequest
) -> None:
    """At REPEATABLE READ the copy into the ops locks what it reads, and saves the naive form."""
    meeting.leave_out(" FOR UPDATE")
    faults = await meeting.faults()
    committed = request.node.callspec.params["meeting"] == "READ COMMITTED"
    assert ("['0 3', '0 3'] of ['0 2', '0 3']" in faults) is committed
