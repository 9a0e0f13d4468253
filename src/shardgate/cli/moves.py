"""``shardgate moves``: what is under way, what has stopped, and what moves have left behind."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from shardgate.agreement import Plan
from shardgate.cli.amounts import count, duration, read_seconds
from shardgate.cli.console import AsJson, output, print_json, print_lines, with_gateway
from shardgate.cli.keyspaces import OnKeyspace, keyspace_named, read_map, shards_of
from shardgate.control.moves import Limits, Mover
from shardgate.control.pending import PendingMove, Resumed, end_moves, pending_moves, resume
from shardgate.control.remains import (
    GRACE_SECONDS,
    Unfinished,
    find_unfinished_on,
    remove_remains,
)
from shardgate.errors import ShardgateError, UsageError
from shardgate.handover import RELEASED
from shardgate.shards import ask_all
from shardgate.slotmap import ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from shardgate.gateway import Gateway
    from shardgate.shards import Shard

STUCK = "stuck"


@dataclass(slots=True)
class Survey:
    """What the shards of a keyspace say of moves, and why some of them did not say it."""

    keyspace: str
    found: list[Unfinished]
    down: Mapping[str, ShardgateError]

    @property
    def pending(self) -> list[PendingMove]:
        """The moves that are under way or have stopped."""
        return pending_moves(self.found)

    @property
    def stuck(self) -> list[PendingMove]:
        """The moves that have stopped."""
        return [move for move in self.pending if move.is_stuck]

    @property
    def rests(self) -> list[Unfinished]:
        """What moves have left behind."""
        return [one for one in self.found if one.is_rest]

    def state_of(self, one: Unfinished) -> str:
        """What a row stands for, in a word or two."""
        if one.is_rest:
            return "left behind"
        stuck = {move.slot for move in self.stuck}
        return STUCK if one.row.slot in stuck else "runs"


@dataclass(slots=True)
class Removal:
    """What became of what moves had left behind in a keyspace: removed, kept, or neither."""

    keyspace: str
    removed: list[Unfinished] = field(default_factory=list)
    young: list[Unfinished] = field(default_factory=list)
    kept: list[tuple[Unfinished, str]] = field(default_factory=list)


def moves(
    keyspace: OnKeyspace = None,
    finish: Annotated[
        list[str] | None,
        typer.Option(metavar="SLOT|stuck", help="Go on with this slot's move, or with all stuck."),
    ] = None,
    cancel: Annotated[
        list[str] | None,
        typer.Option(metavar="SLOT|stuck", help="Undo it; one that is decided is finished."),
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove what moves have left behind.")
    ] = False,
    grace: Annotated[
        str, typer.Option(help="Keep what was released less than so long ago.")
    ] = f"{GRACE_SECONDS:g}",
    accept_async_standbys: Annotated[
        bool,
        typer.Option("--accept-async-standbys", help="Also where standbys do not confirm commits."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List what is under way, what is stuck (nobody at it for 15 s), and what was left behind.

    Exit code 0: nothing is stuck, and what was asked for is done; 1: something is stuck, was not
    done, or a shard does not answer; 2: the command or the settings are wrong.
    """
    if sum(map(bool, (finish, cancel, remove))) > 1:
        raise UsageError("--finish, --cancel and --remove: one of them at a time")
    limits = Limits(accept_async_standbys=accept_async_standbys)
    if finish or cancel:
        code = _end(
            keyspace, finish or cancel or [], limits, finishes=bool(finish), as_json=as_json
        )
    elif remove:
        seconds = read_seconds("--grace", grace)
        code = _remove_all(keyspace, seconds, limits, as_json=as_json)
    else:
        code = _list(keyspace, as_json=as_json)
    raise typer.Exit(code)


async def _survey(gateway: Gateway, keyspace: str) -> Survey:
    shards = shards_of(gateway, keyspace)
    found, down = await ask_all(
        {name: find_unfinished_on(shard, shards) for name, shard in shards.items()}
    )
    return Survey(keyspace, [one for part in found.values() for one in part], down)


async def _survey_whole(gateway: Gateway, keyspace: str) -> tuple[Plan, dict[str, Shard], Survey]:
    """The keyspace with what its shards say of moves, if all of them answer and are the right ones.

    Raises:
        ShardUnavailable: a shard does not answer.
        OwnershipConflict: a shard is not the one that it is taken for.
    """
    plan, shards = Plan.of(gateway.settings, keyspace), shards_of(gateway, keyspace)
    await read_map(plan, shards)
    survey = await _survey(gateway, keyspace)
    for error in survey.down.values():
        raise error
    return plan, shards, survey


def _chosen(gateway: Gateway, keyspace: str | None) -> list[str]:
    """The keyspace that was named, or all."""
    if keyspace is None:
        return list(gateway.settings.keyspaces)
    return [keyspace_named(gateway.settings, keyspace)]


# --- listing


def _list(keyspace: str | None, *, as_json: bool) -> int:
    async def act(gateway: Gateway) -> list[Survey]:
        await gateway.open()
        return [await _survey(gateway, name) for name in _chosen(gateway, keyspace)]

    surveys = with_gateway(act)
    if as_json:
        rows = [_row(survey, one) for survey in surveys for one in survey.found]
        down = {name: str(error) for survey in surveys for name, error in survey.down.items()}
        print_json({"rows": rows, "down": down})
    else:
        _print_surveys(surveys)
    return 1 if any(survey.down or survey.stuck for survey in surveys) else 0


def _row(survey: Survey, one: Unfinished) -> dict[str, Any]:
    return {
        "keyspace": survey.keyspace,
        "slot": one.row.slot,
        "shard": one.shard,
        "state": one.row.state,
        "peer": one.peer,
        "epoch": one.row.epoch,
        "idle": one.idle,
        "what": survey.state_of(one),
    }


def _print_surveys(surveys: Sequence[Survey]) -> None:
    pending = [_row(survey, one) for survey in surveys for one in survey.found if not one.is_rest]
    if pending:
        output.print(_table(pending))
    else:
        print_lines(["no slot is being moved"])
    for survey in surveys:
        print_lines((f"{error}" for error in survey.down.values()), style="red")
        print_lines(_advice(survey))
        print_lines(_left_behind(survey))


def _table(rows: Iterable[Mapping[str, Any]]) -> Table:
    table = Table("keyspace", "slot", "shard", "state", "peer", "epoch", "idle", "what")
    for row in sorted(rows, key=lambda row: (row["keyspace"], row["slot"])):
        idle = "?" if row["idle"] is None else duration(row["idle"])
        texts = (str(row[name] or "?") for name in ("shard", "state", "peer"))
        table.add_row(
            row["keyspace"], str(row["slot"]), *texts, str(row["epoch"]), idle, row["what"]
        )
    return table


def _advice(survey: Survey) -> Iterator[str]:
    if survey.stuck:
        yield (
            f"{count(len(survey.stuck), 'move')} stuck in keyspace {survey.keyspace}: "
            "'shardgate moves --finish stuck' goes on, 'shardgate moves --cancel stuck' undoes"
        )


def _left_behind(survey: Survey) -> Iterator[str]:
    by_shard: defaultdict[tuple[str, str], list[Unfinished]] = defaultdict(list)
    for one in survey.rests:
        by_shard[one.shard, one.row.state].append(one)
    for (shard, state), rests in sorted(by_shard.items()):
        yield f"left behind on shard {shard}: {count(len(rests), 'slot')}, {state} {_ages(rests)}"
    if by_shard:
        yield "'shardgate moves --remove' removes that, when its grace is over"


def _ages(rests: Iterable[Unfinished]) -> str:
    ages = sorted(one.idle or 0.0 for one in rests)
    first, last = duration(ages[0]), duration(ages[-1])
    return f"{first} ago" if first == last else f"{first} to {last} ago"


# --- finishing and cancelling


def _end(
    keyspace: str | None, wanted: Sequence[str], limits: Limits, *, finishes: bool, as_json: bool
) -> int:
    slots = _read_slots("--finish" if finishes else "--cancel", wanted)

    async def act(gateway: Gateway) -> Resumed:
        await gateway.open()
        name = keyspace_named(gateway.settings, keyspace)
        plan, shards, survey = await _survey_whole(gateway, name)
        chosen = survey.stuck if slots is None else _moves_of(survey, slots)
        mover = Mover(plan, shards, limits=limits)
        return await (resume(mover, chosen) if finishes else end_moves(mover, chosen))

    done = with_gateway(act)
    moved = [event.slot for event in done.outcome.moved]
    failed = {str(slot): str(error) for slot, error in done.outcome.failed.items()}
    left = [move.slot for move in done.outcome.left]
    if as_json:
        print_json({"moved": moved, "ended": done.ended, "failed": failed, "left": left})
    else:
        print_lines(
            (f"slot {slot}: not done: {error}" for slot, error in failed.items()), style="red"
        )
        print_lines(f"slot {slot}: moved" for slot in moved)
        print_lines(f"slot {slot}: its move has ended" for slot in done.ended)
        print_lines(f"slot {slot}: not tried" for slot in left)
        if not (moved or failed or done.ended or left):
            print_lines(["nothing is stuck"])
    return 0 if done.ok else 1


def _read_slots(option: str, wanted: Sequence[str]) -> list[int] | None:
    """The slots that were named; None for all that are stuck."""
    if STUCK in wanted:
        return None
    for text in wanted:
        if not text.isdecimal():
            raise UsageError(f"{option} {text}: use the number of a slot, or {STUCK}")
    return [int(text) for text in wanted]


def _moves_of(survey: Survey, slots: Iterable[int]) -> list[PendingMove]:
    """The moves of these slots; a slot that was released is asked about, too.

    Raises:
        UsageError: a slot is not being moved.
    """
    chosen: list[PendingMove] = []
    for slot in dict.fromkeys(slots):
        found = [move for move in survey.pending if move.slot == slot] or [
            PendingMove(slot, one.shard, one.peer, one.idle or 0.0)
            for one in survey.rests
            if one.row.slot == slot and one.row.state == RELEASED
        ]
        if not found:
            raise UsageError(f"slot {slot} of keyspace {survey.keyspace!r} is not being moved")
        chosen += found
    return chosen


# --- removing


def _remove_all(keyspace: str | None, grace: float, limits: Limits, *, as_json: bool) -> int:
    async def act(gateway: Gateway) -> list[Removal]:
        await gateway.open()
        return [
            await _remove_in(gateway, name, grace, limits) for name in _chosen(gateway, keyspace)
        ]

    removals = with_gateway(act)
    if as_json:
        print_json({removal.keyspace: _removal_json(removal) for removal in removals})
    else:
        for removal in removals:
            print_lines(_said_of(removal, grace))
    return 1 if any(removal.kept for removal in removals) else 0


async def _remove_in(gateway: Gateway, keyspace: str, grace: float, limits: Limits) -> Removal:
    plan, shards, survey = await _survey_whole(gateway, keyspace)
    removal = Removal(keyspace)
    for rest in survey.rests:
        if rest.row.state == RELEASED and rest.idle is not None and rest.idle < grace:
            removal.young.append(rest)
            continue
        try:
            reason = await remove_remains(
                plan,
                shards,
                rest,
                grace_seconds=grace,
                accept_async_standbys=limits.accept_async_standbys,
            )
        except ShardgateError as error:
            reason = str(error)
        if reason is None:
            removal.removed.append(rest)
        else:
            removal.kept.append((rest, reason))
    return removal


def _removal_json(removal: Removal) -> dict[str, Any]:
    return {
        "removed": [{"slot": rest.row.slot, "shard": rest.shard} for rest in removal.removed],
        "kept": [
            {"slot": rest.row.slot, "shard": rest.shard, "why": "its grace is not over"}
            for rest in removal.young
        ]
        + [{"slot": rest.row.slot, "shard": rest.shard, "why": why} for rest, why in removal.kept],
    }


def _said_of(removal: Removal, grace: float) -> Iterator[str]:
    for shard, rests in _by_shard(removal.removed).items():
        yield f"shard {shard}: what it had of {count(len(rests), 'slot')} is removed"
    for shard, rests in _by_shard(removal.young).items():
        yield (
            f"shard {shard}: {count(len(rests), 'slot')} kept, {RELEASED} {_ages(rests)}: the "
            f"grace is {duration(grace)}"
        )
    reasons: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for rest, why in removal.kept:
        reasons[rest.shard, why].append(rest.row.slot)
    for (shard, why), slots in sorted(reasons.items()):
        yield f"shard {shard}: slots {ranges(sorted(slots))} kept: {why}"
    if not (removal.removed or removal.young or removal.kept):
        yield f"keyspace {removal.keyspace}: moves have left nothing behind"


def _by_shard(rests: Iterable[Unfinished]) -> dict[str, list[Unfinished]]:
    found: defaultdict[str, list[Unfinished]] = defaultdict(list)
    for rest in rests:
        found[rest.shard].append(rest)
    return dict(sorted(found.items()))
