"""What moves leave behind is removed, when nobody needs it any more, and only then."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from gateway.conftest import Gateways
from gateway.shards import item, named, session_on, settings_at
from moves.moving import mover_of, places, rows_of_slots, stored
from shardgate.agreement import Plan
from shardgate.control.remains import find_unfinished, remove_remains
from shardgate.handover import Act
from shardgate.recovery import Ends, look, new_mark, take_step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakeDatabases
    from shardgate import Gateway

SLOTS = 8


@pytest.fixture
async def gateway(databases: MakeDatabases) -> AsyncIterator[Gateway]:
    gateways = Gateways()
    yield await gateways.open(settings_at(named(await databases(4)), slots=SLOTS))
    await gateways.finish()


@pytest.fixture
async def slot(gateway: Gateway) -> int:
    """A slot of a's, with a session in it."""
    session_id = session_on(gateway, "a")
    await gateway.tenant("acme").session(session_id).add_items([item(str(n)) for n in range(3)])
    return gateway.route("acme", session_id).slot


async def remove(gateway: Gateway, grace: float = 0) -> list[str | None]:
    """Remove what there is; why the rest was kept."""
    plan, shards = Plan.of(gateway.settings, "main"), gateway.shards
    rests = [one for one in await find_unfinished(shards) if one.is_rest]
    return [await remove_remains(plan, shards, one, grace_seconds=grace) for one in rests]


async def count(gateway: Gateway, name: str, slot: int) -> int:
    tables: dict[str, list[Any]] = await stored(gateway.shards[name], SLOTS, slot)
    return sum(map(len, tables.values()))


async def begin(ends: Ends, *acts: Act) -> None:
    pair, mine = await look(ends), new_mark()
    for act in acts:
        after = await take_step(act, pair, mine, ends)
        assert after is not None
        pair = after


async def test_what_was_released_goes_after_the_grace(gateway: Gateway, slot: int) -> None:
    await mover_of(gateway).move(slot, "a", "b")
    (reason,) = await remove(gateway, grace=60)
    assert reason is not None
    assert "is kept for 60" in reason
    assert await count(gateway, "a", slot) > 0
    assert await remove(gateway) == [None]
    assert await count(gateway, "a", slot) == 0
    assert await count(gateway, "b", slot) > 0
    assert await find_unfinished(gateway.shards) == []


async def test_two_who_remove_the_same(gateway: Gateway, slot: int) -> None:
    await mover_of(gateway).move(slot, "a", "b")
    plan, shards = Plan.of(gateway.settings, "main"), gateway.shards
    (rest,) = await find_unfinished(shards)
    removals = [remove_remains(plan, shards, rest, grace_seconds=0) for _ in range(4)]
    reasons = await asyncio.gather(*removals)
    assert reasons.count(None) == 1
    assert await count(gateway, "a", slot) == 0
    assert await find_unfinished(shards) == []


async def test_what_was_given_to_a_shard_that_is_gone(gateway: Gateway, slot: int) -> None:
    """It has given the slot to another one before it was taken out of the settings."""
    mover = mover_of(gateway)
    await mover.move(slot, "a", "b")
    plan = Plan.of(gateway.settings, "main")
    left = {name: shard for name, shard in gateway.shards.items() if name != "b"}
    (rest,) = await find_unfinished(left)
    assert (rest.shard, rest.peer) == ("a", None)
    reason = await remove_remains(plan, left, rest, grace_seconds=0)
    assert reason is not None
    assert "nobody else serves the slot" in reason
    await mover.move(slot, "b", "c")
    assert await remove_remains(plan, left, rest, grace_seconds=0) is None
    assert await count(gateway, "a", slot) == 0
    assert await count(gateway, "c", slot) > 0
    assert (await places(gateway.shards))[slot] == "c"


async def test_who_has_died_before_he_could_tell(gateway: Gateway, slot: int) -> None:
    """The others are told then: what was released is not kept for good."""
    await mover_of(gateway).move(slot, "a", "b", tells=False)
    third = {row["slot"]: row for row in await rows_of_slots(gateway.shards["c"])}
    assert third[slot]["owner"] == gateway.shards["a"].uuid
    assert await remove(gateway) == [None]
    third = {row["slot"]: row for row in await rows_of_slots(gateway.shards["c"])}
    assert third[slot]["owner"] == gateway.shards["b"].uuid


async def test_a_claim_whose_source_has_moved_the_slot_elsewhere(
    gateway: Gateway, slot: int
) -> None:
    session = gateway.tenant("acme").session(session_on(gateway, "a"))
    await begin(Ends(gateway.shards["a"], gateway.shards["b"], slot), Act.MARK, Act.CLAIM)
    mover = mover_of(gateway)
    await mover.move(slot, "a", "c", takes_over=True)
    (claim,) = [one for one in await find_unfinished(gateway.shards) if not one.is_rest]
    assert (claim.shard, claim.peer) == ("b", "a")
    await mover.end(slot, "a", "b")
    assert set(await remove(gateway)) == {None}
    assert await find_unfinished(gateway.shards) == []
    assert (await places(gateway.shards))[slot] == "c"
    assert (await gateway.check()).ok
    await mover.move(slot, "c", "b")
    assert len(await session.get_items()) == 3


async def test_a_copy_is_kept_while_its_move_can_be_gone_on_with(
    gateway: Gateway, slot: int
) -> None:
    ends = Ends(gateway.shards["a"], gateway.shards["b"], slot)
    await begin(ends, Act.MARK, Act.CLAIM, Act.FENCE, Act.CANCEL)
    (reason,) = await remove(gateway)
    assert reason is not None
    assert "has not ended" in reason
    await mover_of(gateway).end(slot, "a", "b")
    assert await remove(gateway) == [None]
    assert (await places(gateway.shards))[slot] == "a"
    assert (await gateway.check()).ok


async def test_a_shard_that_has_not_joined_yet_is_not_asked(databases: MakeDatabases) -> None:
    urls = named(await databases(4))
    gateways = Gateways()
    try:
        await gateways.open(settings_at({name: urls[name] for name in "abc"}, slots=SLOTS))
        four = await gateways.open(settings_at(urls, slots=SLOTS, create_tables=False))
        where = four.route("acme", session_on(four, "a")).slot
        await begin(Ends(four.shards["a"], four.shards["b"], where), Act.MARK, Act.CLAIM)
        await mover_of(four).move(where, "a", "c", takes_over=True)
        await mover_of(four).end(where, "a", "b")
        pair = await look(Ends(four.shards["c"], four.shards["b"], where))
        assert pair.is_undone
    finally:
        await gateways.finish()
