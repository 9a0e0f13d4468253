"""Ways to break the protocol on purpose, each of which the check of histories has to find.

They are patched into the processes of a storm, before a gateway is made there. What they break is
made likely to be met by pauses in the right place, which alone do no harm.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from shardgate import handover
from shardgate.control import moves
from shardgate.handover import Act
from shardgate.records import change_row
from shardgate.recovery import after
from shardgate.sql import postgresql, transactions
from shardgate.sql.moving import Version

if TYPE_CHECKING:
    from collections.abc import Callable

_SLOW_SHARE, _SLOW_SECONDS = 0.1, 0.15


def slow_down() -> None:
    """Have some statements take their time between their guard and what they write."""
    pause = (
        f" WHERE pg_sleep(CASE WHEN random() < {_SLOW_SHARE} THEN {_SLOW_SECONDS} ELSE 0 END)"
        " IS NOT NULL"
    )
    changed = postgresql._OP.replace("FROM guard", f"FROM guard{pause}")
    assert changed != postgresql._OP
    postgresql._OP = changed


def _without_guard() -> None:
    """Statements are carried out wherever they are sent to."""
    anything = "SELECT 1 WHERE $3::int IS NOT NULL AND $4::text IS NOT NULL"
    postgresql._GUARD = postgresql._HELD = anything
    postgresql._HERE, postgresql._HELD_MANY = postgresql._ALL_HERE, "true"

    async def pass_by(*_: object) -> None:
        """Whoever comes."""

    transactions.check_guard = pass_by


def _without_barrier() -> None:
    """Statements that have passed their guard are not waited for; see ``slow_down``."""

    async def go_on(_mover: Any, run: Any) -> None:
        run.mine.passed = True

    moves.Mover._pass_barrier = go_on


def _without_incarnation() -> None:
    """A session that was deleted and made again is taken for what it was before."""

    def equal(one: Version, other: object) -> bool:
        return isinstance(other, Version) and one.revision == other.revision

    Version.__eq__ = equal
    _pause_before_fence(1.5)


def _pause_before_fence(seconds: float) -> None:
    fence = moves.Mover._fence

    async def wait(mover: Any, run: Any) -> Any:
        await asyncio.sleep(seconds)
        return await fence(mover, run)

    moves.Mover._fence = wait


def _decided_first() -> None:
    """The target owns the slot before the source has stopped to."""

    async def decide_and_fence(mover: Any, run: Any) -> Any:
        before, fenced = run.pair, after(Act.FENCE, run.pair, run.mine.move_id)
        run.fenced_at = asyncio.get_running_loop().time()
        await mover._decide(run)
        await asyncio.sleep(0.1)
        source = run.ends.source

        async def fence(connection: Any) -> bool:
            return await change_row(connection, source.tables, before.source, fenced.source)

        return (
            handover.Pair(before.source_uuid, before.target_uuid, fenced.source, run.pair.target)
            if await source.transact(fence)
            else None
        )

    moves.Mover._fence = decide_and_fence


VARIANTS: dict[str, Callable[[], None]] = {
    "guard": _without_guard,
    "barrier": _without_barrier,
    "incarnation": _without_incarnation,
    "order": _decided_first,
}


def break_it(variant: str | None) -> None:
    """Break this process's protocol; None leaves it whole."""
    if variant is not None:
        VARIANTS[variant]()
