"""What the project wants to reach, as ratios within one run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.contestants.ours import ThroughGateway
from benchmarks.figures import freeze_figures, p50, p99, rate
from benchmarks.results import Ratio

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.results import Results

_GATEWAY = ThroughGateway.key
_NO_MORE, _NO_LESS = 1.1, 0.9
"""What "the same" may differ by: less than this cannot be told from noise."""


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio and its bound: at least it, or at most it."""

    text: str
    bound: float
    measure: Callable[[Results], Ratio | None]
    at_most: bool = False

    @property
    def bound_text(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def _beside(
    results: Results,
    *,
    part: str,
    callers: int,
    peer: str,
    figure: Callable[[Any], float] = rate,
) -> Ratio | None:
    """The gateway's figure divided by a peer's."""
    ours = {"contestant": _GATEWAY, "callers": callers}
    theirs = {"contestant": peer, "callers": callers}
    return results.ratio(part, figure, ours, theirs)


def _grown(
    results: Results, *, part: str, figure: Callable[[Any], float], callers: int
) -> Ratio | None:
    """The gateway's figure at the largest size divided by that at the smallest."""
    labels = results.values(part, "label")
    if len(labels) < 2:
        return None
    ours = {"contestant": _GATEWAY, "callers": callers}
    return results.ratio(part, figure, ours | {"label": labels[-1]}, ours | {"label": labels[0]})


def _routing(results: Results) -> Ratio | None:
    if not results.routing:
        return None
    most = max(results.routing, key=lambda row: float(row["microseconds"]))
    return Ratio(most["microseconds"], most["low"], most["high"])


def _retained(results: Results) -> Ratio | None:
    if not results.handles:
        return None
    each = results.handles["retained"] / 100_000
    return Ratio(each, each, each)


def _frozen(results: Results) -> Ratio | None:
    if not results.moves.get("freezes_ms"):
        return None
    _, most, longest = freeze_figures(results.moves)
    return Ratio(most, results.moves["freezes_ms"][0], longest)


def _failed_calls(results: Results) -> Ratio | None:
    if not results.moves:
        return None
    failed = float(sum(results.moves["failed"].values()))
    return Ratio(failed, failed, failed)


def _on(
    part: str, callers: int, peer: str, figure: Callable[[Any], float] = rate
) -> Callable[[Results], Ratio | None]:
    return partial(_beside, part=part, callers=callers, peer=peer, figure=figure)


TARGETS = (
    Target("handle and route, µs", 5, _routing, at_most=True),
    Target("bytes retained for a handle", 1, _retained, at_most=True),
    Target("1 caller: times the SDK's", 8, _on("exchange", 1, "sdk")),
    Target(
        "1 caller: p50, times raw asyncpg's", 1.25, _on("exchange", 1, "raw", p50), at_most=True
    ),
    Target("32 callers: times the SDK's", 10, _on("exchange", 32, "sdk")),
    Target("32 callers: times LangGraph's", 2, _on("exchange", 32, "langgraph")),
    Target("32 callers: times RedisSession's, not durable", 1.5, _on("exchange", 32, "redis")),
    Target("32 callers: times raw asyncpg's", 0.9, _on("exchange", 32, "raw")),
    Target("128 callers: times raw asyncpg's", 2, _on("exchange", 128, "raw")),
    Target("512 callers: times raw asyncpg's", 2, _on("exchange", 512, "raw")),
    Target("128 callers: times the SDK's", 30, _on("exchange", 128, "sdk")),
    Target("512 callers: times the SDK's", 30, _on("exchange", 512, "sdk")),
    Target(
        "128 callers: p99, times raw asyncpg's", 1, _on("exchange", 128, "raw", p99), at_most=True
    ),
    Target("MariaDB, 1 caller: times raw aiomysql's", 0.8, _on("mariadb", 1, "raw")),
    Target("MariaDB, 32 callers: times raw aiomysql's", 0.8, _on("mariadb", 32, "raw")),
    Target("SQLite, 1 caller: times the SDK's", 5, _on("sqlite", 1, "sdk")),
    Target("SQLite, 32 callers: times the SDK's", 5, _on("sqlite", 32, "sdk")),
    Target(
        "longest history: p50, times that of the shortest",
        _NO_MORE,
        partial(_grown, part="history", figure=p50, callers=1),
        at_most=True,
    ),
    Target(
        "most shards, 32 callers: times the fewest's",
        _NO_LESS,
        partial(_grown, part="shards", figure=rate, callers=32),
    ),
    Target("moves: p99 of how long a slot is frozen, ms", 150, _frozen, at_most=True),
    Target("moves: calls that failed", 0, _failed_calls, at_most=True),
)
