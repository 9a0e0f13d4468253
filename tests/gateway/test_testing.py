"""``shardgate.testing.sqlite_gateway``: a real gateway for platforms' own tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url

from gateway.shards import item, session_on
from shardgate import Gateway, SettingsError, TenantRefused, UsageError
from shardgate.testing import sqlite_gateway

if TYPE_CHECKING:
    from shardgate import GatewaySession


def _file(gateway: Gateway, shard: str) -> Path:
    return Path(str(make_url(str(gateway.shards[shard].engine.url)).database))


async def _add(session: GatewaySession) -> None:
    await session.add_items([item("one")])


async def test_it_is_open_on_two_shards() -> None:
    async with sqlite_gateway() as gateway:
        assert isinstance(gateway, Gateway)
        assert len(gateway.shards) == 2
        files = [_file(gateway, name) for name in gateway.shards]
        for shard in gateway.shards:
            session = gateway.tenant("acme").session(session_on(gateway, shard))
            await _add(session)
            assert await session.get_items() == [item("one")]
        assert (await gateway.check()).ok
        assert all(file.exists() for file in files)
    assert not any(file.parent.exists() for file in files)
    with pytest.raises(UsageError, match="closed"):
        await gateway.check()


async def test_each_has_its_own_shards() -> None:
    async with sqlite_gateway(shards=1) as one, sqlite_gateway(shards=1) as other:
        await _add(one.tenant("acme").session("chat-1"))
        assert await other.tenant("acme").session("chat-1").get_items() == []


async def test_settings_may_be_added() -> None:
    keyspaces = {"main": {"slots": 64, "spread": 4}}
    async with sqlite_gateway(
        shards=3, keyspaces=keyspaces, tenants={"acme": "main"}, default_keyspace=None
    ) as gateway:
        assert len(gateway.shards) == 3
        assert gateway.settings.keyspace("main").spread == 4
    with pytest.raises(SettingsError):
        async with sqlite_gateway(keyspaces={"main": {"slots": 3}}):
            raise AssertionError("opened")


async def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_SHARDS__PRODUCTION__URL", "postgresql+asyncpg://db.example/x")
    monkeypatch.setenv("SHARDGATE_TABLE_PREFIX", "other_")
    async with sqlite_gateway() as gateway:
        assert "production" not in gateway.shards
        assert gateway.settings.table_prefix == "shardgate_"


async def test_the_folder_goes_when_a_test_fails() -> None:
    folders: list[Path] = []
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block itself is what is tested
        async with sqlite_gateway() as gateway:
            folders.append(_file(gateway, next(iter(gateway.shards))).parent)
            raise ZeroDivisionError
    assert not folders[0].exists()


async def test_a_tenant_that_is_not_configured_is_refused_as_in_production() -> None:
    async with sqlite_gateway(default_keyspace="", tenants={"acme": "main"}) as gateway:
        await _add(gateway.tenant("acme").session("chat-1"))
        with pytest.raises(TenantRefused):
            gateway.tenant("globex")
