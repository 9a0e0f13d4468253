"""Rounds: everybody in turn, in another order each time, so that no one has the quiet hour."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from benchmarks.players import Player
from harness.processes import Children

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benchmarks.contestants.base import Contestant
    from benchmarks.load import Slice
    from benchmarks.options import Options

_SECONDS_TO_START = 60
_OFTENER = {"exchange": 2, "history": 4, "sessions": 2}
"""How many rounds of a part there are for one of the others: most targets are of exchanges; and
with so few callers as the other two have, the disk's moods are most of the spread."""


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
    slices = []
    async with Children(seconds=_SECONDS_TO_START) as children:
        players: dict[Contestant, Player] = {}
        for contestant in {cell.contestant: None for cell in cells}:
            progress(f"{part}: warming up {contestant.title}")
            players[contestant] = await Player.start(contestant, children, warm_up=options.warm_up)
        rounds = _OFTENER.get(part, 1) * options.rounds
        for number in range(rounds):
            for cell in _in_turn(cells, number):
                progress(f"{part}: round {number + 1} of {rounds}, {cell.callers} callers")
                measured = await players[cell.contestant].slice(
                    part=part, callers=cell.callers, seconds=options.seconds, label=cell.label
                )
                measured.round = number
                slices.append(measured)
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
