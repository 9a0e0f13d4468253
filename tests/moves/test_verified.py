"""A shard whose slot map changes while it is verified is not taken for an older copy of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway.shards import item, named, session_on, settings_at
from harness.proxy import CuttingProxy
from shardgate import Gateway
from shardgate.agreement import Plan
from shardgate.control.moves import Mover

if TYPE_CHECKING:
    from conftest import MakeDatabases
    from harness.servers import Backend


@pytest.mark.backends("postgresql-18", "mariadb")
async def test_a_slot_moves_while_a_shard_is_verified(
    databases: MakeDatabases, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = named(await databases(2))
    settings = settings_at(urls)
    proxy = CuttingProxy.in_front_of(urls["b"])
    async with proxy, Gateway(settings) as other:
        mover = Mover(Plan.of(settings, "main"), other.shards)
        async with Gateway(settings_at(urls | {"b": proxy.url(urls["b"])})) as gateway:
            session: Any = gateway.tenant("acme").session(session_on(gateway, "b"))
            await session.add_items([item("before")])
            keyspace = gateway._keyspaces["main"]
            slots = iter(gateway._keyspaces["main"].map.slots_of("b"))
            asked, times = keyspace._ask_peers, []

            async def ask_when_moved(shard: Any) -> Any:
                """The connection has been asked by now, and its peers have not."""
                times.append(shard.name)
                slot = next(slot for slot in slots if slot != gateway.route(*where).slot)
                if len(times) < 3:
                    await mover.move(slot, "b", "a")
                return await asked(shard)

            where = ("acme", session.session_id.partition("/")[2])
            monkeypatch.setattr(keyspace, "_ask_peers", ask_when_moved)
            proxy.cut()
            await session.add_items([item("after")])
            assert await session.get_items() == [item("before"), item("after")]
            assert times == ["b", "b", "b"]
            assert (await gateway.check()).ok
