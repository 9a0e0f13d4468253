"""The measured section of the README: made by a run, never by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import about
from benchmarks.tables import tables

if TYPE_CHECKING:
    from benchmarks.results import Results
    from benchmarks.tables import Table

README = Path(__file__).with_name("README.md")
CHARTS = Path(__file__).with_name("charts")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def write(results: Results, drawn: list[Path]) -> None:
    """Put this run's tables and charts in the place of the last one's."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n\n{section(results, _keep(drawn))}\n{END}{after}")


def section(results: Results, charts: list[str]) -> str:
    """The Markdown between the two marks."""
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
