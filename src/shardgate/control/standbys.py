"""Whether what a shard has committed is safe from the promotion of one of its standbys.

A move stops the source in one commit and gives the slot to the target in another one. If a standby
is promoted that lacks one of the two, both shards serve the slot, or neither does.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from shardgate.errors import StandbysNotSafe

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.shards import Shard

_MYSQL = ("mysql", "mariadb")
_POLL_SECONDS = 0.2


async def check_commits(shard: Shard) -> None:
    """Make sure that commits on a shard are confirmed by the standbys that are connected.

    One that is not connected is not seen: that it must not be promoted is the operator's to know.

    Raises:
        StandbysNotSafe: a standby does not confirm commits.
    """
    lagging = await shard.query(_unconfirmed)
    if lagging:
        raise StandbysNotSafe(
            f"shard {shard.name!r} has {lagging} standbys that do not confirm its commits: if one "
            "of them were promoted during a move, what was written meanwhile could be lost. Make "
            "them synchronous, or accept this risk (accept_async_standbys)"
        )


async def _unconfirmed(connection: AsyncConnection) -> int:
    """How many of the connected standbys do not confirm commits."""
    name = connection.dialect.name
    if name == "postgresql":
        return await _unconfirmed_on_postgresql(connection)
    if name in _MYSQL:
        return await _unconfirmed_on_mysql(connection)
    return 0


async def _unconfirmed_on_postgresql(connection: AsyncConnection) -> int:
    commits = await connection.execute(text("SHOW synchronous_commit"))
    states = await connection.execute(
        text(
            "SELECT count(*), count(*) FILTER (WHERE sync_state IN ('sync', 'quorum'))"
            " FROM pg_stat_replication WHERE state <> 'backup'"
        )
    )
    standbys, confirming = states.one()
    if commits.scalar_one() in ("off", "local"):
        confirming = 0
    return int(standbys - confirming)


async def _unconfirmed_on_mysql(connection: AsyncConnection) -> int:
    """With semi-synchronous replication one of them confirms; which one is promoted, MySQL and
    MariaDB leave to others, who are to take the one that has most."""
    replicas: Any = (
        await connection.execute(
            text(
                "SELECT COUNT(*) FROM information_schema.processlist"
                " WHERE command LIKE 'Binlog Dump%'"
            )
        )
    ).scalar_one()
    if not replicas:
        return 0
    semi = await connection.execute(
        text(
            "SHOW GLOBAL STATUS WHERE variable_name IN"
            " ('Rpl_semi_sync_master_status', 'Rpl_semi_sync_source_status')"
        )
    )
    on = any(value == "ON" for _, value in semi)
    return 0 if on else int(replicas)


async def wait_for_standbys(shard: Shard, *, seconds: float) -> None:
    """Wait until the standbys that are connected have what the shard has committed by now.

    Raises:
        StandbysNotSafe: they do not have it in time, or it cannot be found out.
    """
    missing = await shard.query(_missing_on(None))
    clock = asyncio.get_running_loop().time
    give_up = clock() + seconds
    position = missing[0]
    while missing[1]:
        if clock() > give_up:
            raise StandbysNotSafe(
                f"shard {shard.name!r} has {missing[1]} standbys that do not have all of what it "
                "has committed: what a move has left on another shard is not removed before"
            )
        await asyncio.sleep(_POLL_SECONDS)
        missing = await shard.query(_missing_on(position))


def _missing_on(position: str | None) -> Any:
    """Asks for the position of the log (or takes the one given), and how many lack it."""

    async def act(connection: AsyncConnection) -> tuple[str | None, int]:
        if connection.dialect.name != "postgresql":
            return None, await _unconfirmed(connection)
        row = await connection.execute(
            text("SELECT coalesce(cast(:position AS text), pg_current_wal_insert_lsn()::text)"),
            {"position": position},
        )
        until = row.scalar_one()
        lacking = await connection.execute(
            text(
                "SELECT count(*) FROM pg_stat_replication WHERE state <> 'backup'"
                " AND (flush_lsn IS NULL OR flush_lsn < cast(cast(:position AS text) AS pg_lsn))"
            ),
            {"position": until},
        )
        return until, int(lacking.scalar_one())

    return act
