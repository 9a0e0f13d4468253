"""Amounts as people write and read them: sizes, times, parts."""

from __future__ import annotations

import re
from math import inf, isfinite

from shardgate.errors import UsageError

_SIZES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_TIMES = {"": 1, "ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)")


def read_rate(option: str, text: str) -> float | None:
    """Bytes per second: a size (32MB, 500k, 1GiB), or None for "unlimited". Raises UsageError."""
    if text.strip().lower() == "unlimited":
        return None
    rate = _read(text.lower().removesuffix("/s").removesuffix("b"), _SIZES)
    if not 0 < rate < inf:
        raise UsageError(f"{option} {text}: use a size above 0, such as 32MB, or unlimited")
    return rate


def read_seconds(option: str, text: str) -> float:
    """Seconds: a number of them, or with a unit (500ms, 2s, 5m, 1h). Raises UsageError."""
    seconds = _read(text.lower(), _TIMES)
    if not isfinite(seconds):
        raise UsageError(f"{option} {text}: use a number of seconds, or 500ms, 5m, 1h")
    return seconds


def _read(text: str, units: dict[str, float]) -> float:
    """The amount; infinite where it is none."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found[2] not in units:
        return inf
    return float(found[1]) * units[found[2]]


def size(nbytes: float) -> str:
    """A number of bytes, in the unit that leaves up to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def duration(seconds: float) -> str:
    """A time, as exact as it is of interest."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days"


def count(number: int, what: str) -> str:
    """So many of something: "1 slot", "2 slots"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def part(share: float) -> str:
    """A part of the whole, as a percentage."""
    return f"{share * 100:.1f} %"
