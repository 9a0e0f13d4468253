"""When old operations are removed: in the background, as writes come in, and never for long.

What drives it is writes, not a timer: a process that does not write has nothing to remove. Every
``PURGE_EVERY`` writes of a process on a database, a walk along the ops table goes ``STEP`` keys on.
A write adds one operation at most, so four keys are looked at for each that is added, and while
the walk passes a table of N rows once, N/4 are added: in the steady state the table holds what is
young, and at most a third of that again. Several processes walk on their own, each in proportion to
its writes. They begin at places of chance: so they are not all at the same one, and processes that
do not live long do not all see to the same part.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING

from shardgate.errors import ShardgateError
from shardgate.sql.purge import START, OpKey, purge_chunk

if TYPE_CHECKING:
    from shardgate.shards import Database
    from shardgate.sql.dialect import Dialect
    from shardgate.sql.purge import Chunk
    from shardgate.store import Store

logger = logging.getLogger("shardgate")

OPERATION_MEMORY = 86400.0
"""Seconds for which an operation is remembered, where no setting says otherwise."""
PURGE_EVERY = 1024
"""Writes between two steps of a walk."""
STEP = 4096
"""Keys that a step goes on, in one transaction or several."""
_CHUNKS = {"postgresql": 4096, "sqlite": 1024}
"""Keys of one transaction: what costs a process most is to make one. On SQLite nobody else writes
meanwhile."""
_CHUNK_BY_KEY = 256
"""The same on MySQL and MariaDB, where one statement names each of them: less than 1 MB."""

_LEAST, _MOST = -(2**63), 2**63 - 1


class Purge:
    """What an event loop removes on an engine: one step at a time, whatever it is due for."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self._writes: Counter[Dialect] = Counter()  # a dialect is of one set of tables
        self._places: dict[Dialect, OpKey] = {}

    def count_write(self, database: Database, memory: float) -> None:
        """Note a write that the database has answered, and take a step if it is time for one."""
        writes = self._writes[database.dialect] = self._writes[database.dialect] + 1
        if writes < PURGE_EVERY or self.task is not None:
            return
        self._writes[database.dialect] = 0
        # In a context of its own: it is nothing of the request's that happens to start it.
        self.task = asyncio.create_task(self._step(database, memory), context=Context())
        self.task.add_done_callback(self._forget)

    async def end(self) -> None:
        """End what goes on; what has been sent is waited for."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])

    def _forget(self, _task: asyncio.Task[None]) -> None:
        self.task = None

    async def _step(self, database: Database, memory: float) -> None:
        """Go on; where the database does not let us, the next step tries again at that place."""
        dialect = database.dialect
        place = self._places.get(dialect) or OpKey(random.randint(_LEAST, _MOST))  # noqa: S311 - no secret
        try:
            for _ in range(STEP // _chunk(database)):
                chunk = await _purge_chunk(database, place, memory)
                place = self._places[dialect] = chunk.last or START
        except Exception as error:  # noqa: BLE001 - nobody waits for this task
            reason = error if isinstance(error, ShardgateError) else type(error).__name__
            logger.warning("old operations were not removed for now: %s", reason)


def purge_of(database: Database) -> Purge:
    """That of the event loop that uses this database."""
    return database.here.own("purge", Purge)


async def end_purge(database: Database) -> None:
    """End what the running event loop removes on this database's engine, before it is closed."""
    await database.state.of_loop().own("purge", Purge).end()


async def purge_all(store: Store) -> int:
    """Walk the whole table, chunk by chunk, and remove what is old; how many operations it was.

    Raises:
        ShardUnavailable: the shard does not answer; what was removed so far stays removed.
    """
    removed, place = 0, START
    while True:
        chunk = await _purge_chunk(store.database, place, store.operation_memory)
        removed += chunk.removed
        if chunk.last is None:
            return removed
        place = chunk.last


async def _purge_chunk(database: Database, after: OpKey, memory: float) -> Chunk:
    keys = _chunk(database)
    return await database.transact(
        partial(purge_chunk, tables=database.tables, after=after, memory=memory, keys=keys)
    )


def _chunk(database: Database) -> int:
    """Keys of one transaction on this database."""
    return _CHUNKS.get(database.engine.dialect.name, _CHUNK_BY_KEY)
