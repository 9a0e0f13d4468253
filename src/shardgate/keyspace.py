"""A keyspace at work: what this process knows of its slot map, and finding sessions by it.

What is known may be out of date, and nothing depends on it: each statement has the shard itself
confirm that it owns the session's slot. Where the guard fails, the shard's own record tells where
the slot has gone; where that leads nowhere, all shards are read afresh.

A shard that contradicts its peers is put in quarantine: nothing is written there, and the others
serve. It is looked at when the map is read, when a connection leads to a server that has not been
seen before (after a restart, a failover, a restore), and again while it is in quarantine.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from shardgate.agreement import contradictions
from shardgate.errors import (
    OutcomeUnknown,
    OwnershipConflict,
    ShardQuarantined,
    ShardUnavailable,
    TenantRefused,
    UsageError,
)
from shardgate.founding import create
from shardgate.purge import end_purge, purge_all
from shardgate.records import ADMITTED, DRAINING, OWNED, admit, owned_slots, read_record, standing
from shardgate.router import route
from shardgate.settling import together
from shardgate.shards import Quarantine, ask_all
from shardgate.slotmap import Reading, conflict, consult, map_of, not_named, unnamed_owners
from shardgate.slots import from_signed, slot_of, tenant_slots
from shardgate.sql.dialect import Guard, Key
from shardgate.sql.transactions import RefusedError
from shardgate.store import Place, Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from shardgate.agreement import Plan
    from shardgate.records import ShardRecord, Standing
    from shardgate.router import Route
    from shardgate.shards import Shard
    from shardgate.sql.transactions import Listed, SessionInfo
    from shardgate.topology import KeyspaceMap

T = TypeVar("T")

logger = logging.getLogger("shardgate")

_POLL = 0.02
"""Seconds between two looks at a slot that is being moved, or that nobody seems to have."""
_GLANCE_SECONDS = 2.0
"""How long a shard's peers are waited for when it is compared with them."""
_QUARANTINE_SECONDS = 5.0
"""After how long a shard in quarantine is looked at again, if it is asked for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A shard's part of a listing, and the slots that it owned at that moment."""

    owned: frozenset[int]
    sessions: list[SessionInfo]


class Keyspace:
    """One keyspace of a gateway."""

    def __init__(
        self,
        plan: Plan,
        shards: Mapping[str, Shard],
        *,
        creates: bool,
        deadline: float,
        operation_memory: float,
    ) -> None:
        self.plan = plan
        self.shards = shards
        self.map: KeyspaceMap | None = None
        self._stores = {
            name: Store(shard, operation_memory=operation_memory) for name, shard in shards.items()
        }
        self._creates = creates
        self._deadline = deadline
        self._loading: asyncio.Task[KeyspaceMap] | None = None
        self._owned: dict[str, tuple[int, frozenset[int]]] = {}
        self._seen: dict[str, int] = {}
        for shard in shards.values():
            shard.verify = self._verify

    async def create(self) -> None:
        """Create the keyspace on its shards, or what is missing of it."""
        await create(self.plan, self.shards)
        await self._load_map()

    async def examine(self) -> Reading:
        """Read and compare what all shards say, and act on it."""
        reading = await consult(self.plan, self.shards, seen=self._seen)
        self._judge(reading)
        return reading

    async def known(self) -> KeyspaceMap:
        """The map: as known, or read now."""
        return self.map or await self._read()

    async def close(self) -> None:
        """End what goes on in the background."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])
        await together(map(end_purge, self.shards.values()))

    async def purge(self) -> dict[str, int]:
        """Remove all old operations from the shards; how many it were, by name."""
        removed = await together(map(purge_all, self._stores.values()))
        return dict(zip(self._stores, removed, strict=True))

    async def perform(
        self, tenant_id: str, session_id: str, act: Callable[[Store, Place], Awaitable[T]]
    ) -> T:
        """Run ``act`` where the session lives, following it for as long as the deadline allows.

        Raises:
            OwnershipConflict: no shard that answers owns the session's slot, or one that the
                settings do not have.
            ShardQuarantined: the shard is not the one that it is taken for.
            TenantRefused: the tenant is not admitted there.
        """
        clock = asyncio.get_running_loop().time
        give_up = clock() + self._deadline
        while True:
            known = await self.known()
            where = route(known, tenant_id, session_id)
            if where.shard not in self.shards:
                raise self._not_named(known, where.shard)
            await self._reconsider(self.shards[where.shard])
            guard = Guard(where.slot, known.uuids[where.shard])
            place = Place(Key(tenant_id, session_id, where.h), guard)
            try:
                return await act(self._stores[where.shard], place)
            except RefusedError:
                if clock() > give_up:
                    raise self._nobody_has(where) from None
            except (ShardQuarantined, OutcomeUnknown) as error:
                found_out = isinstance(error, ShardQuarantined) or isinstance(
                    error.__cause__, ShardQuarantined
                )
                now = await self.known()
                if not found_out or route(now, tenant_id, session_id).shard == where.shard:
                    raise
                # The same inquiry has told where the session lives by now. An operation that was
                # sent before has taken its op there, if it took effect.
                continue
            await self._learn(known, where, tenant_id)

    async def survey(
        self, tenant_id: str, *, limit: int, after: Any, partial_: bool
    ) -> tuple[list[list[SessionInfo]], tuple[str, ...]]:
        """A page of a tenant's sessions from each shard, and the shards that did not answer.

        Every slot that the tenant's sessions can be in is claimed by exactly one of the answers, or
        was owned by a shard that did not answer: while slots change hands between two answers, all
        are asked again.
        """
        clock = asyncio.get_running_loop().time
        give_up = clock() + self._deadline
        while True:
            known = await self.known()
            slots = tenant_slots(tenant_id, slots=known.slots, spread=known.spread)
            wanted = frozenset(range(known.slots)) if slots is None else slots
            owners = {known.owner(slot) for slot in wanted}
            asked = sorted(owners & self.shards.keys())
            answers, down = await ask_all(
                {name: self._ask(known, name, tenant_id, limit, after) for name in asked}
            )
            down |= {name: self._not_named(known, name) for name in owners - self.shards.keys()}
            if down and not partial_:
                raise next(iter(down.values()))
            claims = Counter(slot for answer in answers.values() for slot in answer.owned & wanted)
            missing = {known.owner(slot) for slot in wanted - claims.keys()}
            if missing <= down.keys() and max(claims.values(), default=1) == 1:
                return [answer.sessions for answer in answers.values()], tuple(down)
            if clock() > give_up:
                raise OwnershipConflict(
                    f"keyspace {self.plan.keyspace!r}: a tenant's slots are owned by no shard that "
                    "answers, or by two",
                    keyspace=self.plan.keyspace,
                )
            await asyncio.sleep(_POLL)
            await self._read()

    async def _ask(
        self, known: KeyspaceMap, name: str, tenant_id: str, limit: int, after: Any
    ) -> Answer:
        """A shard's page, with the slots that it owned at that moment.

        These are remembered by the version of its slot map. Where it has changed they are read, and
        the page is asked for again.
        """
        await self._reconsider(self.shards[name])
        sessions: list[SessionInfo] = []
        place = after
        while True:
            listed = await self._stores[name].page(tenant_id, limit=limit, after=place)
            if listed.shard_uuid != known.uuids[name]:
                self._owned.pop(name, None)
                await self._read()
                self.shards[name].refuse(writes=False)
                raise self._not_itself(name, listed.shard_uuid)
            version, owned = self._owned.get(name, (None, frozenset()))
            if version != listed.map_version:
                self._owned[name] = await owned_slots(self.shards[name])
                sessions, place = [], after
                continue
            if self.shards[name].quarantine is not None:  # its claims may be out of date
                owned &= frozenset((self.map or known).slots_of(name))
            sessions += self._visible(listed, owned)
            if len(listed.sessions) < limit or len(sessions) >= limit:
                return Answer(owned, sessions)
            _, last = listed.sessions[-1]
            place = last.listed_at, last.session_id

    def _visible(self, listed: Listed, owned: frozenset[int]) -> list[SessionInfo]:
        """The sessions that are the shard's: what it has copied, or not yet purged, is not."""
        slots = self.plan.slots
        return [info for h, info in listed.sessions if slot_of(from_signed(h), slots) in owned]

    async def _learn(self, known: KeyspaceMap, where: Route, tenant_id: str) -> None:
        """Find out why the guard failed, and what to do about it."""
        if self.shards[where.shard].quarantine is not None and self.map is known:
            self.shards[where.shard].refuse(writes=True)  # what it says of the slot is out of date
        said = await standing(self.shards[where.shard], where.slot, tenant_id)
        own = known.uuids[where.shard]
        if said.shard_uuid != own:
            await self._read()
            self.shards[where.shard].refuse(writes=False)
            raise self._not_itself(where.shard, said.shard_uuid)
        if said.slot is not None and said.slot.owner == own:
            await self._wait_or_admit(where.shard, said, tenant_id)
            return
        if not self._follow(known, where, said):
            await self._read()
            await asyncio.sleep(_POLL)

    async def _wait_or_admit(self, shard: str, said: Standing, tenant_id: str) -> None:
        state = "" if said.slot is None else said.slot.state
        if state == OWNED and said.tenant is None:
            await admit(self.shards[shard], tenant_id)
        elif state == OWNED and said.tenant != ADMITTED:
            raise TenantRefused(
                f"tenant {tenant_id!r} is {said.tenant} in keyspace {self.plan.keyspace!r}",
                tenant=tenant_id,
            )
        elif state == DRAINING:
            await asyncio.sleep(_POLL)

    def _follow(self, known: KeyspaceMap, where: Route, said: Standing) -> bool:
        """Take a shard's word for where a slot has gone, unless it is older than what is known."""
        if said.slot is None or said.slot.epoch < where.epoch:
            return False
        owner = next((name for name, uuid in known.uuids.items() if uuid == said.slot.owner), None)
        if owner not in self.shards or owner == where.shard:
            return False
        current = self.map or known
        self.map = current.with_slot(where.slot, str(owner), said.slot.epoch)
        return True

    def _not_itself(self, shard: str, uuid: str | None) -> OwnershipConflict:
        found = "has no record of its own" if uuid is None else "is another shard"
        what = f"shard {shard!r} {found} (UUID {uuid}): is its URL the right one?"
        return conflict(self.plan, what)

    def _not_named(self, known: KeyspaceMap, shard: str) -> OwnershipConflict:
        return conflict(self.plan, not_named(shard, len(known.slots_of(shard))))

    def _nobody_has(self, where: Route) -> OwnershipConflict:
        return OwnershipConflict(
            f"keyspace {self.plan.keyspace!r}: slot {where.slot} was refused by shard "
            f"{where.shard!r} and is owned by no shard that answers",
            keyspace=self.plan.keyspace,
        )

    async def _read(self) -> KeyspaceMap:
        """Read the map afresh, once for all who ask meanwhile.

        They share the outcome: to ask again one after the other would outlast their deadlines.
        """
        loading = self._loading or self._start_loading()
        await asyncio.wait([loading])
        if loading.cancelled():
            raise UsageError("the gateway has been closed")
        return loading.result()

    def _start_loading(self) -> asyncio.Task[KeyspaceMap]:
        def end(loading: asyncio.Task[KeyspaceMap]) -> None:
            self._loading = None
            if not loading.cancelled():
                loading.exception()  # retrieved, in case that everybody who asked was cancelled

        self._loading = asyncio.create_task(self._load())
        self._loading.add_done_callback(end)
        return self._loading

    async def _load(self) -> KeyspaceMap:
        if self._creates and self.map is None:
            # Where the keyspace exists, the shards that answer and fit are enough to serve.
            with suppress(ShardUnavailable, OwnershipConflict):
                await create(self.plan, self.shards)
        return await self._load_map()

    async def _load_map(self) -> KeyspaceMap:
        known = map_of(self.plan, await self.examine())
        for problem in unnamed_owners(self.plan, known).values():
            logger.error("keyspace %r: %s", self.plan.keyspace, problem)
        self.map = known
        return known

    def _judge(self, reading: Reading) -> None:
        """Put the shards that contradict the others in quarantine, and let the others out."""
        now = asyncio.get_running_loop().time()
        for name in reading.records:
            shard, wrong = self.shards[name], reading.wrong.get(name)
            before = shard.quarantine
            if wrong is None:
                shard.judge(None)
                if before is not None:
                    logger.warning("shard %r is out of quarantine", name)
                continue
            shard.judge(Quarantine(wrong.reason, wrong.reads, now))
            if before is None or before.reason != wrong.reason:
                logger.error("shard %r is in quarantine: %s", name, wrong.reason)
        self._remember(reading)

    def _remember(self, reading: Reading) -> None:
        for uuid, version in reading.versions.items():
            self._seen[uuid] = max(version, self._seen.get(uuid, 0))

    async def _reconsider(self, shard: Shard) -> None:
        """Look again at a shard that has been in quarantine for a while: it may be mended."""
        quarantine = shard.quarantine
        now = asyncio.get_running_loop().time()
        if quarantine is not None and now - quarantine.since > _QUARANTINE_SECONDS:
            await self._read()

    async def _verify(self, shard: Shard) -> None:
        """Compare a shard that is on another server than before with its peers.

        Where no peer answers, it is believed if it is not behind what this process has seen: else
        the death of one shard would take down another one that was only restarted.
        """
        answers, down = await ask_all(
            {name: self._glance(peer, shard) for name, peer in self.shards.items()}
        )
        if shard.name in down:
            raise down[shard.name]
        wrong = contradictions(self.plan, answers, seen=self._seen)
        if wrong or shard.quarantine is not None:
            await self._read()
            return
        if len(answers) == 1 < len(self.shards):
            logger.warning(
                "shard %r is on another server than before, and none of its peers answers: it is "
                "believed, because it is not behind what this process has seen",
                shard.name,
            )
        self._remember(Reading(answers, down, wrong))

    async def _glance(self, shard: Shard, suspect: Shard) -> ShardRecord | None:
        """What a shard says of itself and its peers, without its slots."""
        try:
            async with asyncio.timeout(None if shard is suspect else _GLANCE_SECONDS):
                return await read_record(shard, rows=False, probing=shard is suspect)
        except TimeoutError as error:
            raise ShardUnavailable(
                f"shard {shard.name!r} did not answer within {_GLANCE_SECONDS:g} seconds",
                shard=shard.name,
            ) from error
