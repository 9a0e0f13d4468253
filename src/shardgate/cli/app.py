"""The commands. They read the same settings as the platform does.

Exit codes: 0 all is well; 1 something does not work (a shard is down, say); 2 the command or the
settings are wrong.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.dialects.mysql import mariadb

from shardgate.agreement import Plan
from shardgate.cli.balancing import drain, rebalance
from shardgate.cli.console import AsJson, errors, output, print_json, print_lines, with_gateway
from shardgate.cli.moves import moves
from shardgate.cli.shards import shards
from shardgate.control import reconcile
from shardgate.errors import ShardgateError, UsageError
from shardgate.slotmap import conflict
from shardgate.sql.schema import TableNames, build_tables, ddl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardgate.control.reconcile import Remedy
    from shardgate.gateway import Gateway, HealthReport
    from shardgate.shards import Shard

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Look at, create and check the shards that the SHARDGATE_ settings name."""
    if version:
        sys.stdout.write(f"shardgate {metadata.version('shardgate')}\n")
        raise typer.Exit


class DialectName(StrEnum):
    """The databases that the tables are declared for."""

    postgresql = "postgresql"
    mysql = "mysql"
    mariadb = "mariadb"
    sqlite = "sqlite"


_DIALECTS: dict[DialectName, Callable[[], Any]] = {
    DialectName.postgresql: postgresql.dialect,
    DialectName.mysql: mysql.dialect,
    DialectName.mariadb: mariadb.MariaDBDialect,
    DialectName.sqlite: sqlite.dialect,
}


@app.command("ddl")
def print_ddl(
    dialect: Annotated[DialectName, typer.Option(help="Which database.")],
    table_prefix: Annotated[str, typer.Option(help="How a gateway's tables begin.")] = "shardgate_",
    schema: Annotated[str | None, typer.Option(help="PostgreSQL: the tables' schema.")] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="The tables of the stand-alone SQLAlchemySession.")
    ] = False,
) -> None:
    """Print the CREATE statements of one shard; reads no settings."""
    names = (
        TableNames.standalone("agent_sessions", "agent_messages")
        if standalone
        else TableNames.gateway(table_prefix)
    )
    for statement in ddl(build_tables(names, schema=schema), _DIALECTS[dialect]()):
        sys.stdout.write(f"{statement};\n\n")


@app.command("create-tables")
def create_tables() -> None:
    """Create the tables and keyspaces, or what is missing of them. Safe to run again."""

    async def act(gateway: Gateway) -> None:
        await gateway.create_tables()
        for keyspace in gateway.settings.keyspaces:
            shards = ", ".join(sorted(gateway.settings.shards_of(keyspace)))
            output.print(f"keyspace {keyspace}: ready on {shards}", highlight=False)

    with_gateway(act)


@app.command("check")
def check(as_json: AsJson = False) -> None:
    """Ask every shard how it is; exit code 1 if one of them does not serve."""

    async def act(gateway: Gateway) -> HealthReport:
        return await gateway.check()

    report = with_gateway(act)
    if as_json:
        shards = {name: asdict(shard) for name, shard in report.shards.items()}
        known = {"ok": report.ok, "shards": shards, "problems": report.problems}
        print_json(known)
    else:
        output.print(_health_table(report))
        for problem in report.problems:
            output.print(problem, style="red", markup=False, highlight=False)
    raise typer.Exit(0 if report.ok else 1)


@app.command("route")
def print_route(
    tenant: Annotated[str, typer.Argument(help="The tenant's id.")],
    session: Annotated[str, typer.Argument(help="The session's id.")],
    keyspace: Annotated[str | None, typer.Option(help="Instead of the tenant's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell where a session lives, whether it exists or not."""

    async def act(gateway: Gateway) -> Any:
        await gateway.open()
        return gateway.route(tenant, session, keyspace=keyspace)

    route = asdict(with_gateway(act))
    if as_json:
        sys.stdout.write(json.dumps(route) + "\n")
        return
    for name, value in route.items():
        output.print(f"{name:9} {value}", highlight=False, markup=False)


@app.command("purge-operations")
def purge_operations() -> None:
    """Remove the records of operations that need not be remembered any more."""

    async def act(gateway: Gateway) -> None:
        for name, removed in (await gateway.purge_operations()).items():
            output.print(f"shard {name}: {removed} removed", highlight=False, markup=False)

    with_gateway(act)


@app.command("reconcile")
def reconcile_shard(
    shard: Annotated[str, typer.Argument(help="The shard's name in the settings.")],
    apply: Annotated[bool, typer.Option("--apply", help="Do what is explained.")] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Also where sessions are lost for good.")
    ] = False,
    expect: Annotated[
        str | None, typer.Option("--expect", help="Only if this is still what was explained.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain what is wrong with a shard, and what would be done to have it agree with its peers.

    Exit code 0: nothing is wrong, or it was mended; 1: something is to be done.
    """

    async def act(gateway: Gateway) -> tuple[Remedy, bool]:
        plan, shards = _keyspace_of(gateway, shard)
        remedy = await reconcile.examine(plan, shards, shard)
        if not as_json:
            print_lines(_explained(remedy, applies=apply))
        if expect not in (None, remedy.digest):
            raise conflict(plan, f"what is to be done is not what {expect} stood for; look again")
        if apply and remedy.steps:
            await reconcile.apply(plan, shards, remedy, accept_loss=accept_loss)
        return remedy, apply and bool(remedy.steps)

    remedy, done = with_gateway(act)
    if as_json:
        known: dict[str, Any] = {"shard": shard, "problem": remedy.problem, "steps": remedy.steps}
        known |= {"notes": remedy.notes, "loses": remedy.loses}
        known |= {"digest": remedy.digest, "done": done}
        print_json(known)
    elif done:
        print_lines(["done"])
    raise typer.Exit(0 if remedy.problem is None or done else 1)


app.command("shards")(shards)
app.command("rebalance")(rebalance)
app.command("drain")(drain)
app.command("moves")(moves)


def _keyspace_of(gateway: Gateway, shard: str) -> tuple[Plan, dict[str, Shard]]:
    """The keyspace that a shard belongs to, with all its shards."""
    settings = gateway.settings
    if shard not in settings.shards:
        known = ", ".join(settings.shards)
        raise UsageError(f"there is no shard {shard!r}; the settings have {known}")
    keyspace = settings.shards[shard].keyspace
    shards = {name: gateway.shards[name] for name in settings.shards_of(keyspace)}
    return Plan.of(settings, keyspace), shards


def _explained(remedy: Remedy, *, applies: bool) -> Iterator[str]:
    if remedy.problem is None:
        yield f"shard {remedy.shard}: nothing is wrong"
        return
    yield remedy.problem
    if not remedy.steps:
        yield "this cannot be mended here: mend the settings, or restore the right database"
        return
    yield "what is to be done:"
    yield from (f"  - {step}" for step in remedy.steps)
    yield from (f"note: {note}" for note in remedy.notes)
    if remedy.loses:
        yield "sessions are lost for good by this"
    if not applies:
        loses = " --accept-loss" if remedy.loses else ""
        command = f"shardgate reconcile {remedy.shard} --apply{loses}"
        yield f"to do just this: {command} --expect {remedy.digest}"


def _health_table(report: HealthReport) -> Table:
    table = Table("shard", "keyspace")
    table.add_column("state", overflow="fold")
    for column in ("server", "latency", "slots"):
        table.add_column(column)
    for name, shard in sorted(report.shards.items()):
        latency = "" if shard.latency is None else f"{shard.latency * 1000:.1f} ms"
        slots = "" if shard.slots is None else str(shard.slots)
        state = "ok" if shard.ok else str(shard.error)
        table.add_row(name, shard.keyspace, state, shard.server or "", latency, slots)
    return table


def run() -> None:
    """Run the command; an error is a line or two, not a traceback."""
    try:
        app()
    except UsageError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except ShardgateError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
