"""Movers in processes of their own that end, or stand still, at a chosen point of a move.

Run in a child process: ``serve`` forks a process for each move that it is told to make, since to
import everything anew each time would take longer than the move.

A move is told as an object: ``urls``, ``slots``, ``slot``, ``source``, ``target``, and

- ``at``: ["commit", n], ["frozen", n] or ["statement", n], the point; each commit has two, right
  before it is sent and right after its answer; those from the fence on are "frozen"; null: none;
- ``then``: "kill" (SIGKILL) or "stop" (SIGSTOP, until a line comes);
- ``seconds``: kill it after so many seconds, wherever it is.

The answer says whether it was ``killed``, and otherwise its ``error`` and how many ``points`` of
each kind there were. Where it stands still, ``{"stopped": true}`` comes first.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from gateway.shards import settings_at
from harness.child import tell
from harness.launch import die_with_parent
from moves.moving import mover_of
from shardgate import Gateway, ShardgateError
from shardgate.control import copying
from shardgate.control.moves import Phase

if TYPE_CHECKING:
    from shardgate.control.moves import MoveEvent
    from shardgate.shards import Shard

_BEGUN = "tests.begun"


def serve(_argument: None) -> None:
    """Make one move for each line that comes."""
    for line in sys.stdin:
        tell(_in_a_process(json.loads(line)))


def _in_a_process(told: dict[str, Any]) -> dict[str, Any]:
    here = os.getpid()
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        _be_the_mover(told, here, writing)
    os.close(writing)
    if told.get("seconds") is not None:
        time.sleep(told["seconds"])
        os.kill(process, signal.SIGKILL)  # it is not waited for yet, so the number is still its own
    status = _wait(process)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    if os.WIFSIGNALED(status):
        return {"killed": os.WTERMSIG(status) == signal.SIGKILL}
    return {"killed": False, **json.loads(said)}


def _wait(process: int) -> int:
    while True:
        _, status = os.waitpid(process, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return status
        tell({"stopped": True})
        sys.stdin.readline()
        os.kill(process, signal.SIGCONT)


def _be_the_mover(told: dict[str, Any], parent: int, writing: int) -> None:
    said: dict[str, Any] = {"error": "did not end"}
    try:
        die_with_parent(signal.SIGKILL, parent)
        said = asyncio.run(_move(told))
    except BaseException as error:  # noqa: BLE001 - whatever it was, the test has to hear of it
        said = {"error": f"{type(error).__name__}: {error}", "foreseen": False}
    finally:
        os.write(writing, json.dumps(said).encode())
        os._exit(0)


async def _move(told: dict[str, Any]) -> dict[str, Any]:
    copying.PAGE, copying.OPS_PAGE = 8, 200
    settings = settings_at(told["urls"], slots=told["slots"], create_tables=False)
    points = Points(told)
    error = None
    async with Gateway(settings) as gateway:
        for shard in gateway.shards.values():
            points.watch(shard)
        mover = mover_of(gateway, points.observe)
        try:
            await mover.move(told["slot"], told["source"], told["target"], takes_over=True)
        except ShardgateError as problem:
            error = f"{type(problem).__name__}: {problem}"
    return {"error": error, "foreseen": True, "points": points.passed}


class Points:
    """Counts the points of a move, and ends or stops this process at the chosen one."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._kind, self._number = told.get("at") or (None, None)
        self._signal = signal.SIGSTOP if told.get("then") == "stop" else signal.SIGKILL
        self._commits = "commit"
        self.passed = {"commit": 0, "frozen": 0, "statement": 0}

    def observe(self, happened: MoveEvent) -> None:
        """Told by the mover, right before it fences the source."""
        if happened.phase is Phase.FROZEN:
            self._commits = "frozen"

    def watch(self, shard: Shard) -> None:
        engine = shard.engine.sync_engine
        event.listen(engine, "before_cursor_execute", self._before)
        event.listen(engine, "after_cursor_execute", self._after)
        commit = engine.dialect.do_commit

        def do_commit(connection: Any) -> None:
            self._pass(self._commits)
            commit(connection)
            self._pass(self._commits)

        engine.dialect.do_commit = do_commit  # type: ignore[method-assign]

    def _before(self, connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        """On MySQL and MariaDB, commits are statements; one that ends nothing is none."""
        if statement == "START TRANSACTION":
            connection.info[_BEGUN] = True
        commits = statement == "COMMIT" and connection.info.get(_BEGUN)
        self._pass(self._commits if commits else "statement")

    def _after(self, connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement in ("COMMIT", "ROLLBACK") and connection.info.pop(_BEGUN, False):
            self._pass(self._commits)

    def _pass(self, kind: str) -> None:
        number = self.passed[kind]
        self.passed[kind] += 1
        if (kind, number) == (self._kind, self._number):
            os.kill(os.getpid(), self._signal)


class Movers:
    """The test's side: has moves made in processes, one at a time."""

    def __init__(self, child: Any) -> None:
        self._child = child

    @classmethod
    async def start(cls, children: Any) -> Movers:
        child = await children.start("moves.crashing:serve")
        await child.go(None)
        return cls(child)

    async def move(self, **told: Any) -> dict[str, Any]:
        """Have a move made; what is said of it, or that it stands still."""
        await self._child.go(told)
        said: dict[str, Any] = await self._child.told()
        return said

    async def go_on(self) -> dict[str, Any]:
        """Let it go on where it stands still; what is said of it when it has ended."""
        with suppress(BrokenPipeError):
            await self._child.go("go on")
        said: dict[str, Any] = await self._child.told()
        return said
