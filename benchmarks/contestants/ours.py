"""Shardgate: through the gateway, and stand-alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.contestants.base import Contestant, Session, engine_options
from benchmarks.contestants.bulk import BULK, load_shardgate
from shardgate import Gateway, GatewaySettings, SQLAlchemySession

if TYPE_CHECKING:
    from benchmarks.contestants.base import Name, Stage

DURABLE = "the server's: each append is on disk before it returns"


def settings_at(
    urls: dict[str, str], connections: int, *, deadline: float | None = 600, coalesce: bool = True
) -> GatewaySettings:
    """Settings for shards at these URLs; the connections are shared out among them. ``deadline`` is
    in seconds; None: the one that there is where nobody sets another one."""
    return GatewaySettings.from_dict(
        {
            "shards": {name: {"url": url} for name, url in urls.items()},
            "keyspaces": {"main": {}},
            "engine_kwargs": engine_options(max(1, connections // len(urls))),
            "coalesce": coalesce,
        }
        | ({} if deadline is None else {"operation_deadline": deadline})
    )


class ThroughGateway(Contestant):
    """``gateway.tenant(...).session(...)``."""

    key: ClassVar[str] = "gateway"
    title: ClassVar[str] = "shardgate, gateway"
    durability: ClassVar[str] = DURABLE
    coalesce: ClassVar[bool] = True

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.urls: dict[str, str] = {}

    async def open(self) -> None:
        new, shards = False, self.stage.shards
        for number in range(shards):
            label = "shardgate" if shards == 1 else f"shardgate-{number}-of-{shards}"
            url, new = await self.stage.database(label, server=number % self.stage.spread_over)
            self.urls[f"shard_{number:03d}"] = url
        self.gateway = Gateway(settings_at(self.urls, self.connections, coalesce=self.coalesce))
        await self.gateway.create_tables()
        if new:
            await self._fill()

    async def _fill(self) -> None:
        if len(self.names) < BULK:
            await self.load()
        else:
            await load_shardgate(self.gateway, self.urls, self.names, self.stage.history)

    def session(self, name: Name) -> Session:
        return self.gateway.tenant(name.tenant).session(name.session)

    async def close(self) -> None:
        await self.gateway.aclose()


class ThroughGatewaySingly(ThroughGateway):
    """Each operation is a statement of its own, however many wait."""

    key: ClassVar[str] = "gateway-singly"
    title: ClassVar[str] = "shardgate, gateway, coalesce=false"
    coalesce: ClassVar[bool] = False


class StandAlone(Contestant):
    """``SQLAlchemySession``, a new one for each exchange, on one engine."""

    key: ClassVar[str] = "standalone"
    title: ClassVar[str] = "shardgate, stand-alone"
    durability: ClassVar[str] = DURABLE

    async def open(self) -> None:
        url, new = await self.stage.database("standalone")
        options = engine_options(self.connections)
        self._source: dict[str, Any] = {"url": url, "engine_kwargs": options}
        first = SQLAlchemySession.from_url("first", create_tables=True, **self._source)
        await first.get_items(1)
        if new:
            await self.load()

    def session(self, name: Name) -> Session:
        return SQLAlchemySession.from_url(name.text, **self._source)

    async def close(self) -> None:
        await SQLAlchemySession.from_url("first", **self._source).aclose()
