"""Copying what a slot holds, while it is served and when it no longer is.

A pass walks the slot on both shards side by side, a page at a time, and brings the target level
where the two differ. As long as the source serves, a pass leaves behind what has changed since; the
last one, once the source is fenced, leaves nothing. It walks only those parts of a large slot whose
rows do not come to the same number on both sides.

The second pass compares the digests of all items. Whatever is written after it is read back and
compared, and whenever a session is written its items are counted: so none is served whose items
were not all compared with the source's. Nothing is remembered from one pass to the next but which
tenants the target knows, so it does not matter who has made those before.

What differs is told by (incarnation, revision): a session's row is read before its items, so items
are never older than the revision that is written with them.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from shardgate.errors import VerificationFailed
from shardgate.records import hold_row
from shardgate.settling import together
from shardgate.sql.moving import (
    Content,
    Digests,
    SessionKey,
    Span,
    digest_of,
    put_ops,
    put_sessions,
    put_tenants,
    read_digests,
    read_digests_from,
    read_items,
    read_items_from,
    read_op_sizes,
    read_op_times,
    read_ops,
    read_prints,
    read_sessions,
    read_tenants,
    read_versions,
    remove_ops,
    remove_sessions,
    shorten_session,
    version_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.handover import SlotRow
    from shardgate.recovery import Ends
    from shardgate.sql.moving import Version
    from shardgate.sql.purge import OpKey

T = TypeVar("T")
K = TypeVar("K", bound=tuple[Any, ...])
V = TypeVar("V")

PAGE = 1000
"""Sessions that are compared at a time."""
OPS_PAGE = 5000
"""Operations that are compared at a time."""
_MOST_SPANS = 16
"""Parts of a slot that are walked by themselves, if no more differ."""
MOST_ITEMS, MOST_BYTES = 1000, 1 << 20
"""Items, and bytes of them, that are written at a time, unless a single one has more."""


@dataclass(slots=True)
class Counts:
    """What has been done for a slot: what was written to the target, and what was verified."""

    sessions: int = 0
    items: int = 0
    nbytes: int = 0
    verified: int = 0


class Pace:
    """Keeps the copying of all who share it below so many bytes a second (None: no limit)."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0

    async def spend(self, nbytes: int) -> None:
        """Wait until as much may be copied as that."""
        if self._rate is None:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + nbytes / self._rate
        await asyncio.sleep(self._free_at - now)


class Calm:
    """Has copying wait while a slot is served by nobody, and slots be frozen one after the other.

    All who move slots in a process share its one thread: what one of them does, another waits for.
    Nobody waits longer than ``seconds``, so that a freeze that does not end holds up no other slot.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._frozen = 0
        self._changed = asyncio.Event()

    async def wait(self) -> None:
        """Wait until no slot is frozen."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                while self._frozen:
                    await self._changed.wait()

    async def end(self) -> None:
        """Wait until no slot is frozen, and be the one that freezes his: ``begin`` ends that."""
        await self.wait()
        self._frozen += 1
        self._changed.clear()

    def begin(self) -> None:
        """The slot is served again, or it is not known when it will be."""
        self._frozen -= 1
        if not self._frozen:
            self._changed.set()


@dataclass(frozen=True, slots=True)
class Site:
    """How the target is read and written: by transactions of its own, or within one."""

    read: Callable[[Callable[[AsyncConnection], Awaitable[Any]]], Awaitable[Any]]
    write: Callable[[Callable[[AsyncConnection], Awaitable[Any]]], Awaitable[Any]]
    urgent: bool = False
    """Whether nobody serves the slot meanwhile."""


@dataclass(slots=True)
class Copying:
    """The copying of one slot under one claim: ``claim`` is the target's row while it holds.

    ``beat`` is called every now and then, while nothing is urgent. ``tenants`` are those that the
    target is known to know: they are never removed. ``calm`` is waited for before each portion,
    unless this very slot is served by nobody; then ``hurry`` is called, which raises when that has
    lasted too long.
    """

    ends: Ends
    span: Span
    claim: SlotRow
    pace: Pace
    counts: Counts
    beat: Callable[[], Awaitable[None]]
    tenants: set[str] = field(default_factory=set)
    calm: Calm | None = None
    hurry: Callable[[], object] = lambda: None
    _is_small: bool = False

    async def copy(self, *, checks: bool = False) -> int:
        """One pass while the source may be serving; how many sessions and operations differed.

        ``checks``: it reads what it has written.

        Raises:
            RowChangedError: the claim holds no more.
            VerificationFailed: the target does not read what was just written to it.
        """
        return await self._pass(self._while_claimed(), checks=checks)

    async def verify(self) -> int:
        """As ``copy``; and compare the digests of all items on both shards.

        Sessions may change meanwhile: then what both have is compared.

        Raises:
            VerificationFailed: an item is missing or is another one.
        """
        return await self._pass(self._while_claimed(), compares=True)

    def _while_claimed(self) -> Site:
        target = self.ends.target

        async def write(act: Callable[[AsyncConnection], Awaitable[T]]) -> T:
            await self._wait_for_calm()

            async def claimed(connection: AsyncConnection) -> T:
                await hold_row(connection, target.tables, self.claim, alone=True)
                return await act(connection)

            return await target.transact(claimed)

        return Site(target.query, write)

    async def settle(self, connection: AsyncConnection) -> int:
        """The last pass, on a connection to the target, when the source is fenced.

        Raises:
            VerificationFailed: the target does not read what was just written to it.
        """
        self.calm = None

        async def at_once(act: Callable[[AsyncConnection], Awaitable[T]]) -> T:
            return await act(connection)

        site = Site(at_once, at_once, urgent=True)
        spans = [self.span] if self._is_small else await self._uneven(site)
        return sum([await self._pass(site, checks=True, span=span) for span in spans])

    async def _uneven(self, site: Site) -> list[Span]:
        """The parts of the slot that are not the same on both shards."""
        read = partial(read_prints, span=self.span)
        theirs, ours = await together((self._ask(read), site.read(self._on_target(read))))
        self.hurry()
        differ = [key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)]
        if len(differ) > _MOST_SPANS:
            return [self.span]
        spans: dict[int, Span] = {}
        for table, number in differ:
            prints = [found[table, number] for found in (theirs, ours) if (table, number) in found]
            known = spans.get(number, Span(prints[0].first, prints[0].last))
            first = min(known.first, *(one.first for one in prints))
            spans[number] = Span(first, max(known.last, *(one.last for one in prints)))
        return list(spans.values())

    async def _pass(
        self,
        site: Site,
        *,
        checks: bool = False,
        compares: bool = False,
        span: Span | None = None,
    ) -> int:
        differences = pages = 0
        span = span or self.span
        async for theirs, ours in self._pages(site, span):
            await self._admit(site, {key.tenant_id for key in theirs})
            gone = [key for key in ours if key not in theirs]
            await self._remove(site, gone, ours)
            changed = {key: ours.get(key) for key in theirs if ours.get(key) != theirs[key]}
            for content in self._contents(theirs, changed):
                async for batch in content:
                    await self._put(site, batch, checks=checks)
            if compares:
                await self._compare(theirs)
            differences += len(gone) + len(changed)
            pages += 1
        op_pages, op_differences = await self._pass_ops(site, span)
        self._is_small = pages == op_pages == 1
        return differences + op_differences

    async def _pages(
        self, site: Site, span: Span
    ) -> AsyncIterator[tuple[dict[SessionKey, Version], dict[SessionKey, Version]]]:
        """The versions of the sessions on the source and on the target, side by side."""
        after: SessionKey | None = None
        while True:
            read = partial(read_versions, span=span)
            theirs, ours, last = await self._page(site, read, after=after, limit=PAGE)
            yield theirs, ours
            if last is None:
                return
            after = last

    async def _page(
        self,
        site: Site,
        read: Callable[..., Awaitable[dict[K, V]]],
        *,
        after: K | None,
        limit: int,
    ) -> tuple[dict[K, V], dict[K, V], K | None]:
        """What both have after a key, up to where one of them ends, and that key unless it was the
        last page. Both are asked at the same time; the order of keys is that of bytes here, too.
        """
        page = partial(read, after=after, limit=limit)
        theirs, ours = await together((self._ask(page), site.read(self._on_target(page))))
        if site.urgent:
            self.hurry()
        ends = [list(found)[-1] for found in (theirs, ours) if len(found) == limit]
        if not ends:
            return theirs, ours, None
        last = min(ends)
        return up_to(last, theirs), up_to(last, ours), last

    def _contents(
        self,
        theirs: Mapping[SessionKey, Version],
        changed: Mapping[SessionKey, Version | None],
    ) -> Iterator[AsyncIterator[list[Content]]]:
        """What is to be put for the sessions that have changed, in portions."""
        small: list[SessionKey] = []
        for key, ours in changed.items():
            version = theirs[key]
            if is_large(version) or (ours is not None and version.has_only_grown_since(ours)):
                yield self._tail(key, ours)
            else:
                small.append(key)
        for batch in batches(small, theirs):
            yield self._whole(batch)

    async def _whole(self, keys: list[SessionKey]) -> AsyncIterator[list[Content]]:
        rows = await self._ask(read_sessions, keys=keys)
        items = await self._ask(read_items, keys=rows)
        contents = []
        for key, row in rows.items():
            # A session that was made anew meanwhile has items that this row knows nothing of.
            own = [item for item in items[key] if item["seq"] >= row["floor_seq"]]
            contents.append(Content(row, own, since=row["floor_seq"]))
        yield contents

    async def _tail(self, key: SessionKey, ours: Version | None) -> AsyncIterator[list[Content]]:
        """What the target lacks of a session if it has only grown, else all of it, in portions of
        which only the last completes it.

        Whether it has is told by the row that is written: since the versions were compared it may
        have been deleted and made anew, or have lost items.
        """
        row = (await self._ask(read_sessions, keys=[key])).get(key)
        if row is None:
            return
        grown = ours is not None and version_of(row).has_only_grown_since(ours)
        since = ours.next_seq if grown and ours is not None else row["floor_seq"]
        while True:
            limit = portion_of(version_of(row))
            items = await self._ask(read_items_from, key=key, since=since, limit=limit)
            below = items[-1]["seq"] + 1 if len(items) == limit else None
            yield [Content(row, items, since, below, whole=below is None)]
            if below is None:
                return
            since = below

    async def _put(self, site: Site, contents: list[Content], *, checks: bool) -> None:
        tables = self.ends.target.tables
        uneven = await site.write(partial(put_sessions, tables=tables, contents=contents))
        if uneven and site.urgent:
            raise self._failure(uneven[0])
        if checks:
            for content in contents:
                await self._check_written(site, content)
        size = sum(content.nbytes for content in contents)
        self.counts.sessions += sum(content.whole for content in contents)
        self.counts.items += sum(len(content.items) for content in contents)
        self.counts.nbytes += size
        await self._pause(site, size)

    async def _check_written(self, site: Site, content: Content) -> None:
        read = partial(
            read_digests_from, key=content.key, since=content.since, limit=len(content.items) + 1
        )
        found = await site.read(self._on_target(read))
        if content.below is not None:
            found = {seq: digest for seq, digest in found.items() if seq < content.below}
        if found != {item["seq"]: digest_of(item["message_data"]) for item in content.items}:
            await self._check_claim(site)
            raise self._failure(content.key)
        self.counts.verified += len(found)

    async def _check_claim(self, site: Site) -> None:
        """Find out whether somebody else writes there by now: then nothing was wrong."""
        if not site.urgent:
            target = self.ends.target
            await target.query(partial(hold_row, tables=target.tables, row=self.claim))

    async def _remove(
        self, site: Site, keys: list[SessionKey], ours: Mapping[SessionKey, Version]
    ) -> None:
        tables = self.ends.target.tables
        for key in keys:
            if is_large(ours[key]):
                shorten = partial(shorten_session, tables=tables, key=key, items=MOST_ITEMS)
                while await site.write(shorten):
                    pass
        for start in range(0, len(keys), MOST_ITEMS):
            part = keys[start : start + MOST_ITEMS]
            await site.write(partial(remove_sessions, tables=tables, keys=part))

    async def _admit(self, site: Site, tenant_ids: set[str]) -> None:
        """Have the target know the tenants as the source does: a stranger would be admitted."""
        unknown = tenant_ids - self.tenants
        if unknown:
            rows = await self._ask(read_tenants, tenant_ids=unknown)
            put = partial(put_tenants, tables=self.ends.target.tables, rows=rows)
            await site.write(put)
            if not site.urgent:  # else it may be rolled back with the decision
                self.tenants |= unknown

    async def _pass_ops(self, site: Site, span: Span) -> tuple[int, int]:
        """Bring the operations level; how many pages it were, and how many differed.

        They outlive their sessions, and are never changed; but a key that one shard has forgotten,
        and not the other one, may have been used again.
        """
        after: OpKey | None = None
        pages = differences = 0
        read = partial(read_op_times, span=span)
        while True:
            theirs, ours, last = await self._page(site, read, after=after, limit=OPS_PAGE)
            await self._admit(site, {key.tenant_id for key in theirs})
            wrong = [key for key in ours if theirs.get(key) != ours[key]]
            if wrong:
                tables = self.ends.target.tables
                await site.write(partial(remove_ops, tables=tables, keys=wrong))
            missing = [key for key in theirs if ours.get(key) != theirs[key]]
            if missing:
                await self._put_ops(site, missing)
            differences += len(missing) + sum(key not in theirs for key in wrong)
            pages += 1
            if last is None:
                return pages, differences
            after = last

    async def _put_ops(self, site: Site, missing: list[OpKey]) -> None:
        """Copy these operations, and whatever lies between them."""
        sizes = await self._ask(read_op_sizes, first=missing[0], last=missing[-1])
        for portion in portions(sizes):
            rows = await self._ask(read_ops, first=portion[0], last=portion[-1])
            await site.write(partial(put_ops, tables=self.ends.target.tables, rows=rows))
            await self._pause(site, sum(sizes[key] for key in portion))

    async def _pause(self, site: Site, nbytes: int) -> None:
        """Keep the pace after so much was written; or hurry, where nobody serves the slot."""
        if site.urgent:
            self.hurry()
        else:
            await self.beat()
            await self.pace.spend(nbytes)

    async def _compare(self, versions: Mapping[SessionKey, Version]) -> None:
        """Compare the digests of sessions that were level a moment ago."""
        for key, version in versions.items():
            if is_large(version):
                await self._compare_large(key, version)
        small = [key for key in versions if not is_large(versions[key])]
        for batch in batches(small, versions):
            await self._compare_small(batch)
            await self.beat()
            await self.pace.spend(sum(versions[key].byte_count for key in batch))

    async def _compare_small(self, keys: list[SessionKey]) -> None:
        read: Any = partial(read_digests, keys=keys)
        theirs: dict[SessionKey, Digests]
        ours: dict[SessionKey, Digests]
        theirs, ours = await together(
            (self._ask(read), self.ends.target.query(self._on_target(read)))
        )
        for key in theirs.keys() & ours.keys():
            if theirs[key].contradict(ours[key]):
                raise self._failure(key)
            self.counts.verified += len(ours[key].of)

    async def _compare_large(self, key: SessionKey, theirs: Version) -> None:
        """In portions, so not in one moment: what one has and the other has not is a failure if
        both are, after that, what they were before it, and the same. Another item is a failure
        unless it is one of another incarnation."""
        since: int | None = theirs.floor_seq
        lacks = contradicts = False
        limit = portion_of(theirs)
        while since is not None:
            read = partial(read_digests_from, key=key, since=since, limit=limit)
            expected = await self._ask(read)
            found = await self.ends.target.query(self._on_target(read))
            since = max(expected) + 1 if len(expected) == limit else None
            if since is not None:
                found = {seq: digest for seq, digest in found.items() if seq < since}
            common = expected.keys() & found.keys()
            contradicts |= any(expected[seq] != found[seq] for seq in common)
            lacks |= expected.keys() != found.keys()
            self.counts.verified += len(common)
            await self.beat()
            await self.pace.spend(theirs.byte_count * len(expected) // max(theirs.item_count, 1))
        if (lacks or contradicts) and await self._fails(key, theirs, contradicts=contradicts):
            raise self._failure(key)

    async def _fails(self, key: SessionKey, before: Version, *, contradicts: bool) -> bool:
        """Whether what was found of a session cannot come from changes meanwhile."""
        read = partial(read_versions, span=Span(key.h, key.h))
        theirs = (await self._ask(read)).get(key)
        ours = (await self.ends.target.query(self._on_target(read))).get(key)
        if theirs is None or ours is None or theirs.incarnation != ours.incarnation:
            return False
        return contradicts or before == theirs == ours

    def _failure(self, key: SessionKey) -> VerificationFailed:
        return VerificationFailed(
            f"session {key.session_id!r} of tenant {key.tenant_id!r} is not the same on shard "
            f"{self.ends.target.name!r} as on shard {self.ends.source.name!r}: slot "
            f"{self.ends.slot} was not moved"
        )

    async def _ask(self, read: Callable[..., Awaitable[T]], **values: Any) -> T:
        await self._wait_for_calm()
        source = self.ends.source
        return await source.query(partial(read, tables=source.tables, **values))

    async def _wait_for_calm(self) -> None:
        if self.calm is not None:
            await self.calm.wait()

    def _on_target(
        self, read: Callable[..., Awaitable[T]]
    ) -> Callable[[AsyncConnection], Awaitable[T]]:
        return partial(read, tables=self.ends.target.tables)


def up_to(last: K, found: dict[K, V]) -> dict[K, V]:
    """What was found, without what comes after a key."""
    return {key: value for key, value in found.items() if key <= last}


def portions(sizes: Mapping[OpKey, int]) -> Iterator[list[OpKey]]:
    """Operations, in order, as many at a time as may be written together."""
    portion: list[OpKey] = []
    size = 0
    for key, nbytes in sizes.items():
        size += nbytes
        if portion and (size > MOST_BYTES or len(portion) == MOST_ITEMS):
            yield portion
            portion, size = [], nbytes
        portion.append(key)
    if portion:
        yield portion


def is_large(version: Version) -> bool:
    return version.item_count > MOST_ITEMS or version.byte_count > MOST_BYTES


def portion_of(version: Version) -> int:
    """How many items of a session are about as many bytes as may be read or written at a time."""
    average = max(version.byte_count // max(version.item_count, 1), 1)
    return max(1, min(MOST_ITEMS, MOST_BYTES // average))


def batches(
    keys: Iterable[SessionKey], versions: Mapping[SessionKey, Version]
) -> Iterator[list[SessionKey]]:
    """Sessions in portions of so many items and bytes at the most."""
    batch: list[SessionKey] = []
    items = size = 0
    for key in keys:
        version = versions[key]
        items, size = items + version.item_count, size + version.byte_count
        if batch and (items > MOST_ITEMS or size > MOST_BYTES):
            yield batch
            batch, items, size = [], version.item_count, version.byte_count
        batch.append(key)
    if batch:
        yield batch
