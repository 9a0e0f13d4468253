"""Engine options: text becomes the type that SQLAlchemy wants, and each pool gets its own."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.engine import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool, StaticPool

from shardgate._settings_engine import OPTIONS, REFUSED, read_options
from shardgate.errors import SettingsError
from shardgate.settings import GatewaySettings

if TYPE_CHECKING:
    from pathlib import Path

POSTGRESQL = "postgresql+asyncpg://user:hunter2@db/name"
MYSQL = "mysql+aiomysql://user:hunter2@db/name"
FILE = "sqlite+aiosqlite:///file.db"
MEMORIES = [
    "sqlite+aiosqlite://",
    "sqlite+aiosqlite:///:memory:",
    "sqlite+aiosqlite:///file::memory:?uri=true",
    "sqlite+aiosqlite:///file:m?mode=memory&cache=shared&uri=true",
]


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("SHARDGATE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def options(url: str, own: dict[str, Any], gateway: dict[str, Any]) -> dict[str, Any]:
    shards = {"a": {"url": url, "engine_kwargs": own}}
    settings = GatewaySettings.from_dict({"shards": shards, "engine_kwargs": gateway})
    return settings.engine_options("a")


def problems(url: str, own: dict[str, Any], gateway: dict[str, Any]) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        options(url, own, gateway)
    return list(raised.value.problems)


# -- text becomes what SQLAlchemy wants

COERCED = [
    ("pool_size", "5", 5),
    ("max_overflow", "4", 4),
    ("pool_timeout", "2.5", 2.5),
    ("pool_recycle", "1800", 1800),
    ("pool_pre_ping", "false", False),
    ("pool_pre_ping", "True", True),
    ("pool_use_lifo", "off", False),
    ("echo", "0", False),
    ("echo", "debug", "debug"),
    ("echo_pool", "yes", True),
    ("hide_parameters", "on", True),
    ("enable_from_linting", "no", False),
    ("query_cache_size", "0", 0),
    ("label_length", "30", 30),
    ("max_identifier_length", "63", 63),
    ("insertmanyvalues_page_size", "10", 10),
    ("logging_name", "123", "123"),
    ("pool_logging_name", "shard", "shard"),
    ("poolclass", "NullPool", NullPool),
]


@pytest.mark.parametrize(("option", "text", "expected"), COERCED)
@pytest.mark.parametrize("level", ["SHARDGATE_", "SHARDGATE_SHARDS__A__"])
def test_options_from_the_environment_have_types(
    option: str, text: str, expected: object, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDGATE_SHARDS__A__URL", POSTGRESQL)
    monkeypatch.setenv(f"{level}ENGINE_KWARGS__{option.upper()}", text)
    value = GatewaySettings().engine_options("a")
    assert value[option] == expected
    assert type(value[option]) is type(expected)


def test_every_option_but_connect_args_has_a_test_above() -> None:
    assert {option for option, _, _ in COERCED} == set(OPTIONS) - {"connect_args"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pool_size", "0"),
        ("pool_size", "many"),
        ("pool_size", "2.5"),
        ("pool_size", 2.5),
        ("pool_size", True),
        ("pool_size", ""),
        ("pool_size", None),
        ("max_overflow", -2),
        ("pool_timeout", "0"),
        ("pool_timeout", "nan"),
        ("pool_timeout", True),
        ("pool_timeout", None),
        ("pool_pre_ping", "maybe"),
        ("pool_pre_ping", 1),
        ("echo", "loud"),
        ("logging_name", ""),
        ("poolclass", "QueuePool"),
        ("poolclass", QueuePool),
        ("poolclass", 5),
        ("connect_args", 5),
        ("connect_args", {5: 5}),
    ],
)
def test_values_that_no_engine_takes(option: str, value: object) -> None:
    assert read_options({option: value}) == ({}, {option: f"must be {OPTIONS[option].wanted}"})


def test_a_bad_option_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_SHARDS__EU_1__URL", POSTGRESQL)
    monkeypatch.setenv("SHARDGATE_SHARDS__EU_1__ENGINE_KWARGS__POOL_SIZE", "hunter2")
    monkeypatch.setenv("SHARDGATE_ENGINE_KWARGS__POOL_SISE", "3")
    with pytest.raises(SettingsError) as raised:
        GatewaySettings()
    assert list(raised.value.problems) == [
        "SHARDGATE_ENGINE_KWARGS__POOL_SISE: there is no such engine option; "
        "did you mean pool_size?",
        "SHARDGATE_SHARDS__EU_1__ENGINE_KWARGS__POOL_SIZE: must be a whole number, at least 1",
    ]


def test_an_option_like_no_other() -> None:
    (problem,) = problems(POSTGRESQL, {"xyzzy": 1}, {})
    assert problem.startswith("shards.a.engine_kwargs.xyzzy: there is no such engine option; known")


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_are_not_for_settings_are_refused_with_a_reason(option: str) -> None:
    (problem,) = problems(POSTGRESQL, {option: lambda: None}, {})
    assert problem == f"shards.a.engine_kwargs.{option}: {REFUSED[option]}"


def test_every_option_that_sqlalchemy_describes_is_either_known_or_refused() -> None:
    """Asked of SQLAlchemy itself, so that the options of a new release are noticed here."""
    described = set(re.findall(r":param (\w+)(?:=[^:]*)?:", create_engine.__doc__ or ""))
    assert "pool_size" in described
    without_effect = {"url", "empty_in_strategy"}
    assert described - without_effect - set(OPTIONS) - set(REFUSED) == set()


# -- driver arguments


def test_nested_driver_arguments_stay_text(monkeypatch: pytest.MonkeyPatch) -> None:
    start = "SHARDGATE_SHARDS__A__ENGINE_KWARGS__CONNECT_ARGS"
    monkeypatch.setenv("SHARDGATE_SHARDS__A__URL", POSTGRESQL)
    monkeypatch.setenv(f"{start}__PASSWORD", "123456")
    monkeypatch.setenv(f"{start}__SSL", "true")
    monkeypatch.setenv(f"{start}__SERVER_SETTINGS__LOCK_TIMEOUT", "5")
    monkeypatch.setenv(f"{start}__TOKEN", '{"a": 1}')
    assert dict(GatewaySettings().engine_options("a")["connect_args"]) == {
        "password": "123456",
        "ssl": "true",
        "server_settings": {"lock_timeout": "5"},
        "token": '{"a": 1}',
    }


def test_driver_arguments_as_one_json_object_keep_types_and_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHARDGATE_SHARDS__A__URL", POSTGRESQL)
    text = (
        '{"password": "123456", "timeout": 5, "ssl": true, "server_settings": {"TimeZone": "UTC"}}'
    )
    monkeypatch.setenv("SHARDGATE_ENGINE_KWARGS__CONNECT_ARGS", text)
    assert dict(GatewaySettings().engine_options("a")["connect_args"]) == {
        "password": "123456",
        "timeout": 5,
        "ssl": True,
        "server_settings": {"TimeZone": "UTC"},
    }


def test_a_shards_options_lie_over_the_gateways() -> None:
    merged = options(
        POSTGRESQL,
        {"pool_size": 9, "connect_args": {"timeout": 1, "server_settings": {"a": "1"}}},
        {"pool_recycle": 60, "pool_size": 4, "connect_args": {"server_settings": {"b": "2"}}},
    )
    assert (merged["pool_size"], merged["max_overflow"], merged["pool_recycle"]) == (9, 2, 60)
    assert dict(merged["connect_args"]) == {"timeout": 1, "server_settings": {"a": "1", "b": "2"}}


def test_driver_arguments_may_make_two_urls_one_database() -> None:
    shards = {
        "a": {"url": POSTGRESQL},
        "b": {
            "url": "postgresql+asyncpg://user@other/name",
            "engine_kwargs": {"connect_args": {"host": "db", "port": 5432}},
        },
    }
    with pytest.raises(SettingsError, match=r"shards\.b\.url: is the same database"):
        GatewaySettings.from_dict({"shards": shards})


# -- pools


@pytest.mark.parametrize("url", [POSTGRESQL, MYSQL, FILE])
async def test_a_counting_pool_gets_small_defaults(url: str) -> None:
    engine = create_async_engine(url, **options(url, {}, {}))
    assert isinstance(engine.sync_engine.pool, AsyncAdaptedQueuePool)
    assert engine.sync_engine.pool.size() == 3
    assert options(url, {}, {})["max_overflow"] == 2
    await engine.dispose()


@pytest.mark.parametrize("url", MEMORIES)
async def test_a_database_in_memory_gets_one_connection(url: str) -> None:
    taken = options(url, {}, {"pool_size": 10, "pool_timeout": 3, "pool_use_lifo": True})
    engine = create_async_engine(url, **taken)
    assert isinstance(engine.sync_engine.pool, StaticPool)
    await engine.dispose()


@pytest.mark.parametrize("poolclass", ["NullPool", NullPool])
@pytest.mark.parametrize("url", [POSTGRESQL, FILE])
async def test_a_pool_that_does_not_count_gets_no_sizes(url: str, poolclass: object) -> None:
    taken = options(url, {"poolclass": poolclass}, {"pool_size": 10})
    engine = create_async_engine(url, **taken)
    assert isinstance(engine.sync_engine.pool, NullPool)
    await engine.dispose()


@pytest.mark.parametrize(
    ("url", "own", "gateway", "start"),
    [
        (POSTGRESQL, {"poolclass": "NullPool", "pool_size": 3}, {}, "shards.a.engine_kwargs."),
        (POSTGRESQL, {"pool_size": 3}, {"poolclass": "NullPool"}, "shards.a.engine_kwargs."),
        (POSTGRESQL, {}, {"poolclass": "NullPool", "pool_size": 3}, "engine_kwargs."),
        (MEMORIES[0], {"pool_size": 3}, {}, "shards.a.engine_kwargs."),
    ],
)
def test_a_size_for_a_pool_that_has_none(
    url: str, own: dict[str, Any], gateway: dict[str, Any], start: str
) -> None:
    (problem,) = problems(url, own, gateway)
    assert problem.startswith(f"{start}pool_size: the pool in use, ")
    assert problem.endswith("does not take it; remove it")


@pytest.mark.parametrize(
    ("url", "poolclass"),
    [(MEMORIES[0], "NullPool"), (MEMORIES[0], "AsyncAdaptedQueuePool"), (POSTGRESQL, "StaticPool")],
)
def test_a_pool_that_cannot_work(url: str, poolclass: str) -> None:
    (problem,) = problems(url, {"poolclass": poolclass}, {})
    assert problem.startswith("shards.a.engine_kwargs.poolclass: shard a: ")
    assert "StaticPool" in problem
    (problem,) = problems(url, {}, {"poolclass": poolclass})
    assert problem.startswith("engine_kwargs.poolclass: shard a: ")


@pytest.mark.parametrize("url", [POSTGRESQL, MYSQL, FILE, *MEMORIES])
async def test_every_option_at_once_makes_an_engine(url: str) -> None:
    every = {option: text for option, text, _ in COERCED if option != "poolclass"} | {
        "echo": "false",
        "echo_pool": "false",
    }
    engine = create_async_engine(url, **options(url, {}, every))
    await engine.dispose()
