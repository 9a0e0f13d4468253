"""A listing waits for a slot that is between two shards, and does what callers of sessions do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway.shards import item, named, session_on, settings_at
from shardgate import Gateway, recovery
from shardgate.handover import Act
from shardgate.recovery import Ends, look, new_mark, take_step

if TYPE_CHECKING:
    from conftest import MakeDatabases

NO_HANG = 30


@pytest.mark.backends("sqlite", "postgresql-18")
@pytest.mark.parametrize("decided", [False, True])
async def test_an_orphan_is_ended_by_a_listing(
    databases: MakeDatabases, decided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mover is dead, and nobody uses a session of the slot."""
    monkeypatch.setattr(recovery, "ORPHANED_SECONDS", 0.1)
    settings = settings_at(named(await databases(3)))
    async with Gateway(settings) as gateway, Gateway(settings) as other:
        tenant, session_id = gateway.tenant("acme"), session_on(gateway, "b")
        await tenant.session(session_id).add_items([item("before")])
        slot = gateway.route("acme", session_id).slot
        ends = Ends(gateway.shards["b"], gateway.shards["a"], slot)
        mine, pair = new_mark(), await look(ends)
        for act in (Act.MARK, Act.CLAIM, Act.FENCE, *([Act.DECIDE] if decided else [])):
            after = await take_step(act, pair, mine, ends)
            assert after is not None
            pair = after
        async with asyncio.timeout(NO_HANG):
            page = await other.tenant("acme").list_sessions()
        # It was decided without copying: only who is asked matters here.
        assert [info.session_id for info in page.sessions] == ([] if decided else [session_id])
