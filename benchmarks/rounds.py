"""Rounds: everybody in turn, in another order each time, so that no one has the quiet hour."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from benchmarks.load import run_slice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benchmarks.contestants.base import Contestant
    from benchmarks.load import Slice
    from benchmarks.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure to be measured: a contestant under a load. ``label`` is what else differs."""

    contestant: Contestant
    callers: int
    label: str = ""


async def run_rounds(
    part: str, cells: list[Cell], options: Options, progress: Callable[[str], None]
) -> list[Slice]:
    """Warm every contestant up, and then measure every cell once in each round."""
    for contestant in {id(cell.contestant): cell.contestant for cell in cells}.values():
        progress(f"{part}: warming up {contestant.title}")
        callers = min(contestant.connections, len(contestant.names))
        await run_slice(contestant, part=part, callers=callers, seconds=options.warm_up)
    gc.collect()
    gc.freeze()  # what the peers' packages hold is no contestant's cost
    slices = []
    for number in range(options.rounds):
        for cell in _in_turn(cells, number):
            progress(f"{part}: round {number + 1} of {options.rounds}, {cell.callers} callers")
            measured = await run_slice(
                cell.contestant,
                part=part,
                callers=cell.callers,
                seconds=options.seconds,
                label=cell.label,
            )
            measured.round = number
            slices.append(measured)
    gc.unfreeze()
    return slices


def _in_turn(cells: Iterable[Cell], number: int) -> list[Cell]:
    """The cells in their order of callers; those of the same number begin with another one."""
    ordered = []
    for _, group in groupby(sorted(cells, key=_callers), key=_callers):
        same = list(group)
        first = number % len(same)
        ordered += same[first:] + same[:first]
    return ordered


def _callers(cell: Cell) -> int:
    return cell.callers
