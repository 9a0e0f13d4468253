"""What is said of an order to move slots: in words, and for programs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from rich.table import Table

from shardgate.cli.amounts import count, duration, size
from shardgate.cli.console import output, print_json, print_lines
from shardgate.cli.progress import Freezes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardgate.cli.orders import Report
    from shardgate.control.moves import MoveEvent
    from shardgate.control.rebalance import Load, MovePlan


def print_report(report: Report) -> None:
    if report.order.as_json:
        print_json(_report_json(report))
        return
    if report.plan is not None and not report.order.applies:
        _print_plan(report, report.plan)
    print_lines(_problems(report), style="red")
    print_lines(_told(report))


def _print_plan(report: Report, plan: MovePlan) -> None:
    if plan.moves:
        output.print(_plan_table(plan))
        print_lines(_estimate(report, plan))


def _plan_table(plan: MovePlan) -> Table:
    table = Table("from", "to")
    for column in ("slots", "sessions", "items", "size"):
        table.add_column(column, justify="right")
    routes: defaultdict[tuple[str, str], list[Load]] = defaultdict(list)
    for move in plan.moves:
        routes[move.source, move.target].append(move.load)
    for (source, target), loads in sorted(routes.items()):
        amounts = (sum(load.sessions for load in loads), sum(load.items for load in loads))
        nbytes = size(sum(load.nbytes for load in loads))
        table.add_row(source, target, str(len(loads)), *map(str, amounts), nbytes)
    return table


def _estimate(report: Report, plan: MovePlan) -> Iterator[str]:
    load = plan.load
    yield (
        f"{count(len(plan.moves), 'slot')} to move: {count(load.sessions, 'session')}, "
        f"{count(load.items, 'item')}, {size(load.nbytes)}"
    )
    if seconds := _least_seconds(report, plan):
        rate = size(report.order.limits.bytes_per_second or 0)
        yield f"this takes {duration(seconds)} at least, at {rate} per second"
    yield f"the fullest shard {_imbalance(plan.imbalance_before)}"
    yield f"  afterwards it {_imbalance(plan.imbalance_after)}"


def _least_seconds(report: Report, plan: MovePlan) -> float | None:
    """What is copied is read twice: to be copied, and to be verified."""
    rate = report.order.limits.bytes_per_second
    return None if rate is None else 2 * plan.seconds(rate)


def _imbalance(ratio: float) -> str:
    if not isfinite(ratio):
        return "has something, and should have nothing"
    return f"carries {ratio:.3g} times its share"


def _problems(report: Report) -> Iterator[str]:
    for move in report.busy:
        yield (
            f"slot {move.slot} is being moved from shard {move.source} to shard {move.target} by "
            f"somebody else, who was seen {duration(move.idle)} ago"
        )
    for name in report.plan.unreachable if report.plan is not None else ():
        yield f"shard {name} owns slots, and the settings do not name it: add it"
    for slot, error in report.failed.items():
        told = str(error)
        yield told if f"slot {slot} " in told else f"slot {slot}: {told}"
    for slot in report.frozen:
        yield f"slot {slot} is served by nobody, until its move is gone on with or ended"


def _told(report: Report) -> Iterator[str]:
    if report.busy:
        yield "nothing was done: wait until they have ended, or see 'shardgate moves'"
    elif report.plan is not None and not report.plan.moves and not report.moved and report.ok:
        yield "nothing is to be moved"
    if report.resumed.ended:
        yield f"{count(len(report.resumed.ended), 'move')} to a shard that is to be empty ended"
    if (report.order.applies and report.plan is not None and report.plan.moves) or report.moved:
        yield ", ".join(_sums(report))
    if report.otherwise:
        yield f"{count(report.otherwise, 'slot')} moved by somebody else meanwhile"
    if report.stopped or report.left or report.failed:
        left = len(report.left) + len(report.failed)
        what = f"{count(left, 'slot')} left to move" if left else "stopped"
        yield f"{what}: run the same command again to go on"


def _sums(report: Report) -> Iterator[str]:
    moved = report.moved
    yield f"{count(len(moved), 'slot')} moved"
    yield count(sum(event.items for event in moved), "item")
    yield size(sum(event.nbytes for event in moved))
    yield f"{count(sum(event.verified for event in moved), 'item')} verified"
    freezes = Freezes.of(moved)
    if freezes.p50 is not None and freezes.p99 is not None and freezes.longest is not None:
        yield (
            f"frozen {duration(freezes.longest)} at most "
            f"(p50 {duration(freezes.p50)}, p99 {duration(freezes.p99)})"
        )
    yield f"{duration(report.seconds)} in all"


def _report_json(report: Report) -> dict[str, Any]:
    known: dict[str, Any] = {"keyspace": report.order.plan.keyspace, "ok": report.ok}
    if (plan := report.plan) is not None:
        known |= {
            "moves": [
                {"slot": move.slot, "source": move.source, "target": move.target}
                | _load_json(move.load)
                for move in plan.moves
            ],
            "imbalance_before": _finite(plan.imbalance_before),
            "imbalance_after": _finite(plan.imbalance_after),
            "least_seconds": _least_seconds(report, plan),
            "unreachable": list(plan.unreachable),
        }
    if report.order.applies:
        known |= _outcome_json(report)
    return known


def _outcome_json(report: Report) -> dict[str, Any]:
    return {
        "busy": [asdict(move) for move in report.busy],
        "ended": report.resumed.ended,
        "moved": [_event_json(event) for event in report.moved],
        "failed": {str(slot): str(error) for slot, error in report.failed.items()},
        "left": [move.slot for move in report.left],
        "moved_otherwise": report.otherwise,
        "unserved": report.frozen,
        "stopped": report.stopped,
        "items": sum(event.items for event in report.moved),
        "bytes": sum(event.nbytes for event in report.moved),
        "verified": sum(event.verified for event in report.moved),
        "frozen": asdict(Freezes.of(report.moved)),
        "seconds": report.seconds,
    }


def _event_json(event: MoveEvent) -> dict[str, Any]:
    return {
        "slot": event.slot,
        "source": event.source,
        "target": event.target,
        "sessions": event.sessions,
        "items": event.items,
        "bytes": event.nbytes,
        "verified": event.verified,
        "frozen": event.frozen,
    }


def _load_json(load: Load) -> dict[str, Any]:
    return {
        "sessions": load.sessions,
        "items": load.items,
        "bytes": load.nbytes,
        "writes": load.writes,
    }


def _finite(ratio: float) -> float | None:
    return ratio if isfinite(ratio) else None
