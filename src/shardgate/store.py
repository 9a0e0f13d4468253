"""The operations of a session on one database, by key: what `sql` can do, made whole.

Items come and go as text; what they mean is the session's business.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardgate.sql import transactions
from shardgate.sql.transactions import UndecodableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    from shardgate.shards import Database
    from shardgate.sql.dialect import Key, Popped, Row
    from shardgate.sql.transactions import SessionInfo, Tail

logger = logging.getLogger("shardgate")

_OPTIMISTIC_POPS = 3
_INCARNATION_BITS = 63


@dataclass(frozen=True, slots=True)
class Codec:
    """How a session reads its rows. ``is_json`` promises that whatever is JSON can be decoded."""

    decode: Callable[[str], Awaitable[Any]]
    is_json: bool

    async def item(self, data: str) -> Any:
        """The item of a row.

        Raises:
            UndecodableError: the row is damaged, or was written by something else.
        """
        try:
            return await self.decode(data)
        except (ValueError, TypeError, RecursionError) as error:
            raise UndecodableError(str(error)) from error


class Store:
    """Sessions on one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def newest(self, key: Key, limit: int | None, codec: Codec) -> list[Any]:
        """The newest ``limit`` valid items (None: all), oldest first.

        Rows that cannot be decoded do not count. Where some are met, a longer tail is read anew, so
        that what is returned is what one statement saw.
        """
        window = limit
        while True:
            rows = await self._tail(key, window)
            items = await self._decoded(key, rows, codec)
            whole = window is None or len(rows) < window
            if whole or limit is None or len(items) >= limit:
                return items if limit is None else items[-limit:]
            window = 2 * len(rows)

    async def _tail(self, key: Key, limit: int | None) -> list[Row]:
        dialect = self.database.dialect
        return await self.database.read(lambda connection: dialect.tail(connection, key, limit))

    async def _decoded(self, key: Key, newest_first: Sequence[Row], codec: Codec) -> list[Any]:
        items, skipped = [], 0
        for row in reversed(newest_first):
            try:
                items.append(await codec.item(row.data))
            except UndecodableError:
                skipped += 1
        _log_skipped(key, skipped)
        return items

    async def append(self, key: Key, items: Sequence[str]) -> None:
        """Append ``items`` as one: nothing comes between them, and they come back in this order."""
        dialect, incarnation = self.database.dialect, secrets.randbits(_INCARNATION_BITS)
        await self.database.write(
            lambda connection: dialect.append(connection, key, items, incarnation)
        )

    async def pop(self, key: Key, codec: Codec) -> Any | None:
        """Remove the newest item that can be decoded and return it; None where there is none.

        The first attempts are one statement each, without a lock held between two round trips. It
        is not used where only the codec can tell whether a row is an item.
        """
        for _ in range(_OPTIMISTIC_POPS if codec.is_json else 0):
            popped = await self._pop(key)
            if popped.outcome == "empty":
                return None
            if popped.data is not None:
                return await codec.item(popped.data)
            if popped.outcome == "undecodable":
                break
        item, skipped = await self.database.transact(
            lambda connection: transactions.pop_decodable(
                connection, self.database.tables, key, codec.item
            )
        )
        _log_skipped(key, skipped)
        return item

    async def _pop(self, key: Key) -> Popped:
        dialect = self.database.dialect
        return await self.database.write(lambda connection: dialect.pop(connection, key))

    async def clear(self, key: Key) -> None:
        """Remove every item; the session stays, and its numbers go on."""
        dialect = self.database.dialect
        await self.database.write(lambda connection: dialect.clear(connection, key))

    async def delete(self, key: Key) -> bool:
        """Remove the session; whether there was one."""
        return await self.database.transact(self._bound(transactions.delete_session, key))

    async def tail(self, key: Key, limit: int) -> Tail:
        """The newest ``limit`` rows with their numbers, to be replaced by :meth:`replace`."""
        return await self.database.query(self._bound(transactions.read_tail, key, limit))

    async def replace(
        self,
        key: Key,
        tail: Tail,
        *,
        start: int,
        items: Sequence[str],
        prune: Callable[[str], Awaitable[Any]] | None,
    ) -> bool:
        """Put ``items`` in the place of ``tail``'s rows from ``start`` on, unless these changed."""
        expected = [row.seq for row in tail.rows[start:]]
        if not expected:
            return False
        return await self.database.transact(
            self._bound(
                transactions.replace_tail,
                key,
                incarnation=tail.incarnation,
                expected=expected,
                items=items,
                prune=prune,
            )
        )

    async def page(
        self, tenant_id: str, *, limit: int, after: tuple[datetime, str] | None
    ) -> list[SessionInfo]:
        """The tenant's next ``limit`` sessions on this database, most recently used first."""
        return await self.database.query(
            self._bound(transactions.list_sessions, tenant_id, limit=limit, after=after)
        )

    def _bound(self, act: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any) -> Any:
        return lambda connection: act(connection, self.database.tables, *arguments, **options)


def _log_skipped(key: Key, skipped: int) -> None:
    if skipped:
        logger.warning(
            "skipped %d undecodable rows of session %r of tenant %r",
            skipped,
            key.session_id,
            key.tenant_id,
        )
