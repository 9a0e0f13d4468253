"""Writers against the real mover, and movers against each other: nothing acknowledged is lost.

The writers and the checks are those of the least mover's races; see ``ownership.test_fences``.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from functools import partial
from typing import TYPE_CHECKING

import pytest

from gateway.shards import named, settings_at
from moves.moving import mover_of, places
from ownership.test_fences import (
    HEAT,
    LEVELS,
    SLOTS,
    AsyncGateways,
    Race,
    check_places,
    empty,
    engine_of,
)
from shardgate.errors import MoveLost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from conftest import MakeDatabases
    from harness.servers import Backend
    from shardgate import Gateway

    Moves = Callable[[list[Gateway], dict[int, str], range, Race], Awaitable[None]]

pytestmark = pytest.mark.timeout(300)  # the slower a machine, the more there is to be copied
NEWEST = pytest.mark.backends("sqlite", "postgresql-18", "mariadb", "mysql")


async def run_race(
    urls: dict[str, str],
    rounds: int,
    moves: Moves,
    *,
    make: Callable[[str], AsyncEngine] | None = None,
    coalesce: bool = True,
) -> None:
    """Race on two shards; AssertionError where anything acknowledged is not as it should be."""
    settings = settings_at(urls, slots=SLOTS, coalesce=coalesce)
    async with AsyncGateways() as gateways:
        *doors, first, second = [await gateways.open(settings, urls, make) for _ in range(4)]
        known = await places(first.shards)
        for start in range(0, rounds, HEAT):
            race = Race(doors, seed=start)
            numbers = range(start, min(start + HEAT, rounds))
            await race.run(partial(moves, [first, second], known, numbers))
            assert await race.faults() == []
            assert await places(first.shards) == known
            await check_places(race, doors[0], known)
            assert (await doors[0].check()).ok
            await asyncio.gather(*map(empty, first.shards.values()))


async def one_after_the_other(
    gateways: list[Gateway], known: dict[int, str], rounds: range, race: Race
) -> None:
    mover = mover_of(gateways[0])
    for number in rounds:
        slot = number % SLOTS
        source = known[slot]
        (target,) = gateways[0].shards.keys() - {source}
        event = await mover.move(slot, source, target)
        assert event.frozen is not None
        known[slot] = target
        await race.next_answers()


async def several_at_once(
    gateways: list[Gateway], known: dict[int, str], rounds: range, race: Race
) -> None:
    mover = mover_of(gateways[0])
    for _ in range(0, len(rounds), SLOTS):
        async with asyncio.TaskGroup() as group:
            for slot, source in list(known.items()):
                (target,) = gateways[0].shards.keys() - {source}
                group.create_task(mover.move(slot, source, target))
                known[slot] = target
        await race.next_answers()


async def against_each_other(
    gateways: list[Gateway], known: dict[int, str], rounds: range, race: Race
) -> None:
    """Two movers at each slot, and one who ends what they do, at any moment."""
    chance = random.Random(rounds.start)
    shards = gateways[0].shards

    async def late(work: Awaitable[object]) -> None:
        await asyncio.sleep(chance.uniform(0, 0.06))
        with contextlib.suppress(MoveLost):
            await work

    for number in rounds:
        slot = number % SLOTS
        source = known[slot]
        (target,) = shards.keys() - {source}
        first, second = map(mover_of, gateways)
        async with asyncio.TaskGroup() as group:
            for mover in (first, second):
                move = mover.move(slot, source, target, takes_over=True)
                group.create_task(late(move))
            group.create_task(late(second.end(slot, source, target)))
        await first.end(slot, source, target)
        known[slot] = (await places(shards))[slot]
        await race.next_answers()


@NEWEST
@pytest.mark.parametrize("coalesce", [True, False])
async def test_nothing_acknowledged_is_in_the_wrong_place(
    databases: MakeDatabases, *, coalesce: bool
) -> None:
    await run_race(named(await databases(2)), 4, one_after_the_other, coalesce=coalesce)


@NEWEST
async def test_several_slots_at_once(databases: MakeDatabases) -> None:
    await run_race(named(await databases(2)), 8, several_at_once)


@NEWEST
async def test_movers_against_each_other(databases: MakeDatabases) -> None:
    await run_race(named(await databases(2)), 4, against_each_other)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.backends("sqlite", "postgresql", "mariadb", "mysql")
@pytest.mark.parametrize("moves", [one_after_the_other, several_at_once, against_each_other])
async def test_for_long(databases: MakeDatabases, moves: Moves) -> None:
    await run_race(named(await databases(2)), 300, moves)


@pytest.mark.backends("postgresql-15", "mariadb", "mysql")
@pytest.mark.parametrize("level", LEVELS[1:])
async def test_at_every_isolation_level(
    databases: MakeDatabases, backend: Backend, level: str
) -> None:
    urls = named(await databases(2))
    await run_race(urls, 4, against_each_other, make=engine_of(level, backend.family))
