"""Bringing contestants onto a stage, and off it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.contestants.bulk import settle
from benchmarks.load import verify
from benchmarks.servers import MissingError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from benchmarks.contestants.base import Contestant, Stage
    from benchmarks.options import Options
    from benchmarks.results import Results


class Run:
    """What every part needs: what is asked for, where it goes, and a word about progress."""

    def __init__(self, options: Options, results: Results, say: Callable[[str], None]) -> None:
        self.options = options
        self.results = results
        self.say = say

    @asynccontextmanager
    async def cast(
        self, part: str, kinds: Sequence[type[Contestant]], stage: Stage
    ) -> AsyncIterator[list[Contestant]]:
        """Those of ``kinds`` that can play, loaded, checked and closed; the others are noted."""
        ready: list[Contestant] = []
        try:
            for contestant in [kind(stage) for kind in kinds if self.options.chosen(kind.key)]:
                self.say(f"{part}: loading {contestant.title}")
                if await self._load(part, contestant):
                    ready.append(contestant)
            if stage.family == "postgresql":
                await settle(list(stage.urls.values()))
            yield ready
        finally:
            await stage.clear()

    async def _load(self, part: str, contestant: Contestant) -> bool:
        results = self.results
        results.titles.setdefault(part, {})[contestant.key] = contestant.title
        results.durability[contestant.title] = contestant.durability
        try:
            async with opened(contestant):
                await verify(contestant, contestant.names[-1])
        except MissingError as error:
            self._miss(part, contestant, str(error))
        except Exception as error:  # noqa: BLE001 - a peer that cannot be used here is shown as such
            self._miss(part, contestant, f"{type(error).__name__}: {_first_line(error)}")
        else:
            return True
        return False

    def _miss(self, part: str, contestant: Contestant, reason: str) -> None:
        self.results.missing.setdefault(part, {})[contestant.title] = reason


@asynccontextmanager
async def opened(contestant: Contestant) -> AsyncIterator[None]:
    """Open it, in this process."""
    await contestant.open()
    try:
        yield
    finally:
        await contestant.close()


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or [""])[0][:120]
