"""The exchange, and callers that do nothing else: each begins the next one as one ends."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.contestants.base import Contestant, Name, Session

READ = 20
"""How many of the newest items an exchange reads."""
APPENDED = 2
_CHARACTERS = 640
_STUCK = 180
"""Seconds after which a slice is given up."""


def items(count: int) -> list[dict[str, Any]]:
    """``count`` items as a conversation has them, each about 700 bytes of JSON."""
    words = "The quick answer to the question of the customer is below. "
    text = (words * 12)[:_CHARACTERS]
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": f"{n:06d} {text}"} for n in range(count)]


ANSWER = items(APPENDED)
_chance = random.Random(4)  # noqa: S311 - the same load in every run


class WrongHistoryError(Exception):
    """A contestant did not return what was stored: its speed would mean nothing."""


class Exchanger(Protocol):
    """Who makes handles of sessions."""

    title: ClassVar[str]

    def session(self, name: Name) -> Session: ...


async def exchange(contestant: Exchanger, name: Name) -> None:
    """Make a handle, read the newest items, append two."""
    session = contestant.session(name)
    history = await session.get_items(READ)
    if len(history) < READ:
        raise WrongHistoryError(f"{contestant.title}: {len(history)} items of {name}")
    await session.add_items(ANSWER)


async def verify(contestant: Contestant, name: Name) -> None:
    """Raise WrongHistoryError unless an exchange can be read back, in order."""
    await exchange(contestant, name)
    newest = await contestant.session(name).get_items(READ)
    if newest[-APPENDED:] != ANSWER:
        raise WrongHistoryError(f"{contestant.title}: what was appended does not come back")


@dataclass(slots=True, kw_only=True)
class Slice:
    """What one contestant did in one stretch of time. Times are in seconds."""

    part: str
    contestant: str
    callers: int
    label: str = ""
    round: int = 0
    exchanges: int = 0
    elapsed: float = 0.0
    cpu: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Exchanges per second."""
        return self.exchanges / self.elapsed if self.elapsed else 0.0

    @property
    def cpu_each(self) -> float:
        """Seconds of this process's CPU for one exchange."""
        return self.cpu / self.exchanges if self.exchanges else 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"rate": self.rate, "cpu_each": self.cpu_each}


async def run_slice(
    contestant: Contestant, *, part: str, callers: int, seconds: float, label: str = ""
) -> Slice:
    """Let ``callers`` exchange until ``seconds`` have passed, and finish what they have begun.

    The time is counted until the last of them has finished. No two callers share a session.
    """
    shared = shares(contestant.names, callers)
    gc.collect()
    latencies: list[float] = []
    errors: Counter[str] = Counter()
    began, cpu = time.perf_counter(), time.process_time()
    until = began + seconds
    try:
        async with asyncio.timeout(seconds + _STUCK), asyncio.TaskGroup() as group:
            for names in shared:
                group.create_task(_call(contestant, names, until, latencies, errors))
    except TimeoutError:
        errors["stuck"] += 1
    elapsed, used = time.perf_counter() - began, time.process_time() - cpu
    latencies.sort()
    return Slice(
        part=part,
        contestant=contestant.key,
        callers=callers,
        label=label,
        exchanges=len(latencies),
        elapsed=elapsed,
        cpu=used,
        p50=percentile(latencies, 0.50),
        p99=percentile(latencies, 0.99),
        errors=dict(errors),
    )


async def _call(
    contestant: Contestant,
    names: Iterator[Name],
    until: float,
    latencies: list[float],
    errors: Counter[str],
) -> None:
    clock = time.perf_counter
    while (began := clock()) < until:
        try:
            await exchange(contestant, next(names))
        except WrongHistoryError:
            raise
        except Exception as error:  # noqa: BLE001 - what fails is counted, and shown by its type
            errors[type(error).__name__] += 1
            await asyncio.sleep(0.001)
        else:
            latencies.append(clock() - began)


def shares(names: list[Name], callers: int) -> list[Iterator[Name]]:
    """The sessions of each caller, in another order each time; each is one caller's alone."""
    if callers > len(names):
        raise ValueError(f"{callers} callers for {len(names)} sessions")
    mixed = _chance.sample(names, len(names))
    return [cycle(mixed[caller::callers]) for caller in range(callers)]


def percentile(ordered: list[float], share: float) -> float:
    """The value that ``share`` of the values in order are not above; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
