"""What was measured, and what is made of it: medians, and ratios within a round."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.load import Slice


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the rounds' ratios, with the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{digits(self.median)} ({digits(self.low)} to {digits(self.high)})"


def digits(value: float) -> str:
    """A number with as many digits as mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass(slots=True, kw_only=True)
class Results:
    """All figures of a run. ``missing`` has the reason for each contestant that did not run."""

    about: dict[str, Any]
    slices: list[Slice] = field(default_factory=list)
    titles: dict[str, dict[str, str]] = field(default_factory=dict)
    durability: dict[str, str] = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)
    wal: list[dict[str, Any]] = field(default_factory=list)
    multixacts: list[dict[str, Any]] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)
    handles: dict[str, float] = field(default_factory=dict)
    moves: dict[str, Any] = field(default_factory=dict)

    def find(self, part: str, **where: Any) -> list[Slice]:
        """The slices of a part whose fields have these values, in the order of their rounds."""
        return [
            found
            for found in self.slices
            if found.part == part
            and all(getattr(found, name) == value for name, value in where.items())
        ]

    def values(self, part: str, name: str) -> list[Any]:
        """The different values of a field in a part, in the order in which they came."""
        return list(dict.fromkeys(getattr(found, name) for found in self.find(part)))

    def middle(self, part: str, figure: Callable[[Slice], float], **where: Any) -> float | None:
        """The median of a figure over the rounds; None where nothing was measured."""
        figures = [figure(found) for found in self.find(part, **where) if found.exchanges]
        return median(figures) if figures else None

    def ratio(
        self,
        part: str,
        figure: Callable[[Slice], float],
        over: dict[str, Any],
        under: dict[str, Any],
    ) -> Ratio | None:
        """One figure divided by another of the same round."""
        above = {found.round: figure(found) for found in self.find(part, **over)}
        below = {found.round: figure(found) for found in self.find(part, **under)}
        ratios = [above[number] / below[number] for number in above if below.get(number)]
        return Ratio(median(ratios), min(ratios), max(ratios)) if ratios else None

    def errors(self, part: str) -> dict[str, dict[str, int]]:
        """How often which error was met, by contestant."""
        met: dict[str, dict[str, int]] = {}
        for found in self.find(part):
            for name, count in found.errors.items():
                counts = met.setdefault(found.contestant, {})
                counts[name] = counts.get(name, 0) + count
        return met

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        content = asdict(self) | {"slices": [found.as_json() for found in self.slices]}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
