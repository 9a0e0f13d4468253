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


def _values(urls: dict[str, str]) -> dict[str, Any]:
    return {
        "shards": {name: {"url": url} for name, url in urls.items()},
        "keyspaces": {"main": {"slots": SLOTS}},
        "engine_kwargs": {"pool_size": 1, "max_overflow": 1},
        "operation_deadline": 60,
    }


@pytest.mark.processes
async def test_many_processes_make_one_keyspace(
    databases: MakeDatabases, children: Children, gateways: Gateways
) -> None:
    """First of empty databases; then two new shards join one with slots, and nothing moves."""
    *empty, old, first, last = await databases(5)
    await gateways.open(settings_at({"m": old.url}))
    fresh = named(empty)
    joined = {"a": first.url, "m": old.url, "z": last.url}
    argument = {"rounds": [_values(fresh), _values(joined)]}
    done = await children.run("gateway.creating:create_all", [argument] * PROCESSES)
    assert done == [TASKS * 2] * PROCESSES

    assert Counter(await owners(fresh)) == {"a": SLOTS / 2, "b": SLOTS / 2}
    assert set(await owners(joined)) == {"m"}
    for urls in (fresh, joined):
        await check_peers(urls)
        assert len({(await identity(url))["keyspace_uuid"] for url in urls.values()}) == 1
        stored = [row for url in urls.values() for row in await records(url, "messages")]
        assert len(stored) == PROCESSES * TASKS
