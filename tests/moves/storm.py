"""A storm: clients in several processes while slots move, movers die, and connections are cut.

What the processes have written is checked when all of it is over, together with what the shards say
and hold then.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gateway.shards import records, settings_at
from harness.processes import Child, Children
from harness.proxy import CuttingProxy
from moves.clients import CLIENTS, SLOTS, clear_up, listed, settings_of
from moves.history import End, Op, Recorder, load, problems, recorder
from shardgate import Gateway, OperatorError
from shardgate.handover import CLAIMING, ELSEWHERE, OWNED

if TYPE_CHECKING:
    from pathlib import Path

PROCESSES, MOVERS = 4, 2
POLL = 0.1
JOINS = "d"
"""The shard that is created while the others are at work, and drained before the end."""
GRACE = 180
"""Seconds that processes have to end after the moment at which they are to."""
FOR_AN_OPERATOR = tuple(
    f"{error.__name__}(" for error in (OperatorError, *OperatorError.__subclasses__())
)
"""How errors begin that nobody is to get while all shards are what they are taken for."""
USE, MOVE = "moves.clients:use_sessions", "moves.clients:move_slots"


@dataclass(frozen=True, slots=True)
class Report:
    """What was done, and what is wrong with it: with what the shards say and hold at the end and
    with the errors of others, and with what clients were answered."""

    problems: list[str]
    contradictions: list[str]
    operations: Counter[str]
    errors: Counter[str]
    moves: Counter[str]
    freezes: list[float]

    def __str__(self) -> str:
        freezes = [round(1000 * seconds) for seconds in sorted(self.freezes)]
        slowest = f"{freezes[len(freezes) // 2]} ms, {freezes[-1]} ms" if freezes else "-"
        return "\n".join(
            (
                f"operations: {dict(self.operations)}",
                f"errors: {dict(self.errors)}",
                f"moves: {dict(self.moves)}; frozen for (median, longest): {slowest}",
                *self.problems,
                *self.contradictions,
            )
        )


@dataclass(slots=True)
class Storm:
    """One storm.

    ``urls``: four shards, of which the last one joins. It lasts for so many ``seconds``, and until
    so many slots were moved, but not for more than a minute because of these. One that is
    ``broken`` (see there) is otherwise quiet: what it shows is due to that alone.
    """

    urls: dict[str, str]
    folder: Path
    seed: int
    seconds: float
    moves: int = 20
    broken: str | None = None
    _children: Children = field(default_factory=Children)
    _proxies: dict[str, CuttingProxy] = field(default_factory=dict)
    _random: random.Random = field(init=False)
    _began: float = 0.0
    _files: list[Path] = field(default_factory=list)
    _kills: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def run(self) -> Report:
        """Let it rage, and say what it has left."""
        first = {name: url for name, url in self.urls.items() if self.broken or name != JOINS}
        await self._create(first)
        async with AsyncExitStack() as stack:
            for name, url in self.urls.items():
                proxy = await stack.enter_async_context(CuttingProxy.in_front_of(url))
                self._proxies[name] = proxy
            await stack.enter_async_context(self._children)
            await self._rage()
        left = [] if self.broken else await self._clear_up()
        await self._read_all()
        return self._report([*left, *([] if self.broken else await self._misplaced())])

    async def _create(self, urls: dict[str, str]) -> None:
        async with Gateway(settings_at(urls, slots=SLOTS)) as gateway:
            await gateway.create_tables()

    async def _rage(self) -> None:
        targets = [USE] * PROCESSES + [MOVE] * MOVERS
        waiting = await asyncio.gather(*map(self._children.start, targets))
        self._began = time.monotonic()
        clients, movers = waiting[:PROCESSES], waiting[PROCESSES:]
        async with asyncio.timeout(self.seconds + GRACE), asyncio.TaskGroup() as group:
            for number, child in enumerate(clients):
                kills = number == 0 and self.broken is None
                group.create_task(self._keep_using(number, child, kills=kills))
            for number, child in enumerate(movers):
                group.create_task(self._keep_moving(number, child))
            for task in (self._join, self._cut, self._watch):
                group.create_task(task())

    def _argument(self, name: str, *, proxied: bool) -> dict[str, Any]:
        path = self.folder / name
        urls = self.urls
        if proxied:
            urls = {name: proxy.url(urls[name]) for name, proxy in self._proxies.items()}
        return {
            "urls": urls,
            "name": name,
            "path": str(path),
            "seed": self.seed,
            "stop": str(self._stop),
            "broken": self.broken,
            "drained": JOINS,
            "drained_from": self._began + (1e9 if self.broken else 0.75 * self.seconds),
        }

    @property
    def _stop(self) -> Path:
        return self.folder / "stop"

    async def _watch(self) -> None:
        """Have everybody stop when it is time."""
        await asyncio.sleep(self.seconds)
        for _ in range(round(60 / POLL)):
            if sum("frozen" in line for line in self._lines()) >= self.moves:
                break
            await asyncio.sleep(POLL)
        self._stop.touch()

    def _lines(self) -> list[dict[str, Any]]:
        """What the movers have noted."""
        return [line for path in sorted(self.folder.glob("m*")) for line in _lines_of(path)]

    async def _keep_using(self, number: int, child: Child, *, kills: bool) -> None:
        """A process of clients; half-way it may be killed, and another one comes in its place."""
        share = range(number, CLIENTS, PROCESSES)
        for run in range(2):
            name = f"c{number}{run}"
            argument = self._argument(name, proxied=number < PROCESSES // 2)
            argument |= {
                "clients": [*share],
                "slow": number % 2 == 1 or self.broken == "barrier",
                "settings": {"coalesce": number % 2 == 0 and self.broken != "barrier"},
            }
            self._files.append(self.folder / name)
            await child.go(argument)
            if not (kills and run == 0):
                await child.result()
                return
            await asyncio.sleep(self.seconds * self._random.uniform(0.3, 0.7))
            await child.end()
            self._kills["client processes"] += 1
            child = await self._children.start(USE)

    async def _keep_moving(self, number: int, child: Child) -> None:
        """A mover, killed again and again; the next one finds what it has left."""
        run = 0
        while True:
            argument = self._argument(f"m{number}-{run}", proxied=run % 2 == 1)
            await child.go(argument)
            if self.broken is not None or not await self._has_lived(self.folder / argument["name"]):
                await child.result()
                return
            await child.end()
            self._kills["movers"] += 1
            child, run = await self._children.start(MOVE), run + 1

    async def _has_lived(self, path: Path) -> bool:
        """Wait until a mover has done a few things, and a bit; False if all is over before."""
        few = self._random.randint(1, 8)
        while not await self._over_within(POLL):
            if len(_lines_of(path)) >= few:
                return not await self._over_within(self._random.uniform(0, 0.5))
        return False

    async def _over_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stop.exists():  # noqa: ASYNC110 - a file
            await asyncio.sleep(POLL)
        return self._stop.exists()

    async def _join(self) -> None:
        if self.broken is None:
            await asyncio.sleep(self.seconds * 0.2)
            await self._create(self.urls)

    async def _cut(self) -> None:
        """Cut all connections to a shard, or one while its answer is under way."""
        while self.broken is None and not await self._over_within(self._random.uniform(0.1, 1.5)):
            proxy = self._random.choice([*self._proxies.values()])
            self._kills["cuts"] += 1
            if self._random.random() < 0.3:
                proxy.cut()
            else:
                proxy.cut_after(server=self._random.randint(0, 200))

    async def _clear_up(self) -> list[str]:
        argument = self._argument("end", proxied=False) | {"drained_from": 0}
        async with Gateway(settings_of(self.urls)) as gateway:
            return await clear_up(gateway, argument)

    async def _read_all(self) -> None:
        """Every session whole and every list, through a fresh gateway, as the last operations."""
        names = {op.name for op in load(self._files) if op.kind != "list"}
        path = self.folder / "end"
        self._files.append(path)
        with recorder(path) as notes:
            async with Gateway(settings_of(self.urls)) as gateway:
                for tenant, session in sorted(names):
                    await self._note_read(gateway, notes, tenant, session)
                for tenant in sorted({tenant for tenant, _ in names}):
                    number = notes.begin(kind="list", tenant=tenant, session="", client="end")
                    notes.end(number, End.DONE, answer=await listed(gateway, tenant))

    async def _note_read(
        self, gateway: Gateway, notes: Recorder, tenant: str, session: str
    ) -> None:
        number = notes.begin(kind="read", tenant=tenant, session=session, client="end")
        items: Any = await gateway.tenant(tenant).session(session).get_items()
        notes.end(number, End.DONE, answer=[item["content"] for item in items])

    async def _misplaced(self) -> list[str]:
        """What the shards say of their slots, and hold of others', once all moves are over."""
        found: list[str] = []
        owners: dict[int, list[str]] = {slot: [] for slot in range(SLOTS)}
        holders: Counter[tuple[str, str]] = Counter()
        for name, url in self.urls.items():
            (own,) = await records(url, "shard")
            states = {
                row["slot"]: (row["state"], row["owner"]) for row in await records(url, "slots")
            }
            for slot, (state, owner) in states.items():
                if owner == own["shard_uuid"] and state in CLAIMING:
                    owners[slot].append(name)
                if state not in (OWNED, ELSEWHERE):
                    found.append(f"shard {name}: slot {slot} is {state}")
            for row in await records(url, "sessions"):
                holders[row["tenant_id"], row["session_id"]] += 1
        found += [f"slot {slot} is owned by {who}" for slot, who in owners.items() if len(who) != 1]
        found += [f"{name} is stored {n} times" for name, n in holders.items() if n != 1]
        return found

    def _report(self, found: list[str]) -> Report:
        ops = load(self._files)
        lines = self._lines()
        wrong = [line["error"] for line in lines if line.get("wrong")]
        wrong += sorted({op.error for op in ops if op.error.startswith(FOR_AN_OPERATOR)})
        return Report(
            problems=[*found, *wrong],
            contradictions=problems(ops),
            operations=Counter(f"{op.kind} {op.end.value}" for op in ops),
            errors=Counter(_kind_of(op) for op in ops if op.error),
            moves=self._kills + Counter(map(_outcome_of, lines)),
            freezes=[line["frozen"] for line in lines if line.get("frozen") is not None],
        )


def _lines_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _kind_of(op: Op) -> str:
    return f"{op.end.value} {op.kind}: {op.error[:160]}"


def _outcome_of(line: dict[str, Any]) -> str:
    what = next((kind for kind in ("moved", "ended", "resumed", "removed") if kind in line), "")
    if "error" in line:
        return f"{what}: {line['error'][:60]}"
    return f"{what}: kept" if line.get("kept") else what
