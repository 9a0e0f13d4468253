"""The settings' sources, their order, and what the settings answer."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from shardgate import _settings_sources as sources
from shardgate.errors import SettingsError, TenantRefused, UsageError
from shardgate.settings import (
    GatewaySettings,
    KeyspaceSettings,
    PoolSizeWarning,
    ShardSettings,
)

POSTGRESQL = "postgresql+asyncpg://user:hunter2@db/name"
MYSQL = "mysql+aiomysql://user:hunter2@db/name"
MEMORY = "sqlite+aiosqlite://"


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("SHARDGATE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def made(**values: Any) -> GatewaySettings:
    return GatewaySettings.from_dict({"shards": {"a": {"url": MEMORY}}} | values)


def write(path: str, text: str) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


# -- defaults and answers


def test_defaults() -> None:
    settings = made()
    assert settings.default_keyspace == "main"
    assert settings.keyspaces == {"main": KeyspaceSettings(slots=4096, spread=None)}
    assert settings.table_prefix == "shardgate_"
    assert settings.operation_deadline == 10.0
    assert settings.operation_memory == 86400.0
    assert settings.create_tables is False
    assert settings.coalesce is True
    shard = settings.shards["a"]
    assert (shard.schema_, shard.weight, shard.keyspace) == (None, 1.0, "main")


def test_settings_are_frozen_and_can_be_pickled() -> None:
    settings = made()
    with pytest.raises(ValueError, match="frozen"):
        settings.create_tables = True
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 - our own bytes


def two_keyspaces(**values: Any) -> GatewaySettings:
    shards = {"a": {"url": MEMORY, "keyspace": "eu"}, "b": {"url": MEMORY}, "c": {"url": MEMORY}}
    return made(shards=shards, **values)


def test_a_used_keyspace_need_not_be_declared() -> None:
    settings = two_keyspaces(keyspaces={"main": {"slots": 64, "spread": 4}})
    assert settings.keyspace("main") == KeyspaceSettings(slots=64, spread=4)
    assert settings.keyspace("eu") == KeyspaceSettings()
    assert list(settings.shards_of("main")) == ["b", "c"]
    assert list(settings.shards_of("eu")) == ["a"]


def test_unknown_names_are_refused_by_every_question() -> None:
    settings = made()
    for ask in (settings.keyspace, settings.shards_of, settings.engine_options):
        with pytest.raises(UsageError, match="'nowhere'"):
            ask("nowhere")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"default_keyspace": "EU"}, "eu"),
        ({"default_keyspace": ""}, None),
        ({"default_keyspace": None}, None),
    ],
)
def test_default_keyspace_of_several(values: dict[str, Any], expected: str | None) -> None:
    assert two_keyspaces(**values).default_keyspace == expected


@pytest.mark.parametrize("none", ["", None])
def test_the_only_keyspace_is_the_default_unless_there_shall_be_none(none: str | None) -> None:
    assert made().default_keyspace == "main"
    assert made(default_keyspace=none).default_keyspace is None


def test_keyspace_of_a_tenant() -> None:
    settings = two_keyspaces(tenants={"Acme": "EU", "acme": "main"})
    assert settings.keyspace_of("Acme") == "eu"
    assert settings.keyspace_of("acme") == "main"
    with pytest.raises(TenantRefused) as refused:
        settings.keyspace_of("ACME")
    assert refused.value.tenant == "ACME"
    assert two_keyspaces(default_keyspace="eu").keyspace_of("ACME") == "eu"


def test_the_widest_tenant_id_is_accepted() -> None:
    every = "".join(chr(code) for code in range(33, 127) if chr(code) != "/")
    tenants = {every[:64]: "main", every[64:]: "main"}
    assert made(tenants=tenants).tenants == tenants


@pytest.mark.parametrize("model", [KeyspaceSettings, ShardSettings])
def test_a_part_refuses_what_it_does_not_know(model: type[Any]) -> None:
    with pytest.raises(ValidationError, match="xyzzy"):
        model(url=POSTGRESQL, xyzzy=1) if model is ShardSettings else model(xyzzy=1)


# -- sources


def test_from_dict_reads_no_environment_and_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write(".env", "SHARDGATE_TABLE_PREFIX=dotenv_\nSHARDGATE_NONSENSE=1\n")
    monkeypatch.setenv("SHARDGATE_TABLE_PREFIX", "env_")
    monkeypatch.setenv("SHARDGATE_CONFIG", "missing.toml")
    monkeypatch.setenv("SHARDGATE_SECRETS_DIR", "missing")
    assert made().table_prefix == "shardgate_"


def test_the_order_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source sets one prefix; taking the strongest away lets the next one through."""
    toml = 'table_prefix = "toml_"\n[shards.a]\nurl = "sqlite+aiosqlite://"\n'
    monkeypatch.setenv("SHARDGATE_CONFIG", str(write("config.toml", toml)))
    assert GatewaySettings().table_prefix == "toml_"
    write("secrets/table_prefix", "secret_\n")
    monkeypatch.setenv("SHARDGATE_SECRETS_DIR", "secrets")
    assert GatewaySettings().table_prefix == "secret_"
    write(".env", "SHARDGATE_TABLE_PREFIX=dotenv_\n")
    assert GatewaySettings().table_prefix == "dotenv_"
    monkeypatch.setenv("SHARDGATE_TABLE_PREFIX", "env_")
    assert GatewaySettings().table_prefix == "env_"
    assert GatewaySettings(table_prefix="argument_").table_prefix == "argument_"
    assert GatewaySettings(_env_file=None).table_prefix == "env_"


def test_sources_are_merged_setting_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    toml = """
        [tenants]
        Acme = "main"
        [shards.EU_1]
        weight = 2
        [shards.EU_1.engine_kwargs.connect_args.server_settings]
        application_name = "shop"
    """
    monkeypatch.setenv("SHARDGATE_CONFIG", str(write("config.toml", toml)))
    write(".env", 'SHARDGATE_SHARDS__EU_1__ENGINE_KWARGS={"pool_size": 7}\n')
    write("secrets/shards/eu_1/url", POSTGRESQL + "\n")
    monkeypatch.setenv("SHARDGATE_SECRETS_DIR", "secrets")
    monkeypatch.setenv(
        "SHARDGATE_SHARDS__EU_1__ENGINE_KWARGS__CONNECT_ARGS__SERVER_SETTINGS__TIMEZONE", "UTC"
    )
    monkeypatch.setenv("SHARDGATE_TENANTS", '{"acme": "main"}')
    settings = GatewaySettings()
    shard = settings.shards["eu_1"]
    assert shard.url.get_secret_value() == POSTGRESQL
    assert shard.weight == 2.0
    assert shard.engine_kwargs["pool_size"] == 7
    server = shard.engine_kwargs["connect_args"]["server_settings"]
    assert dict(server) == {"application_name": "shop", "timezone": "UTC"}
    assert settings.tenants == {"Acme": "main", "acme": "main"}


@pytest.mark.parametrize("source", ["arguments", "environment", "dotenv", "nested", "flat", "toml"])
def test_names_of_shards_and_keyspaces_are_folded_in_every_source(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"SHARDGATE_SHARDS__EU_1__URL": MEMORY, "Shardgate_Shards__Eu_1__Keyspace": "BigCo"}
    if source == "arguments":
        made_of = GatewaySettings(shards={"EU_1": {"url": MEMORY, "keyspace": "BigCo"}})
    elif source == "toml":
        text = f'[shards.EU_1]\nurl = "{MEMORY}"\nkeyspace = "BigCo"'
        made_of = GatewaySettings(_config_file=write("config.toml", text))
    elif source == "nested":
        write("secrets/shards/EU_1/url", MEMORY)
        write("secrets/Shards/Eu_1/keyspace", "BigCo")
        made_of = GatewaySettings(_secrets_dir="secrets")
    elif source == "flat":
        for name, value in variables.items():
            write(f"secrets/{name}", value)
        made_of = GatewaySettings(_secrets_dir="secrets")
    elif source == "dotenv":
        write("my.env", "\n".join(f"{name}={value}" for name, value in variables.items()))
        made_of = GatewaySettings(_env_file="my.env")
    else:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        made_of = GatewaySettings()
    assert {name: shard.keyspace for name, shard in made_of.shards.items()} == {"eu_1": "bigco"}
    assert made_of.default_keyspace == "bigco"


def test_one_json_object_may_hold_all_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_SHARDS", '{"A": {"url": "sqlite+aiosqlite://", "weight": 3}}')
    monkeypatch.setenv("SHARDGATE_SHARDS__B__URL", MEMORY)
    shards = GatewaySettings().shards
    assert {name: shard.weight for name, shard in shards.items()} == {"a": 3.0, "b": 1.0}


def test_where_the_files_are_may_stand_in_dotenv() -> None:
    write("settings.toml", f'[shards.a]\nurl = "{MEMORY}"')
    write(".env", "SHARDGATE_CONFIG=settings.toml\nSHARDGATE_SECRETS_DIR=\n")
    assert list(GatewaySettings().shards) == ["a"]


def test_models_are_arguments_too() -> None:
    shard = ShardSettings(url=SecretStr(POSTGRESQL), schema="agents", weight=2)
    settings = GatewaySettings(shards={"a": shard}, keyspaces={"main": KeyspaceSettings(slots=8)})
    assert settings.shards == {"a": shard}
    assert settings.keyspace("main").slots == 8


def test_a_secrets_directory_as_kubernetes_mounts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    write("secrets/..2024_01/shards/a/url", MEMORY)
    write("secrets/..2024_01/SHARDGATE_TABLE_PREFIX", "mounted_\n")
    Path("secrets/..data").symlink_to("..2024_01")
    Path("secrets/shards").symlink_to("..data/shards")
    Path("secrets/SHARDGATE_TABLE_PREFIX").symlink_to("..data/SHARDGATE_TABLE_PREFIX")
    write("secrets/..2024_01/shards/a/..leftover", "hunter2")
    write("secrets/other_program_password", "hunter2")
    monkeypatch.setenv("SHARDGATE_SECRETS_DIR", "secrets")
    assert GatewaySettings().table_prefix == "mounted_"


def test_a_circle_of_links_in_the_secrets_directory_ends() -> None:
    write("secrets/shards/a/url", MEMORY)
    Path("secrets/other").symlink_to(".")
    assert list(GatewaySettings(_secrets_dir="secrets").shards) == ["a"]


KUBERNETES = [
    "SHARDGATE_SERVICE_HOST",
    "SHARDGATE_SERVICE_PORT",
    "SHARDGATE_SERVICE_PORT_HTTP_2",
    "SHARDGATE_PORT",
    "SHARDGATE_PORT_8080_TCP",
    "SHARDGATE_PORT_8080_TCP_PROTO",
    "SHARDGATE_PORT_8080_TCP_PORT",
    "SHARDGATE_PORT_8080_TCP_ADDR",
    "SHARDGATE_PORT_53_UDP_ADDR",
]


@pytest.mark.parametrize("name", KUBERNETES)
def test_what_kubernetes_adds_is_no_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "tcp://10.0.0.1:8080")
    assert list(GatewaySettings(shards={"a": {"url": MEMORY}}).shards) == ["a"]


def test_a_service_whose_name_begins_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_DEMO_PORT_80_TCP", "tcp://10.0.0.1:80")
    with pytest.raises(SettingsError, match="SHARDGATE_DEMO_PORT_80_TCP: there is no such setting"):
        made_with_environment()
    monkeypatch.setenv("SHARDGATE_DEMO_SERVICE_HOST", "10.0.0.1")
    assert list(made_with_environment().shards) == ["a"]


def made_with_environment() -> GatewaySettings:
    return GatewaySettings(shards={"a": {"url": MEMORY}})


# -- secrets stay secret

LEAKS = ["hunter2", "s3cret", "123456"]


def secretive() -> GatewaySettings:
    return GatewaySettings.from_dict(
        {
            "shards": {
                "a": {
                    "url": POSTGRESQL,
                    "engine_kwargs": {"connect_args": {"password": "s3cret", "x": {"y": "123456"}}},
                }
            },
            "engine_kwargs": {"connect_args": {"passfile": "s3cret"}, "poolclass": "NullPool"},
        }
    )


def test_no_password_in_a_repr_or_a_dump() -> None:
    settings = secretive()
    shown = [
        repr(settings),
        str(settings),
        repr(settings.shards["a"]),
        repr(settings.engine_kwargs),
        repr(settings.engine_options("a")),
        repr(settings.engine_options("a")["connect_args"]),
        str(settings.shards["a"].engine_kwargs),
        repr(settings.shards["a"].parsed_url),
        repr(settings.model_dump()),
        settings.model_dump_json(),
    ]
    assert not [(leak, text) for leak in LEAKS for text in shown if leak in text]
    assert "pool" in repr(settings.engine_kwargs)


def test_connect_args_are_whole_for_the_engine() -> None:
    driver = secretive().engine_options("a")["connect_args"]
    assert dict(driver) == {"passfile": "s3cret", "password": "s3cret", "x": {"y": "123456"}}


@pytest.mark.parametrize(
    "values",
    [
        {"url": "postgresql://user:hunter2@db/name"},
        {"url": POSTGRESQL, "weight": "hunter2"},
        {"url": POSTGRESQL, "engine_kwargs": {"connect_args": "hunter2", "pool_size": "hunter2"}},
        {"url": POSTGRESQL, "uri": "hunter2"},
    ],
)
def test_no_password_in_the_error_of_a_shard_alone(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        ShardSettings(**values)
    assert "hunter2" not in str(raised.value)


def test_no_password_in_an_error_or_what_hangs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    write(".env", "SHARDGATE_OPERATION_DEADLINE=hunter2\nOTHER_PASSWORD=hunter2\n")
    monkeypatch.setenv("SHARDGATE_SHARDS__A__URL", "postgresql://user:hunter2@db/name")
    monkeypatch.setenv("SHARDGATE_SHARDS__B__URL", "postgresql+asyncpg://user:hun/ter@hunter2@db/n")
    monkeypatch.setenv("SHARDGATE_SHARDS__C", POSTGRESQL)
    monkeypatch.setenv("SHARDGATE_SHARDS__D__WEIGHT", "hunter2")
    monkeypatch.setenv("SHARDGATE_SHARDS__D__KEYSPACE", POSTGRESQL)
    monkeypatch.setenv("SHARDGATE_ENGINE_KWARGS__POOL_SIZE", "hunter2")
    monkeypatch.setenv("SHARDGATE_ENGINE_KWARGS__CONNECT_ARGS", '{"password": "hunter2"')
    monkeypatch.setenv("SHARDGATE_TENANTS", '{"acme": "postgresql://:hunter2@db", "b": 1}')
    monkeypatch.setenv("SHARDGATE_DEFAULT_KEYSPACE", "hunter2://")
    monkeypatch.setenv("SHARDGATE_NONSENSE", "hunter2")
    write("bad.toml", 'url = "hunter2\n')
    monkeypatch.setenv("SHARDGATE_CONFIG", "bad.toml")
    with pytest.raises(SettingsError) as raised:
        GatewaySettings()
    error = raised.value
    assert "hunter2" not in str(error)
    assert error.__context__ is None
    assert error.__cause__ is None
    assert len(error.problems) >= 11
    assert all(len(problem.splitlines()) == 1 for problem in error.problems)


# -- connections


@pytest.mark.parametrize("count", [40, 41])
def test_many_connections_are_warned_of(count: int) -> None:
    shards = {f"s{n}": {"url": f"sqlite+aiosqlite:///{n}.db"} for n in range(count)}
    if count * (3 + 2) <= 200:
        assert len(made(shards=shards).shards) == count
    else:
        with pytest.warns(PoolSizeWarning, match="41 shards may open 205 connections"):
            made(shards=shards)


def test_a_pool_without_limit_is_warned_of() -> None:
    with pytest.warns(PoolSizeWarning, match="inf connections"):
        made(shards={"a": {"url": POSTGRESQL}}, engine_kwargs={"max_overflow": -1})


def test_pools_that_count_nothing_are_not_warned_of() -> None:
    shards = {f"s{n}": {"url": MEMORY} for n in range(300)}
    assert len(made(shards=shards).shards) == 300


# -- the shape that is read is the shape of the models


def test_every_field_of_the_models_can_be_read() -> None:
    def fields(model: type[Any]) -> set[str]:
        return {known.alias or name for name, known in model.model_fields.items()}

    assert set(sources.GATEWAY.fields) == fields(GatewaySettings)
    assert set(sources.SHARD.fields) == fields(ShardSettings)
    assert set(sources.KEYSPACE.fields) == fields(KeyspaceSettings)
