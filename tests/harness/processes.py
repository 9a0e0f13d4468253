"""Functions run in real child processes, started together, bounded in time, gone at the end.

A function is named as "module:function", may be async, takes one JSON value and returns one.
``tests`` is importable in the child, so it may stand beside its test: "harness.test_processes:add".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import TracebackType

TESTS = Path(__file__).parent.parent
LINE_LIMIT = 64 * 2**20


class ChildError(Exception):
    """A child raised, ended early or took too long; the message has its traceback or stderr."""


class Child:
    """One child process, ready to go: its function is imported and waits for its argument."""

    def __init__(self, process: Process, target: str) -> None:
        self._process = process
        self._target = target
        self._stderr = asyncio.create_task(_read(process.stderr))

    @property
    def pid(self) -> int:
        return self._process.pid

    async def go(self, argument: Any) -> None:
        """Hand over the argument; the function starts."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(argument).encode() + b"\n")
        await self._process.stdin.drain()

    async def told(self) -> Any:
        """Wait for the next value that the function sends with ``harness.child.tell``."""
        return await self._hear("told")

    async def result(self) -> Any:
        """Wait for what the function returns, past anything told before."""
        return await self._hear("result")

    async def ready(self) -> None:
        await self._hear("ready")

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self) -> None:
        """Kill the process if it runs, and wait until it is gone."""
        self.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()
        await self._stderr

    async def _hear(self, kind: str) -> Any:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            if "error" in message:
                raise ChildError(f"{self._target}:\n{message['error']}")
            if kind in message:
                return message[kind]
        await self._process.wait()
        said = (await self._stderr).decode(errors="replace")[-4000:]
        raise ChildError(f"{self._target} ended with {self._process.returncode}:\n{said}")


class Children:
    """Starts child processes and ends those still there when the ``async with`` block ends."""

    def __init__(self, *, seconds: float = 60) -> None:
        self._seconds = seconds
        self._all: list[Child] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for child in self._all:
            child.kill()
        for child in self._all:
            await child.end()

    async def start(self, target: str, *, warnings: str = "error") -> Child:
        """Start a process and wait until its function is imported; ``go`` then runs it.

        ``warnings``: what becomes of Python's, as for its option ``-W``.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-W", warnings, "-m", "harness.child", target, str(os.getpid())),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            limit=LINE_LIMIT,
            env=os.environ | {"PYTHONPATH": _python_path()},
        )
        child = Child(process, target)
        self._all.append(child)
        async with self._bounded(target):
            await child.ready()
        return child

    async def run(self, target: str, arguments: Sequence[Any]) -> list[Any]:
        """Run one process per argument, all let go at once; return the results in order.

        ChildError if one raises, dies, or is not done within the seconds given.
        """
        children = await asyncio.gather(*(self.start(target) for _ in arguments))
        async with self._bounded(target):
            await asyncio.gather(*map(Child.go, children, arguments))
            return await asyncio.gather(*(child.result() for child in children))

    @contextlib.asynccontextmanager
    async def _bounded(self, target: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._seconds):
                yield
        except TimeoutError:
            raise ChildError(f"{target}: not done after {self._seconds} s") from None


def _python_path() -> str:
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join([str(TESTS), *(str(Path(path).resolve()) for path in inherited)])


async def _read(stream: asyncio.StreamReader | None) -> bytes:
    return await stream.read() if stream is not None else b""
