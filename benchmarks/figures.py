"""The figures of a slice that tables, targets and charts are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.load import percentile

if TYPE_CHECKING:
    from benchmarks.load import Slice


def rate(found: Slice) -> float:
    """Exchanges per second."""
    return found.rate


def p50(found: Slice) -> float:
    """Milliseconds."""
    return found.p50 * 1e3


def p99(found: Slice) -> float:
    """Milliseconds."""
    return found.p99 * 1e3


def cpu(found: Slice) -> float:
    """Microseconds of the callers' process for one exchange."""
    return found.cpu_each * 1e6


def freeze_figures(moves: dict[str, Any]) -> tuple[float, float, float]:
    """For how many milliseconds slots were frozen: the median, p99, the longest."""
    freezes = moves["freezes_ms"] or [0.0]
    return percentile(freezes, 0.5), percentile(freezes, 0.99), freezes[-1]
