"""A keyspace at work: what this process knows of its slot map, and finding sessions by it.

What is known may be out of date, and nothing depends on it: each statement has the shard itself
confirm that it owns the session's slot. Where the guard fails, the shard's own record tells where
the slot has gone; where that leads nowhere, all shards are read afresh.

A shard that contradicts its peers is put in quarantine: nothing is written there, and the others
serve. It is looked at when the map is read, when a connection leads to a server that has not been
seen before (after a restart, a failover, a restore), and again while it is in quarantine. What this
process has seen is a witness too: a quarantine is not lifted because the others cannot be asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, TypeVarTuple

from shardgate import shards as shards_module
from shardgate.agreement import Contradiction, Memory, lost_record, older_copy, other_shard
from shardgate.errors import (
    KeyspaceNotCreated,
    OperatorError,
    OutcomeUnknown,
    OwnershipConflict,
    ShardgateError,
    ShardQuarantined,
    ShardUnavailable,
    TenantRefused,
    UsageError,
)
from shardgate.founding import create
from shardgate.handover import DRAINING, OWNED
from shardgate.purge import end_purge, purge_all
from shardgate.records import ADMITTED, admit, owned_slots, standing, testify
from shardgate.recovery import wait_for_move
from shardgate.router import route
from shardgate.settling import together
from shardgate.shards import UNANSWERED, OutdatedError, Quarantine, ask_all
from shardgate.slotmap import conflict, consult, map_of, not_named, unnamed_owners
from shardgate.slots import session_hash, slot_of_stored, tenant_slots, to_signed
from shardgate.sql.dialect import Guard, Key
from shardgate.sql.transactions import RefusedError
from shardgate.store import Place, Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from shardgate.agreement import Plan
    from shardgate.handover import SlotRow
    from shardgate.records import Standing, Testimony
    from shardgate.router import Route
    from shardgate.shards import Shard
    from shardgate.slotmap import Reading
    from shardgate.sql.dialect import Admission
    from shardgate.sql.transactions import Listed, SessionInfo
    from shardgate.topology import KeyspaceMap

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

logger = logging.getLogger("shardgate")

_POLL = 0.02
"""Seconds between two looks at a slot that nobody seems to have."""
_LOOK_SECONDS, _LOOK_SHARE = 2.0, 0.25
"""How long a shard is waited for when others are to be compared with it: so many seconds, and no
more than this part of the deadline."""
_IDLE_SHARE = 20
"""A shard in quarantine is looked at again after this many times as long as the last look took."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A shard's part of a listing, and the slots that it owned at that moment."""

    owned: frozenset[int]
    sessions: list[SessionInfo]


class Spot(NamedTuple):
    """Where the sessions of a slot live, by the map that is ``known``."""

    shard: Shard
    store: Store
    guard: Guard
    known: KeyspaceMap


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
        self._creates = creates  # until it has been done
        self._all_well = False
        self._deadline = deadline
        self._look_seconds = min(_LOOK_SECONDS, _LOOK_SHARE * deadline)
        self._loading: asyncio.Task[KeyspaceMap] | None = None
        self._loading_took = 0.0
        self._owned: dict[str, tuple[int, frozenset[int]]] = {}
        self._watches: dict[tuple[str, int], asyncio.Task[SlotRow]] = {}
        self._spots: dict[int, Spot] = {}  # by the map
        self._memory = Memory()
        for shard in shards.values():
            shard.verify = self._verify

    async def create(self) -> None:
        """Create the keyspace on its shards, or what is missing of it."""
        await create(self.plan, self.shards)
        await self._load_map()

    async def examine(self) -> Reading:
        """Read and compare what all shards say, and act on it."""
        began = asyncio.get_running_loop().time()
        # At first, whoever is slow is waited for: without a map nothing can be done.
        seconds = None if self.map is None else max(self._look_seconds, self._loading_took)
        reading = await consult(self.plan, self.shards, self._memory, seconds=seconds)
        self._judge(reading, began)
        self._all_well = not (reading.down or reading.wrong)
        return reading

    async def known(self) -> KeyspaceMap:
        """The map: as known, or read now."""
        return self.map or await self._read()

    async def close(self) -> None:
        """End what goes on in the background."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])
        await together(shard.close() for shard in self.shards.values())
        await together(map(end_purge, self.shards.values()))

    async def purge(self) -> dict[str, int]:
        """Remove all old operations from the shards; how many it were, by name."""
        removed = await together(map(purge_all, self._stores.values()))
        return dict(zip(self._stores, removed, strict=True))

    def key_of(self, tenant_id: str, session_id: str) -> Key:
        """A session's key. The caller has checked the ids."""
        plan = self.plan
        h = session_hash(tenant_id, session_id, slots=plan.slots, spread=plan.spread)
        return Key(tenant_id, session_id, to_signed(h))

    async def _find(self, slot: int) -> Spot:
        """One for all operations on a slot, as long as the map stays as it is."""
        known = await self.known()
        name = known.owners[slot]
        if name not in self.shards:
            raise self._not_named(known, name)
        guard = Guard(slot, known.uuids[name])
        spot = Spot(self.shards[name], self._stores[name], guard, known)
        if self.map is known:
            self._spots[slot] = spot
        return spot

    def _take(self, known: KeyspaceMap) -> None:
        self.map = known
        self._spots.clear()

    async def perform(
        self, key: Key, act: Callable[[Store, Place, *Ts], Awaitable[T]], *args: *Ts
    ) -> T:
        """Run ``act`` where a session lives, following it for as long as the deadline allows.

        Raises:
            OutcomeUnknown: a write was sent, and whatever came of it after that, nobody has said
                whether it took effect.
            OwnershipConflict: no shard that answers owns the session's slot, or one that the
                settings do not have.
            ShardQuarantined: the shard is not the one that it is taken for.
            TenantRefused: the tenant is not admitted there.
        """
        before = UNANSWERED.get()
        give_up = monotonic() + self._deadline
        refusals: tuple[tuple[str, int], ...] = ()
        slot = slot_of_stored(key.h, self.plan.slots)
        try:
            while True:
                shard, store, guard, known = self._spots.get(slot) or await self._find(slot)
                if shard.quarantine is not None:
                    self._reconsider(shard.quarantine)
                try:
                    return await act(store, Place(key, guard), *args)
                except RefusedError:
                    where = route(known, key.tenant_id, key.session_id)
                    refusals += ((shard.name, where.epoch),)
                    if monotonic() > give_up:
                        raise self._not_found(where, refusals) from None
                except ShardQuarantined:
                    # The inquiry that found it out has also told where the session lives by now.
                    if (await self.known()).owners[slot] == shard.name:
                        raise
                    continue
                await self._learn(known, where, key.tenant_id, seconds=give_up - monotonic())
        except ShardgateError as error:
            unanswered = UNANSWERED.get()
            if unanswered is None or unanswered is before or isinstance(error, OutcomeUnknown):
                raise
            raise OutcomeUnknown(
                f"{error}; a write was sent to shard {unanswered.shard!r} before, and may or may "
                "not have taken effect",
                shard=unanswered.shard,
            ) from error
        finally:
            if UNANSWERED.get() is not before:
                UNANSWERED.set(before)

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
        first = await self.known()
        looked = False
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
                raise self._not_in_one_piece(known, first, missing)
            frozen = min(
                (slot for slot in wanted - claims.keys() if known.owner(slot) not in down),
                default=None,
            )
            if frozen is not None:
                try:
                    await self._wait_for_move(known.owner(frozen), frozen, give_up - clock())
                except ShardUnavailable:
                    if not looked:
                        raise
                    # No move, by the looks before: for this last one there was no time.
                    raise self._not_in_one_piece(known, first, missing) from None
                looked = True
            await asyncio.sleep(_POLL)
            await self._read()

    def _not_in_one_piece(
        self, known: KeyspaceMap, first: KeyspaceMap, missing: set[str]
    ) -> ShardgateError:
        if known.epochs != first.epochs:
            return ShardUnavailable(
                f"slots of keyspace {self.plan.keyspace!r} kept moving from shard to shard while a "
                "tenant's sessions were listed: try again",
                shard=min(missing, default=known.owners[0]),
            )
        return OwnershipConflict(
            f"keyspace {self.plan.keyspace!r}: a tenant's slots are owned by no shard that "
            "answers, or by two",
            keyspace=self.plan.keyspace,
        )

    async def _ask(
        self, known: KeyspaceMap, name: str, tenant_id: str, limit: int, after: Any
    ) -> Answer:
        """A shard's page, with the slots that it owned at that moment.

        These are remembered by the version of its slot map. Where it has changed they are read, and
        the page is asked for again.
        """
        if (quarantine := self.shards[name].quarantine) is not None:
            self._reconsider(quarantine)
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
        return [info for h, info in listed.sessions if slot_of_stored(h, slots) in owned]

    async def _learn(
        self, known: KeyspaceMap, where: Route, tenant_id: str, *, seconds: float
    ) -> None:
        """Find out why the guard failed, and what to do about it."""
        if self.shards[where.shard].quarantine is not None and self.map is known:
            self.shards[where.shard].refuse(writes=True)  # what it says of the slot is out of date
        said = await standing(self.shards[where.shard], where.slot, tenant_id)
        own = known.uuids[where.shard]
        if said.shard_uuid != own:
            await self._read()
            self.shards[where.shard].refuse(writes=False)
            raise self._not_itself(where.shard, said.shard_uuid)
        row = said.slot
        if row is not None and row.owner == own and row.state == OWNED:
            await self._admit(self.shards[where.shard], said, tenant_id)
            return
        if row is not None and row.owner == own and row.state == DRAINING:
            row = await self._wait_for_move(where.shard, where.slot, seconds)
            if row.owner == own:
                return
        if row is None or not self._follow(known, where, row):
            await self._read()
            await asyncio.sleep(_POLL)

    async def _admit(self, shard: Shard, said: Standing, tenant_id: str) -> None:
        if said.tenant is None:
            await admit(shard, tenant_id)
        elif said.tenant != ADMITTED:
            raise TenantRefused(
                f"tenant {tenant_id!r} is {said.tenant} in keyspace {self.plan.keyspace!r}",
                tenant=tenant_id,
            )

    async def _wait_for_move(self, name: str, slot: int, seconds: float) -> SlotRow:
        """Wait until a slot that is being moved is served again: one looks, for all who wait."""
        shard = self.shards[name]
        watch = self._watches.get((name, slot))
        if watch is None:
            by_uuid = {one.uuid: one for one in self.shards.values() if one.uuid is not None}
            watch = shard.in_background(wait_for_move(shard, slot, by_uuid))
            self._watches[name, slot] = watch
            watch.add_done_callback(lambda _: self._watches.pop((name, slot)))
        await asyncio.wait([watch], timeout=max(seconds, 0))
        if watch.cancelled():
            raise UsageError("the gateway has been closed")
        if not watch.done():
            raise ShardUnavailable(
                f"slot {slot} of keyspace {self.plan.keyspace!r} is being moved from shard "
                f"{name!r}, and was not served again in time",
                shard=name,
            )
        return watch.result()

    def _follow(self, known: KeyspaceMap, where: Route, row: SlotRow) -> bool:
        """Take a shard's word for where a slot has gone, unless it is older than what is known."""
        owner = next((name for name, uuid in known.uuids.items() if uuid == row.owner), None)
        if row.epoch < where.epoch or owner not in self.shards or owner == where.shard:
            return False
        current = self.map or known
        self._take(current.with_slot(where.slot, str(owner), row.epoch))
        return True

    def _not_itself(self, shard: str, uuid: str | None) -> OwnershipConflict:
        found = "has no record of its own" if uuid is None else "is another shard"
        what = f"shard {shard!r} {found} (UUID {uuid}): is its URL the right one?"
        return conflict(self.plan, what)

    def _not_named(self, known: KeyspaceMap, shard: str) -> OwnershipConflict:
        return conflict(self.plan, not_named(shard, len(known.slots_of(shard))))

    def _not_found(self, where: Route, refusals: Sequence[tuple[str, int]]) -> ShardgateError:
        """Nobody has the slot, if the same shard kept refusing; else there was no time to follow
        it."""
        if len(refusals) == 1 or len(set(refusals)) > 1:
            return ShardUnavailable(
                f"slot {where.slot} of keyspace {self.plan.keyspace!r} was on the move, and was "
                "not reached in time",
                shard=where.shard,
            )
        return OwnershipConflict(
            f"keyspace {self.plan.keyspace!r}: slot {where.slot} was refused by shard "
            f"{where.shard!r} and is owned by no shard that answers",
            keyspace=self.plan.keyspace,
        )

    async def _read(self, *, afresh: bool = False) -> KeyspaceMap:
        """Read the map afresh, once for all who ask meanwhile.

        They share the outcome: to ask again one after the other would outlast their deadlines.
        ``afresh``: what is being read already does not count, it may be older than the question.
        """
        if afresh and self._loading is not None:
            await asyncio.wait([self._loading])
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
        failed: ShardgateError | None = None
        if self._creates and (self.map is None or self._all_well):
            # Where the keyspace exists, the shards that answer and fit are enough to serve. What
            # has broken off goes on when all do, so that nobody waits for one that does not.
            try:
                await create(self.plan, self.shards)
                self._creates = False
            except (ShardUnavailable, OperatorError) as error:
                failed = error
        try:
            return await self._load_map()
        except KeyspaceNotCreated:
            if failed is None:
                raise
            raise failed from None

    async def _load_map(self) -> KeyspaceMap:
        clock = asyncio.get_running_loop().time
        began = clock()
        known = map_of(self.plan, await self.examine())
        self._loading_took = clock() - began
        for problem in unnamed_owners(self.plan, known).values():
            logger.error("keyspace %r: %s", self.plan.keyspace, problem)
        self._take(known)
        return known

    def _judge(self, reading: Reading, began: float) -> None:
        """Put the shards that contradict the others in quarantine, and let the others out."""
        self._memory.take(reading.right)
        self._inform()
        now = asyncio.get_running_loop().time()
        for name, record in reading.records.items():
            shard, wrong = self.shards[name], reading.wrong.get(name)
            before = shard.quarantine
            verdict = None if wrong is None else Quarantine(wrong.reason, wrong.reads, now)
            shard.judge(verdict, None if record is None else record.server, began=began)
            self._tell(shard, before)

    def _inform(self) -> None:
        """Have the shards know which ones they are, and how far they have come."""
        for name, shard in self.shards.items():
            shard.uuid = self._memory.uuids.get(name)
            shard.map_version = self._memory.versions.get(shard.uuid or "", 0)

    def _tell(self, shard: Shard, before: Quarantine | None) -> None:
        now = shard.quarantine
        if now is None and before is not None:
            logger.warning("shard %r is out of quarantine", shard.name)
        elif now is not None and (before is None or before.reason != now.reason):
            logger.error("shard %r is in quarantine: %s", shard.name, now.reason)

    def _reconsider(self, quarantine: Quarantine) -> None:
        """Have a shard looked at again that was in quarantine for a while: it may be mended."""
        if self._loading is not None:
            return
        waited = asyncio.get_running_loop().time() - quarantine.since
        if waited > max(shards_module.QUARANTINE_SECONDS, _IDLE_SHARE * self._loading_took):
            self._start_loading()

    async def _verify(self, shard: Shard, admission: Admission) -> Quarantine | None:
        """Compare a shard that is on another server than before with its peers, by what it has said
        on the very connection that is in question.

        Where no peer answers, it is believed if it is not behind what this process has seen: else
        the death of one shard would take down another one that was only restarted.
        """
        began = asyncio.get_running_loop().time()
        wrong = self._contradiction(shard, admission)
        said = [] if wrong is not None else await self._ask_peers(shard)
        wrong = wrong or self._contradiction(shard, admission)
        if wrong is not None:
            return await self._condemn(shard, admission, wrong)
        versions = self._memory.versions
        if any(answer.map_version != versions.get(answer.shard_uuid) for answer in said):
            await self._read(afresh=True)  # somebody may have come to own what was this shard's
        if not said and len(self.shards) > 1:
            logger.warning(
                "shard %r is on another server than before, and none of its peers answers: it is "
                "believed, because it is not behind what this process has seen",
                shard.name,
            )
        if shard.quarantine is None:
            if admission.shard_uuid is not None:
                self._memory.see(admission.shard_uuid, admission.map_version)
                self._inform()
            shard.judge(None, admission.server, began=began)
        return None

    async def _ask_peers(self, shard: Shard) -> list[Testimony]:
        """What a shard's peers say of it, and of themselves; remembers it."""
        uuids, about = self._memory.uuids, self._memory.uuids.get(shard.name)
        answers, _ = await ask_all(
            {
                name: testify(peer, about or "", seconds=self._look_seconds)
                for name, peer in self.shards.items()
                if peer is not shard and peer.quarantine is None
            }
        )
        said = [
            answer
            for name, answer in answers.items()
            if answer is not None and answer.shard_uuid == uuids.get(name)
        ]
        if about is not None:
            for answer in said:
                self._memory.see(about, answer.recorded or 0)
        return said

    def _contradiction(self, shard: Shard, admission: Admission) -> Contradiction | None:
        """What is wrong with what a shard has said on a connection, by all that is known of it.

        Raises:
            OutdatedError: it is behind what has been learnt since it was asked.
        """
        known = self._memory.uuids.get(shard.name)
        if known is None:
            return None
        if admission.shard_uuid is None:
            return Contradiction(lost_record(shard.name, known))
        if admission.shard_uuid != known:
            return Contradiction(other_shard(shard.name, admission.shard_uuid, known))
        seen = self._memory.versions.get(known, 0)
        if admission.map_version < seen:
            if admission.expected < seen:
                self._inform()
                raise OutdatedError
            return Contradiction(older_copy(shard.name, admission.map_version, seen), reads=True)
        return None

    async def _condemn(
        self, shard: Shard, admission: Admission, wrong: Contradiction
    ) -> Quarantine:
        """Put a shard in quarantine, and find out who owns its slots by now."""
        now = asyncio.get_running_loop().time()
        before = shard.quarantine
        verdict = Quarantine(wrong.reason, wrong.reads, now)
        shard.judge(verdict, admission.server, began=now)
        self._inform()
        self._tell(shard, before)
        if before is None or before.reason != wrong.reason:
            with suppress(ShardgateError):
                await self._read(afresh=True)
        return verdict
