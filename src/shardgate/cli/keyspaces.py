"""Which keyspace a command is about, and who owns what there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardgate.errors import KeyspaceNotCreated, UsageError
from shardgate.slotmap import conflict, consult, map_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardgate.agreement import Plan
    from shardgate.gateway import Gateway
    from shardgate.settings import GatewaySettings
    from shardgate.shards import Shard
    from shardgate.topology import KeyspaceMap

OnKeyspace = Annotated[
    str | None, typer.Option("--keyspace", help="Where the settings have several: which one.")
]


def keyspace_named(settings: GatewaySettings, name: str | None) -> str:
    """The keyspace of this name; without one the only one, or ``main``.

    Raises:
        UsageError: there is no such keyspace, or there are several and none is main.
    """
    if name is not None:
        settings.keyspace(name)
        return name
    known = list(settings.keyspaces)
    if len(known) == 1:
        return known[0]
    if "main" in known:
        return "main"
    raise UsageError(f"say which keyspace, with --keyspace: {', '.join(known)}")


async def read_map(plan: Plan, shards: Mapping[str, Shard]) -> KeyspaceMap:
    """Who owns what, by all shards of the keyspace.

    Raises:
        ShardUnavailable: a shard does not answer.
        OwnershipConflict: a shard is not the one that it is taken for.
        KeyspaceNotCreated: a shard has not joined the keyspace yet.
    """
    reading = await consult(plan, shards)
    for unavailable in reading.down.values():
        raise unavailable
    for wrong in reading.wrong.values():
        raise conflict(plan, wrong.reason)
    for name in shards.keys() - reading.created.keys():
        raise KeyspaceNotCreated(
            f"shard {name!r} is not created yet: run 'shardgate create-tables'",
            keyspace=plan.keyspace,
        )
    return map_of(plan, reading)


def shards_of(gateway: Gateway, keyspace: str) -> dict[str, Shard]:
    """A keyspace's shards, by name."""
    return {name: gateway.shards[name] for name in gateway.settings.shards_of(keyspace)}
