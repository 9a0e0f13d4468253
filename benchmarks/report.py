"""The tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table as Drawn

from benchmarks import about
from benchmarks.contestants.ours import StandAlone, ThroughGateway
from benchmarks.tables import GROWTHS, LOADS, tables

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.results import Results


def show(results: Results, console: Console) -> None:
    """Print every table, and what the run was."""
    for table in tables(results):
        drawn = Drawn(title=table.title, title_justify="left", title_style="bold")
        for number, name in enumerate(table.header):
            drawn.add_column(name, justify="left" if number == 0 else "right")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    console.print(about.sentence(results.about))


def ours_failed(results: Results) -> bool:
    """Whether Shardgate met an error, or could not run where its database was there."""
    ours = {ThroughGateway.key, StandAlone.key}
    titles = {ThroughGateway.title, StandAlone.title}
    errors = any(ours & results.errors(part).keys() for part in (*LOADS, *GROWTHS))
    missing = any(
        not reason.startswith("no ")
        for found in results.missing.values()
        for title, reason in found.items()
        if title in titles
    )
    moves = results.moves
    moves_failed = bool(moves) and bool(
        moves["failed"] or moves["not_moved"] or moves["items_found"] != moves["items_expected"]
    )
    return errors or missing or moves_failed
