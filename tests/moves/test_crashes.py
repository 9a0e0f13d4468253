"""Movers, and servers, that are killed at any point of a move, under writers, and somebody goes on.

The points are the commits of a move, right before and right after each, and its statements. A run
takes every so many of them, from where a seed says; a soak run takes them all.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import delete

from gateway.shards import item, named, settings_at
from moves.crashing import Movers
from moves.moving import mover_of, places
from once.history import End, History
from shardgate import Gateway, recovery
from shardgate.errors import MoveLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakeDatabases, StartServer
    from harness.processes import Children
    from harness.servers import Backend, Server

SLOTS = 4
STILL = 9
"""Sessions that nobody writes to while the slot is moved."""
PACE = 0.1
FEW = 3
"""Points of each kind in a short run."""
GO_ON = ["resume", "end", "wait"]
"""Another mover goes on; another one ends it; or nobody does, but the clients."""
UNFINISHED = ("MoveLost", "ShardUnavailable", "OutcomeUnknown", "Contended")

pytestmark = pytest.mark.processes


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("TEST_SEED") or random.randrange(10**6))
    print(f"TEST_SEED={chosen}")  # noqa: T201 - shown where the test fails
    return chosen


@pytest.fixture(autouse=True)
def impatient_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end a move that nobody goes on with after a moment."""
    monkeypatch.setattr(recovery, "ORPHANED_SECONDS", 0.3)


class Crashes:
    """One slot that is moved to and fro by processes that are killed, while it is written to."""

    def __init__(self, urls: dict[str, str], gateway: Gateway, movers: Movers, seed: int) -> None:
        self._urls = urls
        self._gateway = gateway
        self._movers = movers
        self.random = random.Random(seed)
        self._tenant: Any = gateway.tenant("acme")
        route = gateway.route
        self.slot = route("acme", "chat").slot
        names = (f"chat-{n}" for n in range(1000))
        here = (name for name in names if route("acme", name).slot == self.slot)
        self.histories = {next(here): History() for _ in range(3)}
        self._still = {next(here): [item(f"{n} {m}") for m in range(n)] for n in range(1, STILL)}
        self._where = route("acme", "chat").shard
        self._turns = [asyncio.Event() for _ in range(4)]
        self._may_write, self._ended = asyncio.Event(), False
        self._writing = 0
        self.killed = self.survived = 0
        self.points: dict[str, int] = {}

    async def run(self, act: Any) -> None:
        """Do something while there are writers, and check everything in the end."""
        for name, items in self._still.items():
            await self._tenant.session(name).add_items(items)
        self._may_write.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write(0, 0, 0))
            group.create_task(self._write(1, 0, 0))
            group.create_task(self._write(2, 1, 3))
            group.create_task(self._write(3, 2, 7))
            try:
                await act(self)
            finally:
                self._ended = True
                self._may_write.set()
        await self.check()

    async def _write(self, writer: int, number: int, removes: int) -> None:
        name, turn = list(self.histories)[number], 0
        while not self._ended:
            await self._may_write.wait()
            session, history, turn = self._tenant.session(name), self.histories[name], turn + 1
            self._writing += 1
            if removes and turn % removes == 0:
                kind = history.clear if turn % (5 * removes) == 0 else history.pop
                await kind(session)
            else:
                await history.append(session, f"w{writer}", 2)
            self._writing -= 1
            self._turns[writer].set()
            await asyncio.sleep(PACE)

    async def _next_answers(self) -> None:
        """Wait until every writer has had an answer to what he asked since."""
        for _ in range(2):  # the first one may have been on its way
            for turn in self._turns:
                turn.clear()
            for turn in self._turns:
                await asyncio.wait_for(turn.wait(), 60)

    async def check(self) -> None:
        """AssertionError where anything is not as it was acknowledged."""
        self._may_write.clear()
        while self._writing:  # noqa: ASYNC110 - every writer would set it
            await asyncio.sleep(0.001)
        for name, history in self.histories.items():
            assert history.errors() == []
            assert {done.end for done in history.operations} == {End.ACKNOWLEDGED}
            items = await self._tenant.session(name).get_items()
            assert history.problems(items) == [], name
        for name, items in self._still.items():
            assert await self._tenant.session(name).get_items() == items
        page = await self._tenant.list_sessions(limit=1000)
        listed = sorted(found.session_id for found in page.sessions)
        assert listed == sorted([*self.histories, *self._still])
        report = await self._gateway.check()
        assert report.ok, report
        assert (await places(self._gateway.shards))[self.slot] == self._where
        await self._begin_anew()
        self._may_write.set()

    async def _begin_anew(self) -> None:
        """Each point is to be as quick as the first one."""
        for name in self.histories:
            await self._tenant.delete_session(name)
            self.histories[name] = History()
            await self.histories[name].append(self._tenant.session(name), "first")
        for shard in self._gateway.shards.values():
            ops = shard.tables.ops
            await shard.transact(lambda connection, ops=ops: connection.execute(delete(ops)))

    def told(self, **more: Any) -> dict[str, Any]:
        """What a process is told: move the slot to where it is not."""
        source, target = self.ends()
        about = {"slots": SLOTS, "slot": self.slot, "source": source, "target": target}
        return {"urls": self._urls, **about, **more}

    def ends(self) -> tuple[str, str]:
        """Where the slot is, and where it is to go."""
        (target,) = self._gateway.shards.keys() - {self._where}
        return self._where, target

    async def count_points(self) -> None:
        """Find out how many points a move has, by one that comes to its end."""
        for _ in range(2):  # the first one copies all there is, as the later ones do not
            said = await self._movers.move(**self.told(at=None))
            assert said["error"] is None, said
            self.points = said["points"]
            await self._find()

    async def kill(self, **at: Any) -> None:
        """Have a mover killed, and somebody go on or not."""
        ends = self.ends()
        said = await self._movers.move(**self.told(**at))
        self.killed += said["killed"]
        self.survived += not said["killed"]
        assert said["killed"] or said["error"] is None, said
        await self._go_on(self.random.choice(GO_ON), ends)

    async def kill_server(self, at: list[Any], server: Server, *, late: bool) -> None:
        """Have a server killed while a mover stands at a point; ``late``: it is started again when
        the mover has gone on."""
        ends = self.ends()
        said = await self._movers.move(**self.told(at=at, then="stop"))
        if "stopped" not in said:
            self.survived += 1
            assert said["error"] is None, said
            await self._go_on("wait", ends)
            return
        self.killed += 1
        await server.kill()
        if not late:
            await server.start()
        going = asyncio.create_task(self._movers.go_on())
        if late:
            await asyncio.sleep(self.random.uniform(0, 0.3))
            await server.start()
        said = await going
        foreseen = said["error"] is None or said["error"].split(":")[0] in UNFINISHED
        assert foreseen, said
        await self._go_on("wait" if said["error"] is None else "resume", ends)

    async def _go_on(self, how: str, ends: tuple[str, str]) -> None:
        mover = mover_of(self._gateway)
        if how == "resume":
            try:
                await mover.move(self.slot, *ends, takes_over=True)
            except MoveLost:  # a client was faster
                how = "wait"
        if how == "wait":
            await self._next_answers()
        if how != "resume":
            await mover.end(self.slot, *ends)
        await self._find()
        await self._next_answers()

    async def _find(self) -> None:
        self._where = (await places(self._gateway.shards))[self.slot]


def chosen(crashes: Crashes, share: int | None) -> list[list[Any]]:
    """The points at which to crash: of each kind every so many, all of them for None."""
    picked = []
    for kind, number in crashes.points.items():
        step = max(1, number // share) if share else 1
        first = crashes.random.randrange(step)
        picked += [[kind, point] for point in range(first, number, step)][:share]
    crashes.random.shuffle(picked)
    return picked


@pytest.fixture
async def movers(children: Children) -> Movers:
    return await Movers.start(children)


async def crashes_at(urls: dict[str, str], movers: Movers, seed: int) -> AsyncIterator[Crashes]:
    async with Gateway(settings_at(urls, slots=SLOTS)) as gateway:
        yield Crashes(urls, gateway, movers, seed)


@pytest.fixture
async def crashes(databases: MakeDatabases, movers: Movers, seed: int) -> AsyncIterator[Crashes]:
    async for one in crashes_at(named(await databases(2)), movers, seed):
        yield one


async def kill_movers(crashes: Crashes, few: int | None) -> None:
    async def act(at: Crashes) -> None:
        await at.count_points()
        frozen = [["frozen", number] for number in range(at.points["frozen"])]
        for number, point in enumerate(chosen(at, few) + (frozen if few else [])):
            await at.kill(at=point)
            if number % 10 == 9:
                await at.check()
        for _ in range(few or 50):
            await at.kill(seconds=at.random.uniform(0.05, 0.6))

    await crashes.run(act)
    print(f"{crashes.points} points, killed {crashes.killed}, survived {crashes.survived}")  # noqa: T201 - shown where the test fails
    assert crashes.killed > crashes.survived


@pytest.mark.backends("sqlite", "postgresql-18", "mariadb")
async def test_a_mover_is_killed(crashes: Crashes) -> None:
    await kill_movers(crashes, FEW)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.backends("sqlite", "postgresql", "mariadb", "mysql")
async def test_a_mover_is_killed_at_every_point(crashes: Crashes) -> None:
    await kill_movers(crashes, None)


async def kill_servers(
    backend: Backend, start_server: StartServer, movers: Movers, seed: int, few: int | None
) -> None:
    servers = [await start_server(backend, durable=True) for _ in range(2)]
    urls = {
        name: await server.create_database() for name, server in zip("ab", servers, strict=True)
    }

    async def act(at: Crashes) -> None:
        await at.count_points()
        for number, point in enumerate(chosen(at, few)):
            if number % 10 == 9:
                await at.check()
            await at.kill_server(point, servers[number % 2], late=at.random.choice([False, True]))

    async for crashes in crashes_at(urls, movers, seed):
        await crashes.run(act)
        print(f"{crashes.points} points, killed {crashes.killed}, survived {crashes.survived}")  # noqa: T201 - shown where the test fails
        assert crashes.killed > crashes.survived


@pytest.mark.usefixtures("long_outages")
@pytest.mark.backends("postgresql-18", "mariadb")
async def test_a_server_is_killed(
    backend: Backend, start_server: StartServer, movers: Movers, seed: int
) -> None:
    await kill_servers(backend, start_server, movers, seed, FEW - 1)


@pytest.mark.usefixtures("long_outages")
@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.backends("postgresql", "mariadb")
async def test_a_server_is_killed_at_every_point(
    backend: Backend, start_server: StartServer, movers: Movers, seed: int
) -> None:
    await kill_servers(backend, start_server, movers, seed, None)
