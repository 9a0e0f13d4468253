"""Moving slots from shard to shard under running sessions.

What a move is, and why it is safe whoever else is at it, is in ``handover``; what is copied, in
``copying``. Here the steps are taken in their order, the time in which a slot is served by nobody
is measured and kept short, and what a move leaves behind is removed.

Nothing but the shards' rows is needed to go on with a move, so anybody can: see ``Mover.move``.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from shardgate.control.copying import Calm, Copying, Counts, Pace
from shardgate.control.recording import Recorder
from shardgate.control.standbys import check_commits
from shardgate.errors import (
    Contended,
    FreezeTooLong,
    MoveBusy,
    MoveLost,
    OutcomeUnknown,
    ShardgateError,
    TransientError,
)
from shardgate.handover import CANCELLED, DRAINING, IMPORTING, Act, next_act
from shardgate.records import (
    RowChangedError,
    change_row,
    hold_row,
    read_row,
    row_age,
)
from shardgate.recovery import (
    Ends,
    after,
    end_move,
    look,
    new_mark,
    read_slot,
    take_step,
    who_serves,
)
from shardgate.settling import settle
from shardgate.slots import slot_range
from shardgate.sql.moving import Span, limit_lock_wait

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from shardgate.agreement import Plan
    from shardgate.handover import Pair, Progress
    from shardgate.shards import Shard

logger = logging.getLogger("shardgate")

_FEW = 3
"""Differences that are left to the last pass, while nobody serves the slot."""
_PASSES = 10
"""Passes over a slot that keeps changing, before it is fenced all the same."""
_HEARTBEAT_SECONDS = 2.0
STUCK_SECONDS = 15.0
"""A move whose rows were not touched for so long is taken for abandoned: who takes over one that
is not does no harm, he only wastes what it has done."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0


class OverBudgetError(Exception):
    """The slot has been served by nobody for long enough."""


class AtSourceError(Exception):
    """The source has failed, while a transaction of the target's was waiting for it."""

    def __init__(self, error: ShardgateError) -> None:
        self.error = error
        super().__init__(str(error))


class Phase(Enum):
    """How far a slot's move is."""

    COPYING = "copying"
    VERIFYING = "verifying"
    FROZEN = "frozen"
    MOVED = "moved"
    STEPPED_BACK = "stepped back"


@dataclass(frozen=True, slots=True)
class MoveEvent:
    """What a move reports. ``frozen`` is for how many seconds nobody has served the slot; None
    where that is not known, since somebody else has begun it."""

    slot: int
    source: str
    target: str
    phase: Phase
    sessions: int
    items: int
    nbytes: int
    verified: int
    frozen: float | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a move may take.

    Attributes:
        freeze_seconds: for how long a slot may be served by nobody, before the move steps back.
        bytes_per_second: how fast items are copied, by all moves of a process together (None: as
            fast as it goes).
        attempts: how often a slot's move is begun, if it has stepped back.
        patience_seconds: how long a shard that does not answer is waited for.
        accept_async_standbys: whether shards may have standbys that do not confirm commits: if one
            of them is promoted during a move, both shards may serve the slot, or what was written
            to it may be lost, also later.
    """

    freeze_seconds: float = 0.5
    bytes_per_second: float | None = 32e6
    attempts: int = 5
    patience_seconds: float = 30.0
    accept_async_standbys: bool = False


@dataclass(slots=True)
class _Run:
    """One attempt at a move: what its driver has in memory."""

    ends: Ends
    pair: Pair
    mine: Progress
    counts: Counts
    copying: Copying | None = None
    fenced_at: float | None = None
    frozen: float | None = None
    touched_at: float = 0.0
    holds_up: bool = False


class Mover:
    """Moves slots of one keyspace between its shards."""

    def __init__(
        self,
        plan: Plan,
        shards: Mapping[str, Shard],
        *,
        limits: Limits | None = None,
        observe: Callable[[MoveEvent], None] = lambda _: None,
    ) -> None:
        self.plan = plan
        self.shards = shards
        self.limits = limits or Limits()
        self._observe = observe
        self._pace = Pace(self.limits.bytes_per_second)
        self._checked: set[str] = set()
        self._tenants: dict[str, set[str]] = {}
        self._recorder = Recorder(shards)
        self._calm = Calm(self.limits.freeze_seconds)

    async def move(
        self, slot: int, source: str, target: str, *, takes_over: bool = False, tells: bool = True
    ) -> MoveEvent:
        """Move a slot, or go on with its move from where that is.

        Args:
            slot: which slot.
            source: the name of the shard that owns it.
            target: the name of the shard that is to own it.
            takes_over: also where somebody else was at it a moment ago.
            tells: have all shards record it before this returns; else ``tell`` has to be called.

        Returns:
            What was done by this call, and for how long the slot was frozen.

        Raises:
            MoveBusy: somebody else is at it.
            MoveLost: somebody else has taken over, or the slot is not the source's.
            FreezeTooLong: it stepped back as often as it may; the source serves the slot.
            VerificationFailed: the copy is not the same; the source serves the slot.
            StandbysNotSafe: see ``Limits.accept_async_standbys``.
            ShardUnavailable: a shard does not answer. Where the slot was frozen already, it stays
                so until somebody goes on, or ends the move.
        """
        ends = Ends(self.shards[source], self.shards[target], slot)
        await self._check_standbys(ends)
        pair = await look(ends)
        if pair.source.move_id is not None and not pair.is_decided and not takes_over:
            await self._refuse_busy(ends, pair.source.peer)
        counts = Counts()
        for attempt in range(self.limits.attempts):
            try:
                made = await self._attempt(ends, pair if attempt == 0 else await look(ends), counts)
            except MoveLost:
                raise
            except OverBudgetError:
                with suppress(Contended):  # then it was not even fenced
                    await settle(self._step_back(ends, counts))
                await asyncio.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt))
            except BaseException:
                await settle(self._step_back(ends, counts))
                raise
            else:
                if tells:
                    await self.tell()
                return made
        raise FreezeTooLong(
            f"slot {slot} could not be moved from shard {source!r} to {target!r} within "
            f"{self.limits.freeze_seconds:g} seconds of being served by nobody, "
            f"{self.limits.attempts} times: try when there is less to do, or allow more"
        )

    async def tell(self) -> None:
        """Have all shards that answer record what has moved, and was not recorded yet."""
        await settle(self._recorder.flush())

    async def end(self, slot: int, source: str, target: str) -> Pair:
        """End a slot's move: one that is decided is finished, any other undone.

        Where the source has given the slot to a third shard since, what is left of the claim on the
        target is undone from there.
        """
        ends = Ends(self.shards[source], self.shards[target], slot)
        pair = await end_move(ends)
        if pair.target.state in (IMPORTING, CANCELLED):
            server = await who_serves(self.shards, slot)
            if server is not None and server not in (ends.source, ends.target):
                ends = Ends(server, ends.target, slot)
                pair = await end_move(ends)
        self._recorder.add(pair.source, ends)
        await self.tell()
        return pair

    async def _check_standbys(self, ends: Ends) -> None:
        for shard in (ends.source, ends.target):
            if shard.name not in self._checked and not self.limits.accept_async_standbys:
                await check_commits(shard)
                self._checked.add(shard.name)

    async def _refuse_busy(self, ends: Ends, peer: str | None) -> None:
        """Refuse where a shard that has a part in the move was touched a moment ago."""
        parties = (ends.source.uuid, ends.target.uuid, peer)
        asked = [shard for shard in self.shards.values() if shard.uuid in parties]
        ages = [await row_age(shard, ends.slot) for shard in asked]
        age = min((age for age in ages if age is not None), default=STUCK_SECONDS)
        if age < STUCK_SECONDS:
            raise MoveBusy(
                f"slot {ends.slot} is being moved from shard {ends.source.name!r} by somebody "
                f"else, who was seen {age:.0f} seconds ago"
            )

    async def _attempt(self, ends: Ends, pair: Pair, counts: Counts) -> MoveEvent:
        run = _Run(ends, pair, new_mark(), counts)
        try:
            return await self._take_all(run)
        finally:
            self._resume(run)

    async def _take_all(self, run: _Run) -> MoveEvent:
        ends, trouble_since = run.ends, None
        while True:
            act = next_act(run.pair, run.mine)
            if act is Act.LOST:
                raise self._lost(run)
            if act is Act.DONE:
                self._recorder.add(run.pair.source, ends)
                return self._report(run, Phase.MOVED)
            try:
                await self._take(act, run)
                trouble_since = None
            except (TransientError, OutcomeUnknown) as error:
                self._resume(run)
                now = asyncio.get_running_loop().time()
                trouble_since = trouble_since or now
                if now - trouble_since > self.limits.patience_seconds:
                    raise
                logger.warning("slot %d: %s; trying again", ends.slot, error)
                await asyncio.sleep(_FIRST_PAUSE)
                run.pair = await self._look_again(run, trouble_since)
            except RowChangedError:
                run.pair = await self._look_again(run, asyncio.get_running_loop().time())

    async def _look_again(self, run: _Run, since: float) -> Pair:
        while True:
            try:
                return await look(run.ends)
            except TransientError:
                if asyncio.get_running_loop().time() - since > self.limits.patience_seconds:
                    raise
                await asyncio.sleep(_FIRST_PAUSE)

    async def _take(self, act: Act, run: _Run) -> None:
        if act is Act.COPY:
            await self._copy(run)
        elif act is Act.BARRIER:
            await self._pass_barrier(run)
        elif act is Act.DECIDE:
            await self._decide(run)
        elif act is Act.MARK and run.pair.is_fenced:
            # Somebody has left it frozen. What is copied by now has only to be compared again, but
            # that takes its time: until then it is served where it was.
            run.pair = await end_move(run.ends)
        else:
            fences = act is Act.FENCE
            step = self._fence(run) if fences else take_step(act, run.pair, run.mine, run.ends)
            run.pair = await step or await look(run.ends)
        if run.fenced_at is not None and run.frozen is None and run.pair.is_decided:
            run.frozen = asyncio.get_running_loop().time() - run.fenced_at
            self._resume(run)

    def _resume(self, run: _Run) -> None:
        """Have others go on, who wait until no slot is frozen."""
        if run.holds_up:
            run.holds_up = False
            self._calm.begin()

    async def _copy(self, run: _Run) -> None:
        """Bring the target level while the source serves, and verify it."""
        run.copying = copying = Copying(
            ends=run.ends,
            span=Span(*slot_range(run.ends.slot, self.plan.slots)),
            claim=run.pair.target,
            pace=self._pace,
            counts=run.counts,
            beat=partial(self._beat, run),
            tenants=self._tenants.setdefault(run.ends.target.name, set()),
            calm=self._calm,
            hurry=partial(self._left, run),
        )
        run.touched_at = asyncio.get_running_loop().time()
        self._report(run, Phase.COPYING)
        await copying.copy()
        self._report(run, Phase.VERIFYING)
        differences = await copying.verify()
        await self._copy_until_level(run, copying, differences)
        run.mine.copied = True

    async def _copy_until_level(self, run: _Run, copying: Copying, differences: int) -> None:
        for _ in range(_PASSES):
            if differences <= _FEW:
                return
            before, differences = differences, await copying.copy(checks=True)
            self._report(run, Phase.COPYING)
            if differences >= before:
                return

    async def _beat(self, run: _Run) -> None:
        """Show that somebody is at it, and find out whether it still is oneself."""
        now = asyncio.get_running_loop().time()
        if now - run.touched_at < _HEARTBEAT_SECONDS:
            return
        run.touched_at = now
        self._report(run, Phase.COPYING)
        target, row = run.ends.target, run.pair.target
        touch = partial(change_row, tables=target.tables, before=row, after=row)
        if not await target.transact(touch):
            raise RowChangedError

    async def _fence(self, run: _Run) -> Pair | None:
        """Have the source serve the slot no more. On MySQL and MariaDB this waits for statements
        under way, as the barrier does elsewhere."""
        source, wanted = run.ends.source, after(Act.FENCE, run.pair, run.mine.move_id)
        if not run.holds_up:
            await self._calm.end()
            run.holds_up = True
        run.fenced_at = asyncio.get_running_loop().time()
        self._report(run, Phase.FROZEN)

        async def act(connection: AsyncConnection) -> bool:
            async with limit_lock_wait(connection, self.limits.freeze_seconds, OverBudgetError):
                return await change_row(connection, source.tables, run.pair.source, wanted.source)

        return wanted if await source.transact(act) else None

    async def _pass_barrier(self, run: _Run) -> None:
        """Wait for every statement that has passed its guard, and refuse those still at it.

        To lock the row is not enough on PostgreSQL: a statement that found the fence not yet
        committed goes on with the old row afterwards, unless the new one was updated, too. On other
        databases the fence has waited for them, and who comes after it reads the fenced row.
        """
        source, row = run.ends.source, run.pair.source
        if source.engine.dialect.name != "postgresql":
            run.mine.passed = True
            return

        async def act(connection: AsyncConnection) -> None:
            async with limit_lock_wait(connection, self._left(run), OverBudgetError):
                await hold_row(connection, source.tables, row, alone=True)
                await change_row(connection, source.tables, row, row)

        await source.transact(act)
        run.mine.passed = True

    async def _decide(self, run: _Run) -> None:
        """The last pass and the decision, in one transaction of the target's."""
        target, copying = run.ends.target, run.copying
        assert copying is not None, "nothing is decided that was not copied"  # noqa: S101 - for mypy
        wanted = after(Act.DECIDE, run.pair, run.mine.move_id)

        async def act(connection: AsyncConnection) -> None:
            try:
                await hold_row(connection, target.tables, run.pair.target, alone=True)
            except RowChangedError:
                if await read_row(connection, target.tables, run.ends.slot) == wanted.target:
                    return  # the answer to the commit was lost
                raise
            try:
                await copying.settle(connection)
            except ShardgateError as error:
                raise AtSourceError(error) from error
            self._left(run)
            await change_row(connection, target.tables, run.pair.target, wanted.target)

        try:
            await target.transact(act)
        except AtSourceError as failure:
            raise failure.error from failure
        run.pair = wanted

    def _left(self, run: _Run) -> float:
        """The seconds that are left of the time without service.

        Raises:
            OverBudgetError: there are none.
        """
        assert run.fenced_at is not None, "only one's own fence is gone on with"  # noqa: S101 - for mypy
        left = run.fenced_at + self.limits.freeze_seconds - asyncio.get_running_loop().time()
        if left <= 0:
            raise OverBudgetError
        return left

    async def _step_back(self, ends: Ends, counts: Counts) -> None:
        """Have the source serve the slot again; where nobody can tell whether it may, wait a while
        for the shards to answer."""
        give_up = asyncio.get_running_loop().time() + self.limits.patience_seconds
        while True:
            try:
                pair = await end_move(ends)
                break
            except (TransientError, OutcomeUnknown):
                late = asyncio.get_running_loop().time() > give_up
                if late or not await self._is_frozen(ends):
                    raise
                await asyncio.sleep(_FIRST_PAUSE)
        if pair.is_served:
            self._observe(self._event(ends, counts, Phase.STEPPED_BACK))
        self._recorder.add(pair.source, ends)
        await self._recorder.flush()

    async def _is_frozen(self, ends: Ends) -> bool:
        try:
            row = await read_slot(ends.source, ends.slot)
        except ShardgateError:
            return True
        return row.state == DRAINING

    def _lost(self, run: _Run) -> MoveLost:
        return MoveLost(
            f"slot {run.ends.slot} is not shard {run.ends.source.name!r}'s to be moved to "
            f"{run.ends.target.name!r} any more: somebody else has taken over, or has ended it"
        )

    def _report(self, run: _Run, phase: Phase) -> MoveEvent:
        event = self._event(run.ends, run.counts, phase)
        if run.frozen is not None:
            event = replace(event, frozen=run.frozen)
        self._observe(event)
        return event

    def _event(self, ends: Ends, counts: Counts, phase: Phase) -> MoveEvent:
        return MoveEvent(
            slot=ends.slot,
            source=ends.source.name,
            target=ends.target.name,
            phase=phase,
            sessions=counts.sessions,
            items=counts.items,
            nbytes=counts.nbytes,
            verified=counts.verified,
        )
