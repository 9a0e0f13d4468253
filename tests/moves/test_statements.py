"""Every statement of a move, taken from one on SQLite, compiles for the other databases and parses.

No MySQL runs here, so this is what is known of it; the others run real moves, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlglot
from sqlalchemy import event
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.dialects.mysql.mariadb import MariaDBDialect
from sqlalchemy.sql.elements import TextClause
from sqlglot import exp
from sqlglot.errors import ErrorLevel

from gateway.shards import item, settings_at
from moves.moving import mover_of
from shardgate import Gateway
from shardgate.agreement import Plan
from shardgate.control import copying
from shardgate.control.load import measure
from shardgate.control.remains import find_unfinished, remove_remains
from shardgate.errors import ShardgateError

if TYPE_CHECKING:
    from pathlib import Path

DIALECTS = {
    "mysql": mysql.dialect,
    "mariadb": MariaDBDialect,
    "postgres": postgresql.dialect,
}


@pytest.fixture
async def statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of a slot that moves with all kinds of changes in between, comes back, and is cleared up."""
    monkeypatch.setattr(copying, "MOST_ITEMS", 3)
    urls = {name: f"sqlite+aiosqlite:///{tmp_path / name}.db" for name in "ab"}
    seen: dict[str, Any] = {}

    def note(_connection: Any, element: Any, *_: Any) -> None:
        if not isinstance(element, TextClause):
            seen.setdefault(str(element.compile(dialect=mysql.dialect())), element)

    settings = settings_at(urls, slots=1)
    async with Gateway(settings) as gateway:
        tenant, (home, away) = gateway.tenant("acme"), ("a", "b")
        if gateway.route("acme", "s").shard == away:
            home, away = away, home
        for shard in gateway.shards.values():
            event.listen(shard.engine.sync_engine, "before_execute", note)
        for name in ("few", "many", "gone"):
            await tenant.session(name).add_items([item(str(n)) for n in range(2)])
        for _ in range(5):
            await tenant.session("many").add_items([item("more")])
        mover = mover_of(gateway)
        await mover.move(0, home, away)
        await tenant.session("many").pop_item()
        await tenant.session("few").clear_session()
        await tenant.delete_session("gone")
        await mover.move(0, away, home)
        plan = Plan.of(settings, "main")
        for rest in await find_unfinished(gateway.shards):
            assert await remove_remains(plan, gateway.shards, rest, grace_seconds=0) is None
        with pytest.raises(ShardgateError):
            await mover.move(0, away, home)
        await measure(plan, gateway.shards, await gateway._keyspaces["main"].known())
    return list(seen.values())


async def test_they_compile_and_parse(statements: list[Any]) -> None:
    kinds = set()
    for name, dialect in DIALECTS.items():
        for statement in statements:
            options = {"render_postcompile": True}
            sql = str(statement.compile(dialect=dialect(), compile_kwargs=options))
            # The placeholder of both drivers is no SQL.
            plain = sql.replace("%%", "%").replace("%s", "?")
            reads = "postgres" if name == "postgres" else "mysql"
            (one,) = sqlglot.parse(plain, reads, error_level=ErrorLevel.RAISE)
            assert not isinstance(one, exp.Command), sql
            kinds.add(type(one))
    assert kinds >= {exp.Select, exp.Insert, exp.Update, exp.Delete}
    assert len(statements) > 25
