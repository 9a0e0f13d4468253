"""Writers and readers that a test runs as tasks and as processes, and what their items must show.

An item says who wrote it (``writer``), the number of its append (``batch``), its place in it
(``place``) and the size of the append (``of``).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from contract.doors import door_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contract.doors import Session

Item = dict[str, Any]
Span = tuple[str, int, int, int]
"""Writer, batch, and the nanoseconds at which the append began and was acknowledged."""


def batch_of(writer: str, batch: int, size: int) -> list[Item]:
    return [{"writer": writer, "batch": batch, "place": n, "of": size} for n in range(size)]


async def append_batches(
    session: Session, writer: str, batches: int, *, first: int = 0
) -> list[Span]:
    """Append 1 to 4 items at a time."""
    spans = []
    for batch in range(first, first + batches):
        items: list[Any] = batch_of(writer, batch, 1 + batch % 4)
        began = time.monotonic_ns()
        await session.add_items(items)
        spans.append((writer, batch, began, time.monotonic_ns()))
    return spans


async def append_together(session_of: Any, writers: Sequence[str], batches: int) -> list[Span]:
    """One task for each writer, each with a session object of its own."""
    tasks = [append_batches(session_of(), writer, batches) for writer in writers]
    return [span for spans in await asyncio.gather(*tasks) for span in spans]


async def append_in_process(argument: dict[str, Any]) -> list[Span]:
    """Run in a child process: open the door and append."""
    async with door_at(argument["address"]) as door:
        return await append_together(door.session, argument["writers"], argument["batches"])


async def pop_in_process(argument: dict[str, Any]) -> list[Any]:
    """Run in a child process: open the door and pop so many times at once."""
    async with door_at(argument["address"]) as door:
        return await asyncio.gather(*(door.session().pop_item() for _ in range(argument["pops"])))


def assert_whole(history: Sequence[Any]) -> None:
    """Appends are whole, not interleaved, and each writer's come in its order, once."""
    last: dict[str, int] = defaultdict(lambda: -1)
    place = 0
    while place < len(history):
        head = history[place]
        expected = batch_of(head["writer"], head["batch"], head["of"])
        assert list(history[place : place + head["of"]]) == expected
        assert head["batch"] > last[head["writer"]], "an append is out of its writer's order"
        last[head["writer"]] = head["batch"]
        place += head["of"]


def batches_in(history: Sequence[Any]) -> list[tuple[str, int]]:
    """Who appended and the append's number, in the order of the history."""
    return [key for key, _ in groupby((item["writer"], item["batch"]) for item in history)]


def assert_order_of_commits(history: Sequence[Any], spans: Sequence[Span]) -> None:
    """Every acknowledged append is there; one that began after another's end comes after it."""
    places = {key: place for place, key in enumerate(batches_in(history))}
    assert places.keys() == {(writer, batch) for writer, batch, _, _ in spans}
    by_end = sorted(spans, key=lambda span: span[3])
    ended, furthest = 0, -1
    for writer, batch, began, _ in sorted(spans, key=lambda span: span[2]):
        while by_end[ended][3] < began:
            furthest = max(furthest, places[by_end[ended][:2]])
            ended += 1
        assert places[writer, batch] > furthest, "an append came before one that had ended"
