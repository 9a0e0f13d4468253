"""The inside of a child process: run as ``python -m harness.child MODULE:FUNCTION PARENT_PID``.

Says ``ready`` when the function is imported, waits for a line with its JSON argument, and answers
with its JSON result. Each message is a line of JSON on the real standard output; what the function
itself prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import signal
import sys
import traceback
from typing import IO, Any

from harness.launch import die_with_parent

_channel: IO[str] | None = None


def tell(value: Any) -> None:
    """Called in a child: send a JSON value to the test, which gets it from ``Child.told()``."""
    _send({"told": value})


def _send(message: dict[str, Any]) -> None:
    if _channel is None:
        raise RuntimeError("tell() works in a child process of the harness only")
    _channel.write(json.dumps(message) + "\n")
    _channel.flush()


def _take_channel() -> IO[str]:
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return channel


async def _finish(result: Any) -> Any:
    return await result


def _run(target: str) -> None:
    module, _, function = target.partition(":")
    called = getattr(importlib.import_module(module), function)
    _send({"ready": True})
    line = sys.stdin.readline()
    if not line:
        return
    result = called(json.loads(line))
    if inspect.isawaitable(result):
        result = asyncio.run(_finish(result))
    _send({"result": result})


def main(target: str, parent: str) -> None:
    global _channel
    die_with_parent(signal.SIGKILL, int(parent))
    _channel = _take_channel()
    try:
        _run(target)
    except BaseException:  # noqa: BLE001 - whatever it was, the test has to hear of it
        _send({"error": traceback.format_exc()})
        sys.exit(1)


if __name__ == "__main__":
    # Under -m this file is ``__main__``; ``tell`` has to find the channel in the imported module.
    from harness import child

    child.main(*sys.argv[1:])
