"""Whether what a shard has committed is safe from the promotion of one of its standbys.

A move stops the source in one commit and gives the slot to the target in another one. If a standby
is promoted that lacks one of the two, both shards serve the slot, or neither does.
"""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from shardgate.errors import StandbysNotSafe
from shardgate.shards import driver_error

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.shards import Shard

_MYSQL = ("mysql", "mariadb")
_POLL_SECONDS = 0.2
_ACCEPT = "accept standbys that do not confirm commits (--accept-async-standbys)"

_QUORUM = re.compile(r"\s*ANY\s+(\d+)", re.IGNORECASE)
"""In ``synchronous_standby_names``: how many standbys have to confirm a commit, whichever."""

_ACCESS_DENIED = 1227


async def check_commits(shard: Shard) -> None:
    """Make sure that commits on a shard are confirmed by the standbys that are connected.

    One that is not connected is not seen: that it must not be promoted is the operator's to know.

    Raises:
        StandbysNotSafe: a standby need not confirm commits, or the shard does not let its user see
            whether there is one.
    """
    lagging = await shard.query(partial(_unconfirmed, shard=shard.name))
    if lagging:
        raise StandbysNotSafe(
            f"shard {shard.name!r} has {lagging} standbys that need not confirm its commits: if "
            "one of them were promoted during a move, what was written meanwhile could be lost. "
            f"Make them synchronous, or {_ACCEPT}"
        )


async def _unconfirmed(connection: AsyncConnection, *, shard: str) -> int:
    """How many of the connected standbys may lack a commit."""
    name = connection.dialect.name
    if name == "postgresql":
        return await _unconfirmed_on_postgresql(connection, shard)
    if name in _MYSQL:
        return await _unconfirmed_on_mysql(connection, shard)
    return 0


async def _unconfirmed_on_postgresql(connection: AsyncConnection, shard: str) -> int:
    states = await connection.execute(
        text(
            "SELECT count(*), count(*) FILTER (WHERE state IS NULL),"
            " count(*) FILTER (WHERE sync_state = 'sync'),"
            " count(*) FILTER (WHERE sync_state = 'quorum'),"
            " current_setting('synchronous_commit'), current_setting('synchronous_standby_names')"
            " FROM pg_stat_replication WHERE state IS DISTINCT FROM 'backup'"
        )
    )
    standbys, hidden, confirming, quorum, commits, names = states.one()
    _refuse_hidden(hidden, shard)
    if commits in ("off", "local"):
        return int(standbys)
    # Of those of which any k confirm, all but k may lack a commit.
    needed = _QUORUM.match(names)
    return int(standbys - confirming - (min(quorum, int(needed[1])) if needed else 0))


def _refuse_hidden(hidden: int, shard: str) -> None:
    """To most roles PostgreSQL shows that there is a standby, or a backup, and nothing else."""
    if hidden:
        raise StandbysNotSafe(
            f"shard {shard!r} has {hidden} standbys (or backups that are being taken), and its "
            "role may not see whether they confirm commits: pg_stat_replication hides that. GRANT "
            f"pg_monitor (or pg_read_all_stats) to the role, or {_ACCEPT}"
        )


async def _unconfirmed_on_mysql(connection: AsyncConnection, shard: str) -> int:
    """With semi-synchronous replication one of them confirms; which one is promoted, MySQL and
    MariaDB leave to others, who are to take the one that has most."""
    rows = await connection.execute(
        text(
            "SHOW GLOBAL STATUS WHERE variable_name IN ('Slaves_connected',"
            " 'Rpl_semi_sync_master_status', 'Rpl_semi_sync_source_status')"
        )
    )
    status: dict[str, str] = {row[0]: row[1] for row in rows}
    connected = status.pop("Slaves_connected", None)
    if "ON" in status.values():
        return 0
    if connected is not None:  # MariaDB tells everybody, MySQL has no such variable
        return int(connected)
    return await _replicas_of_mysql(connection, shard)


async def _replicas_of_mysql(connection: AsyncConnection, shard: str) -> int:
    """How many there are; without PROCESS a user sees no threads but its own, and no error."""
    if not (await connection.execute(text("SELECT @@global.log_bin"))).scalar_one():
        return 0
    try:  # a grant may come by a role: only the use of the privilege tells
        await connection.execute(text("SELECT 1 FROM information_schema.INNODB_METRICS LIMIT 1"))
    except DBAPIError as error:
        if driver_error(error).args[:1] != (_ACCESS_DENIED,):
            raise
        raise StandbysNotSafe(
            f"shard {shard!r} writes a binary log, so it may have replicas, and its user may not "
            "see whether it has: GRANT PROCESS ON *.* to the user, make replication "
            f"semi-synchronous, or {_ACCEPT}"
        ) from error
    replicas: Any = await connection.execute(
        text(
            "SELECT COUNT(*) FROM information_schema.processlist WHERE command LIKE 'Binlog Dump%'"
        )
    )
    return int(replicas.scalar_one())


async def wait_for_standbys(shard: Shard, *, seconds: float) -> None:
    """Wait until the standbys that are connected have what the shard has committed by now.

    Raises:
        StandbysNotSafe: they do not have it in time, or it cannot be found out.
    """
    missing = await shard.query(_missing_on(None, shard.name))
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
        missing = await shard.query(_missing_on(position, shard.name))


def _missing_on(position: str | None, shard: str) -> Any:
    """Asks for the position of the log (or takes the one given), and how many lack it."""

    async def act(connection: AsyncConnection) -> tuple[str | None, int]:
        if connection.dialect.name != "postgresql":
            return None, await _unconfirmed(connection, shard=shard)
        row = await connection.execute(
            text("SELECT coalesce(cast(:position AS text), pg_current_wal_insert_lsn()::text)"),
            {"position": position},
        )
        until = row.scalar_one()
        lacking = await connection.execute(
            text(
                "SELECT count(*) FILTER (WHERE state IS NULL), count(*) FROM pg_stat_replication"
                " WHERE state IS DISTINCT FROM 'backup' AND"
                " (flush_lsn IS NULL OR flush_lsn < cast(cast(:position AS text) AS pg_lsn))"
            ),
            {"position": until},
        )
        hidden, count = lacking.one()
        _refuse_hidden(hidden, shard)
        return until, int(count)

    return act
