"""The same as pictures: bars on the terminal, lines in PNG files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.table import Table as Drawn

from benchmarks.figures import p50, rate
from benchmarks.servers import MissingError, require
from benchmarks.tables import GROWTHS, LOADS, measured_titles

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from benchmarks.results import Results

_WIDTH = 28
_FORMAT = "png"


def show(results: Results, console: Console) -> None:
    """Throughput against callers, as bars."""
    for part, place in LOADS.items():
        numbers = results.values(part, "callers")
        if not numbers:
            continue
        drawn = Drawn(title=f"{place}: exchanges per second", title_justify="left", box=None)
        drawn.add_column("callers", justify="right")
        drawn.add_column("", no_wrap=True)
        drawn.add_column("", width=_WIDTH)
        drawn.add_column("", justify="right")
        for number in numbers:
            _add_bars(drawn, results, part, number)
        console.print(drawn)


def _add_bars(drawn: Drawn, results: Results, part: str, number: int) -> None:
    titles = measured_titles(results, part)
    rates = {
        title: results.middle(part, rate, contestant=key, callers=number) or 0.0
        for key, title in titles.items()
    }
    most = max(rates.values(), default=0.0) or 1.0
    for place, (title, value) in enumerate(rates.items()):
        label = str(number) if place == 0 else ""
        drawn.add_row(label, title, Bar(most, 0, value, color="green"), f"{value:,.0f}")
    drawn.add_section()


def draw(results: Results, folder: Path) -> list[Path]:
    """Write a PNG for each part that was measured; none without matplotlib."""
    try:
        matplotlib = require("matplotlib")
    except MissingError:
        return []
    matplotlib.use("Agg")
    plot = require("matplotlib.pyplot")
    drawn = [_callers(plot, results, part, folder) for part in LOADS if results.find(part)]
    drawn += [_growth(plot, results, part, folder) for part in GROWTHS if results.find(part)]
    if results.moves:
        drawn.append(_moves(plot, results.moves, folder))
    return drawn


def _callers(plot: Any, results: Results, part: str, folder: Path) -> Path:
    """Exchanges per second against callers, both on scales of powers."""
    figure, axes = plot.subplots(figsize=(10, 5))
    numbers = results.values(part, "callers")
    for key, title in measured_titles(results, part).items():
        rates = [results.middle(part, rate, contestant=key, callers=n) for n in numbers]
        axes.plot(numbers, rates, marker="o", label=title, linewidth=3 if key == "gateway" else 1.5)
    axes.set(xscale="log", yscale="log", xlabel="callers", ylabel="exchanges per second")
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.set_title(f"{LOADS[part]}: read the last 20 items, append 2")
    return _save(plot, figure, axes, folder / f"{part}.{_FORMAT}")


def _growth(plot: Any, results: Results, part: str, folder: Path) -> Path:
    """Milliseconds against size."""
    figure, axes = plot.subplots(figsize=(10, 5))
    labels = results.values(part, "label")
    sizes = [int(label) for label in labels]
    for callers in results.values(part, "callers"):
        for key, title in measured_titles(results, part).items():
            where = {"contestant": key, "callers": callers}
            costs = [results.middle(part, p50, **where, label=label) for label in labels]
            axes.plot(sizes, costs, marker="o", label=f"{title}, callers: {callers}")
    axes.set(xscale="log", yscale="log", xlabel=GROWTHS[part], ylabel="p50 of an exchange, ms")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    return _save(plot, figure, axes, folder / f"{part}.{_FORMAT}")


def _moves(plot: Any, moves: dict[str, Any], folder: Path) -> Path:
    """The callers' throughput and p99, second by second, and the time in which slots move."""
    figure, (above, below) = plot.subplots(2, 1, figsize=(10, 6), sharex=True)
    places = [second["at"] + 0.5 for second in moves["timeline"]]
    above.plot(places, [second["rate"] for second in moves["timeline"]], label="throughput")
    above.set(ylabel="exchanges per second", title=f"{moves['slots']:,} slots move to a new shard")
    below.plot(places, [second["p99"] for second in moves["timeline"]], label="p99", color="C1")
    below.set(xlabel="seconds", ylabel="p99 of an exchange, ms")
    for axes in (above, below):
        axes.axvspan(0, moves["seconds"], alpha=0.15, color="green", label="slots move")
        axes.set_ylim(bottom=0)
    above.grid(visible=True, alpha=0.3)
    above.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _save(plot, figure, below, folder / f"moves.{_FORMAT}")


def _save(plot: Any, figure: Any, axes: Any, path: Path) -> Path:
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plot.close(figure)
    return path
