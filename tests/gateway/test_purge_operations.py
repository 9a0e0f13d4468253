"""``gateway.purge_operations()`` and its command: what is old goes at once, on every shard."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import update

from gateway.shards import execute, item, named, records, session_on, settings_at
from gateway.test_reconcile_command import shardgate
from shardgate import Gateway, ShardUnavailable, metadata

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import MakeDatabases
    from gateway.conftest import Gateways

    SQLiteUrls = Callable[[str], dict[str, str]]

OPS = metadata().tables["shardgate_ops"]


async def _age(url: str, op_id: str) -> None:
    """Have the operation be older than a day, by the shard's own clock."""
    (created,) = [row["created_at"] for row in await records(url, "ops") if row["op_id"] == op_id]
    aged = created - timedelta(hours=25)
    await execute(url, update(OPS).where(OPS.c.op_id == op_id).values(created_at=aged))


async def test_what_is_old_goes_from_every_shard(
    databases: MakeDatabases, gateways: Gateways
) -> None:
    urls = named(await databases(2))
    gateway = await gateways.open(settings_at(urls))
    for name, url in urls.items():
        session = gateway.tenant("acme").session(session_on(gateway, name))
        await session.add_items([item("one")], idempotency_key="old")
        await session.add_items([item("two")], idempotency_key="young")
        await _age(url, "=old")
    assert await gateway.purge_operations() == {"a": 1, "b": 1}
    assert await gateway.purge_operations() == {"a": 0, "b": 0}
    for name, url in urls.items():
        assert [row["op_id"] for row in await records(url, "ops")] == ["=young"]
        session = gateway.tenant("acme").session(session_on(gateway, name))
        await session.add_items([item("two")], idempotency_key="young")
        assert await session.get_items() == [item("one"), item("two")]


async def test_the_window_is_a_setting(sqlite_urls: SQLiteUrls, gateways: Gateways) -> None:
    urls = sqlite_urls("a")
    gateway = await gateways.open(settings_at(urls, operation_memory=26 * 3600))
    session = gateway.tenant("acme").session("1")
    await session.add_items([item("one")], idempotency_key="old")
    await _age(urls["a"], "=old")
    assert await gateway.purge_operations() == {"a": 0}


async def test_a_shard_that_is_down_is_named(
    sqlite_urls: SQLiteUrls, gateways: Gateways, tmp_path: Path
) -> None:
    urls = sqlite_urls("ab")
    await (await gateways.open(settings_at(urls))).aclose()
    await asyncio.to_thread(os.rename, tmp_path / "b.db", tmp_path / "away.db")
    (tmp_path / "b.db").mkdir()
    gateway = gateways.make(settings_at(urls))
    with pytest.raises(ShardUnavailable, match="shard 'b'"):
        await gateway.purge_operations()


def test_the_command(sqlite_urls: SQLiteUrls) -> None:
    async def make() -> None:
        async with Gateway(settings_at(urls)) as gateway:
            session = gateway.tenant("acme").session("1")
            await session.add_items([item("one")], idempotency_key="old")
            await _age(urls["a"], "=old")

    urls = sqlite_urls("a")
    asyncio.run(make())
    ran = shardgate(urls, "purge-operations")
    assert (ran.returncode, ran.stdout) == (0, "shard a: 1 removed\n")
