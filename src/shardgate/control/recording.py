"""Having the shards record which slots have moved, and how far the ends' slot maps have come.

Moves that have ended about the same time are recorded together, in one transaction of each shard:
every such transaction locks the row that the next fence has to change, too. Until then the hints of
other shards are older, which costs a caller one more question.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from shardgate.errors import ShardgateError
from shardgate.handover import CANCELLED, IMPORTING
from shardgate.records import read_identity, record_moves
from shardgate.settling import together
from shardgate.shards import ask_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardgate.handover import SlotRow
    from shardgate.records import Identity
    from shardgate.recovery import Ends
    from shardgate.shards import Shard

logger = logging.getLogger("shardgate")


class _Told(NamedTuple):
    row: SlotRow
    ends: frozenset[str]


class Recorder:
    """What is still to be recorded of the moves of a keyspace."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        self._shards = shards
        self._waiting: list[_Told] = []
        self._turn = asyncio.Lock()

    def add(self, row: SlotRow, ends: Ends) -> None:
        """Have this recorded with the next ``flush``: who owns a slot after its move.

        What a shard says of a slot that it imports, or has imported, tells nothing of that.
        """
        if row.state in (IMPORTING, CANCELLED):
            return
        self._waiting.append(_Told(row, frozenset({ends.source.name, ends.target.name})))

    async def flush(self) -> None:
        """Tell all shards that answer, once for all moves that were added.

        Returns when everything that was added before is told, by whomever. Cancelled, it leaves
        what it has begun to the next one: nothing is spoilt by being told again.
        """
        async with self._turn:
            batch, self._waiting = self._waiting, []
            if not batch:
                return
            try:
                await self._tell(batch)
            except BaseException:
                self._waiting[:0] = batch
                raise

    async def _tell(self, batch: Sequence[_Told]) -> None:
        identities = await self._identities({name for told in batch for name in told.ends})
        await together(
            self._tell_one(shard, [told.row for told in batch if name not in told.ends], identities)
            for name, shard in self._shards.items()
        )

    async def _identities(self, names: set[str]) -> list[Identity]:
        """The shards' own records, of those that answer."""
        asked = {name: self._shards[name] for name in sorted(names)}
        found, down = await ask_all(
            {
                name: shard.query(partial(read_identity, tables=shard.tables))
                for name, shard in asked.items()
            }
        )
        for name, error in down.items():
            logger.warning("nobody was told how far shard %r has come: %s", name, error)
        return [identity for identity in found.values() if identity is not None]

    async def _tell_one(
        self, shard: Shard, hints: Sequence[SlotRow], identities: Sequence[Identity]
    ) -> None:
        peers = [one for one in identities if one.shard_uuid != shard.uuid]
        record = partial(record_moves, tables=shard.tables, hints=hints, identities=peers)
        try:
            await shard.transact(record)
        except ShardgateError as error:
            slots = ", ".join(str(row.slot) for row in hints)
            logger.warning("shard %r was not told who owns slots %s: %s", shard.name, slots, error)
