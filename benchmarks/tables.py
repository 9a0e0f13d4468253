"""The run's tables as plain text cells, for the terminal and for the README alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.contestants.ours import ThroughGateway
from benchmarks.figures import cpu, freeze_figures, p50, p99, rate
from benchmarks.results import digits
from benchmarks.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.results import Results

BASELINE = ThroughGateway.key
LOADS = {"exchange": "PostgreSQL", "mariadb": "MariaDB", "sqlite": "SQLite"}
GROWTHS = {"history": "items in a session", "sessions": "sessions", "shards": "shards"}
_NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(results: Results) -> list[Table]:
    """All tables that this run has figures for."""
    return [table for table in _all(results) if table.rows]


def _all(results: Results) -> Iterator[Table]:
    yield _targets(results)
    for part, place in LOADS.items():
        yield _rates(results, part, place)
        yield _ratios(results, part, place)
        yield _latencies(results, part, place)
    for part, what in GROWTHS.items():
        yield _growth(results, part, what)
    yield _wal(results)
    yield _multixacts(results)
    yield _routing(results)
    yield _moves(results)
    yield _callers_of_moves(results)
    yield _missing(results)


def _targets(results: Results) -> Table:
    rows = []
    for target in TARGETS:
        measured = target.measure(results)
        if measured is not None:
            reached = "yes" if target.reached(measured.median) else "not yet"
            rows.append([target.text, target.bound_text, str(measured), reached])
    return Table("Targets", ["", "target", "measured", "reached"], rows)


def measured_titles(results: Results, part: str) -> dict[str, str]:
    """The contestants that were measured, with their titles."""
    measured = results.values(part, "contestant")
    return {key: title for key, title in results.titles.get(part, {}).items() if key in measured}


def _rates(results: Results, part: str, place: str) -> Table:
    numbers = results.values(part, "callers")
    rows = [
        [title]
        + [_cell(results.middle(part, rate, contestant=key, callers=number)) for number in numbers]
        for key, title in measured_titles(results, part).items()
    ]
    return Table(f"{place}: exchanges per second, by callers", ["", *map(str, numbers)], rows)


def _ratios(results: Results, part: str, place: str) -> Table:
    numbers = results.values(part, "callers")
    rows = []
    for key, title in measured_titles(results, part).items():
        found = [
            results.ratio(
                part,
                rate,
                {"contestant": BASELINE, "callers": number},
                {"contestant": key, "callers": number},
            )
            for number in numbers
        ]
        if key != BASELINE and any(found):
            rows.append([title, *(_NOTHING if ratio is None else str(ratio) for ratio in found)])
    title = f"{place}: the gateway's exchanges per second, as a multiple of each other's"
    return Table(title, ["", *map(str, numbers)], rows)


def _latencies(results: Results, part: str, place: str) -> Table:
    numbers = results.values(part, "callers")
    rows = []
    for key, title in measured_titles(results, part).items():
        cells = []
        for number in numbers:
            where: dict[str, Any] = {"contestant": key, "callers": number}
            medians = (results.middle(part, figure, **where) for figure in (p50, p99, cpu))
            cells.append(" / ".join(map(_cell, medians)))
        rows.append([title, *cells])
    title = f"{place}: p50 and p99 in ms / CPU of the callers' process in µs an exchange"
    return Table(title, ["", *map(str, numbers)], rows)


def _growth(results: Results, part: str, what: str) -> Table:
    labels = results.values(part, "label")
    rows = []
    for callers in results.values(part, "callers"):
        for key, title in measured_titles(results, part).items():
            cells = [
                _cell(results.middle(part, p50, contestant=key, callers=callers, label=label))
                for label in labels
            ]
            where = {"contestant": key, "callers": callers}
            last, first = {**where, "label": labels[-1]}, {**where, "label": labels[0]}
            ratio = results.ratio(part, p50, last, first)
            name = f"{title}, {callers} caller{'s' if callers > 1 else ''}"
            rows.append([name, *cells, _NOTHING if ratio is None else str(ratio)])
    title = f"p50 of an exchange in ms, by {what}; the last as a multiple of the first"
    return Table(title, ["", *labels, "multiple"], rows)


def _wal(results: Results) -> Table:
    titles = results.titles.get("wal", {})
    rows = [[titles[row["contestant"]], _cell(row["bytes_each"])] for row in results.wal]
    return Table("WAL for an append of two items", ["", "bytes"], rows)


def _multixacts(results: Results) -> Table:
    rows = [
        [
            "one tenant" if row["tenants"] == 1 else f"{row['tenants']} tenants",
            f"{row['callers']}",
            f"{row['exchanges']:,}",
            f"{row['multixacts']:,}",
            _cell(row["multixacts"] / max(1, row["exchanges"]) * 1000),
        ]
        for row in results.multixacts
    ]
    header = ["", "callers", "exchanges", "multixacts", "for 1 000 exchanges"]
    return Table("Multixacts of the gateway's locks (each ages the database by one)", header, rows)


def _routing(results: Results) -> Table:
    rows = [
        [
            "1 shard" if row["shards"] == 1 else f"{row['shards']} shards",
            f"{row['microseconds']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
        ]
        for row in results.routing
    ]
    if results.handles:
        kept = results.handles
        rows.append(["bytes retained of 100 000 handles", f"{kept['retained']:,.0f}"])
        rows.append(["bytes of a handle while it is kept", f"{kept['each_while_kept']:,.0f}"])
    return Table("A handle and its route, without a database: µs", ["", ""], rows)


def _moves(results: Results) -> Table:
    found = results.moves
    if not found:
        return Table("", [], [])
    freezes = " / ".join(map(digits, freeze_figures(found)))
    lost = found["items_expected"] - found["items_found"]
    rows = [
        ["slots moved", f"{found['slots']:,}"],
        ["seconds", _cell(found["seconds"])],
        ["items copied", f"{found['items_copied']:,}"],
        ["items copied in a second", _cell(found["items_each_second"])],
        ["MB copied in a second", _cell(found["bytes_copied"] / found["seconds"] / 1e6)],
        ["items whose digests were compared", f"{found['items_verified']:,}"],
        ["for how long a slot was frozen, ms: p50 / p99 / longest", freezes],
        ["moves that have stepped back and were made later", f"{found['stepped_back']:,}"],
        ["moves that were not made", f"{sum(found['not_moved'].values()):,}"],
        ["calls that failed", f"{sum(found['failed'].values()):,}"],
        ["items at the end, and lost of them", f"{found['items_found']:,} / {lost:,}"],
    ]
    title = (
        f"Moves: {found['items']:,} items in {found['sessions']:,} sessions on {found['shards']} "
        f"PostgreSQL shards; one more joins and is filled, under {found['callers']} callers"
    )
    return Table(title, ["", ""], rows)


def _callers_of_moves(results: Results) -> Table:
    phases = results.moves.get("phases", {})
    figures = {
        "exchanges per second": "rate",
        "p50, ms": "p50",
        "p99, ms": "p99",
        "longest, ms": "longest",
    }
    rows = [
        [text, *(_cell(phase[figure]) for phase in phases.values())]
        for text, figure in figures.items()
        if phases
    ]
    return Table("The callers before, during and after the moves", ["", *phases], rows)


def _missing(results: Results) -> Table:
    rows = [
        [part, title, reason]
        for part, found in results.missing.items()
        for title, reason in found.items()
    ]
    for part in (*LOADS, *GROWTHS):
        for key, counts in results.errors(part).items():
            said = ", ".join(f"{count} {name}" for name, count in counts.items())
            rows.append([part, results.titles[part][key], f"errors: {said}"])
    for what in ("not_moved", "failed"):
        for reason, count in results.moves.get(what, {}).items():
            rows.append(["moves", what.replace("_", " "), f"{count} times: {reason}"])
    return Table("Not run, or not without errors", ["part", "", "why"], rows)


def _cell(value: float | None) -> str:
    return _NOTHING if value is None else digits(value)
