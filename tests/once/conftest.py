"""Fixtures of these tests; `kind`, `door`, `open_door` and what they need are the contract suite's.

proxied     a `Wire`: a door of either kind on a fresh database, through a proxy, and one past it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest_asyncio

from contract.conftest import door, engines, kind, open_door, urls
from contract.doors import open_door as open_at
from once.wire import HoldingProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from contract.doors import Door
    from harness.engines import EngineMaker
    from harness.servers import Database

__all__ = ["door", "engines", "kind", "open_door", "proxied", "urls"]

POOL = {"pool_size": 4, "max_overflow": 0}


@dataclass(frozen=True, slots=True)
class Wire:
    """Sessions whose connections can be cut, and the same sessions over connections that hold."""

    proxy: HoldingProxy
    through: Door
    past: Door

    async def items(self, session_id: str = "chat-1") -> list[Any]:
        """What the database holds."""
        return await self.past.session(session_id).get_items()


@pytest_asyncio.fixture
async def proxied(
    kind: str, database: Database, engines: EngineMaker, long_outages: None
) -> AsyncIterator[Wire]:
    past = await open_at({"kind": kind, "urls": [database.url], "engine_kwargs": POOL})
    await past.session().get_items()  # creates the tables
    async with HoldingProxy.in_front_of(database.url) as proxy:
        address = {"kind": kind, "urls": [proxy.url(database.url)], "engine_kwargs": POOL}
        through = await open_at(address)
        for one in (past, through):
            for engine in one.engines:
                engines.watch(engine)
        yield Wire(proxy, through, past)
        proxy.release()
        await through.close()
        await past.close()
