"""The operations of a session on one database, by key: what `sql` can do, made whole.

Items come and go as text; what they mean is the session's business.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from shardgate.errors import UsageError
from shardgate.items import decode, decode_all, split
from shardgate.purge import OPERATION_MEMORY, purge_of
from shardgate.sql import transactions
from shardgate.sql.dialect import Append, Operation, Outcome, TailRead
from shardgate.sql.transactions import VOID, RefusedError, RepeatedError, UndecodableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.items import Texts
    from shardgate.purge import Purge
    from shardgate.shards import Database
    from shardgate.sql.dialect import Guard, Key
    from shardgate.sql.transactions import Listed, RecordedOp, Tail

T = TypeVar("T")

logger = logging.getLogger("shardgate")

_OPTIMISTIC_POPS = 3
_NO_ITEM = (ValueError, TypeError, RecursionError)


@dataclass(slots=True)
class Codec:
    """How a session reads its rows. ``is_json``: as :func:`shardgate.items.decode` does."""

    decode: Callable[[str], Awaitable[Any]]
    is_json: bool

    async def item(self, data: str) -> Any:
        """The item of a row.

        Raises:
            UndecodableError: the row is damaged, or was written by something else.
        """
        try:
            return await self.decode(data)
        except _NO_ITEM as error:
            raise UndecodableError(str(error)) from error


async def _decode_json(text: str) -> Any:
    return decode(text)


JSON = Codec(decode=_decode_json, is_json=True)
"""That of sessions that have none of their own."""


class Place(NamedTuple):
    """A session on a database: which rows, and the guard under which they may be touched."""

    key: Key
    guard: Guard | None = None


class Store:
    """Sessions on one database.

    Every method raises RefusedError where the guard of its place fails: nothing was seen or
    changed, and the session has to be looked for elsewhere. Operations are remembered for
    ``operation_memory`` seconds, at least.
    """

    def __init__(self, database: Database, *, operation_memory: float = OPERATION_MEMORY) -> None:
        self.database = database
        self.operation_memory = operation_memory

    async def newest(self, place: Place, limit: int | None, codec: Codec) -> list[Any]:
        """The newest ``limit`` valid items (None: all), oldest first.

        Rows that cannot be decoded do not count. Where some are met, a longer tail is read anew, so
        that what is returned is what one statement saw.
        """
        key, guard = place
        window = limit
        while True:
            rows = await self.database.tail(TailRead(key, guard, window))
            if rows is None:
                raise RefusedError
            items = _decoded_at_once(rows) if codec.is_json else None
            if items is None:
                items = await self._one_by_one(key, rows, codec)
            count = len(rows) if isinstance(rows, list) else rows[0]
            whole = window is None or count < window
            if whole or limit is None or len(items) >= limit:
                return items if limit is None else items[-limit:]
            window = 2 * count

    async def _one_by_one(self, key: Key, newest_first: Texts, codec: Codec) -> list[Any]:
        """The items that can be decoded."""
        items, skipped = [], 0
        for data in reversed(split(newest_first)):
            try:
                items.append(await codec.item(data))
            except UndecodableError:
                skipped += 1
        _log_skipped(key, skipped)
        return items

    async def append(self, place: Place, operation: Operation, items: Sequence[str]) -> None:
        """Append ``items`` as one: nothing comes between them, and they come back in this order.

        Raises:
            UsageError: the operation's id has been used before, for something else.
        """
        key, guard = place
        outcome = await self.database.append(Append(key, guard, operation, items))
        self._count_write()
        if outcome is not Outcome.DONE:
            await self._accept(place, operation, outcome)

    async def pop(self, place: Place, operation: Operation, codec: Codec) -> Any | None:
        """Remove the newest item that can be decoded and return it; None where there is none.

        The first attempts are one statement each, without a lock held between two round trips. It
        is not used where only the codec can tell whether a row is an item. What was removed is
        recorded with the operation, so that a repetition of it returns the same item.
        """
        for _ in range(_OPTIMISTIC_POPS if codec.is_json else 0):
            outcome, data, first = await self._pop(place, operation)
            if outcome is Outcome.EMPTY and first:
                return None
            if outcome is Outcome.REFUSED:
                raise RefusedError
            if data is not None:
                return await codec.item(data)
            if outcome is not Outcome.CONTENDED:
                break  # for a repetition, "empty" may be its own doing
        item, skipped = await self._transact(
            transactions.pop_decodable, place.key, place.guard, operation, codec.item
        )
        _log_skipped(place.key, skipped)
        return item

    async def _pop(self, place: Place, operation: Operation) -> tuple[Outcome, str | None, bool]:
        """The outcome, what was removed, and whether nothing was sent before this."""
        pop, sent = self.database.dialect.pop, 0

        def send(connection: Any) -> Awaitable[tuple[Outcome, str | None]]:
            nonlocal sent
            sent = operation.sendings
            operation.sendings += 1
            return pop(connection, place.key, place.guard, operation)

        outcome, data = await self._write(send)
        return outcome, data, sent == 0

    async def clear(self, place: Place, operation: Operation) -> None:
        """Remove every item; the session stays, and its numbers go on."""
        clear = self.database.dialect.clear
        outcome = await self._write(
            lambda connection: clear(connection, place.key, place.guard, operation)
        )
        await self._accept(place, operation, outcome)

    async def _accept(self, place: Place, operation: Operation, outcome: Outcome) -> None:
        """Take the outcome of a change: a repetition of the same is a success."""
        if outcome is Outcome.REFUSED:
            raise RefusedError
        if outcome is Outcome.REPEATED:
            known = await self.recorded(place, operation.op_id)
            if known is not None and known.kind == VOID:
                raise UsageError(f"{_named(operation)} was settled as not landed; use a new one")
            if known is None or (known.kind, known.fingerprint) != (
                operation.kind,
                operation.fingerprint,
            ):
                raise UsageError(
                    f"{_named(operation)} was used before in this session, for other items or "
                    "another operation: use a new one"
                )

    async def recorded(self, place: Place, op_id: str) -> RecordedOp | None:
        """What is recorded of an operation; None where it has not taken effect (so far)."""
        return await self._query(transactions.find_op, place.key, op_id)

    async def settle(self, place: Place, op_id: str) -> bool:
        """Whether the operation took effect; if not, it is burnt, and never will."""
        burn = transactions.burn_op
        return await self._transact(burn, place.key, place.guard, op_id) is not None

    async def delete(self, place: Place, operation: Operation) -> bool:
        """Remove the session; whether there was one."""
        return await self._transact(transactions.delete_session, place.key, place.guard, operation)

    async def tail(self, place: Place, limit: int) -> Tail:
        """The newest ``limit`` rows with their numbers, to be replaced by :meth:`replace`."""
        return await self._transact(transactions.read_tail, place.key, place.guard, limit)

    async def replace(
        self,
        place: Place,
        operation: Operation,
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
        return await self._transact(
            transactions.replace_tail,
            place.key,
            place.guard,
            operation,
            incarnation=tail.incarnation,
            expected=expected,
            items=items,
            prune=prune,
        )

    async def replace_all(self, place: Place, operation: Operation, items: Sequence[str]) -> bool:
        """Put ``items`` in the place of everything; False where there is no such session."""
        return await self._transact(
            transactions.replace_all, place.key, place.guard, operation, items=items
        )

    async def page(
        self, tenant_id: str, *, limit: int, after: tuple[datetime, str] | None
    ) -> Listed:
        """The tenant's next ``limit`` rows on this database, most recently used first."""
        return await self._query(transactions.list_sessions, tenant_id, limit=limit, after=after)

    async def _write(self, action: Callable[[Any], Awaitable[T]]) -> T:
        return await self._counted(self.database.write(action))

    async def _transact(self, act: Callable[..., Awaitable[T]], *values: Any, **more: Any) -> T:
        tables = self.database.tables

        async def once(connection: AsyncConnection) -> T:
            return await act(connection, tables, *values, **more)

        try:
            return await self._counted(self.database.transact(once))
        except RepeatedError:  # a twin has committed meanwhile, and is found now
            return await self._counted(self.database.transact(once))

    async def _counted(self, write: Awaitable[T]) -> T:
        answer = await write
        self._count_write()
        return answer

    def _count_write(self) -> None:
        """A write has been answered: have old operations removed, now and then."""
        self._purge.count_write(self.database, self.operation_memory)

    @cached_property
    def _purge(self) -> Purge:
        return purge_of(self.database)

    async def _query(self, act: Callable[..., Awaitable[T]], *values: Any, **more: Any) -> T:
        tables = self.database.tables
        return await self.database.query(
            lambda connection: act(connection, tables, *values, **more)
        )


def _decoded_at_once(newest_first: Texts) -> list[Any] | None:
    """The items, oldest first; None where one of them cannot be decoded."""
    try:
        return decode_all(newest_first)[::-1]
    except _NO_ITEM:
        return None


def _named(operation: Operation) -> str:
    """What the caller knows it by: his own key, if he has chosen one."""
    op_id = operation.op_id
    return f"the idempotency key {op_id[1:]!r}" if op_id[0] == "=" else f"the op_id {op_id!r}"


def _log_skipped(key: Key, skipped: int) -> None:
    if skipped:
        logger.warning(
            "skipped %d undecodable rows of session %r of tenant %r",
            skipped,
            key.session_id,
            key.tenant_id,
        )
