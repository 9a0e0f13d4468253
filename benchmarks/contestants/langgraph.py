"""LangGraph's AsyncPostgresSaver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.contestants.base import SECONDS_FOR_A_CONNECTION, Contestant, Session
from benchmarks.servers import driver_url, require

if TYPE_CHECKING:
    from benchmarks.contestants.base import Name

_CHANNEL = "messages"


class LangGraph(Contestant):
    """The least that a turn costs: read the checkpoint, write the next one.

    A graph that runs writes more: a checkpoint for its input, and each node's writes. The state is
    one value, so that it is read and written whole.
    """

    key: ClassVar[str] = "langgraph"
    title: ClassVar[str] = "LangGraph AsyncPostgresSaver"
    durability: ClassVar[str] = "the server's: each checkpoint is on disk before it returns"

    async def open(self) -> None:
        saver: Any = require("langgraph.checkpoint.postgres.aio")
        pool: Any = require("psycopg_pool")
        rows: Any = require("psycopg.rows")
        self.base: Any = require("langgraph.checkpoint.base")
        url, new = await self.stage.database("langgraph")
        self._pool = pool.AsyncConnectionPool(
            driver_url(url),
            min_size=self.connections,
            max_size=self.connections,
            timeout=SECONDS_FOR_A_CONNECTION,
            open=False,
            kwargs={"autocommit": True, "prepare_threshold": 0, "row_factory": rows.dict_row},
        )
        await self._pool.open(wait=True)
        self.saver = saver.AsyncPostgresSaver(self._pool)
        if new:
            await self.saver.setup()
            await self.load()

    def session(self, name: Name) -> Session:
        return LangGraphSession(self, name)

    async def close(self) -> None:
        await self._pool.close()


class LangGraphSession:
    """A thread: what was read is what the next checkpoint follows."""

    def __init__(self, langgraph: LangGraph, name: Name) -> None:
        self._langgraph = langgraph
        self._config = {"configurable": {"thread_id": name.text, "checkpoint_ns": ""}}
        self._state: list[Any] = []
        self._version: str | None = None
        self._step = -1

    async def get_items(self, limit: int | None = None) -> list[Any]:
        found = await self._langgraph.saver.aget_tuple(self._config)
        if found is not None:
            self._config = found.config
            self._state = found.checkpoint["channel_values"][_CHANNEL]
            self._version = found.checkpoint["channel_versions"][_CHANNEL]
            self._step = found.metadata["step"]
        return self._state if limit is None else self._state[-limit:]

    async def add_items(self, items: list[Any]) -> None:
        saver = self._langgraph.saver
        self._state = [*self._state, *items]
        self._step += 1
        versions = {_CHANNEL: saver.get_next_version(self._version, None)}
        checkpoint = self._langgraph.base.empty_checkpoint() | {
            "channel_values": {_CHANNEL: self._state},
            "channel_versions": versions,
        }
        metadata = {"source": "loop", "step": self._step, "parents": {}}
        self._config = await saver.aput(self._config, checkpoint, metadata, versions)
        self._version = versions[_CHANNEL]
