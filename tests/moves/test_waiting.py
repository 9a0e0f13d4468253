"""Callers and newcomers while a slot is between two shards, its move taken step by step by hand."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway.conftest import Gateways
from gateway.shards import item, named, patient, session_on, settings_at
from shardgate import ShardUnavailable, recovery
from shardgate.handover import Act
from shardgate.recovery import Ends, look, new_mark, take_step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakeDatabases
    from shardgate import Gateway
    from shardgate.handover import Pair
    from shardgate.session import GatewaySession

NO_HANG = 30
UP_TO_FENCE = (Act.MARK, Act.CLAIM, Act.FENCE)


@pytest.fixture
async def gateways() -> AsyncIterator[Gateways]:
    some = Gateways()
    yield some
    await some.finish()


@pytest.fixture
async def urls(databases: MakeDatabases) -> dict[str, str]:
    return named(await databases(3))


async def steps(ends: Ends, *acts: Act) -> Pair:
    pair, mine = await look(ends), new_mark()
    for act in acts:
        after = await take_step(act, pair, mine, ends)
        assert after is not None
        pair = after
    return pair


async def session_between(gateway: Gateway, *acts: Act) -> tuple[GatewaySession, Ends]:
    """A session with an item, whose slot has come so far on its way from b to a."""
    session = gateway.tenant("acme").session(session_on(gateway, "b"))
    await session.add_items([item("before")])
    slot = gateway.route("acme", session_on(gateway, "b")).slot
    ends = Ends(gateway.shards["b"], gateway.shards["a"], slot)
    await steps(ends, *acts)
    return session, ends


async def test_callers_wait_together_and_are_served_when_it_goes_on(
    urls: dict[str, str], gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ORPHANED_SECONDS", NO_HANG)
    gateway = await gateways.open(settings_at(urls))
    session, ends = await session_between(gateway, *UP_TO_FENCE)
    looks = 0
    watching = recovery.wait_for_move

    async def counted(*values: object) -> object:
        nonlocal looks
        looks += 1
        return await watching(*values)  # type: ignore[arg-type]

    monkeypatch.setattr("shardgate.keyspace.wait_for_move", counted)
    async with asyncio.timeout(NO_HANG), asyncio.TaskGroup() as group:
        callers = [group.create_task(session.get_items()) for _ in range(20)]
        writer = group.create_task(session.add_items([item("meanwhile")]))
        while not looks:  # noqa: ASYNC110 - what is watched has no event
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in (*callers, writer))
        await recovery.end_move(ends)
    assert looks == 1
    for caller in callers:
        assert caller.result()[0] == item("before")
    assert await session.get_items() == [item("before"), item("meanwhile")]


async def test_a_caller_goes_to_the_target_before_the_source_is_released(
    urls: dict[str, str], gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ORPHANED_SECONDS", NO_HANG)
    gateway = await gateways.open(settings_at(urls))
    empty = gateway.route("acme", "nobody")
    source = gateway.shards[empty.shard]
    target = next(shard for name, shard in gateway.shards.items() if name != empty.shard)
    await steps(Ends(source, target, empty.slot), *UP_TO_FENCE, Act.DECIDE)
    async with asyncio.timeout(NO_HANG):
        await gateway.tenant("acme").session("nobody").add_items([item("new")])
    assert gateway.route("acme", "nobody").shard == target.name


@pytest.mark.parametrize("decided", [False, True])
async def test_an_orphan_is_ended_by_those_who_wait(
    decided: bool, urls: dict[str, str], gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mover is dead; a process that has just opened finds the slot frozen."""
    monkeypatch.setattr(recovery, "ORPHANED_SECONDS", 0.1)
    first = await gateways.open(settings_at(urls))
    session, ends = await session_between(first, *UP_TO_FENCE)
    others = [await gateways.open(settings_at(urls)) for _ in range(3)]
    if decided:
        await steps_to_decision(ends)
    async with asyncio.timeout(NO_HANG):
        await asyncio.gather(
            *(
                other.tenant("acme").session(session.key.session_id).add_items([item(f"{number}")])
                for number, other in enumerate((first, *others))
            )
        )
    assert len(await session.get_items()) == (4 if decided else 5)
    assert (await first.check()).ok
    pair = await look(ends)
    assert pair.source.state == ("draining" if decided else "owned")


async def steps_to_decision(ends: Ends) -> None:
    """Without copying: only who serves it matters here."""
    pair = await look(ends)
    assert await take_step(Act.DECIDE, pair, new_mark(), ends)


async def test_a_deadline_ends_the_wait(
    urls: dict[str, str], gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ORPHANED_SECONDS", NO_HANG)
    gateway = await gateways.open(settings_at(urls))
    session, ends = await session_between(gateway, *UP_TO_FENCE)
    hasty = patient(gateways.make(settings_at(urls, create_tables=False, operation_deadline=1)))
    await hasty.open()
    with pytest.raises(ShardUnavailable, match="is being moved from shard 'b'") as caught:
        await hasty.tenant("acme").session(session.key.session_id).add_items([item("lost")])
    assert caught.value.shard == "b"
    await recovery.end_move(ends)
    assert await session.get_items() == [item("before")]


@pytest.mark.parametrize("acts", [(Act.MARK, Act.CLAIM), UP_TO_FENCE])
async def test_a_shard_joins_while_a_slot_is_between_two(
    acts: tuple[Act, ...], urls: dict[str, str], gateways: Gateways
) -> None:
    """What the target says of a slot that it is about to import is no news for the newcomer."""
    two = {name: urls[name] for name in "ab"}
    first = await gateways.open(settings_at(two))
    session, ends = await session_between(first, *acts)
    three = gateways.make(settings_at(urls))
    await three.create_tables()
    fresh = await gateways.open(settings_at(urls, create_tables=False))
    assert fresh.route("acme", session.key.session_id).shard == "b"
    await recovery.end_move(ends)
    same = fresh.tenant("acme").session(session.key.session_id)
    assert await same.get_items() == [item("before")]
    assert (await fresh.check()).ok
