"""``_serialize_item`` and ``_deserialize_item``, overridden as a platform would to seal items."""

from __future__ import annotations

import base64
import json
import zlib
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from shardgate.errors import UsageError
from shardgate.session import SQLAlchemySession

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from harness.servers import Database


class Sealed(SQLAlchemySession):
    """Stores base64 of compressed JSON: no row is JSON."""

    async def _serialize_item(self, item: Any) -> str:
        return base64.b64encode(zlib.compress(json.dumps(item).encode())).decode()

    async def _deserialize_item(self, item: str) -> Any:
        try:
            return json.loads(zlib.decompress(base64.b64decode(item)))
        except zlib.error as error:
            raise ValueError("not sealed") from error


class Wrapped(SQLAlchemySession):
    """Stores JSON of its own, with more in it: rows of other makers are JSON, but no items."""

    async def _serialize_item(self, item: Any) -> str:
        return json.dumps({"sealed": item})

    async def _deserialize_item(self, item: str) -> Any:
        content = json.loads(item)
        if "sealed" not in content:
            raise ValueError("not sealed")
        return content["sealed"]


@pytest_asyncio.fixture(params=[Sealed, Wrapped])
async def sealed(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[Any]:
    session = request.param.from_url("chat-1", url=database.url, create_tables=True)
    yield session
    await session.aclose()


@pytest_asyncio.fixture
async def plain(database: Database) -> AsyncIterator[Any]:
    session = SQLAlchemySession.from_url("chat-1", url=database.url, create_tables=True)
    yield session
    await session.aclose()


async def test_items_come_back(sealed: Any) -> None:
    items = [{"n": n, "text": "é\0😀\ud800"} for n in range(5)]
    await sealed.add_items(items)
    assert await sealed.get_items() == items
    assert await sealed.get_items(2) == items[-2:]
    assert [await sealed.pop_item() for _ in range(6)] == [*items[::-1], None]


async def test_rows_of_another_maker_are_undecodable(
    sealed: Any, plain: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(4):
        await sealed.add_items([{"n": n}])
        await plain.add_items([{"plain": n}] * (n % 3))
    assert await sealed.get_items() == [{"n": n} for n in range(4)]
    assert await sealed.get_items(3) == [{"n": n} for n in (1, 2, 3)]
    assert "3 undecodable" in caplog.text
    assert [await sealed.pop_item() for _ in range(5)] == [{"n": n} for n in (3, 2, 1, 0)] + [None]
    left = [{"plain": 1}, {"plain": 2}, {"plain": 2}]
    assert await plain.get_items() == left


class Binary(SQLAlchemySession):
    async def _serialize_item(self, item: Any) -> Any:
        return item["raw"]


@pytest.mark.backends("sqlite", "postgresql-15", "mariadb")
async def test_what_no_database_can_store_is_refused(database: Database) -> None:
    session: Any = Binary.from_url("chat-1", url=database.url, create_tables=True)
    for raw in (b"bytes", "a\0b", "\ud800", None, 7):
        with pytest.raises(UsageError, match="_serialize_item"):
            await session.add_items([{"raw": '"fine"'}, {"raw": raw}])
    assert await session.get_items() == []
    await session.add_items([{"raw": '"fine é"'}])
    assert await session.get_items() == ["fine é"]
    await session.aclose()


@pytest.mark.backends("sqlite", "postgresql-15", "mariadb")
async def test_methods_may_be_replaced_in_one_object(database: Database, plain: Any) -> None:
    session: Any = SQLAlchemySession.from_url("chat-1", url=database.url, create_tables=True)
    other = Sealed.from_url("chat-1", url=database.url)
    session._serialize_item = other._serialize_item
    await session.add_items([{"n": 1}])
    assert await plain.get_items() == []
    session._deserialize_item = other._deserialize_item
    assert await session.get_items() == [{"n": 1}]
    assert await session.pop_item() == {"n": 1}
    await session.aclose()
