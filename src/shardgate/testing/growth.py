"""The end of ``make demo``: a fifth shard is added while conversations go on.

The conversations are held here, and ``shardgate rebalance`` runs beside them as a process of its
own, as an operator would run it. At the end each conversation has to have every turn once and in
order, wherever it lives by then.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agents import Agent, RunConfig, Runner

import shardgate
from shardgate.gateway import Gateway
from shardgate.settings import GatewaySettings
from shardgate.testing.model import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(".demo")
ADDED = "s4"
FILE = FOLDER / "shard-4.db"

TALKS = [
    (tenant, session)
    for tenant in ("acme", "globex", "initech")
    for session in ("running-1", "running-2")
]
REBALANCE = ("rebalance", "--apply", "--at-once", "1", "--freeze-budget", "2s", "--json")
"""One slot at a time: a SQLite file has one writer. The budget is for machines that are busy."""
PAUSE_SECONDS = 0.02
"""Between two turns of a conversation: everything runs on one machine."""


def grown(values: dict[str, Any]) -> GatewaySettings:
    """The demo's settings with the fifth shard."""
    added = {ADDED: {"url": f"sqlite+aiosqlite:///{FILE}"}}
    return GatewaySettings.from_dict(values | {"shards": values["shards"] | added})


def command(*arguments: str) -> list[str]:
    """The ``shardgate`` command, of this same installation."""
    return [sys.executable, "-m", "shardgate", *arguments]


def environment(settings: GatewaySettings) -> dict[str, str]:
    """The settings as an operator's shell has them; it stands in the shards' folder, so that no
    other settings are found."""
    known = {name: value for name, value in os.environ.items() if name[:10] != "SHARDGATE_"}
    package = str(Path(shardgate.__file__).resolve().parents[1])
    known["PYTHONPATH"] = os.pathsep.join(filter(None, (package, known.get("PYTHONPATH"))))
    known["SHARDGATE_KEYSPACES__MAIN__SLOTS"] = str(settings.keyspace("main").slots)
    for name, shard in settings.shards.items():
        file = Path(str(shard.parsed_url.database)).name
        known[f"SHARDGATE_SHARDS__{name.upper()}__URL"] = f"sqlite+aiosqlite:///{file}"
    return known


def take_back(settings: GatewaySettings) -> bool:
    """Drain the fifth shard if there is one from the last time; whether nothing is left on it."""
    asyncio.run(_create(settings))
    show(f"$ shardgate drain {ADDED} --apply")
    drain = command("drain", ADDED, "--apply")
    done = subprocess.run(drain, cwd=FOLDER, env=environment(settings), check=False)  # noqa: S603 - this same program
    return done.returncode == 0


async def _create(settings: GatewaySettings) -> None:
    async with Gateway(settings) as gateway:
        await gateway.create_tables()


async def grow(settings: GatewaySettings) -> None:
    """Add the fifth shard and rebalance while conversations go on; exit if one is not whole."""
    async with Gateway(settings) as gateway:
        await gateway.create_tables()
        for tenant, session in TALKS:
            await gateway.tenant(tenant).delete_session(session)
        before = {talk: gateway.route(*talk).shard for talk in TALKS}
        ended = asyncio.Event()
        talking = asyncio.gather(*(_keep_talking(gateway, talk, ended) for talk in TALKS))
        show(f"$ shardgate {' '.join(REBALANCE)}")
        try:
            said = await _rebalance(settings)
        finally:
            ended.set()
            turns = await talking
        for talk, count in zip(TALKS, turns, strict=True):
            await _check(gateway, talk, count)
        _tell(said, sum(turns))
        _show_places(gateway, before, turns)


async def _keep_talking(gateway: Gateway, talk: tuple[str, str], ended: asyncio.Event) -> int:
    """Hold a conversation until the end, and one turn more; how many turns it had."""
    tenant, session_id = talk
    agent = Agent(name="Demo", model=ScriptedModel(_answer_last))
    session = gateway.tenant(tenant).session(session_id, session_settings={"limit": 6})
    quiet, turn, last = RunConfig(tracing_disabled=True), 0, False
    while not last:
        last = ended.is_set()
        await Runner.run(agent, f"turn {turn}", session=session, run_config=quiet)
        turn += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), PAUSE_SECONDS)
    return turn


def _answer_last(said: list[str]) -> str:
    return f"heard {said[-1]}"


async def _rebalance(settings: GatewaySettings) -> Any:
    """Run the command; its progress is shown, and what it says at the end is returned."""
    process = await asyncio.create_subprocess_exec(
        *command(*REBALANCE),
        cwd=FOLDER,
        env=environment(settings),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    if process.returncode != 0:
        sys.exit(f"the rebalance failed: {said.decode()}")
    return json.loads(said)


async def _check(gateway: Gateway, talk: tuple[str, str], turns: int) -> None:
    """Make sure that a conversation has every turn once and in order, and its answer after it."""
    tenant, session_id = talk
    items = await gateway.tenant(tenant).session(session_id).get_items()
    texts = [_text(cast("dict[str, Any]", item)) for item in items]
    expected = [text for turn in range(turns) for text in (f"turn {turn}", f"heard turn {turn}")]
    if texts != expected:
        sys.exit(f"{tenant}/{session_id} is not whole: {texts}")


def _text(item: dict[str, Any]) -> str:
    content = item["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


def _tell(said: Any, turns: int) -> None:
    longest = said["frozen"]["longest"] or 0.0
    show(f"\nMeanwhile {len(TALKS)} conversations have had {turns} turns.")
    show(
        f"{len(said['moved'])} slots moved, {said['verified']} items verified, "
        f"frozen {longest * 1000:.0f} ms at most; every conversation is whole"
    )


def _show_places(gateway: Gateway, before: dict[tuple[str, str], str], turns: list[int]) -> None:
    show("\nWhere these conversations live:")
    show(f"  {'tenant':10} {'session':10} {'turns':>5}  shard")
    for line in _places(gateway, before, turns):
        show(line)


def _places(
    gateway: Gateway, before: dict[tuple[str, str], str], turns: list[int]
) -> Iterator[str]:
    for talk, count in zip(TALKS, turns, strict=True):
        tenant, session = talk
        now = gateway.route(tenant, session).shard
        where = now if now == before[talk] else f"{before[talk]} -> {now}"
        yield f"  {tenant:10} {session:10} {count:>5}  {where}"


def show(line: str) -> None:
    """Print at once, so that two processes' lines come in order."""
    print(line, flush=True)
