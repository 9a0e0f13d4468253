"""Fixtures of the contract suite.

door        a session's door, stand-alone and through a gateway, on each backend; no session is
            stored yet. The databases are used again by the next test, for the sake of time
open_door   `await open_door()`: one more on the same databases, with engines of its own
fresh_urls  databases in which nothing has been created yet
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import pytest_asyncio
from sqlalchemy import delete

from contract.doors import Door
from contract.doors import open_door as open_at
from harness.engines import EngineMaker
from harness.servers import Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import MakeDatabases
    from harness.fleet import Fleet
    from harness.servers import Backend, Server

KEPT = pytest.StashKey[dict[tuple[str, str], list[Database]]]()
SHARDS = {"standalone": 1, "gateway": 2}


class OpenDoor(Protocol):
    async def __call__(self, **engine_kwargs: Any) -> Door: ...


@pytest.fixture(params=["standalone", "gateway"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture
async def urls(kind: str, backend: Backend, pytestconfig: pytest.Config) -> list[str]:
    """Databases that every test of this kind and backend shares."""
    kept = pytestconfig.stash.setdefault(KEPT, {})
    databases = kept.setdefault((kind, backend.id), [])
    while len(databases) < SHARDS[kind]:
        server = await _fleet(pytestconfig).shared(backend)
        url = await server.create_database()
        databases.append(Database(url=url, server=server))
        pytestconfig.add_cleanup(partial(_drop, server, url))
    for database in databases:
        await database.server.start()
    return [database.url for database in databases]


def _drop(server: Server, url: str) -> None:
    asyncio.run(server.drop_database(url))


def _fleet(config: pytest.Config) -> Fleet:
    """The run's servers. Importing the other conftest.py would make a second one of it."""
    plugin = config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))
    assert plugin is not None
    fleet: Fleet = config.stash[plugin.FLEET]
    return fleet


@pytest_asyncio.fixture
async def fresh_urls(kind: str, databases: MakeDatabases) -> list[str]:
    return [database.url for database in await databases(SHARDS[kind])]


@pytest_asyncio.fixture
async def engines() -> AsyncIterator[EngineMaker]:
    maker = EngineMaker("")
    yield maker
    await maker.finish()


@pytest_asyncio.fixture
async def open_door(kind: str, urls: list[str], engines: EngineMaker) -> AsyncIterator[OpenDoor]:
    """Each door that is opened differs in its engines, so that none shares another's pool."""
    doors: list[Door] = []

    async def open_one(**engine_kwargs: Any) -> Door:
        options = {"pool_recycle": 10_000 + len(doors)} | engine_kwargs
        door = await open_at({"kind": kind, "urls": urls, "engine_kwargs": options})
        doors.append(door)
        for engine in door.engines:
            engines.watch(engine)
        return door

    yield open_one
    leaked = await engines.still_out()
    for door in doors[:1]:
        await _empty(door)
    for door in doors:
        await door.close()
    assert not leaked, f"{leaked} connection(s) still checked out"


@pytest_asyncio.fixture
async def door(open_door: OpenDoor) -> Door:
    door = await open_door()
    await door.session().get_items()
    return door


async def _empty(door: Door) -> None:
    for engine in door.engines:
        async with engine.connect() as connection:
            for table in door.tables.slot_owned:
                await connection.execute(delete(table))
            await connection.commit()
