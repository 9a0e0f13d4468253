"""``shardgate rebalance`` and ``shardgate drain``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from shardgate.agreement import Plan
from shardgate.cli.amounts import read_rate, read_seconds
from shardgate.cli.console import AsJson, print_lines, with_gateway
from shardgate.cli.keyspaces import OnKeyspace, keyspace_named
from shardgate.cli.orders import Order, Report, carry_out_order
from shardgate.cli.reports import print_report
from shardgate.control.moves import Limits
from shardgate.control.rebalance import THRESHOLD, drained, plan_moves, plan_of_slots
from shardgate.control.schedule import AT_ONCE
from shardgate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shardgate.control.rebalance import Load, MovePlan
    from shardgate.gateway import Gateway
    from shardgate.topology import KeyspaceMap

RATE = "32MB"

OnlyPlan = Annotated[bool, typer.Option("--plan", help="Print the moves, and make none.")]
Apply = Annotated[bool, typer.Option("--apply", help="Make the moves.")]
Most = Annotated[int | None, typer.Option(min=1, help="So many moves at the most.")]
WatchFor = Annotated[
    str, typer.Option("--watch", help="Count writes for so long first (10s), to weigh them, too.")
]
AtOnce = Annotated[int, typer.Option(min=1, help="Slots that are moved at a time.")]
Rate = Annotated[
    str, typer.Option("--bytes-per-second", help="How fast to copy, all together; or unlimited.")
]
FreezeBudget = Annotated[
    str, typer.Option(help="For how long a slot may be served by nobody, such as 200ms.")
]
AcceptAsync = Annotated[
    bool,
    typer.Option(
        "--accept-async-standbys",
        help="Also where standbys do not confirm commits; one that is promoted may lose writes.",
    ),
]


def rebalance(
    only_plan: OnlyPlan = False,
    apply: Apply = False,
    keyspace: OnKeyspace = None,
    move: Annotated[
        list[str] | None,
        typer.Option(metavar="SLOT:SHARD", help="Instead: just this slot to this shard."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, help="How much more than its share a shard may carry.")
    ] = THRESHOLD,
    most: Most = None,
    watch: WatchFor = "0",
    at_once: AtOnce = AT_ONCE,
    bytes_per_second: Rate = RATE,
    freeze_budget: FreezeBudget = "500ms",
    accept_async_standbys: AcceptAsync = False,
    as_json: AsJson = False,
) -> None:
    """Bring each shard to the share that its weight says, while sessions go on.

    It can be stopped (Ctrl-C) and begun again at any time, from anywhere.

    Exit code 0: nothing is left to do; 1: something is (so --plan tells whether there are moves to
    make); 2: the command or the settings are wrong.
    """
    limits = _limits(bytes_per_second, freeze_budget, accept_async_standbys)
    seconds = read_seconds("--watch", watch)
    wanted = _read_moves(move or [])

    def choose(known: KeyspaceMap, weights: Mapping[str, float], loads: Sequence[Load]) -> MovePlan:
        if wanted is not None:
            return plan_of_slots(known, wanted.slots, wanted.target, loads, weights=weights)
        return plan_moves(known, weights, loads, threshold=threshold, most=most)

    async def act(gateway: Gateway) -> Report:
        plan = Plan.of(gateway.settings, keyspace_named(gateway.settings, keyspace))
        unwanted = frozenset(name for name, weight in plan.weights.items() if not weight)
        order = Order(plan, choose, unwanted, applies, as_json, seconds, at_once, limits)
        return await carry_out_order(gateway, order)

    applies = _applies(only_plan, apply)
    report = with_gateway(act)
    print_report(report)
    raise typer.Exit(0 if report.ok else 1)


def drain(
    shard: Annotated[str, typer.Argument(help="The shard's name in the settings.")],
    only_plan: OnlyPlan = False,
    apply: Apply = False,
    most: Most = None,
    watch: WatchFor = "0",
    at_once: AtOnce = AT_ONCE,
    bytes_per_second: Rate = RATE,
    freeze_budget: FreezeBudget = "500ms",
    accept_async_standbys: AcceptAsync = False,
    as_json: AsJson = False,
) -> None:
    """Move everything off a shard, to the others by their weights, while sessions go on.

    It can be stopped (Ctrl-C) and begun again at any time, from anywhere.

    Exit code 0: the shard owns nothing any more; 1: something is left to do; 2: the command or the
    settings are wrong.
    """
    limits = _limits(bytes_per_second, freeze_budget, accept_async_standbys)
    seconds = read_seconds("--watch", watch)
    applies = _applies(only_plan, apply)

    async def act(gateway: Gateway) -> Report:
        settings = gateway.settings
        if shard not in settings.shards:
            known = ", ".join(settings.shards)
            raise UsageError(f"there is no shard {shard!r}; the settings have {known}")
        plan = Plan.of(settings, settings.shards[shard].keyspace)
        unwanted = frozenset(
            name for name, weight in drained(plan.weights, shard).items() if not weight
        )
        choose = partial(_plan_drain, shard, most)
        order = Order(plan, choose, unwanted, applies, as_json, seconds, at_once, limits)
        return await carry_out_order(gateway, order)

    report = with_gateway(act)
    print_report(report)
    if report.ok and not as_json:
        print_lines(_drained(shard))
    raise typer.Exit(0 if report.ok else 1)


def _plan_drain(
    shard: str,
    most: int | None,
    known: KeyspaceMap,
    weights: Mapping[str, float],
    loads: Sequence[Load],
) -> MovePlan:
    """The moves off a shard, and no others: those come first in a plan."""
    rest = drained(weights, shard)
    rest = {name: weight for name, weight in rest.items() if weight or name == shard}
    owned = len(known.slots_of(shard))
    return plan_moves(known, rest, loads, most=owned if most is None else min(most, owned))


def _drained(shard: str) -> Iterator[str]:
    yield f"shard {shard} owns no slot. Set its weight to 0, or a rebalance fills it again"
    yield (
        f"it still stores what it has released: once 'shardgate moves' has nothing of {shard} "
        "left, remove it from the settings"
    )


def _applies(only_plan: bool, apply: bool) -> bool:
    if only_plan == apply:
        raise UsageError("say one of --plan (print the moves) and --apply (make them)")
    return apply


def _limits(rate: str, freeze_budget: str, accept_async_standbys: bool) -> Limits:
    seconds = read_seconds("--freeze-budget", freeze_budget)
    if not seconds:
        raise UsageError(
            "--freeze-budget 0: a slot cannot be moved in no time; the default is 500ms"
        )
    return Limits(
        freeze_seconds=seconds,
        bytes_per_second=read_rate("--bytes-per-second", rate),
        accept_async_standbys=accept_async_standbys,
    )


@dataclass(frozen=True, slots=True)
class _Wanted:
    slots: list[int]
    target: str


def _read_moves(texts: Sequence[str]) -> _Wanted | None:
    """What ``--move`` says, all of it; None where it says nothing."""
    if not texts:
        return None
    slots: list[int] = []
    targets: set[str] = set()
    for text in texts:
        slot, _, target = text.partition(":")
        if not slot.isdecimal() or not target:
            raise UsageError(f"--move {text}: use SLOT:SHARD, such as 12:eu_2")
        slots.append(int(slot))
        targets.add(target)
    if len(targets) > 1:
        raise UsageError("--move: to one shard at a time")
    return _Wanted(slots, targets.pop())
