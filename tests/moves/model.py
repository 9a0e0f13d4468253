"""Everything that can happen to one slot while it is moved, as states and steps between them.

What a mover, or who ends a move, does next and what a row becomes is said by the real functions of
``shardgate.handover``; this module does around them what the databases, the clients and the faults
do. A step is what happens in one moment: one transaction on one shard, or one reading of one.

- A shard has its row of the slot and its sessions of the slot. A request sets a row if it is what
  the sender knows, and may change sessions with it.
- An actor moves the slot, ends a move, or purges. His memory is the pair of rows as he has seen
  them, his progress, and what he has read of the source. One who dies is one who takes no further
  step, so there is no step for it: all of this holds with everybody dead from any moment on.
- A request whose answer is lost is a stray: it is carried out at some time, or never. Its sender
  looks at the rows again.
- A client's statement passes its guard on a shard that serves, and commits at some later moment,
  whatever the row says by then; only the barrier waits for it. It is acknowledged, and what all
  acknowledged writes together have made is the truth.
- A failover takes the last transactions of a shard back, and the statements that are under way
  there. A write that it takes back leaves the truth.
- A restore puts a shard back to an earlier moment. It is in quarantine then: it serves nothing,
  and nobody moves anything to it or from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

from shardgate.handover import (
    CANCELLED,
    DRAINING,
    ELSEWHERE,
    OWNED,
    RELEASED,
    Act,
    Pair,
    Progress,
    SlotRow,
    cancel,
    claim,
    decide,
    fence,
    forget,
    mark,
    next_act,
    next_act_of_abort,
    release,
    reopen,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = "ABC"
"""The shards' names, which are their UUIDs too."""

T = TypeVar("T")


class Numbers(Generic[T]):
    """Values and their numbers: a number is quick to hash and to compare, and there are few."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}
        self._values: list[T] = []

    def __getitem__(self, number: int) -> T:
        return self._values[number]

    def of(self, value: T) -> int:
        number = self._numbers.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        return number


ROWS = Numbers[SlotRow]()
NONE = -1
"""In place of a row's number: none; in a request: whatever the row is."""

Items: TypeAlias = tuple[int, ...]
"""What was written, by seq."""
Session: TypeAlias = "tuple[int, int, Items] | None"
"""Incarnation, revision, items; None where there is no such session."""
Data: TypeAlias = tuple[Session, ...]
Known: TypeAlias = tuple[str, bool, bool, bool, bool, bool]
"""A ``Progress``, in its order."""
COPIED, PASSED = 4, 5
"""Places in it. Who purges has passed it once he has waited until the decision is durable."""
Due: TypeAlias = tuple[Act, int, int]
"""What is to be done next; the shard whose row it sets, and to what."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the protocol demands. Each rule can be broken, and the model has to notice."""

    decide_on_source: bool = False
    """Broken: the source's release is the decision; it alone says whether the slot has moved."""
    release_if_unchanged: bool = True
    reopen_if_unchanged: bool = True
    cancel_before_reopen: bool = True
    compare_incarnations: bool = True
    compare_items: bool = False
    """Beyond the design: compare what the items are, too, as with digests of them."""
    guard_purge: bool = True
    purge_when_durable: bool = True
    pass_barrier: bool = True
    claim_once: bool = True
    look_after_claim: bool = True
    """The barrier is only passed if the source still has the sender's mark."""
    durable: frozenset[Act] = frozenset({Act.MARK, Act.FENCE, Act.BARRIER, Act.CANCEL})
    """After these the sender waits until no failover can take them back."""


class Actor(NamedTuple):
    """Somebody who moves the slot, ends a move, or purges what is left of one, with his memory."""

    kind: str
    """move, abort, purge (the source's released rows) or sweep (the target's cancelled ones)."""
    source: int
    target: int
    name: str
    at: str = "source"
    """What he is about to do: read the source's row or the target's, act, write, hint; or end."""
    rows: tuple[int, int] = (NONE, NONE)
    progress: Known = ("", False, False, False, False, False)
    due: Due = (Act.LOST, NONE, NONE)
    held: Data = ()
    """What he has read of the source."""
    session: int = 0
    """Which one is copied next."""


class Request(NamedTuple):
    """A transaction on a shard: if the row is this one, set it to that, and change the sessions."""

    shard: int
    expected: int
    row: int
    durable: bool = False
    held: Data = ()
    """Bring the sessions level with these."""
    session: int = NONE
    """Only this one."""
    drop: bool = False
    """Delete that one instead."""


class Lost(NamedTuple):
    """A shard before a transaction that a failover may take back; the truth too if it changed."""

    row: int
    data: Data
    truth: Data | None


class Left(NamedTuple):
    """How often things may still happen."""

    writes: int
    lost: int
    failovers: int
    backups: int


class State(NamedTuple):
    rows: tuple[int, ...]
    data: tuple[Data, ...]
    truth: Data
    actors: tuple[Actor, ...]
    left: Left
    undo: tuple[tuple[Lost, ...], ...]
    under_way: tuple[int, ...] = ()
    """The shards of the statements that have passed their guard."""
    stray: Request | None = None
    written: int = 0
    backup: tuple[int, int, Data] | None = None
    quarantined: int = NONE
    flaw: str | None = None
    """What was wrong with the step that led here."""

    def serves(self, shard: int) -> bool:
        row = ROWS[self.rows[shard]]
        return row.state == OWNED and row.owner == NAMES[shard] and shard != self.quarantined

    @property
    def servers(self) -> list[int]:
        return [shard for shard in range(len(self.rows)) if self.serves(shard)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Who is there, and what may happen how often."""

    actors: tuple[Actor, ...]
    shards: int = 2
    sessions: int = 1
    writes: int = 0
    at_once: int = 1
    """As many statements may be under way."""
    lost: int = 0
    """As many answers may be lost."""
    failovers: int = 0
    lossy: str = ""
    """The shards whose failover takes something back."""
    depth: int = 1
    """As many transactions."""
    keeps_writes: bool = False
    """A client's write is not acknowledged before no failover can take it back."""
    restores: str = ""
    """The shards that may be restored."""
    before: tuple[str, ...] = ()
    """The moves before it begins: AB; or AB- if that one's mover has died after the fence."""
    rules: Rules = Rules()


_MOST_STEPS = 100
"""Of one who is alone."""
PURGED = "a purge takes what is needed"
BACK = "an epoch goes back"


def actor(kind: str, way: str, name: str) -> Actor:
    """Somebody who is about to begin; ``way`` names the source and the target."""
    progress = (name, False, False, False, False, False)
    return Actor(kind, NAMES.index(way[0]), NAMES.index(way[1]), name, progress=progress)


def first(case: Case) -> State:
    """A owns the slot, everybody knows, and there is one session with an item."""
    owned = SlotRow(0, NAMES[0], OWNED, 1)
    known = SlotRow(0, NAMES[0], ELSEWHERE, 1)
    data: Data = ((0, 1, (0,)), *[None] * (case.sessions - 1))
    nothing: Data = (None,) * case.sessions
    others = case.shards - 1
    return State(
        rows=(ROWS.of(owned), *[ROWS.of(known)] * others),
        data=(data, *[nothing] * others),
        truth=data,
        actors=(),
        left=Left(0, 0, 0, 0),
        undo=((),) * case.shards,
    )


class Model:
    """The steps of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rules = case.rules
        self.lossy = [NAMES.index(name) for name in case.lossy]
        self._plan = cache(self._planned)

    def start(self) -> State:
        state = first(self.case)
        for number, way in enumerate(self.case.before):
            mover = actor("move", way, f"before{number}")
            state = self.alone(state, mover, until=DRAINING if way.endswith("-") else None)
        left = Left(
            self.case.writes, self.case.lost, self.case.failovers, int(bool(self.case.restores))
        )
        return state._replace(actors=self.case.actors, left=left)

    def alone(self, state: State, who: Actor, *, until: str | None = None) -> State:
        """What comes out when one acts with nothing in his way, and nobody else any more.

        He comes to an end, or dies when the source's state is ``until``.

        Statements that are under way have failed, and no strays arrive.
        """
        state = state._replace(
            actors=(who,),
            left=Left(0, 0, 0, 0),
            under_way=(),
            stray=None,
            backup=None,
            undo=((),) * len(state.rows),
        )
        for _ in range(_MOST_STEPS):
            states = [following for _, following in self.steps(state)]
            if not states or ROWS[state.rows[who.source]].state == until:
                return state._replace(actors=(), written=0)
            (state,) = states
        raise AssertionError(f"{who} does not come to an end")

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """What can happen next, in words, and what it leads to."""
        for index, who in enumerate(state.actors):
            if who.at != "end":
                for what, after in self._act(state, index, who):
                    yield f"{who.name}: {what}", after
        if state.stray is not None:
            arrived = self.carry_out(state._replace(stray=None), state.stray)
            if arrived is not None:
                yield "the stray request arrives", arrived
        yield from self._writes(state)
        yield from self._faults(state)

    # Clients

    def _writes(self, state: State) -> Iterator[tuple[str, State]]:
        left = state.left
        if left.writes and len(state.under_way) < self.case.at_once:
            for shard in state.servers:
                under_way = tuple(sorted((*state.under_way, shard)))
                fewer = left._replace(writes=left.writes - 1)
                yield (
                    f"a statement passes its guard on {NAMES[shard]}",
                    state._replace(under_way=under_way, left=fewer),
                )
        for shard in set(state.under_way):
            rest = list(state.under_way)
            rest.remove(shard)
            for session, before in enumerate(state.data[shard]):
                for what in ("appends to", "deletes") if before else ("appends to",):
                    yield (
                        f"a statement {what} session {session} on {NAMES[shard]}",
                        self._commit(state._replace(under_way=tuple(rest)), shard, session, what),
                    )

    def _commit(self, state: State, shard: int, session: int, what: str) -> State:
        number = state.written + 1
        data = _with(state.data[shard], session, _written(state.data[shard][session], number, what))
        truth = _with(state.truth, session, _written(state.truth[session], number, what))
        after = self._set(state, shard, state.rows[shard], data, durable=self.case.keeps_writes)
        if self.case.keeps_writes or shard not in self.lossy or not state.left.failovers:
            return after._replace(truth=truth, written=number)
        *some, last = after.undo[shard]
        undo = _with(after.undo, shard, (*some, last._replace(truth=state.truth)))
        return after._replace(truth=truth, written=number, undo=undo)

    # What the databases do

    def _set(self, state: State, shard: int, row: int, data: Data, *, durable: bool) -> State:
        undo = state.undo
        if shard in self.lossy and state.left.failovers:
            before = Lost(state.rows[shard], state.data[shard], None)
            some = () if durable else (*undo[shard], before)[-self.case.depth :]
            undo = _with(undo, shard, some)
        flaw = BACK if ROWS[row].epoch < ROWS[state.rows[shard]].epoch else state.flaw
        return state._replace(
            rows=_with(state.rows, shard, row),
            data=_with(state.data, shard, data),
            undo=undo,
            flaw=flaw,
        )

    def carry_out(self, state: State, request: Request) -> State | None:
        """The state after it; None where the row is another one."""
        shard = request.shard
        if shard == state.quarantined:
            return None
        if request.expected not in (NONE, state.rows[shard]):
            return None
        data = state.data[shard]
        if request.drop:
            data = _with(data, request.session, None)
            state = state._replace(flaw=state.flaw or self._flaw_of_purge(state, shard))
        elif request.held:
            which = range(len(data)) if request.session == NONE else (request.session,)
            for session in which:
                level = self.level(request.held[session], data[session])
                data = _with(data, session, level)
        row = state.rows[shard] if request.row == NONE else request.row
        return self._set(state, shard, row, data, durable=request.durable)

    @staticmethod
    def _flaw_of_purge(state: State, shard: int) -> str | None:
        others = [data for other, data in enumerate(state.data) if other != shard]
        needed = state.data[shard] == state.truth and state.truth not in others
        return PURGED if state.serves(shard) or needed else None

    def level(self, source: Session, target: Session) -> Session:
        """What an incremental copy makes of a session of the target."""
        if source is None or target is None:
            return source
        if self.rules.compare_incarnations and source[0] != target[0]:
            return source
        if self.rules.compare_items and source[2] != target[2]:
            return source
        if source[1] == target[1]:
            return target
        have = target[2][: len(source[2])]
        return source[0], source[1], have + source[2][len(have) :]

    def _faults(self, state: State) -> Iterator[tuple[str, State]]:
        if state.left.failovers:
            for shard in self.lossy:
                for count in range(1, len(state.undo[shard]) + 1):
                    yield (
                        f"a failover of {NAMES[shard]} loses {count}",
                        _failed_over(state, shard, count),
                    )
        for name in self.case.restores:
            shard = NAMES.index(name)
            if state.left.backups:
                copy = (shard, state.rows[shard], state.data[shard])
                left = state.left._replace(backups=state.left.backups - 1)
                yield f"a backup of {name}", state._replace(backup=copy, left=left)
            elif state.backup is not None and state.backup[0] == shard:
                yield f"{name} is restored", _restored(state)

    # Movers, and others who act

    def _act(self, state: State, index: int, who: Actor) -> Iterator[tuple[str, State]]:
        if state.quarantined in (who.source, who.target):
            yield "gives up", _with_actor(state, index, _ended(who))
        elif who.at == "source":
            seen = who._replace(at="target", rows=(state.rows[who.source], NONE))
            yield "reads the source's row", _with_actor(state, index, seen)
        elif who.at == "target":
            seen = who._replace(rows=(who.rows[0], state.rows[who.target]))
            yield "reads the target's row", _with_actor(state, index, self._next(seen))
        elif who.at == "hint":
            yield "hints", _with_actor(_hinted(state, who), index, self._next(who))
        elif who.kind in ("purge", "sweep"):
            yield from self._purges(state, index, who)
        else:
            yield from self._goes_on(state, index, who)

    def _next(self, who: Actor) -> Actor:
        """He who acts next, or has come to an end."""
        if who.kind in ("purge", "sweep"):
            return who._replace(at="act") if self._may_purge(who) else _ended(who)
        due, progress = self._plan(who.kind, who.source, who.target, who.rows, who.progress)
        if due[0] in (Act.DONE, Act.LOST):
            return _ended(who)
        return who._replace(at="act", due=due, progress=progress)

    def _planned(
        self, kind: str, source: int, target: int, rows: tuple[int, int], known: Known
    ) -> tuple[Due, Known]:
        pair = _pair(source, target, rows)
        mine = Progress(*known)
        if not self.rules.claim_once:
            mine.claimed = False
        act = (next_act if kind == "move" else next_act_of_abort)(pair, mine)
        act = self._misguided(kind, pair, mine, act)
        wanted = {
            Act.MARK: lambda: (source, mark(pair, mine.move_id)),
            Act.CLAIM: lambda: (target, claim(pair, mine.move_id)),
            Act.FENCE: lambda: (source, fence(pair)),
            Act.DECIDE: lambda: (target, decide(pair.target)),
            Act.RELEASE: lambda: (source, self._released(pair)),
            Act.CANCEL: lambda: (target, cancel(pair, mine.move_id)),
            Act.REOPEN: lambda: (source, reopen(pair)),
        }
        known = (mine.move_id, mine.asked, mine.marked, mine.claimed, mine.copied, mine.passed)
        if act not in wanted:
            return (act, NONE, NONE), known
        shard, row = wanted[act]()
        return (act, shard, ROWS.of(row)), known

    def _misguided(self, kind: str, pair: Pair, mine: Progress, act: Act) -> Act:
        """What is done instead where the rules are broken."""
        if act is Act.CANCEL and not self.rules.cancel_before_reopen:
            return Act.REOPEN
        if act is Act.BARRIER and not self.rules.pass_barrier:
            return Act.DECIDE
        if not self.rules.decide_on_source:
            return act
        if kind == "abort" and pair.source.state == DRAINING:
            return Act.REOPEN if pair.source.move_id == mine.move_id else Act.MARK
        if act is Act.DECIDE and pair.source.state == DRAINING:
            return Act.RELEASE
        return act

    def _released(self, pair: Pair) -> SlotRow:
        if self.rules.decide_on_source and not pair.is_decided:
            return replace(pair.source, state=RELEASED, owner=pair.target_uuid)
        return release(pair)

    def _goes_on(self, state: State, index: int, who: Actor) -> Iterator[tuple[str, State]]:
        act, shard, row = who.due
        if act is Act.COPY or (act is Act.RELEASE and self._decides(who)):
            yield from self._copies(state, index, who, act)
        elif act is Act.BARRIER:
            yield from self._waits(state, index, who)
        elif act is Act.DECIDE and not who.held:
            read = who._replace(held=state.data[who.source])
            yield "reads what is frozen", _with_actor(state, index, read)
        else:
            expected = who.rows[0] if shard == who.source else who.rows[1]
            if self._is_unconditional(act):
                expected = NONE
            request = Request(shard, expected, row, act in self.rules.durable, who.held)
            yield from self._sends(state, index, who, act, request)

    def _decides(self, who: Actor) -> bool:
        """Whether the release is the decision, and the last of the difference is not there yet."""
        decided = _pair(who.source, who.target, who.rows).is_decided
        return self.rules.decide_on_source and not decided and who.session == 0

    def _is_unconditional(self, act: Act) -> bool:
        return (act is Act.RELEASE and not self.rules.release_if_unchanged) or (
            act is Act.REOPEN and not self.rules.reopen_if_unchanged
        )

    def _copies(
        self, state: State, index: int, who: Actor, act: Act
    ) -> Iterator[tuple[str, State]]:
        """Session by session; each is read at one moment and written at another."""
        if not who.held:
            read = who._replace(held=state.data[who.source])
            yield f"reads session {who.session}", _with_actor(state, index, read)
            return
        every = act is Act.RELEASE
        request = Request(
            who.target,
            who.rows[1],
            who.rows[1],
            held=who.held,
            session=NONE if every else who.session,
        )
        yield from self._sends(state, index, who, Act.COPY, request)

    def _waits(self, state: State, index: int, who: Actor) -> Iterator[tuple[str, State]]:
        """The barrier: for statements that have passed their guard on the source."""
        if self.rules.look_after_claim and state.rows[who.source] != who.rows[0]:
            yield "does not pass the barrier", _with_actor(state, index, _looking(who))
        elif who.source not in state.under_way:
            if Act.BARRIER in self.rules.durable:
                state = state._replace(undo=_with(state.undo, who.source, ()))
            passed = self._next(who._replace(progress=_with(who.progress, PASSED, True)))
            yield "passes the barrier", _with_actor(state, index, passed)

    def _sends(
        self, state: State, index: int, who: Actor, act: Act, request: Request
    ) -> Iterator[tuple[str, State]]:
        what = f"{act.value}s" if act is not Act.COPY else "writes what was read"
        after = self.carry_out(state, request)
        if after is None:
            yield f"{what} in vain", _with_actor(state, index, _looking(who))
        else:
            yield what, _with_actor(after, index, self._succeeded(who, act, request))
        if state.left.lost and state.stray is None:
            left = state.left._replace(lost=state.left.lost - 1)
            astray = state._replace(left=left, stray=request)
            yield f"{what}, and gets no answer", _with_actor(astray, index, _looking(who))

    def _succeeded(self, who: Actor, act: Act, request: Request) -> Actor:
        side = 0 if request.shard == who.source else 1
        who = who._replace(held=(), rows=_with(who.rows, side, request.row))
        if act is Act.COPY:
            session = who.session + 1
            if session == self.case.sessions or request.session == NONE:
                who = who._replace(progress=_with(who.progress, COPIED, True))
                session = 1 if request.session == NONE else 0
            who = who._replace(session=session)
        if act is Act.RELEASE and self.case.shards > 2:
            return who._replace(at="hint")
        return self._next(who)

    # Purging

    def _may_purge(self, who: Actor) -> bool:
        pair = _pair(who.source, who.target, who.rows)
        if who.kind == "purge":
            return pair.source.state == RELEASED and pair.is_decided
        return pair.target.state == CANCELLED and pair.is_undone

    def _purges(self, state: State, index: int, who: Actor) -> Iterator[tuple[str, State]]:
        """One session after the other, as long as the row is what it was; then it is forgotten."""
        side, shard = (0, who.source) if who.kind == "purge" else (1, who.target)
        row = who.rows[side]
        if who.kind == "purge" and self.rules.purge_when_durable and not who.progress[PASSED]:
            if state.rows[who.target] != who.rows[1]:
                yield "does not find the decision any more", _with_actor(state, index, _ended(who))
                return
            state = state._replace(undo=_with(state.undo, who.target, ()))
            who = who._replace(progress=_with(who.progress, PASSED, True))
            yield "waits until the decision is durable", _with_actor(state, index, who)
            return
        stored = [number for number, session in enumerate(state.data[shard]) if session]
        expected = row if self.rules.guard_purge else NONE
        if not stored:
            gone = forget(ROWS[row], NAMES[who.source])
            after = self.carry_out(state, Request(shard, row, ROWS.of(gone)))
            yield "forgets the slot", _with_actor(after or state, index, _ended(who))
            return
        request = Request(shard, expected, NONE, session=stored[0], drop=True)
        after = self.carry_out(state, request)
        if after is None:
            yield "stops purging", _with_actor(state, index, _ended(who))
        else:
            yield f"purges session {stored[0]}", _with_actor(after, index, who)


def _with(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _with_actor(state: State, index: int, who: Actor) -> State:
    return state._replace(actors=_with(state.actors, index, who))


def _ended(who: Actor) -> Actor:
    return Actor(who.kind, who.source, who.target, who.name, "end")


def _looking(who: Actor) -> Actor:
    return who._replace(at="source", rows=(NONE, NONE), held=())


def _pair(source: int, target: int, rows: tuple[int, int]) -> Pair:
    return Pair(NAMES[source], NAMES[target], ROWS[rows[0]], ROWS[rows[1]])


def _written(session: Session, number: int, what: str) -> Session:
    """A session after a write; what is written, and a new incarnation, is the write's number."""
    if what == "deletes":
        return None
    if session is None:
        return number, 1, (number,)
    return session[0], session[1] + 1, (*session[2], number)


def _hinted(state: State, who: Actor) -> State:
    """Third shards learn what the released source says, if it is news to them."""
    told = ROWS[who.rows[0]]
    rows = list(state.rows)
    for shard, number in enumerate(rows):
        row = ROWS[number]
        third = shard not in (who.source, who.target, state.quarantined)
        if third and row.state == ELSEWHERE and row.epoch < told.epoch:
            rows[shard] = ROWS.of(SlotRow(row.slot, told.owner, ELSEWHERE, told.epoch))
    return state._replace(rows=tuple(rows))


def _failed_over(state: State, shard: int, count: int) -> State:
    lost = state.undo[shard][-count:]
    truths = [one.truth for one in lost if one.truth is not None]
    left = state.left._replace(failovers=state.left.failovers - 1)
    undo = _with(state.undo, shard, ()) if left.failovers else ((),) * len(state.undo)
    return state._replace(
        rows=_with(state.rows, shard, lost[0].row),
        data=_with(state.data, shard, lost[0].data),
        truth=truths[0] if truths else state.truth,
        under_way=tuple(one for one in state.under_way if one != shard),
        undo=undo,
        left=left,
    )


def _restored(state: State) -> State:
    assert state.backup is not None
    shard, row, data = state.backup
    return state._replace(
        rows=_with(state.rows, shard, row),
        data=_with(state.data, shard, data),
        under_way=tuple(one for one in state.under_way if one != shard),
        backup=None,
        quarantined=shard,
    )
