"""Child processes: results come back, failures are told, nothing stays."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import pytest

from harness.child import tell
from harness.processes import ChildError, Children

pytestmark = pytest.mark.processes
HERE = "harness.test_processes"


def square(number: int) -> dict[str, int]:
    print("this goes to standard error")  # noqa: T201 - that it does no harm is the test
    return {"square": number * number, "pid": os.getpid()}


async def slow_echo(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


def fail(message: str) -> None:
    raise ValueError(message)


def die(status: int) -> None:
    sys.stderr.write("last words\n")
    os._exit(status)


async def tell_and_hang(values: list[Any]) -> None:
    for value in values:
        tell(value)
    await asyncio.sleep(3600)


async def test_results_come_back_in_order_from_different_processes(children: Children) -> None:
    results = await children.run(f"{HERE}:square", [1, 2, 3])
    assert [result["square"] for result in results] == [1, 4, 9]
    assert len({os.getpid(), *(result["pid"] for result in results)}) == 4


async def test_values_survive(children: Children) -> None:
    value = {"text": "\x00 é \ud800 😀", "big": 2**80, "long": "x" * 5_000_000}
    assert await children.run(f"{HERE}:slow_echo", [value]) == [value]


async def test_an_exception_is_told_with_its_traceback(children: Children) -> None:
    with pytest.raises(ChildError, match="ValueError: on purpose"):
        await children.run(f"{HERE}:fail", ["on purpose"])


async def test_a_death_is_told_with_its_last_words(children: Children) -> None:
    with pytest.raises(ChildError, match=r"ended with 7:\s+last words"):
        await children.run(f"{HERE}:die", [7])


async def test_a_function_that_does_not_exist(children: Children) -> None:
    with pytest.raises(ChildError, match="no_such_function"):
        await children.run(f"{HERE}:no_such_function", [1])


async def test_time_is_bounded() -> None:
    async with Children(seconds=3) as children:
        with pytest.raises(ChildError, match="not done after 3"):
            await children.run(f"{HERE}:tell_and_hang", [[]])


async def test_killed_in_the_middle() -> None:
    async with Children() as children:
        child = await children.start(f"{HERE}:tell_and_hang")
        await child.go([1, "two"])
        assert await child.told() == 1
        assert await child.told() == "two"
        child.kill()
        with pytest.raises(ChildError, match="-9"):
            await child.result()


async def test_no_child_stays() -> None:
    async with Children() as children:
        child = await children.start(f"{HERE}:tell_and_hang")
        await child.go([1])
        assert await child.told() == 1
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
