"""How far moves are, while they are made: a display where somebody looks, else lines for a log."""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shardgate.cli.amounts import count, duration, size
from shardgate.control.moves import Phase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from rich.console import Console, RenderableType

    from shardgate.control.moves import MoveEvent
    from shardgate.control.rebalance import PlannedMove

_REFRESH_SECONDS = 0.1
_LINE_SECONDS = 10.0
"""How often a log hears of a slot that is still being copied."""


@dataclass(frozen=True, slots=True)
class Freezes:
    """For how many seconds slots were served by nobody; None where no slot was moved."""

    p50: float | None
    p99: float | None
    longest: float | None

    @classmethod
    def of(cls, moved: Sequence[MoveEvent]) -> Freezes:
        """Of the slots whose freeze is known: each figure is one that has occurred."""
        known = sorted(event.frozen for event in moved if event.frozen is not None)
        if not known:
            return cls(None, None, None)

        def rank(part: float) -> float:
            return known[math.ceil(part * len(known)) - 1]

        return cls(rank(0.5), rank(0.99), known[-1])


@dataclass(slots=True)
class _Running:
    """A slot that is being moved: the last that was heard of it, and since when it is copied."""

    event: MoveEvent
    since: float
    told_at: float

    @property
    def rate(self) -> float:
        """Bytes per second so far."""
        return self.event.nbytes / max(monotonic() - self.since, 1e-3)


class Watch:
    """Sees what a mover reports, and shows it."""

    def __init__(self, console: Console, moves: Sequence[PlannedMove]) -> None:
        self.moved: list[MoveEvent] = []
        self._console = console
        self._planned = {move.slot: move for move in moves}
        self._running: dict[int, _Running] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("moving", total=len(moves), told="")

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Show it as long as the block runs. Where nobody looks, there are lines instead."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, get_renderable=self._render) as live:
            refreshing = asyncio.create_task(_refresh(live))
            try:
                yield
            finally:
                refreshing.cancel()
                with suppress(asyncio.CancelledError):
                    await refreshing

    def see(self, event: MoveEvent) -> None:
        """What a mover's ``observe`` is called with."""
        now = monotonic()
        running = self._running.setdefault(event.slot, _Running(event, now, now))
        running.event = event
        if event.phase is Phase.MOVED:
            self.moved.append(event)
            self._running.pop(event.slot)
        elif event.phase is Phase.STEPPED_BACK:
            self._running.pop(event.slot)
        if not self._console.is_terminal:
            self._log(event, running, now)

    def _log(self, event: MoveEvent, running: _Running, now: float) -> None:
        ended = event.phase in (Phase.MOVED, Phase.STEPPED_BACK)
        if ended or now - running.told_at >= _LINE_SECONDS:
            running.told_at = now
            line = ", ".join(_told(event))
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        copied = self._copied()
        told = f"{len(self.moved)} of {count(len(self._planned), 'slot')}  {size(copied)}"
        if total := sum(move.load.nbytes for move in self._planned.values()):
            told += f" of {size(max(total, copied))}"
        self._bar.update(self._task, completed=len(self.moved), told=told)
        return Group(self._bar, self._table())

    def _copied(self) -> int:
        under_way = [running.event for running in self._running.values()]
        return sum(event.nbytes for event in (*self.moved, *under_way))

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for running in self._running.values():
            event = running.event
            table.add_row(
                f"  slot {event.slot}",
                f"{event.source} -> {event.target}",
                event.phase.value,
                count(event.items, "item"),
                size(event.nbytes),
                f"{size(running.rate)}/s",
            )
        return table


async def _refresh(live: Live) -> None:
    while True:
        live.refresh()
        await asyncio.sleep(_REFRESH_SECONDS)


def _told(event: MoveEvent) -> Iterator[str]:
    yield f"slot {event.slot}: {event.source} -> {event.target}"
    yield event.phase.value
    yield count(event.items, "item")
    yield size(event.nbytes)
    if event.phase is Phase.MOVED:
        yield f"{event.verified} verified"
    if event.frozen is not None:
        yield f"frozen {duration(event.frozen)}"
