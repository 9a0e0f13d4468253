"""Every state that a case can come to, breadth first, and what must hold in each of them."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache
from itertools import permutations, product
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from shardgate.agreement import Plan
from shardgate.handover import DRAINING, ELSEWHERE, RELEASED, SlotRow
from shardgate.records import HASH, Identity, ShardRecord
from shardgate.slotmap import build_map, unserved
from shardgate.sql.schema import SCHEMA_VERSION

from .model import NAMES, NONE, ROWS, Actor, Case, Data, Left, Model, Rules, State, actor

if TYPE_CHECKING:
    from collections.abc import Iterator

Rows: TypeAlias = tuple[int, ...]
Stored: TypeAlias = tuple[Data, ...]

TWO = "two shards serve the slot"
MISSING = "who serves lacks an acknowledged write, or has what was deleted"
MISLED = "the map does not name who serves"
STUCK = "nobody can have it served again, and whole"
FIXED = "it cannot be moved any more"
LITTER = "what a move has left behind can never be purged"


class Found(NamedTuple):
    """What a search has found: how many states, and the shortest way to a flaw if there is one."""

    states: int
    flaw: str | None = None
    way: tuple[str, ...] = ()
    steps: frozenset[str] = frozenset()
    """What has been done in any of them."""

    def __str__(self) -> str:
        return "\n".join((f"{self.states} states; {self.flaw or 'no flaw'}", *self.way))


class Search:
    """The search of one case."""

    def __init__(self, case: Case) -> None:
        self.model = Model(case)
        self.came: dict[State, tuple[State, str] | None] = {}
        self.ways = tuple(permutations(range(case.shards), 2))
        self.right = Model(replace(case, rules=Rules(compare_items=case.rules.compare_items)))
        """What can be done to end it, by those who keep the rules."""
        self.quiet = self.model.start()._replace(actors=(), left=Left(0, 0, 0, 0))
        self.done: set[str] = set()
        self.stuck = cache(self._stuck)

    def run(self, *, at_most: int, overlook: str | None = None) -> Found:
        """Look at every state, at most so many; without a look at one kind of flaw."""
        gc.disable()  # it would walk through all of the states again and again, and find nothing
        try:
            return self._run(at_most, (overlook, None))
        finally:
            gc.enable()

    def _run(self, at_most: int, overlooked: tuple[str | None, ...]) -> Found:
        start = self.model.start()
        self.came[start] = None
        edge = [start]
        while edge:
            following: list[State] = []
            for state in edge:
                for flaw in self.flaws(state):
                    if flaw not in overlooked:
                        return Found(len(self.came), flaw, tuple(self._way(state)))
                for what, after in self.model.steps(state):
                    self.done.add(what)
                    if after not in self.came:
                        self.came[after] = (state, what)
                        following.append(after)
            assert len(self.came) <= at_most, f"more than {at_most} states"
            edge = following
        return Found(len(self.came), steps=frozenset(self.done))

    def _way(self, state: State) -> list[str]:
        steps = [_told(state)]
        while (came := self.came[state]) is not None:
            state, what = came
            steps += [what, _told(state)]
        return steps[::-1]

    def flaws(self, state: State) -> Iterator[str | None]:
        """What is wrong with a state, or with the step to it."""
        yield state.flaw
        servers = state.servers
        if len(servers) > 1:
            yield TWO
        elif servers and state.data[servers[0]] != state.truth:
            yield MISSING
        elif state.quarantined == NONE:
            if servers and not _leads(state.rows, servers[0]):
                yield MISLED
            yield self.stuck(state.rows, state.data, state.truth)

    def _stuck(self, rows: Rows, data: Stored, truth: Data) -> str | None:
        """What somebody who comes afresh cannot do from here, with everybody else dead.

        He tries what there is, twice at most. Then one shard must serve, with everything; and from
        there every other shard can get the slot.
        """
        here = self.quiet._replace(rows=rows, data=data, truth=truth)
        whole = next((end for end in self._ends(here) if _is_whole(end)), None)
        if whole is None:
            return STUCK
        if whole != here:
            return self.stuck(whole.rows, whole.data, truth)
        server = here.servers[0]
        for shard in set(range(len(rows))) - {server}:
            flaw = self._flaw_of_moving(here, shard)
            if flaw is None and not self._can_forget(here, server, shard):
                flaw = LITTER
            if flaw is not None:
                return flaw
        return None

    def _flaw_of_moving(self, here: State, target: int) -> str | None:
        """What is wrong once it has been moved there; it may need something else before."""
        for state in self._ends(here):
            if not state.servers or state.servers == [target]:
                continue
            end = self.right.alone(state, _afresh("move", state.servers[0], target, state))
            if end.servers == [target]:
                return None if _is_whole(end) else MISSING
        return FIXED

    def _can_forget(self, here: State, server: int, shard: int) -> bool:
        """Whether the rows that it has of a slot which is not its own can be purged."""
        row = ROWS[here.rows[shard]]
        if row.state == RELEASED:
            assert row.peer is not None
            after = self.right.alone(here, Actor("purge", shard, NAMES.index(row.peer), "purger"))
        else:
            after = self.right.alone(here, _afresh("abort", server, shard, here))
            after = self.right.alone(after, Actor("sweep", server, shard, "purger"))
        return ROWS[after.rows[shard]].state in (ELSEWHERE, DRAINING)

    def _ends(self, here: State) -> Iterator[State]:
        """How it is, and how it is after what somebody who comes afresh can do."""
        yield here
        once = []
        for kind, (source, target) in product(("abort", "move"), self.ways):
            end = self.right.alone(here, _afresh(kind, source, target, here))
            if end != here:
                yield end
                once.append(end)
        for middle in once:
            for kind, (source, target) in product(("abort", "move"), self.ways):
                yield self.right.alone(middle, _afresh(kind, source, target, middle))


def _afresh(kind: str, source: int, target: int, state: State) -> Actor:
    """Somebody with a mark that nobody has had."""
    name = f"afresh{max(ROWS[row].epoch for row in state.rows)}"
    return actor(kind, NAMES[source] + NAMES[target], name)


def _is_whole(state: State) -> bool:
    servers = state.servers
    return len(servers) == 1 and state.data[servers[0]] == state.truth


@cache
def _leads(rows: Rows, server: int) -> bool:
    """Whether the map that the shards' records make names who serves, and all is well with them."""
    known = {name: _record(name, ROWS[row]) for name, row in zip(NAMES, rows, strict=False)}
    plan = Plan("main", slots=1, spread=None, weights=dict.fromkeys(known, 1.0))
    named = build_map(plan, known).owners[0]
    return named == NAMES[server] and not unserved(plan, known)


def _record(name: str, row: SlotRow) -> ShardRecord:
    identity = Identity(
        shard_uuid=name,
        name=name,
        keyspace="main",
        keyspace_uuid="uuid-of-main",
        slots=1,
        spread=None,
        hash=HASH,
        schema_version=SCHEMA_VERSION,
        map_version=1,
    )
    return ShardRecord(identity, {}, (row,))


def _told(state: State) -> str:
    """A state's rows and sessions, for people."""
    shards = []
    for name, number, data in zip(NAMES, state.rows, state.data, strict=False):
        row = ROWS[number]
        marks = "".join(f" {what}={value}" for what, value in _marks(row) if value)
        shards.append(f"{name}: {row.state} {row.epoch} owner={row.owner}{marks} {data}")
    return f"    {' | '.join(shards)} | truth {state.truth}"


def _marks(row: SlotRow) -> tuple[tuple[str, str | None], ...]:
    return ("mark", row.move_id), ("peer", row.peer)
