"""``shardgate reconcile``, as an operator runs it: its words, its JSON and its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from gateway.shards import (
    check_peers,
    content,
    execute,
    identity,
    item,
    owners,
    session_on,
    settings_at,
)
from shardgate import Gateway
from shardgate.agreement import Plan
from shardgate.control import reconcile

if TYPE_CHECKING:
    from collections.abc import Callable

    SQLiteUrls = Callable[[str], dict[str, str]]

RUN = "from shardgate.cli.app import run; run()"


def shardgate(urls: dict[str, str], *arguments: str) -> Any:
    """Run the command with settings from the environment alone."""
    variables = {f"SHARDGATE_SHARDS__{name.upper()}__URL": url for name, url in urls.items()}
    variables |= {"SHARDGATE_KEYSPACES__MAIN__SLOTS": "16", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        env=variables | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=60,
    )


def file_of(url: str) -> Path:
    return Path(str(make_url(url).database))


@pytest.fixture
def restored(sqlite_urls: SQLiteUrls) -> dict[str, str]:
    """Shards a, b and c; b is a copy from before c joined."""

    async def make() -> None:
        async with Gateway(settings_at(sqlite_urls("ab"))) as gateway:
            session = gateway.tenant("acme").session(session_on(gateway, "b"))
            await session.add_items([item("one")])
        shutil.copy(file_of(urls["b"]), file_of(urls["b"]).with_suffix(".copy"))
        async with Gateway(settings_at(urls)) as gateway:
            await gateway.create_tables()

    urls = sqlite_urls("abc")
    asyncio.run(make())
    file_of(urls["b"]).with_suffix(".copy").replace(file_of(urls["b"]))
    return urls


def test_a_shard_that_is_all_right(restored: dict[str, str]) -> None:
    ran = shardgate(restored, "reconcile", "a")
    assert (ran.returncode, ran.stdout) == (0, "shard a: nothing is wrong\n")


def test_it_explains_and_changes_nothing(restored: dict[str, str]) -> None:
    before = asyncio.run(content(restored["b"]))
    ran = shardgate(restored, "reconcile", "b")
    assert ran.returncode == 1
    problem, *steps = ran.stdout.splitlines()
    assert "shard 'b' has version" in problem
    assert "older copy" in problem
    assert steps[0] == "what is to be done:"
    assert steps[-1].startswith("to do just this: shardgate reconcile b --apply --expect ")
    assert asyncio.run(content(restored["b"])) == before


def test_it_mends_when_told(restored: dict[str, str]) -> None:
    assert shardgate(restored, "check").returncode == 1
    ran = shardgate(restored, "reconcile", "b", "--apply")
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    assert "what is to be done:" in said
    assert said[-1] == "done"
    before = asyncio.run(content(restored["b"]))
    assert shardgate(restored, "create-tables").returncode == 0
    assert asyncio.run(content(restored["b"])) == before  # it knows c again, too
    assert shardgate(restored, "check").returncode == 0
    assert shardgate(restored, "reconcile", "b").stdout == "shard b: nothing is wrong\n"


def test_as_json(restored: dict[str, str]) -> None:
    ran = shardgate(restored, "reconcile", "b", "--json")
    said = json.loads(ran.stdout)
    assert (ran.returncode, said["shard"], said["loses"], said["done"]) == (1, "b", False, False)
    assert "older copy" in said["problem"]
    assert said["steps"]


def test_an_emptied_shard_is_made_again_only_if_that_is_accepted(restored: dict[str, str]) -> None:
    file_of(restored["b"]).unlink()
    ran = shardgate(restored, "reconcile", "b", "--apply")
    assert ran.returncode == 2
    assert "without their sessions" in ran.stdout  # it is told what would be lost
    assert "lost for good" in ran.stderr
    ran = shardgate(restored, "reconcile", "b", "--apply", "--accept-loss")
    assert ran.returncode == 0, ran.stderr
    assert shardgate(restored, "check").returncode == 0


def test_just_what_was_explained_is_done(restored: dict[str, str]) -> None:
    digest = json.loads(shardgate(restored, "reconcile", "b", "--json").stdout)["digest"]
    before = asyncio.run(content(restored["b"]))
    ran = shardgate(restored, "reconcile", "b", "--apply", "--expect", "something")
    assert ran.returncode == 1
    assert "is not what something stood for" in ran.stderr
    assert asyncio.run(content(restored["b"])) == before
    assert shardgate(restored, "reconcile", "b", "--apply", "--expect", digest).returncode == 0
    assert shardgate(restored, "reconcile", "b", "--expect", digest).returncode == 1


def test_a_slot_that_nobody_claims(sqlite_urls: SQLiteUrls) -> None:
    """b does not know that a slot has come to it, and no version tells that it is behind."""

    async def make() -> int:
        async with Gateway(settings_at(urls)) as gateway:
            slot = gateway.route("acme", session_on(gateway, "a")).slot
        own = (await identity(urls["b"]))["shard_uuid"]
        values = {"slot": slot, "owner": own}
        for url in (urls["a"], urls["c"]):
            moved = "UPDATE shardgate_slots SET owner = :owner, state = 'elsewhere', epoch = 2"
            await execute(url, text(f"{moved} WHERE slot = :slot").bindparams(**values))
        return slot

    urls = sqlite_urls("abc")
    slot = asyncio.run(make())
    ran = shardgate(urls, "check", "--json")
    assert ran.returncode == 1
    (problem,) = json.loads(ran.stdout)["problems"]
    assert f"slots {slot} are claimed by no shard" in problem
    assert "run 'shardgate reconcile b'" in problem
    assert shardgate(urls, "reconcile", "a").returncode == 0
    assert shardgate(urls, "reconcile", "b", "--apply").returncode == 2
    ran = shardgate(urls, "reconcile", "b", "--apply", "--accept-loss")
    assert ran.returncode == 0, ran.stderr
    assert f"have it own slots {slot} again" in ran.stdout
    assert shardgate(urls, "check").returncode == 0
    assert asyncio.run(owners(urls))[slot] == "b"
    assert shardgate(urls, "reconcile", "b").returncode == 0


@pytest.mark.parametrize("step", ["_tell_peers", "introduce", "publish"])
def test_it_goes_on_after_it_was_ended_half_way(
    step: str, restored: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def end(*_: object) -> None:
        raise KeyboardInterrupt

    async def reconcile_b() -> None:
        async with Gateway(settings_at(restored, create_tables=False)) as gateway:
            plan = Plan.of(gateway.settings, "main")
            remedy = await reconcile.examine(plan, gateway.shards, "b")
            await reconcile.apply(plan, gateway.shards, remedy, accept_loss=True)

    file_of(restored["b"]).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(reconcile, step, end)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(reconcile_b())
    ran = shardgate(restored, "reconcile", "b", "--apply")
    assert ran.returncode == 0, ran.stderr
    assert "introduce it to its peers" in ran.stdout
    asyncio.run(check_peers(restored))
    assert shardgate(restored, "reconcile", "b").stdout == "shard b: nothing is wrong\n"


def test_others_are_mended_first(restored: dict[str, str]) -> None:
    other = file_of(restored["a"]).with_name("copy-of-a.db")
    shutil.copy(file_of(restored["a"]), other)
    wrong = restored | {"c": restored["a"].replace("a.db", other.name)}
    ran = shardgate(wrong, "reconcile", "b", "--apply")
    assert ran.returncode == 1
    assert "before shard 'b', mend these: shard 'c' says that its name is 'a'" in ran.stderr


def test_swapped_urls_are_not_mended_here(restored: dict[str, str]) -> None:
    swapped = restored | {"a": restored["c"], "c": restored["a"]}
    ran = shardgate(swapped, "reconcile", "a", "--apply")
    assert ran.returncode == 1
    assert "cannot be mended here" in ran.stdout


def test_a_shard_that_does_not_exist(restored: dict[str, str]) -> None:
    ran = shardgate(restored, "reconcile", "d")
    assert ran.returncode == 2
    assert "there is no shard 'd'" in ran.stderr


def test_all_shards_are_needed_to_tell(restored: dict[str, str]) -> None:
    away = restored | {"c": restored["c"].replace("c.db", "no/such/folder/c.db")}
    ran = shardgate(away, "reconcile", "b", "--apply")
    assert ran.returncode == 1
    assert "shard 'c'" in ran.stderr
