"""From (tenant, session) to the shard that owns its slot: pure, no input or output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardgate.slots import session_hash, slot_of, to_signed

if TYPE_CHECKING:
    from shardgate.topology import KeyspaceMap


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a session lives, as far as this map knows.

    ``shard`` is the name of the shard that owns ``slot`` since ``epoch``; ``h`` is the session's
    hash, signed, as it is stored.
    """

    keyspace: str
    slot: int
    shard: str
    epoch: int
    h: int


def route(known: KeyspaceMap, tenant_id: str, session_id: str) -> Route:
    """Return where a session lives. The caller has checked the ids."""
    h = session_hash(tenant_id, session_id, slots=known.slots, spread=known.spread)
    slot = slot_of(h, known.slots)
    return Route(
        keyspace=known.name,
        slot=slot,
        shard=known.owners[slot],
        epoch=known.epochs[slot],
        h=to_signed(h),
    )
