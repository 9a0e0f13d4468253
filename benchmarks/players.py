"""Contestants in processes of their own, as a platform has one of them: nobody runs on a heap and
with caches that others have left.

``play`` is started by ``harness.processes``: it warms up, and then runs a slice for each line of
standard input.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import sys
import warnings
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from benchmarks.contestants.base import Contestant, Stage
from benchmarks.load import Slice, run_slice
from harness.child import tell

if TYPE_CHECKING:
    from harness.processes import Child, Children


class Player:
    """A contestant, warm, in a process of its own."""

    def __init__(self, contestant: Contestant, child: Child) -> None:
        self.contestant = contestant
        self._child = child

    @classmethod
    async def start(cls, contestant: Contestant, children: Children, *, warm_up: float) -> Player:
        """Start one, and warm it up for so many seconds with a caller for each connection."""
        child = await children.start("benchmarks.players:play", warnings="ignore")
        kind = type(contestant)
        await child.go(
            {
                "kind": [kind.__module__, kind.__name__],
                "stage": _as_json(contestant.stage),
                "seconds": warm_up,
            }
        )
        await child.told()
        return cls(contestant, child)

    async def slice(self, *, part: str, callers: int, seconds: float, label: str) -> Slice:
        """Run one, while all others rest."""
        await self._child.go({"part": part, "callers": callers, "seconds": seconds, "label": label})
        return Slice(**await self._child.told())


def _as_json(stage: Stage) -> dict[str, Any]:
    return asdict(replace(stage, servers=None))


async def play(told: dict[str, Any]) -> None:
    """Be a contestant until standard input ends."""
    quieten()
    module, name = told["kind"]
    kind: type[Contestant] = getattr(importlib.import_module(module), name)
    contestant = kind(Stage(**told["stage"]))
    await contestant.open()
    try:
        callers = min(contestant.connections, len(contestant.names))
        await run_slice(contestant, part="", callers=callers, seconds=told["seconds"])
        gc.collect()
        gc.freeze()  # what packages and pools hold is no exchange's cost
        tell("warm")
        while line := await asyncio.to_thread(sys.stdin.readline):
            tell(asdict(await run_slice(contestant, **json.loads(line))))
    finally:
        await contestant.close()


def quieten() -> None:
    """The peers' words of experiments and telemetry are not about this run."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.ERROR)
