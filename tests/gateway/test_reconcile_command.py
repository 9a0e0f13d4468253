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
from sqlalchemy.engine import make_url

from gateway.shards import content, item, session_on, settings_at
from shardgate import Gateway

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
    assert steps[0] == "what would be done:"
    assert steps[-1] == "to do it: shardgate reconcile b --apply"
    assert asyncio.run(content(restored["b"])) == before


def test_it_mends_when_told(restored: dict[str, str]) -> None:
    assert shardgate(restored, "check").returncode == 1
    ran = shardgate(restored, "reconcile", "b", "--apply")
    assert ran.returncode == 0, ran.stderr
    assert "what was done:" in ran.stdout
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
    assert "lost for good" in ran.stderr
    ran = shardgate(restored, "reconcile", "b", "--apply", "--accept-loss")
    assert ran.returncode == 0, ran.stderr
    assert shardgate(restored, "check").returncode == 0


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
