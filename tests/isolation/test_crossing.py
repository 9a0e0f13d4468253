"""One tenant tries to reach another's sessions with whatever an id may hold."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select

from shardgate.errors import UsageError

if TYPE_CHECKING:
    from shardgate.gateway import Gateway

TENANTS = [
    *("acme", "Acme", "ACME", "acme_", "acme%", "a", "acme.", "acme-1", "acme:1", "acme|chat"),
    *("'", '"', "`", "\\", "''", "'OR'1'='1", ";", "--", "/*".replace("/", "|"), "%", "_", "*"),
    *("$1", ":tenant", "%(tenant)s", "{tenant}", "?", "X'61'", "0x61636d65", "null", "0", "x" * 64),
]
SESSIONS = [
    *(
        "chat",
        "Chat",
        "chat ",
        "acme/chat",
        "/chat",
        "../acme/chat",
        "acme|chat",
        "|chat",
        "e/chat",
    ),
    *("%", "_", "chat%", "ch_t", "'", "' OR tenant_id <> '", "\\", "\x1f", "\t", "\n", "\x7f"),
    *("ch\u0430t", "\uff43hat", "chát", "cha\u0301t", "\u202echat", "x" * 255, "😀"),
]


def _marks(tenant: str, session: str) -> list[Any]:
    return [{"tenant": tenant, "session": session, "n": n} for n in range(2)]


async def _filled(gateway: Gateway) -> list[tuple[str, str]]:
    """Every session id in every tenant, each with items that say whose they are."""
    pairs = list(itertools.product(TENANTS, SESSIONS))
    for start in range(0, len(pairs), 40):
        await asyncio.gather(
            *(
                gateway.tenant(tenant).session(session).add_items(_marks(tenant, session))
                for tenant, session in pairs[start : start + 40]
            )
        )
    return pairs


async def _listed(gateway: Gateway, tenant: str, limit: int = 1000) -> list[str]:
    found, cursor = [], None
    while True:
        page = await gateway.tenant(tenant).list_sessions(limit=limit, cursor=cursor)
        assert len(page.sessions) <= limit
        assert page.unavailable_shards == ()
        found += [session.session_id for session in page.sessions]
        cursor = page.next_cursor
        if cursor is None:
            return found


@pytest.mark.backends("sqlite", "postgresql-18", "mariadb", "mysql")
async def test_the_same_ids_in_many_tenants(gateway: Gateway) -> None:
    assert len(set(TENANTS)) == len(TENANTS)
    pairs = await _filled(gateway)
    for tenant, session in pairs[::7]:
        items: list[Any] = await gateway.tenant(tenant).session(session).get_items()
        assert items == _marks(tenant, session)
    for tenant in TENANTS:
        assert sorted(await _listed(gateway, tenant)) == sorted(SESSIONS)

    attacker = gateway.tenant("'OR'1'='1")
    for session in SESSIONS:
        await attacker.session(session).clear_session()
        assert await attacker.session(session).pop_item() is None
        assert await attacker.delete_session(session) is True
    assert await _listed(gateway, "'OR'1'='1") == []
    await gateway.tenant("acme").delete_session("%")
    await gateway.tenant("acme").session("_").clear_session()
    popped: Any = await gateway.tenant("acme").session("\\").pop_item()
    assert popped == _marks("acme", "\\")[1]

    lost = {("acme", "%"), ("acme", "_")} | {("'OR'1'='1", session) for session in SESSIONS}
    lost |= {("acme", "\\")}
    for tenant, session in pairs:
        if (tenant, session) not in lost:
            items = await gateway.tenant(tenant).session(session).get_items()
            assert items == _marks(tenant, session)


async def test_every_row_says_whose_it_is(gateway: Gateway) -> None:
    """What is stored is the tenant itself, exactly: not a hash, nothing folded."""
    for tenant in TENANTS:
        await gateway.tenant(tenant).session("chat").add_items([{"tenant": tenant}])  # type: ignore[list-item]  # any JSON
    stored: list[str] = []
    for shard in gateway.shards.values():
        messages = shard.tables.messages
        async with shard.engine.connect() as connection:
            rows = await connection.execute(select(messages.c.tenant_id, messages.c.message_data))
            for tenant_id, data in rows:
                assert tenant_id in TENANTS
                stored.append(tenant_id)
                assert data.startswith('{"tenant":')
    assert sorted(stored) == sorted(TENANTS)


async def test_no_page_and_no_cursor_of_another_tenant(gateway: Gateway) -> None:
    for tenant in ("acme", "Acme", "acme_"):
        for n in range(12):
            items: list[Any] = [{"n": n}]
            await gateway.tenant(tenant).session(f"{tenant} {n}").add_items(items)
    page = await gateway.tenant("acme").list_sessions(limit=5)
    assert page.next_cursor is not None
    assert len(page.sessions) == 5
    for tenant in ("Acme", "acme_", "other"):
        with pytest.raises(UsageError, match="cursor"):
            await gateway.tenant(tenant).list_sessions(limit=5, cursor=page.next_cursor)
    for cursor in ("", "x", "AAAA", page.next_cursor[:-4], page.next_cursor * 2, "é", "null"):
        with pytest.raises(UsageError, match="cursor"):
            await gateway.tenant("acme").list_sessions(limit=5, cursor=cursor)
    for limit in (1, 5, 12, 50):
        found = await _listed(gateway, "acme", limit)
        assert sorted(found) == sorted(f"acme {n}" for n in range(12))
        assert len(set(found)) == 12
    assert await _listed(gateway, "nobody") == []


async def test_nothing_without_a_tenant(gateway: Gateway) -> None:
    wrong: list[Any] = [
        "",
        " ",
        "a b",
        "a/b",
        "é",
        "x" * 65,
        "a\0",
        "\n",
        None,
        7,
        b"acme",
        "\ud800",
    ]
    for tenant in wrong:
        with pytest.raises(UsageError, match="tenant_id"):
            gateway.tenant(tenant)
        with pytest.raises(UsageError, match="tenant_id"):
            gateway.route(tenant, "chat")
    for session in ("", "x" * 256, "a\0b", "\ud800"):
        with pytest.raises(UsageError, match="session_id"):
            gateway.tenant("acme").session(session)
        with pytest.raises(UsageError, match="session_id"):
            await gateway.tenant("acme").delete_session(session)
    assert not hasattr(gateway, "session")


async def test_the_log_of_one_tenant_names_no_other(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing at all is logged of what goes well, at any level: items are a tenant's secrets."""
    caplog.set_level(logging.DEBUG, logger="shardgate")
    for tenant in ("acme", "globex"):
        items: list[Any] = [{"secret": f"of {tenant}"}]
        await gateway.tenant(tenant).session("chat").add_items(items)
        assert await gateway.tenant(tenant).session("chat").pop_item() == items[0]
    ours = [record for record in caplog.records if record.name.startswith("shardgate")]
    assert not [record for record in ours if "secret" in record.getMessage()]


async def test_shards_hold_what_the_route_says(gateway: Gateway) -> None:
    placed: dict[str, set[tuple[str, str]]] = {name: set() for name in gateway.shards}
    items: list[Any] = [{}]
    for tenant, session in itertools.product(TENANTS[:6], SESSIONS[:8]):
        await gateway.tenant(tenant).session(session).add_items(items)
        placed[gateway.route(tenant, session).shard].add((tenant, session))
    assert all(placed.values())
    for name, shard in gateway.shards.items():
        sessions = shard.tables.sessions
        async with shard.engine.connect() as connection:
            rows = await connection.execute(select(sessions.c.tenant_id, sessions.c.session_id))
            assert {tuple(row) for row in rows} == placed[name]
            counted = await connection.execute(select(func.count()).select_from(sessions))
            assert counted.scalar_one() == len(placed[name])
