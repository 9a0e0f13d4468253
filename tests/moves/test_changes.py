"""Sessions that change between two questions of a pass: nothing may seem level that is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import delete

from gateway.conftest import Gateways
from gateway.shards import item, named, session_on, settings_at
from moves.moving import mover_of
from shardgate.control import copying, moves
from shardgate.errors import MoveLost
from shardgate.recovery import Ends, end_move

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from conftest import MakeDatabases
    from shardgate import Gateway


@pytest.fixture
async def gateway(databases: MakeDatabases) -> AsyncIterator[Gateway]:
    gateways = Gateways()
    yield await gateways.open(settings_at(named(await databases(2)), slots=4))
    await gateways.finish()


class Passes:
    """Counts the passes over a's slots, and does something before some of them."""

    def __init__(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.before: dict[int, Callable[[], Awaitable[Any]]] = {}
        read_versions = copying.read_versions

        async def counted(*values: Any, **more: Any) -> Any:
            if "limit" in more and values[0].engine is gateway.shards["a"].engine:
                self.count += 1
                if self.count in self.before:
                    await self.before[self.count]()
            return await read_versions(*values, **more)

        monkeypatch.setattr(copying, "read_versions", counted)


@pytest.fixture
def passes(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(gateway, monkeypatch)


@pytest.mark.parametrize("change", ["made anew", "popped"])
async def test_a_session_that_had_only_grown(
    change: str, gateway: Gateway, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is deleted and made anew, or loses items, after the versions were compared and before its
    row is read: then more than its end is to be copied, or removed."""
    tenant, session_id = gateway.tenant("acme"), session_on(gateway, "a")
    session, slot = tenant.session(session_id), gateway.route("acme", session_on(gateway, "a")).slot
    await session.add_items([item(str(n)) for n in range(5)])
    read_sessions = copying.read_sessions
    # Before the second pass the session grows, so that only its end is read.
    passes.before[2] = lambda: session.add_items([item("more")])

    async def changed(*values: Any, **more: Any) -> Any:
        if passes.count == 2 and values[0].engine is gateway.shards["a"].engine:
            if change == "made anew":
                await tenant.delete_session(session_id)
                await session.add_items([item(f"anew {n}") for n in range(9)])
            else:
                for _ in range(4):
                    await session.pop_item()
        return await read_sessions(*values, **more)

    monkeypatch.setattr(copying, "read_sessions", changed)
    wanted = [item(f"anew {n}") for n in range(9)] if change == "made anew" else None
    await mover_of(gateway).move(slot, "a", "b")
    assert passes.count >= 2
    found = await session.get_items()
    assert found == (wanted or [item("0"), item("1")])
    assert gateway.route("acme", session_id).shard == "b"


async def test_a_session_that_is_made_anew_after_its_row_was_read(
    gateway: Gateway, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pass that reads what it has written: that the items are not the row's is no failure."""
    tenant, session_id = gateway.tenant("acme"), session_on(gateway, "a")
    session, slot = tenant.session(session_id), gateway.route("acme", session_on(gateway, "a")).slot
    await session.add_items([item(str(n)) for n in range(5)])
    read_items = copying.read_items
    passes.before[2] = lambda: session.add_items([item("more")])
    passes.before[3] = session.clear_session

    async def made_anew(*values: Any, **more: Any) -> Any:
        if passes.count == 3 and values[0].engine is gateway.shards["a"].engine:
            await tenant.delete_session(session_id)
            await session.add_items([item(f"anew {n}") for n in range(2)])
        return await read_items(*values, **more)

    monkeypatch.setattr(moves, "_FEW", 0)
    monkeypatch.setattr(copying, "read_items", made_anew)
    await mover_of(gateway).move(slot, "a", "b")
    assert passes.count > 3
    assert await session.get_items() == [item("anew 0"), item("anew 1")]
    assert gateway.route("acme", session_id).shard == "b"


async def test_somebody_takes_over_before_what_was_written_is_read_back(
    gateway: Gateway, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing was wrong with it."""
    session_id = session_on(gateway, "a")
    session = gateway.tenant("acme").session(session_id)
    slot = gateway.route("acme", session_id).slot
    await session.add_items([item(str(n)) for n in range(5)])
    read_digests_from = copying.read_digests_from
    passes.before[2] = passes.before[3] = lambda: session.add_items([item("more")])
    a, b = gateway.shards["a"], gateway.shards["b"]

    async def taken_over(*values: Any, **more: Any) -> Any:
        if passes.count == 3 and values[0].engine is b.engine:
            await end_move(Ends(a, b, slot))
            await b.transact(lambda connection: connection.execute(delete(b.tables.messages)))
        return await read_digests_from(*values, **more)

    monkeypatch.setattr(moves, "_FEW", 0)
    monkeypatch.setattr(copying, "read_digests_from", taken_over)
    with pytest.raises(MoveLost):
        await mover_of(gateway).move(slot, "a", "b")
    assert passes.count == 3
    assert len(await session.get_items()) == 7
    assert gateway.route("acme", session_id).shard == "a"
