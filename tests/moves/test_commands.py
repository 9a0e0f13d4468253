"""``shardgate shards``, ``rebalance``, ``drain`` and ``moves``, as an operator runs them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
from rich.console import Console
from sqlalchemy import update
from sqlalchemy.engine import make_url

from gateway.shards import execute, item, records, session_on, settings_at
from moves.moving import places
from shardgate import Gateway, UsageError, metadata
from shardgate.cli.amounts import duration, read_rate, read_seconds, size
from shardgate.cli.app import run
from shardgate.cli.progress import Freezes, Watch
from shardgate.control.moves import MoveEvent, Phase
from shardgate.control.rebalance import Load, PlannedMove
from shardgate.control.remains import find_unfinished
from shardgate.control.schedule import AT_ONCE
from shardgate.handover import IMPORTING, Act
from shardgate.recovery import Ends, look, new_mark, take_step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from moves.conftest import Apart

RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background
from shardgate.cli.app import run; run()
"""
SLOTS = 16
SESSIONS = 32
SECONDS = 60
"""Bounds a command that has gone wrong."""
PATIENT = ("--freeze-budget", "20s")
"""A busy machine's freezes are not what is tested."""

Held = dict[str, list[Any]]


@pytest.fixture
def sqlite_urls(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    return lambda names: {name: f"sqlite+aiosqlite:///{tmp_path / name}.db" for name in names}


def environment(urls: Mapping[str, str], **weights: float) -> dict[str, str]:
    """Settings as an operator's shell has them."""
    known = {f"SHARDGATE_SHARDS__{name.upper()}__URL": url for name, url in urls.items()}
    known |= {
        f"SHARDGATE_SHARDS__{name.upper()}__WEIGHT": str(weight) for name, weight in weights.items()
    }
    known |= {"SHARDGATE_KEYSPACES__MAIN__SLOTS": str(SLOTS), "COLUMNS": "200"}
    return known | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}


def start(urls: Mapping[str, str], *arguments: str, **weights: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", RUN, *arguments],
        env=environment(urls, **weights),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def in_a_process(
    urls: Mapping[str, str], *arguments: str, **weights: float
) -> subprocess.CompletedProcess[str]:
    """Run a command as it is run by an operator."""
    with start(urls, *arguments, **weights) as process:
        try:
            said, wrong = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    for url in urls.values():
        password = make_url(url).password
        assert password is None or password not in said + wrong
    return subprocess.CompletedProcess(arguments, process.returncode, said, wrong)


def shardgate(
    urls: Mapping[str, str], *arguments: str, **weights: float
) -> subprocess.CompletedProcess[str]:
    """Run a command here, which is quicker."""
    said, wrong = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, environment(urls, **weights), clear=True),
        patch.object(sys, "argv", ["shardgate", *arguments]),
        redirect_stdout(said),
        redirect_stderr(wrong),
        pytest.raises(SystemExit) as ended,
    ):
        run()
    assert isinstance(ended.value.code, int)
    return subprocess.CompletedProcess(
        arguments, ended.value.code, said.getvalue(), wrong.getvalue()
    )


def told(ran: subprocess.CompletedProcess[str]) -> Any:
    """What it has told programs; nothing else is among it."""
    return json.loads(ran.stdout)


async def fill(urls: Mapping[str, str], *, nbytes: int = 200) -> Held:
    """Sessions in all slots of these shards, and what they hold."""
    held: Held = {}
    async with Gateway(settings_at(urls, slots=SLOTS)) as gateway:
        for number in range(SESSIONS):
            held[f"chat-{number}"] = [item(f"{number} {n} " + "x" * nbytes) for n in range(4)]
            session = gateway.tenant("acme").session(f"chat-{number}")
            await session.add_items(held[f"chat-{number}"])
    return held


async def join(urls: Mapping[str, str]) -> None:
    async with Gateway(settings_at(urls, slots=SLOTS)) as gateway:
        await gateway.create_tables()


async def check(urls: Mapping[str, str], held: Held) -> dict[int, str]:
    """Who serves each slot; AssertionError unless each is served, and all is as it was."""
    async with Gateway(settings_at(urls, slots=SLOTS, create_tables=False)) as gateway:
        for session_id, items in held.items():
            assert await gateway.tenant("acme").session(session_id).get_items() == items
        assert (await gateway.check()).ok
        return await places(gateway.shards)


@pytest.fixture
def grown(sqlite_urls: Callable[[str], dict[str, str]]) -> tuple[dict[str, str], Held]:
    """Shards a and b with sessions, and c that has just joined."""
    urls = sqlite_urls("abc")
    held = asyncio.run(fill({name: urls[name] for name in "ab"}))
    asyncio.run(join(urls))
    return urls, held


def test_a_shard_that_has_joined_is_filled(grown: tuple[dict[str, str], Held]) -> None:
    urls, held = grown
    ran = shardgate(urls, "shards", "--json")
    before = {row["shard"]: row for row in told(ran)["shards"]}
    assert (ran.returncode, before["a"]["slots"], before["c"]["slots"]) == (0, 8, 0)
    assert sum(row["items"] for row in before.values()) == 4 * SESSIONS
    assert before["c"]["wanted"] == pytest.approx(1 / 3)

    ran = shardgate(urls, "rebalance", "--plan", "--json")
    plan = told(ran)
    assert ran.returncode == 1
    assert {move["target"] for move in plan["moves"]} == {"c"}
    assert plan["imbalance_after"] < plan["imbalance_before"]
    assert "c" not in asyncio.run(check(urls, held)).values()

    ran = in_a_process(urls, "rebalance", "--apply", *PATIENT)
    assert ran.returncode == 0, ran.stderr
    first, *lines, last = ran.stdout.splitlines()
    assert first == f"moving {len(plan['moves'])} slots, {AT_ONCE} at a time"
    assert sum(": moved" in line or ", moved," in line for line in lines) == len(plan["moves"])
    assert last.startswith(f"{len(plan['moves'])} slots moved, ")
    assert " items verified, frozen " in last
    now = asyncio.run(check(urls, held))
    assert {slot for slot, owner in now.items() if owner == "c"} == {
        move["slot"] for move in plan["moves"]
    }
    again = shardgate(urls, "rebalance", "--plan")
    assert (again.returncode, again.stdout) == (0, "nothing is to be moved\n")


def test_what_moves_leave_behind(grown: tuple[dict[str, str], Held]) -> None:
    urls, held = grown
    move = ("rebalance", "--apply", "--json", "--move", "0:c", "--move", "1:c", *PATIENT)
    ran = in_a_process(urls, *move)
    assert ran.returncode == 0, ran.stderr
    said = told(ran)
    assert sorted(event["slot"] for event in said["moved"]) == [0, 1]
    assert said["frozen"]["p50"] <= said["frozen"]["p99"] <= said["frozen"]["longest"]
    assert said["items"] == said["verified"] == sum(event["items"] for event in said["moved"])

    ran = shardgate(urls, "moves")
    assert ran.returncode == 0
    assert "no slot is being moved" in ran.stdout
    assert "left behind on shard a: 2 slots, released" in ran.stdout
    ran = shardgate(urls, "moves", "--remove", "--grace", "1h")
    assert ran.returncode == 0
    assert "shard a: 2 slots kept, released" in ran.stdout
    ran = shardgate(urls, "moves", "--remove", "--grace", "0", "--json")
    assert (ran.returncode, told(ran)["main"]["kept"]) == (0, [])
    assert [rest["slot"] for rest in told(ran)["main"]["removed"]] == [0, 1]
    assert told(shardgate(urls, "moves", "--json")) == {"rows": [], "down": {}}
    now = asyncio.run(check(urls, held))
    assert (now[0], now[1]) == ("c", "c")


def test_it_is_stopped_and_goes_on(sqlite_urls: Callable[[str], dict[str, str]]) -> None:
    """Twice in the middle, by Ctrl-C and by what ends containers; then to the end."""
    urls = sqlite_urls("abc")
    held = asyncio.run(fill({name: urls[name] for name in "ab"}, nbytes=4000))
    asyncio.run(join(urls))
    wanted = len(told(shardgate(urls, "drain", "a", "--plan", "--json"))["moves"])
    assert wanted == 8
    slowly = ("drain", "a", "--apply", "--at-once", "2", "--bytes-per-second", "10kB", *PATIENT)
    for stop in (signal.SIGINT, signal.SIGTERM):
        with start(urls, *slowly) as process:
            asyncio.run(_until_a_slot_is_copied(urls))
            process.send_signal(stop)
            said, wrong = process.communicate(timeout=SECONDS)
        assert process.returncode == 1, wrong
        assert "run the same command again to go on" in said
        left = list(asyncio.run(check(urls, held)).values()).count("a")
        assert f"{left} slot" in said.splitlines()[-1]
        assert left > 0
    ran = in_a_process(urls, "drain", "a", "--apply", "--json", *PATIENT)
    assert ran.returncode == 0, ran.stderr
    assert len(told(ran)["moved"]) == left
    assert "a" not in asyncio.run(check(urls, held)).values()


async def _until_a_slot_is_copied(urls: Mapping[str, str]) -> None:
    async with Gateway(settings_at(urls, slots=SLOTS)) as gateway:
        async with asyncio.timeout(SECONDS):
            while True:
                found = await find_unfinished(gateway.shards)
                if any(one.row.state == IMPORTING for one in found):
                    return
                await asyncio.sleep(0.02)


async def leave_half_way(
    urls: Mapping[str, str], slot: int, source: str, target: str, *acts: Act
) -> None:
    """Take these steps of a move, and no more."""
    async with Gateway(settings_at(urls, slots=SLOTS)) as gateway:
        ends = Ends(gateway.shards[source], gateway.shards[target], slot)
        mine, pair = new_mark(), await look(ends)
        for act in acts:
            taken = await take_step(act, pair, mine, ends)
            assert taken is not None
            pair = taken


async def age(urls: Mapping[str, str], slots: list[int]) -> None:
    """Have nobody been at these slots for a minute, by the shards' own clocks."""
    table = metadata().tables["shardgate_slots"]
    for url in urls.values():
        for row in await records(url, "slots"):
            if row["slot"] in slots and row["changed_at"] is not None:
                aged = row["changed_at"] - timedelta(minutes=1)
                this = table.c.slot == row["slot"]
                await execute(url, update(table).where(this).values(changed_at=aged))


def test_moves_that_have_stopped(grown: tuple[dict[str, str], Held]) -> None:
    urls, held = grown
    copied, fenced = (Act.MARK, Act.CLAIM), (Act.MARK, Act.CLAIM, Act.FENCE)
    asyncio.run(leave_half_way(urls, 0, "a", "c", *copied))
    asyncio.run(leave_half_way(urls, 1, "a", "c", *fenced))
    ran = shardgate(urls, "rebalance", "--apply")  # somebody was at them a moment ago
    assert ran.returncode == 1
    assert "slot 0 is being moved from shard a to shard c by somebody else" in ran.stdout
    assert "nothing was done" in ran.stdout
    ran = shardgate(urls, "moves", "--finish", "0")
    assert ran.returncode == 1
    assert "by somebody else" in ran.stdout

    asyncio.run(age(urls, [0, 1]))
    ran = shardgate(urls, "moves", "--json")
    rows = [(row["slot"], row["shard"], row["state"], row["what"]) for row in told(ran)["rows"]]
    assert ran.returncode == 1
    assert sorted(rows) == [
        (0, "a", "owned", "stuck"),
        (0, "c", "importing", "stuck"),
        (1, "a", "draining", "stuck"),
        (1, "c", "importing", "stuck"),
    ]
    ran = shardgate(urls, "moves", "--cancel", "0")
    assert (ran.returncode, ran.stdout) == (0, "slot 0: its move has ended\n")
    ran = shardgate(urls, "rebalance", "--apply", *PATIENT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("going on with 1 move that somebody has left half-way\nslot 1: a")
    assert asyncio.run(check(urls, held))[1] == "c"


def test_all_that_is_stuck_is_finished(grown: tuple[dict[str, str], Held]) -> None:
    urls, held = grown
    for slot in (0, 1):
        asyncio.run(leave_half_way(urls, slot, "a", "c", Act.MARK, Act.CLAIM, Act.FENCE))
    asyncio.run(age(urls, [0, 1]))
    ran = shardgate(urls, "moves", "--finish", "stuck", "--json")
    assert ran.returncode == 0, ran.stderr
    assert sorted(told(ran).pop("moved")) == [0, 1]
    now = asyncio.run(check(urls, held))
    assert (now[0], now[1]) == ("c", "c")


def test_a_drained_shard_stays_empty(grown: tuple[dict[str, str], Held]) -> None:
    urls, held = grown
    asyncio.run(leave_half_way(urls, 0, "a", "b", Act.MARK, Act.CLAIM, Act.FENCE))
    asyncio.run(age(urls, [0]))
    ran = shardgate(urls, "drain", "b", "--apply", *PATIENT)
    assert ran.returncode == 0, ran.stderr
    assert "1 move to a shard that is to be empty ended" in ran.stdout
    assert "shard b owns no slot. Set its weight to 0" in ran.stdout
    now = asyncio.run(check(urls, held))
    assert "b" not in now.values()
    assert now[0] == "a"
    ran = shardgate(urls, "rebalance", "--plan", "--json", b=0)
    assert "b" not in {move["target"] for move in told(ran)["moves"]}
    ran = shardgate({name: urls[name] for name in "ac"}, "shards")
    assert ran.returncode == 0, ran.stdout  # and may be removed from the settings


async def test_on_postgresql(apart: Apart) -> None:
    """And its password is not printed, whatever is wrong; see ``in_a_process``."""
    urls = await apart("postgresql", "postgresql")
    held = await fill(urls)
    ran = await asyncio.to_thread(
        in_a_process, urls, "rebalance", "--apply", "--json", "--move", "0:b", *PATIENT
    )
    assert ran.returncode == 0, ran.stderr
    assert [event["slot"] for event in told(ran)["moved"]] == [0]
    assert (await check(urls, held))[0] == "b"
    wrong = make_url(urls["b"]).set(database="no_such")
    urls["b"] = wrong.render_as_string(hide_password=False)
    ran = await asyncio.to_thread(in_a_process, urls, "shards")
    assert ran.returncode == 1
    assert "shard 'b'" in ran.stdout + ran.stderr


def test_a_shard_that_has_not_been_created(at_rest: dict[str, str]) -> None:
    urls = at_rest | {"d": at_rest["c"].replace("c.db", "d.db")}
    ran = shardgate(urls, "rebalance", "--apply")
    assert ran.returncode == 1
    assert "shard 'd' is not created yet: run 'shardgate create-tables'" in ran.stderr


@pytest.fixture(scope="module")
def at_rest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shards a, b and c, for commands that change nothing."""
    folder = tmp_path_factory.mktemp("shards")
    urls = {name: f"sqlite+aiosqlite:///{folder / name}.db" for name in "abc"}
    asyncio.run(join(urls))
    return urls


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("rebalance", "say one of --plan"),
        ("rebalance --plan --apply", "say one of --plan"),
        ("rebalance --plan --keyspace eu", "there is no keyspace 'eu'"),
        ("rebalance --plan --bytes-per-second fast", "--bytes-per-second fast: use a size"),
        ("rebalance --plan --freeze-budget 0", "cannot be moved in no time"),
        ("rebalance --plan --watch long", "--watch long: use a number of seconds"),
        ("rebalance --plan --move 3", "--move 3: use SLOT:SHARD"),
        ("rebalance --plan --move 3:x", "no shard 'x'"),
        ("rebalance --plan --move 99:a", "99"),
        ("rebalance --plan --move 3:a --move 4:b", "to one shard at a time"),
        ("rebalance --plan --at-once 0", "at-once"),
        ("drain x --plan", "there is no shard 'x'"),
        ("drain", "Missing argument"),
        ("moves --finish 3", "slot 3 of keyspace 'main' is not being moved"),
        ("moves --finish all", "--finish all: use the number of a slot, or stuck"),
        ("moves --finish 3 --remove", "one of them at a time"),
        ("moves --remove --grace -1", "--grace -1: use a number of seconds"),
    ],
)
def test_what_is_asked_wrongly(at_rest: dict[str, str], arguments: str, says: str) -> None:
    ran = shardgate(at_rest, *arguments.split())
    assert ran.returncode == 2
    assert says in ran.stderr


def test_the_last_shard_with_a_weight_cannot_be_drained(at_rest: dict[str, str]) -> None:
    ran = shardgate(at_rest, "drain", "b", "--plan", a=0, c=0)
    assert ran.returncode == 2
    assert "shard 'b' cannot be drained" in ran.stderr


def test_a_shard_that_does_not_answer(
    at_rest: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardgate.shards.Database.outage", 0.3)
    urls = at_rest | {"c": at_rest["c"].replace("c.db", "no/such/folder/c.db")}
    ran = shardgate(urls, "shards", "--json")
    rows = {row["shard"]: row for row in told(ran)["shards"]}
    assert ran.returncode == 1
    assert (rows["a"]["error"], rows["a"]["items"], rows["c"]["items"]) == (None, 0, None)
    assert "shard 'c'" in rows["c"]["error"]
    ran = shardgate(urls, "rebalance", "--plan")
    assert ran.returncode == 1
    assert "shard 'c'" in ran.stderr
    ran = shardgate(urls, "moves", "--json")
    assert ran.returncode == 1
    assert list(told(ran)["down"]) == ["c"]


def test_an_owner_that_the_settings_do_not_name(at_rest: dict[str, str]) -> None:
    urls = {name: at_rest[name] for name in "ac"}
    ran = shardgate(urls, "rebalance", "--apply")
    assert ran.returncode == 1
    assert "shard b owns slots, and the settings do not name it" in ran.stdout
    assert shardgate(urls, "shards").returncode == 1


async def test_a_session_is_served_while_its_slot_is_moved_by_a_command(
    grown_async: tuple[dict[str, str], Held],
) -> None:
    """One caller goes on appending; nothing is lost, and nothing comes twice."""
    urls, held = grown_async
    async with Gateway(settings_at(urls, slots=SLOTS, create_tables=False)) as gateway:
        session_id = session_on(gateway, "a")
        session, kept = gateway.tenant("acme").session(session_id), held.get(session_id, [])
        slot = gateway.route("acme", session_id).slot
        moving = asyncio.create_task(
            asyncio.to_thread(
                in_a_process, urls, "rebalance", "--apply", "--move", f"{slot}:c", *PATIENT
            )
        )
        number = 0
        while not moving.done() or number < 3:
            await session.add_items([item(f"later {number}")])
            number += 1
            await asyncio.sleep(0.02)  # as fast as it goes, copying would hardly keep up
        ran = await moving
        assert ran.returncode == 0, ran.stderr
        assert gateway.route("acme", session_id).shard == "c"
        expected = kept + [item(f"later {n}") for n in range(number)]
        assert await session.get_items() == expected


@pytest.fixture
async def grown_async(sqlite_urls: Callable[[str], dict[str, str]]) -> tuple[dict[str, str], Held]:
    urls = sqlite_urls("abc")
    held = await fill({name: urls[name] for name in "ab"})
    await join(urls)
    return urls, held


# --- what is shown


EVENT = MoveEvent(7, "a", "b", Phase.COPYING, sessions=1, items=3, nbytes=4200, verified=0)


def shown(*, terminal: bool) -> str:
    """What a watch shows of one slot that is moved, and one that still is being moved."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    watch = Watch(console, [PlannedMove(7, "a", "b", Load(nbytes=5000)), _planned(8)])

    async def show() -> None:
        async with watch.shown():
            watch.see(EVENT)
            watch.see(replace(EVENT, slot=8))
            watch.see(replace(EVENT, phase=Phase.MOVED, verified=3, frozen=0.004))

    asyncio.run(show())
    assert [event.slot for event in watch.moved] == [7]
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _planned(slot: int) -> PlannedMove:
    return PlannedMove(slot, "a", "b", Load(nbytes=5000))


def test_lines_where_nobody_looks() -> None:
    assert shown(terminal=False) == (
        "slot 7: a -> b, moved, 3 items, 4.2 kB, 3 verified, frozen 4 ms\n"
    )


def test_a_display_where_somebody_looks() -> None:
    said = shown(terminal=True)
    assert "1 of 2 slots  8.4 kB of 10.0 kB" in said
    assert any("slot 8" in line and "copying" in line for line in said.splitlines())


def test_figures_of_freezes_are_ones_that_have_occurred() -> None:
    events = [replace(EVENT, frozen=number / 1000) for number in range(1, 101)]
    assert Freezes.of(events) == Freezes(0.05, 0.099, 0.1)
    assert Freezes.of([EVENT]) == Freezes(None, None, None)


def test_amounts() -> None:
    rates = {"32MB": 32e6, "500k": 500e3, "1GiB": 2**30, "7": 7, "1.5 MB/s": 1.5e6}
    assert {text: read_rate("--rate", text) for text in rates} == rates
    assert read_rate("--rate", "unlimited") is None
    times = {"0.5": 0.5, "500ms": 0.5, "2s": 2, "5m": 300, "1h": 3600, "1d": 86400}
    assert {text: read_seconds("--time", text) for text in times} == times
    for wrong in ("", "-1", "fast", "0", "1 MBB", "inf"):
        with pytest.raises(UsageError):
            read_rate("--rate", wrong)
    assert [size(n) for n in (0, 999, 1500, 2.5e6)] == ["0 B", "999 B", "1.5 kB", "2.5 MB"]
    told_times = [duration(seconds) for seconds in (0.004, 0.9996, 59, 61, 3700, 200_000)]
    assert told_times == ["4 ms", "1.0 s", "59.0 s", "1 min 1 s", "1 h 1 min", "2 days"]
