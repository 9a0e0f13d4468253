"""Clients at work while everything moves: what they were answered can be true.

The seed is printed; ``SEED`` and ``SECONDS`` in the environment choose those of the long form.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

import pytest

from gateway.shards import named
from moves.broken import VARIANTS
from moves.storm import Storm

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeDatabases
    from harness.servers import Backend

pytestmark = [
    pytest.mark.processes,
    pytest.mark.backends("postgresql"),
    pytest.mark.timeout(400),  # on a machine that is busy with other things
]

SLOW = ("guard", "incarnation")
"""Those that are found less soon: with the long tests."""
SECONDS = float(os.environ.get("SECONDS", "600"))


def _seed() -> int:
    seed = int(os.environ.get("SEED", 0)) or secrets.randbelow(10**6)
    print(f"seed {seed}")  # noqa: T201 - to run it again
    return seed


async def test_nothing_is_lost_while_slots_move(
    databases: MakeDatabases, backend: Backend, tmp_path: Path
) -> None:
    urls = named(await databases(4))
    report = await Storm(urls, tmp_path, _seed(), seconds=12).run()
    print(report)  # noqa: T201 - what was done
    assert report.problems + report.contradictions == []
    assert report.moves["moved"] > 9


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.soak if name in SLOW else ()) for name in VARIANTS],
)
async def test_what_is_broken_on_purpose_is_found(
    databases: MakeDatabases, backend: Backend, tmp_path: Path, variant: str
) -> None:
    urls = named(await databases(4))
    moves = 40 if variant == "incarnation" else 20  # the likes of it are not met in every move
    report = await Storm(urls, tmp_path, _seed(), seconds=4, moves=moves, broken=variant).run()
    print(report)  # noqa: T201 - what was done
    assert report.contradictions != []


@pytest.mark.soak
@pytest.mark.timeout(2 * SECONDS + 600)
@pytest.mark.parametrize("number", range(3))
async def test_nothing_is_lost_while_slots_move_for_long(
    databases: MakeDatabases, backend: Backend, tmp_path: Path, number: int
) -> None:
    urls = named(await databases(4, servers=3))
    report = await Storm(urls, tmp_path, _seed() + number, seconds=SECONDS).run()
    print(report)  # noqa: T201 - what was done
    assert report.problems + report.contradictions == []
