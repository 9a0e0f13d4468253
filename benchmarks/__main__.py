"""``python -m benchmarks``: start servers, measure, show and store."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks import about, charts, readme, report
from benchmarks.options import read_options
from benchmarks.parts import exchange, growth, moves, routing, wal
from benchmarks.parts.cast import Run
from benchmarks.players import quieten
from benchmarks.results import Results
from benchmarks.servers import MissingError, Servers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.options import Options

PARTS: dict[str, Callable[[Run, Servers], Awaitable[None]]] = {
    "wal": wal.measure,  # before anything is left for the server to clear away
    "exchange": exchange.on_postgresql,
    "mariadb": exchange.on_mariadb,
    "sqlite": exchange.on_sqlite,
    "history": growth.against_history,
    "sessions": growth.against_sessions,
    "shards": growth.against_shards,
    "moves": moves.measure,
}


async def measure(options: Options, console: Console) -> Results:
    """Run the parts that are asked for, each on databases of its own."""
    results = Results(about=about.before(options))
    with console.status("starting") as status:
        run = Run(options, results, lambda word: status.update(word))
        if "routing" in options.parts:
            routing.measure(run)
        async with Servers() as servers:
            for part, act in PARTS.items():
                if part in options.parts:
                    await _part(run, part, act, servers)
            results.about |= about.after(servers)
    return results


async def _part(
    run: Run, part: str, act: Callable[[Run, Servers], Awaitable[None]], servers: Servers
) -> None:
    try:
        await act(run, servers)
    except MissingError as error:
        run.results.missing.setdefault(part, {})["everybody"] = str(error)


def main() -> None:
    """Run the benchmark; exits with 1 where a contestant of ours failed."""
    options = read_options()
    quieten()
    console = Console()
    results = asyncio.run(measure(options, console))
    options.results.mkdir(parents=True, exist_ok=True)
    results.write(options.results / "results.json")
    report.show(results, console)
    charts.show(results, console)
    drawn = charts.draw(results, options.results)
    if options.write_readme:
        readme.write(results, drawn)
    console.print(f"figures and charts: {options.results}")
    sys.exit(1 if report.ours_failed(results) else 0)


if __name__ == "__main__":
    main()
