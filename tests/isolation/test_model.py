"""Random operations of many tenants, checked against a model of what each of them must see."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete

from contract.doors import gateway_settings
from harness.engines import go_round
from shardgate.gateway import Gateway

if TYPE_CHECKING:
    from collections.abc import Coroutine

TENANTS = st.sampled_from(["a", "A", "a%", "_", "a|b", "'", "\\"])
SESSIONS = st.sampled_from(["s", "S", "s ", "b/s", "%", "_", "'", "é", "e\u0301", "a/s", "😀"])
ITEMS = st.lists(
    st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5), max_size=2),
    max_size=3,
)

Pair = tuple[str, str]


class Platform(RuleBasedStateMachine):
    """A platform with a few tenants whose ids and session ids look alike.

    Two gateways over the same shards take turns, as two processes of a platform do.
    """

    urls: list[str]
    runner: asyncio.Runner

    def __init__(self) -> None:
        super().__init__()
        self.histories: dict[Pair, list[Any]] = {}
        self.turn = 0
        self.gateways: list[Gateway] = []

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(call)

    @initialize()
    def open(self) -> None:
        self.gateways = self.run(self._open())

    async def _open(self) -> list[Gateway]:
        gateways = [Gateway(gateway_settings(self.urls)) for _ in range(2)]
        for gateway in gateways:
            await gateway.open()
        for shard in gateways[0].shards.values():
            async with shard.engine.begin() as connection:
                for table in shard.tables.slot_owned:
                    await connection.execute(delete(table))
        return gateways

    def teardown(self) -> None:
        for gateway in self.gateways:
            self.run(go_round())
            pools: list[Any] = [shard.engine.pool for shard in gateway.shards.values()]
            assert not any(pool.checkedout() for pool in pools)
            self.run(gateway.aclose())

    def gateway(self) -> Gateway:
        self.turn += 1
        return self.gateways[self.turn % 2]

    def session(self, pair: Pair) -> Any:
        return self.gateway().tenant(pair[0]).session(pair[1])

    @rule(pair=st.tuples(TENANTS, SESSIONS), items=ITEMS)
    def append(self, pair: Pair, items: list[Any]) -> None:
        self.run(self.session(pair).add_items(items))
        if items:
            self.histories.setdefault(pair, []).extend(items)

    @rule(pair=st.tuples(TENANTS, SESSIONS), items=ITEMS)
    def append_in_every_tenant(self, pair: Pair, items: list[Any]) -> None:
        for tenant in ("a", "A", "a%"):
            self.append((tenant, pair[1]), items)

    @rule(pair=st.tuples(TENANTS, SESSIONS))
    def pop(self, pair: Pair) -> None:
        history = self.histories.get(pair, [])
        expected = history.pop() if history else None
        assert self.run(self.session(pair).pop_item()) == expected

    @rule(pair=st.tuples(TENANTS, SESSIONS))
    def clear(self, pair: Pair) -> None:
        self.run(self.session(pair).clear_session())
        if pair in self.histories:
            self.histories[pair] = []

    @rule(pair=st.tuples(TENANTS, SESSIONS))
    def delete(self, pair: Pair) -> None:
        existed = self.run(self.gateway().tenant(pair[0]).delete_session(pair[1]))
        assert existed is (self.histories.pop(pair, None) is not None)

    @rule(pair=st.tuples(TENANTS, SESSIONS), limit=st.none() | st.integers(0, 5))
    def read(self, pair: Pair, limit: int | None) -> None:
        history = self.histories.get(pair, [])
        expected = history if limit is None else history[max(0, len(history) - limit) :]
        assert self.run(self.session(pair).get_items(limit)) == expected

    @rule(tenant=TENANTS, limit=st.integers(1, 4))
    def list_page_by_page(self, tenant: str, limit: int) -> None:
        found = self.run(self._listed(tenant, limit))
        places = [(info.listed_at, info.session_id.encode()) for info in found]
        assert places == sorted(places, reverse=True)
        counts = {info.session_id: info.item_count for info in found}
        assert len(counts) == len(found)
        assert counts == {
            session: len(items) for (of, session), items in self.histories.items() if of == tenant
        }

    async def _listed(self, tenant: str, limit: int) -> list[Any]:
        found: list[Any] = []
        cursor = None
        while True:
            page = await self.gateway().tenant(tenant).list_sessions(limit=limit, cursor=cursor)
            found += page.sessions
            cursor = page.next_cursor
            if cursor is None:
                return found
            assert len(page.sessions) == limit

    @invariant()
    def nothing_else_has_changed(self) -> None:
        if self.turn % 8 == 0:
            return
        by_tenant: dict[str, dict[str, list[Any]]] = defaultdict(dict)
        for (tenant, session), items in list(self.histories.items())[-3:]:
            by_tenant[tenant][session] = items
        for tenant, sessions in by_tenant.items():
            for session, items in sessions.items():
                assert self.run(self.session((tenant, session)).get_items()) == items


def _check(urls: list[str], examples: int, steps: int, *, shrink: bool = False) -> None:
    """Without ``shrink``, a failure shows the steps as they were, and soon."""
    with asyncio.Runner() as runner:
        machine = type("Machine", (Platform,), {"urls": urls, "runner": runner})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                phases=[phase for phase in Phase if shrink or phase is not Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )


EXAMPLES = {"sqlite": 25, "postgresql": 8, "mariadb": 8, "mysql": 8}


@pytest.mark.backends("sqlite", "postgresql-18", "mariadb", "mysql")
def test_each_tenant_sees_its_own(urls: list[str], backend: Any) -> None:
    _check(urls, EXAMPLES[backend.family], 30)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_each_tenant_sees_its_own_for_long(urls: list[str]) -> None:
    _check(urls, 300, 60, shrink=True)
