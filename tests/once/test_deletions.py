"""A deletion takes effect once: its retry answers as the first attempt did, and deletes no more."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, select

from once.wire import SECONDS
from shardgate import OutcomeUnknown
from shardgate.sql.dialect import Operation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from contract.conftest import OpenDoor
    from contract.doors import Door
    from once.conftest import Wire

NETWORKED = pytest.mark.backends("postgresql", "mariadb", "mysql")
CUTS = 8
"""In what a deletion sends, and in what it is answered."""
DIGITS = 5
"""By so many bytes may an answer be shorter: zeros that a moment in it ends in are left out."""

OLD: list[Any] = [{"id": "old"}]
NEW: list[Any] = [{"id": "new"}]


async def _send(door: Door, operation: Operation) -> bool:
    """Send a deletion, once more, as a first attempt that comes late does."""
    perform: Any = door.session()._perform
    return bool(await perform(lambda store, place: store.delete(place, operation)))


async def _recorded(door: Door, op_id: str) -> tuple[str, int | None]:
    ops = door.tables.ops
    async with door.engine().connect() as connection:
        rows = await connection.execute(select(ops.c.kind, ops.c.n).where(ops.c.op_id == op_id))
        kind, n = rows.one()
        return kind, n


async def test_the_same_deletion_again_answers_the_same(door: Door) -> None:
    operation = Operation("0" * 32, "delete")
    await door.session().add_items(OLD)
    assert [await _send(door, operation) for _ in range(3)] == [True] * 3
    assert await _recorded(door, operation.op_id) == ("delete", 1)
    await door.session().add_items(NEW)
    assert await _send(door, operation)
    assert await door.session().get_items() == NEW


async def test_one_that_found_nothing_deletes_nothing_that_is_made_later(door: Door) -> None:
    operation = Operation("1" * 32, "delete")
    assert not await _send(door, operation)
    assert await _recorded(door, operation.op_id) == ("delete", 0)
    await door.session().add_items(NEW)
    assert not await _send(door, operation)
    assert await door.session().get_items() == NEW
    assert await door.delete()


async def test_twins_at_once_agree(door: Door, open_door: OpenDoor) -> None:
    doors = [door, await open_door()]
    for n in range(6):
        there = n % 2 == 0
        if there:
            await door.session().add_items(OLD)
        operation = Operation(f"{n:032}", "delete")
        answers = await asyncio.gather(*(_send(doors[m % 2], operation) for m in range(6)))
        assert answers == [there] * 6
        assert await door.session().get_items() == []


async def test_a_deletion_that_was_settled_before_it_came(door: Door) -> None:
    session: Any = door.session()
    await session.add_items(OLD)
    assert not await session.settle("2" * 32)
    assert not await _send(door, Operation("2" * 32, "delete"))
    assert await session.get_items() == OLD
    assert await _send(door, Operation("3" * 32, "delete"))
    assert await session.settle("3" * 32)


@NETWORKED
@pytest.mark.parametrize("there", [True, False], ids=["of a session", "of nothing"])
async def test_with_the_wire_cut_at_every_point(proxied: Wire, there: bool) -> None:
    async def delete() -> bool:
        if there:
            await proxied.past.session().add_items(OLD)
        return await proxied.through.delete()

    assert await delete() is there
    before = proxied.proxy.traffic
    assert await delete() is there
    crossed = proxied.proxy.traffic - before
    for side, size in (("client", crossed.client_bytes), ("server", crossed.server_bytes)):
        for place in [*(size * step // CUTS for step in range(CUTS)), size - DIGITS]:
            proxied.proxy.cut_after(**{side: place})
            assert await delete() is there, (side, place, size)
            await asyncio.wait_for(proxied.proxy.was_cut(), SECONDS)
            assert await proxied.items() == []


@contextmanager
def _commit_held(wire: Wire) -> Iterator[None]:
    """Hold back the COMMIT of the next deletion that is sent through the proxy."""
    (engine,) = wire.through.engines
    recorded = False

    def look(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal recorded
        recorded = recorded or ("_ops " in statement and statement.startswith("INSERT"))
        if statement == "COMMIT":
            commit()

    def commit(*_: Any) -> None:
        nonlocal recorded
        if recorded:
            recorded = False
            wire.proxy.hold_next()

    # PostgreSQL's commit is no statement to SQLAlchemy; those to MySQL and MariaDB are.
    event.listen(engine.sync_engine, "before_cursor_execute", look)
    event.listen(engine.sync_engine, "commit", commit)
    try:
        yield
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", look)
        event.remove(engine.sync_engine, "commit", commit)


@NETWORKED
@pytest.mark.parametrize("there", [True, False], ids=["of a session", "of nothing"])
async def test_a_commit_that_arrives_after_its_client_has_gone(proxied: Wire, there: bool) -> None:
    """The retry waits for it, and answers as it would have."""
    if there:
        await proxied.past.session().add_items(OLD)
    with _commit_held(proxied):
        deleting = asyncio.ensure_future(proxied.through.delete())
        await proxied.proxy.is_holding()
    proxied.proxy.drop_clients()
    await proxied.proxy.arrive()
    assert await asyncio.wait_for(deleting, SECONDS) is there
    assert await proxied.items() == []


@NETWORKED
@pytest.mark.parametrize("kind", ["gateway"], indirect=True)
@pytest.mark.parametrize("there", [True, False], ids=["of a session", "of nothing"])
async def test_an_unknown_outcome_can_be_settled(proxied: Wire, there: bool) -> None:
    if there:
        await proxied.past.session().add_items(OLD)
    (shard,) = proxied.through.gateway.shards.values()
    shard.outage = 0.1
    with _commit_held(proxied):
        deleting = asyncio.ensure_future(proxied.through.delete())
        await proxied.proxy.is_holding()
    proxied.proxy.refusing = True
    proxied.proxy.drop_clients()
    with pytest.raises(OutcomeUnknown) as caught:
        await asyncio.wait_for(deleting, SECONDS)
    op_id = caught.value.op_id
    assert isinstance(op_id, str)
    proxied.proxy.refusing = False
    await proxied.proxy.arrive()
    session: Any = proxied.through.session()
    assert await session.settle(op_id)
    assert await _recorded(proxied.past, op_id) == ("delete", int(there))
    assert await proxied.items() == []
