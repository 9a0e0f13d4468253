"""Sessions written by SQL, where a contestant's own appends would take too long.

Rows lie session after session, as they do where a contestant appends a whole history at once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import asyncpg

from benchmarks.load import items
from benchmarks.servers import driver_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.contestants.base import Name
    from shardgate import Gateway

BULK = 2_000
"""From how many sessions on they are written by SQL."""
_BATCH = 5_000

_SHARDGATE_SESSIONS = """
    INSERT INTO shardgate_sessions
        (tenant_id, session_id, h, incarnation, next_seq, floor_seq, revision, item_count,
         byte_count, created_at, updated_at, listed_at)
    SELECT tenant, session, h, h, $4 + 1, 1, 1, $4, $5, now, now, now
    FROM unnest($1::text[], $2::text[], $3::bigint[]) AS new (tenant, session, h),
        timezone('UTC', now()) AS now
    ON CONFLICT DO NOTHING
"""
_SHARDGATE_MESSAGES = """
    INSERT INTO shardgate_messages
        (tenant_id, session_id, seq, message_data, nbytes, created_at)
    SELECT tenant, session, place, data, length(data), timezone('UTC', now())
    FROM unnest($1::text[], $2::text[]) AS new (tenant, session),
        unnest($3::text[]) WITH ORDINALITY AS item (data, place)
    ON CONFLICT DO NOTHING
"""
_SDK_SESSIONS = "INSERT INTO agent_sessions (session_id) SELECT unnest($1::text[])"
# Two items of the same moment at a time, as an exchange appends them.
_SDK_MESSAGES = """
    INSERT INTO agent_messages (session_id, message_data, created_at)
    SELECT session, data, timezone('UTC', now()) - interval '1 day' + (place / 2) * interval '1 s'
    FROM unnest($1::text[]) AS session, unnest($2::text[]) WITH ORDINALITY AS item (data, place)
"""
_ADK_SESSIONS = """
    INSERT INTO sessions (app_name, user_id, id, state, create_time, update_time)
    SELECT s.app_name, new.tenant, new.session, s.state, s.create_time, s.update_time
    FROM sessions AS s, unnest($1::text[], $2::text[]) AS new (tenant, session)
    WHERE s.id = $3
"""
_ADK_EVENTS = """
    INSERT INTO events
        (id, app_name, user_id, session_id, invocation_id, timestamp, event_data)
    SELECT gen_random_uuid()::text, e.app_name, new.tenant, new.session, e.invocation_id,
        e.timestamp - interval '1 day' + place * interval '1 s', e.event_data
    FROM events AS e, unnest($1::text[], $2::text[]) AS new (tenant, session),
        generate_series(1, $4::int) AS place
    WHERE e.session_id = $3
"""


def texts(history: int) -> list[str]:
    """A history as it is stored: one JSON text for each item."""
    return [json.dumps(item, separators=(",", ":")) for item in items(history)]


async def load_shardgate(
    gateway: Gateway, urls: dict[str, str], names: list[Name], history: int
) -> None:
    """Fill a gateway's shards. The tenants are admitted by an append each, on each shard."""
    data = texts(history)
    by_shard: dict[str, list[tuple[Name, int]]] = defaultdict(list)
    for name in names:
        place = gateway.route(name.tenant, name.session)
        by_shard[place.shard].append((name, place.h))
    for shard, placed in by_shard.items():
        await _admit(gateway, placed)
        size = sum(map(len, data))
        for batch in _batches(placed):
            tenants, sessions = _columns([name for name, _ in batch])
            hashes = [h for _, h in batch]
            await _run(
                urls[shard],
                (_SHARDGATE_SESSIONS, tenants, sessions, hashes, history, size),
                (_SHARDGATE_MESSAGES, tenants, sessions, data),
            )


async def _admit(gateway: Gateway, placed: list[tuple[Name, int]]) -> None:
    """A tenant's row is made where its first session is used; what is written here is kept."""
    for name in {name.tenant: name for name, _ in placed}.values():
        session = gateway.tenant(name.tenant).session(name.session)
        await session.get_items(1)


async def load_sdk(url: str, names: list[Name], history: int) -> None:
    """Fill the tables of the SDK's SQLAlchemySession."""
    data = texts(history)
    for batch in _batches(names):
        sessions = [name.text for name in batch]
        await _run(url, (_SDK_SESSIONS, sessions), (_SDK_MESSAGES, sessions, data))


async def load_adk(url: str, names: list[Name], history: int, template: str) -> None:
    """Fill ADK's tables with copies of a session that it made itself, of two events."""
    for batch in _batches(names):
        columns = _columns(batch)
        await _run(
            url,
            (_ADK_SESSIONS, *columns, template),
            (_ADK_EVENTS, *columns, template, (history + 1) // 2),
        )


def _columns(names: list[Name]) -> tuple[list[str], list[str]]:
    return [name.tenant for name in names], [name.session for name in names]


def _batches(rows: list[Any]) -> Iterator[list[Any]]:
    for first in range(0, len(rows), _BATCH):
        yield rows[first : first + _BATCH]


async def _run(url: str, *statements: tuple[Any, ...]) -> None:
    connection = await asyncpg.connect(driver_url(url))
    try:
        for statement, *values in statements:
            await connection.execute(statement, *values, timeout=600)
    finally:
        await connection.close()


async def settle(urls: list[str]) -> None:
    """Statistics for the planner and a checkpoint, so that nobody pays for the loading."""
    for url in urls:
        await _run(url, ("VACUUM ANALYZE",), ("CHECKPOINT",))
