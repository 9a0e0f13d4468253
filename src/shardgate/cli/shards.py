"""``shardgate shards``: what each shard carries, against what it should."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from shardgate.agreement import Plan
from shardgate.cli.amounts import part, size
from shardgate.cli.console import AsJson, output, print_json, print_lines, with_gateway
from shardgate.cli.keyspaces import OnKeyspace, shards_of
from shardgate.control.load import measure
from shardgate.control.pending import pending_moves
from shardgate.control.rebalance import plan_moves
from shardgate.control.remains import find_unfinished_on
from shardgate.errors import ShardgateError
from shardgate.shards import ask_all
from shardgate.slotmap import consult, map_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from shardgate.control.pending import PendingMove
    from shardgate.control.rebalance import ShardLoad
    from shardgate.gateway import Gateway, ShardHealth


def shards(keyspace: OnKeyspace = None, as_json: AsJson = False) -> None:
    """Tell what each shard carries, against what it should by its weight.

    Exit code 0: every shard serves; 1: one of them does not, or is not to be asked.
    """

    async def act(gateway: Gateway) -> list[dict[str, Any]]:
        with suppress(ShardgateError):
            await gateway.open()
        health = (await gateway.check()).shards
        chosen = gateway.settings.keyspaces if keyspace is None else [keyspace]
        return [row for name in chosen for row in await _carried(gateway, name, health)]

    rows = with_gateway(act)
    if as_json:
        print_json({"shards": rows})
    else:
        output.print(_shards_table(rows))
        print_lines(
            (f"{row['shard']}: {row['error']}" for row in rows if row["error"]), style="red"
        )
    raise typer.Exit(1 if any(row["error"] for row in rows) else 0)


async def _carried(
    gateway: Gateway, keyspace: str, health: Mapping[str, ShardHealth]
) -> list[dict[str, Any]]:
    plan, shards = Plan.of(gateway.settings, keyspace), shards_of(gateway, keyspace)
    known = {name: None if health[name].ok else str(health[name].error) for name in shards}
    carried: Mapping[str, ShardLoad] = {}
    with suppress(ShardgateError):
        owners = map_of(plan, await consult(plan, shards))
        loads, down = await measure(plan, shards, owners)
        carried = plan_moves(owners, plan.weights, loads, most=0).before
        known = (
            dict.fromkeys(carried)
            | {name: str(e) for name, e in down.items()}
            | {name: error for name, error in known.items() if error is not None}
        )
    found, _ = await ask_all(
        {name: find_unfinished_on(shard, shards) for name, shard in shards.items()}
    )
    moves = pending_moves(one for part in found.values() for one in part)
    return [
        _row(keyspace, name, plan.weights.get(name), carried.get(name), known[name], moves)
        for name in sorted(known)
    ]


def _row(
    keyspace: str,
    name: str,
    weight: float | None,
    carried: ShardLoad | None,
    error: str | None,
    moves: Sequence[PendingMove],
) -> dict[str, Any]:
    counted = carried is not None and error is None
    load = carried.load if carried is not None and counted else None
    return {
        "keyspace": keyspace,
        "shard": name,
        "error": error,
        "slots": None if carried is None else carried.slots,
        "sessions": None if load is None else load.sessions,
        "items": None if load is None else load.items,
        "bytes": None if load is None else load.nbytes,
        "weight": weight,
        "share": None if carried is None else carried.share,
        "wanted": None if carried is None else carried.wanted,
        "leaving": sum(move.source == name for move in moves),
        "arriving": sum(move.target == name for move in moves),
    }


def _shards_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    table = Table("keyspace", "shard", "state")
    for column in ("slots", "sessions", "items", "size", "weight", "share", "wanted"):
        table.add_column(column, justify="right")
    table.add_column("moves")
    for row in rows:
        table.add_row(
            row["keyspace"],
            row["shard"],
            "does not serve" if row["error"] else "ok",
            *(_shown(row[name], str) for name in ("slots", "sessions", "items")),
            _shown(row["bytes"], size),
            _shown(row["weight"], lambda weight: f"{weight:g}"),
            *(_shown(row[name], part) for name in ("share", "wanted")),
            ", ".join(f"{row[name]} {name}" for name in ("leaving", "arriving") if row[name]),
        )
    return table


def _shown(value: Any, show: Callable[[Any], str]) -> str:
    return "?" if value is None else show(value)
