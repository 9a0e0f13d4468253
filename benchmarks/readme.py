"""The measured sections of the README: made by a run, never by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import about
from benchmarks.results import Results
from benchmarks.tables import tables

if TYPE_CHECKING:
    from benchmarks.tables import Table

README = Path(__file__).with_name("README.md")
CHARTS = Path(__file__).with_name("charts")
_HISTORY, _MOVES = _APART = ("history", "moves")


def write(results: Results, drawn: list[Path]) -> None:
    """Put this run's tables and charts in the place of the last one's.

    Histories and moves have sections of their own, so that they can be measured alone; a run
    without them leaves these as they are, and a run of nothing else leaves the rest.
    """
    charts = _keep(drawn)
    histories = results.find(_HISTORY)
    others = {part: why for part, why in results.missing.items() if part not in _APART}
    slices = [one for one in results.slices if one.part != _HISTORY]
    rest = replace(results, slices=slices, moves={}, missing=others)
    if any((rest.slices, rest.wal, rest.multixacts, rest.routing, others)):
        named = [name for name in charts if not any(part in name for part in _APART)]
        _replace("measured", section(rest, named))
    if histories:
        alone = Results(about=results.about, slices=histories, titles=results.titles)
        _replace("history measured", section(alone, _charts_of(_HISTORY, charts)))
    if results.moves:
        alone = Results(about=results.about, moves=results.moves)
        _replace("moves measured", section(alone, _charts_of(_MOVES, charts)))


def _charts_of(part: str, charts: list[str]) -> list[str]:
    return [name for name in charts if part in name]


def _replace(mark: str, text: str) -> None:
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = README.read_text().partition(begin)
    _, _, after = rest.partition(end)
    README.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def section(results: Results, charts: list[str]) -> str:
    """The Markdown between two marks."""
    parts = [about.sentence(results.about)]
    parts += [f"![{name}](charts/{name})" for name in charts]
    parts += [_markdown(table) for table in tables(results)]
    return "\n\n".join(parts) + "\n"


def _keep(drawn: list[Path]) -> list[str]:
    CHARTS.mkdir(exist_ok=True)
    return [Path(shutil.copy(path, CHARTS)).name for path in drawn]


def _markdown(table: Table) -> str:
    align = ["---", *["---:"] * (len(table.header) - 1)]
    lines = [table.header, align, *table.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"### {table.title}\n\n{body}"
