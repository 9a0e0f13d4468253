"""Several processes with several tasks create the same keyspace at the same moment."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from gateway.creating import TASKS
from gateway.shards import SLOTS, check_peers, identity, named, owners, records, settings_at

if TYPE_CHECKING:
    from conftest import MakeDatabases
    from gateway.conftest import Gateways
    from harness.processes import Children

PROCESSES = 4
ROUNDS = 2


def _values(urls: dict[str, str]) -> dict[str, Any]:
    return {
        "shards": {name: {"url": url} for name, url in urls.items()},
        "keyspaces": {"main": {"slots": SLOTS}},
        "engine_kwargs": {"pool_size": 1, "max_overflow": 1},
        "operation_deadline": 60,
    }


async def _create_everywhere(children: Children, rounds: list[dict[str, str]]) -> None:
    argument = {"rounds": [_values(urls) for urls in rounds]}
    done = await children.run("gateway.creating:create_all", [argument] * PROCESSES)
    assert done == [TASKS * len(rounds)] * PROCESSES


@pytest.mark.processes
async def test_empty_databases_become_one_keyspace(
    databases: MakeDatabases, children: Children
) -> None:
    rounds = [named(await databases(2)) for _ in range(ROUNDS)]
    await _create_everywhere(children, rounds)
    for urls in rounds:
        assert Counter(await owners(urls)) == {"a": SLOTS / 2, "b": SLOTS / 2}
        await check_peers(urls)
        assert len({(await identity(url))["keyspace_uuid"] for url in urls.values()}) == 1
        stored = [row for url in urls.values() for row in await records(url, "messages")]
        assert len(stored) == PROCESSES * TASKS


@pytest.mark.processes
async def test_new_shards_join_together_and_nothing_moves(
    databases: MakeDatabases, children: Children, gateways: Gateways
) -> None:
    old, first, last = await databases(3)
    await gateways.open(settings_at({"m": old.url}))
    urls = {"a": first.url, "m": old.url, "z": last.url}
    await _create_everywhere(children, [urls])
    assert set(await owners(urls)) == {"m"}
    await check_peers(urls)
