"""Callers in a process of their own, who exchange until they are told to stop.

``run`` is started by ``harness.processes``: it says when all have begun, and returns every call.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.contestants.base import names
from benchmarks.contestants.ours import settings_at
from benchmarks.load import WrongHistoryError, exchange, shares
from harness.child import tell
from shardgate import Gateway

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.contestants.base import Name, Session
    from shardgate import GatewaySettings

_AFTER_A_FAILURE = 0.01


class Platform:
    """A gateway as a platform has it: with the deadline that it comes with."""

    title: ClassVar[str] = "shardgate, gateway"

    def __init__(self, settings: GatewaySettings) -> None:
        self.gateway = Gateway(settings)

    def session(self, name: Name) -> Session:
        return self.gateway.tenant(name.tenant).session(name.session)


class Calls:
    """What has become of the calls: when each began, by the clock that all processes of a machine
    share, and how long it took, in seconds; and of those that failed, why."""

    def __init__(self) -> None:
        self.made: list[tuple[float, float]] = []
        self.failed: Counter[str] = Counter()
        self.stopped = False

    async def keep_calling(self, platform: Platform, own: Iterator[Name]) -> None:
        """One caller: each call begins when the last one has ended."""
        clock = time.monotonic
        while not self.stopped:
            began = clock()
            try:
                await exchange(platform, next(own))
            except WrongHistoryError:
                raise
            except Exception as error:  # noqa: BLE001 - what fails is counted, and shown by its type
                self.failed[f"{type(error).__name__}: {error}"[:300]] += 1
                await asyncio.sleep(_AFTER_A_FAILURE)
            else:
                self.made.append((began, clock() - began))


async def run(told: dict[str, Any]) -> dict[str, Any]:
    """Call until the next line of standard input; ``told`` has the shards' ``urls``, how many
    ``sessions``, ``callers`` and ``connections`` there are, and how many ``seconds`` to warm up."""
    platform = Platform(settings_at(told["urls"], told["connections"], deadline=None))
    calls = Calls()
    async with platform.gateway, asyncio.TaskGroup() as group:
        for own in shares(names(told["sessions"]), told["callers"]):
            group.create_task(calls.keep_calling(platform, own))
        await asyncio.sleep(told["seconds"])
        gc.collect()
        gc.freeze()
        tell("warm")
        await asyncio.to_thread(sys.stdin.readline)
        calls.stopped = True
    return {"made": calls.made, "failed": dict(calls.failed)}
