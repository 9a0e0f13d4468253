"""Every mistake is one line that names the variable as it was written, and how to mend it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shardgate.errors import SettingsError
from shardgate.settings import GatewaySettings

POSTGRESQL = "postgresql+asyncpg://user:hunter2@db/name"
MYSQL = "mysql+aiomysql://user:hunter2@db/name"
MEMORY = "sqlite+aiosqlite://"


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("SHARDGATE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def problems(**values: Any) -> list[str]:
    """The problems of arguments alone."""
    with pytest.raises(SettingsError) as raised:
        GatewaySettings.from_dict(values)
    return list(raised.value.problems)


def problems_around(**arguments: Any) -> list[str]:
    """The problems of everything that the test has put around."""
    with pytest.raises(SettingsError) as raised:
        GatewaySettings(**arguments)
    assert str(raised.value) == "\n".join(raised.value.problems)
    return list(raised.value.problems)


def one(**urls: str) -> dict[str, Any]:
    return {name: {"url": url} for name, url in urls.items()}


# -- URLs


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("postgresql://u:hunter2@h/d", "postgresql+asyncpg://"),
        ("postgres://u:hunter2@h/d", "postgresql+asyncpg://"),
        ("PostgreSQL+asyncpg://u:hunter2@h/d", "postgresql+asyncpg://"),
        ("postgresql+psycopg2://u:hunter2@h/d", "postgresql+asyncpg://"),
        ("postgresql+psycopg://u:hunter2@h/d", "postgresql+asyncpg://"),
        ("mysql://u:hunter2@h/d", "mysql+aiomysql://"),
        ("mysql+pymysql://u:hunter2@h/d", "mysql+aiomysql://"),
        ("mysql+asyncmy://u:hunter2@h/d", "mysql+aiomysql://"),
        ("mariadb://u:hunter2@h/d", "mariadb+aiomysql://"),
        ("sqlite:///file.db", "sqlite+aiosqlite://"),
        ("sqlite+pysqlite:///file.db", "sqlite+aiosqlite://"),
    ],
)
def test_a_driver_that_is_not_supported(url: str, scheme: str) -> None:
    assert problems(shards=one(eu_1=url)) == [
        f"shards.eu_1.url: does not name a supported asynchronous driver; begin it with {scheme}"
    ]


@pytest.mark.parametrize("url", ["oracle://u:hunter2@h/d", "hunter2", '"' + POSTGRESQL + '"', ""])
def test_no_url_of_a_supported_database(url: str) -> None:
    (problem,) = problems(shards=one(a=url))
    assert problem.startswith("shards.a.url: is no URL of a supported database")
    assert "postgresql+asyncpg://, mysql+aiomysql://" in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("postgresql+asyncpg://user:hun@ter2@host/d", "%40 for @"),
        ("postgresql+asyncpg://user:hun@ter2:3@host/d", "%40 for @"),
        ("postgresql+asyncpg://u:hunter2@host:54x2/d", "cannot be read as a URL"),
        ("postgresql+asyncpg://u:hunter2@host", "names no database"),
        ("mysql+aiomysql://u:hunter2@host/", "names no database"),
        (POSTGRESQL + "\n", "ends with a space or a line break"),
        (POSTGRESQL + "?sslmode=require", "write ?ssl="),
    ],
)
def test_a_url_that_cannot_work(url: str, text: str) -> None:
    (problem,) = problems(shards=one(a=url))
    assert problem.startswith("shards.a.url: ")
    assert text in problem
    assert "hunter2" not in problem


def test_a_shard_without_url_is_named_in_the_form_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = "is missing; it must be the text of a database URL"
    assert problems(shards={"a": {}}) == [f"shards.a.url: {wanted}"]
    monkeypatch.setenv("SHARDGATE_SHARDS__EU_1__WEIGHT", "2")
    assert problems_around() == [f"SHARDGATE_SHARDS__EU_1__URL: {wanted}"]


def test_no_shards_at_all() -> None:
    assert problems() == ["shards.NAME.url: there is no shard; give at least one its URL"]
    assert problems_around() == [
        "SHARDGATE_SHARDS__NAME__URL: there is no shard; give at least one its URL"
    ]


SAME = [
    (POSTGRESQL, "postgresql+asyncpg://other:pass@DB:5432/name"),
    (POSTGRESQL, "postgresql+asyncpg://user@/name?host=db"),
    (POSTGRESQL, "postgresql+asyncpg://user@/name?host=db:5432"),
    (POSTGRESQL, "postgresql+asyncpg://user@db./name"),
    (MYSQL, "mariadb+aiomysql://user@db:3306/name"),
    ("mysql+aiomysql://localhost/d", "mysql+aiomysql://127.0.0.1/d"),
    ("sqlite+aiosqlite:///a.db", "sqlite+aiosqlite:///./x/../a.db"),
    ("sqlite+aiosqlite:///a.db", "sqlite+aiosqlite:///file:a.db?uri=true"),
    (
        "sqlite+aiosqlite:///file:m?mode=memory&cache=shared&uri=true",
        "sqlite+aiosqlite:///file:m?mode=memory&cache=shared&uri=true",
    ),
    (
        "postgresql+asyncpg://u@/d?host=h1:5432&host=h2:5432",
        "postgresql+asyncpg://u@/d?host=h2:5432&host=h1:5432",
    ),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_two_shards_on_one_database(first: str, second: str) -> None:
    found = problems(shards=one(a=first, b=second))
    assert found == [
        "shards.b.url: is the same database as shards.a.url; each shard needs a database, or on "
        "PostgreSQL a schema, of its own"
    ]


def test_a_relative_and_an_absolute_path_are_one_database(tmp_path: Path) -> None:
    urls = one(a="sqlite+aiosqlite:///a.db", b=f"sqlite+aiosqlite:///{tmp_path}/a.db")
    (problem,) = problems(shards=urls)
    assert problem.startswith("shards.b.url: is the same database")


def test_the_schema_counts_and_public_is_the_default() -> None:
    shards = {"a": {"url": POSTGRESQL}, "b": {"url": POSTGRESQL, "schema": "public"}}
    (problem,) = problems(shards=shards)
    assert problem.startswith("shards.b.url: is the same database")
    shards["b"]["schema"] = "agents"
    assert len(GatewaySettings.from_dict({"shards": shards}).shards) == 2


DIFFERENT = [
    (POSTGRESQL, "postgresql+asyncpg://user@db:5433/name"),
    (POSTGRESQL, "postgresql+asyncpg://user@db2/name"),
    (POSTGRESQL, "postgresql+asyncpg://user@db/Name"),
    (POSTGRESQL, MYSQL),
    (MEMORY, MEMORY),
    (f"{MEMORY}/:memory:", f"{MEMORY}/:memory:"),
    ("sqlite+aiosqlite:///a.db", "sqlite+aiosqlite:///b.db"),
    ("postgresql+asyncpg:///d?host=/run/one", "postgresql+asyncpg:///d?host=/run/two"),
    ("mysql+aiomysql:///d?unix_socket=/a", "mysql+aiomysql:///d?unix_socket=/b"),
]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_two_shards_on_two_databases(first: str, second: str) -> None:
    settings = GatewaySettings.from_dict({"shards": one(a=first, b=second)})
    assert list(settings.shards) == ["a", "b"]


@pytest.mark.parametrize("url", [MYSQL, MEMORY])
def test_only_postgresql_has_schemas(url: str) -> None:
    (problem,) = problems(shards={"a": {"url": url, "schema": "agents"}})
    assert problem.startswith("shards.a.schema: only PostgreSQL has schemas")


# -- numbers and names


@pytest.mark.parametrize("slots", [0, -8, 3, 4095, 131072, "many", 4.5, True])
def test_a_slot_count_that_is_no_power_of_two(slots: object) -> None:
    assert problems(shards=one(a=MEMORY), keyspaces={"main": {"slots": slots}}) == [
        "keyspaces.main.slots: must be a power of two from 1 to 65536, such as 4096"
    ]


@pytest.mark.parametrize("spread", [0, 65, "all", True])
def test_a_spread_that_does_not_fit(spread: object) -> None:
    keyspaces = {"main": {"slots": 64, "spread": spread}}
    (problem,) = problems(shards=one(a=MEMORY), keyspaces=keyspaces)
    assert problem.startswith("keyspaces.main.spread: must be a whole number from 1")


@pytest.mark.parametrize("number", [0, -1, "heavy", float("inf"), float("nan"), True])
def test_numbers_above_zero(number: object) -> None:
    found = problems(shards=one(a=MEMORY), operation_deadline=number, operation_memory=number)
    assert found == [
        "operation_deadline: must be a number of seconds above 0, such as 10",
        "operation_memory: must be a number of seconds above 0, such as 86400",
    ]


@pytest.mark.parametrize("weight", [-1, "heavy", float("inf"), float("nan"), True])
def test_a_weight_is_0_or_more(weight: object) -> None:
    shards = {"a": {"url": MEMORY, "weight": weight}}
    wanted = "shards.a.weight: must be a number of 0 or more, such as 1.0"
    assert problems(shards=shards) == [wanted]


def test_a_keyspace_needs_a_shard_with_a_weight() -> None:
    shards = {
        "a": {"url": MEMORY},
        "b": {"url": MEMORY, "weight": 0},
        "c": {"url": MEMORY, "weight": 0, "keyspace": "eu"},
    }
    assert problems(shards=shards) == [
        "shards.c.weight: is 0, and so is that of all other shards of keyspace eu: one of them "
        "must be above 0"
    ]


@pytest.mark.parametrize("prefix", ["", "Agents_", "9_", "a-b", "x" * 31, "sqlite_a", "a\n"])
def test_table_prefix(prefix: str) -> None:
    (problem,) = problems(shards=one(a=MEMORY), table_prefix=prefix)
    assert problem.startswith("table_prefix: must begin with a letter")


@pytest.mark.parametrize("name", ["eu-1", "é", "", "a__b", "_a", "a_", "x" * 64, "a\nb"])
def test_names_of_shards(name: str) -> None:
    found = problems(shards={name: {"url": MEMORY}})
    assert "is no valid name; names are made of a-z, 0-9" in found[0]
    assert all(len(problem.splitlines()) == 1 for problem in found)


def test_create_tables_must_be_a_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_CREATE_TABLES", "maybe")
    found = problems_around(shards=one(a=MEMORY))
    assert found == ["SHARDGATE_CREATE_TABLES: must be true or false"]


# -- keyspaces and tenants


def test_a_keyspace_without_shards() -> None:
    found = problems(shards=one(a=MEMORY), keyspaces={"eu": {}})
    assert found == [
        "keyspaces.eu: no shard is in this keyspace; the keyspaces of the shards: main"
    ]


def test_an_empty_keyspace_in_toml_is_seen_too() -> None:
    Path("c.toml").write_text(f'[shards.a]\nurl = "{MEMORY}"\n[keyspaces.eu]\n')
    (problem,) = problems_around(_config_file="c.toml")
    assert problem.startswith("keyspaces.eu (c.toml): no shard is in this keyspace")


def test_a_default_keyspace_without_shards() -> None:
    found = problems(shards=one(a=MEMORY), default_keyspace="eu")
    assert found == [
        'default_keyspace: no shard is in the keyspace "eu"; the keyspaces of the shards: main'
    ]


def test_a_tenant_in_an_unknown_keyspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_TENANTS", '{"Acme": "eu", "b": "main", "c": 5}')
    found = problems_around(shards=one(a=MEMORY))
    assert found[0] == (
        'SHARDGATE_TENANTS (Acme): no shard is in the keyspace "eu"; '
        "the keyspaces of the shards: main"
    )
    assert found[1].startswith("SHARDGATE_TENANTS (c): must be the name of a keyspace")


@pytest.mark.parametrize("tenant", ["", "a b", "a/b", "é", "a\n", "x" * 65, "a\x7f"])
def test_tenant_ids(tenant: str) -> None:
    (problem,) = problems(shards=one(a=MEMORY), tenants={tenant: "main"})
    assert "is no tenant id" in problem
    assert len(problem.splitlines()) == 1


def test_tenants_are_never_nested_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_TENANTS__ACME", "main")
    found = problems_around(shards=one(a=MEMORY))
    assert found == [
        "SHARDGATE_TENANTS__ACME: tenant ids are case-sensitive and cannot be part of a name; "
        "write one JSON object in SHARDGATE_TENANTS"
    ]


@pytest.mark.parametrize("text", ["acme=main", "[]", '{"a": "main", "a": "eu"}', "", "'{}'"])
def test_tenants_must_be_one_json_object(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_TENANTS", text)
    (problem,) = problems_around(shards=one(a=MEMORY))
    assert problem.startswith("SHARDGATE_TENANTS: must be one JSON object, without repeated keys")


# -- misspellings


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("SHARDGATE_TABEL_PREFIX", "did you mean SHARDGATE_TABLE_PREFIX?"),
        ("SHARDGATE_SHARD__EU__URL", "did you mean SHARDGATE_SHARDS__EU__URL?"),
        ("SHARDGATE_SHARDS__EU__URI", "did you mean SHARDGATE_SHARDS__EU__URL?"),
        ("SHARDGATE_SHARDS_EU_URL", "two underscores: SHARDGATE_SHARDS__…"),
        ("SHARDGATE_POOL_SIZE", "did you mean SHARDGATE_ENGINE_KWARGS__POOL_SIZE?"),
        ("SHARDGATE_KEYSPACES__MAIN__SLOT", "did you mean SHARDGATE_KEYSPACES__MAIN__SLOTS?"),
        ("SHARDGATE_XYZZY", "known here: shards, keyspaces"),
        ("SHARDGATE_", "known here: shards, keyspaces"),
        ("shardgate_tabel_prefix", "did you mean SHARDGATE_TABLE_PREFIX?"),
    ],
)
@pytest.mark.parametrize("source", ["environment", ".env", "secret file"])
def test_a_misspelt_variable(
    name: str, hint: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = one(a=MEMORY, eu="sqlite+aiosqlite:///eu.db")
    if source == "environment":
        monkeypatch.setenv(name, "hunter2")
        found, where = problems_around(shards=shards), ""
    elif source == ".env":
        Path(".env").write_text(f"{name}=hunter2\n")
        found, where = problems_around(shards=shards), " (.env)"
    else:
        Path("secrets").mkdir()
        Path("secrets", name).write_text("hunter2")
        found, where = problems_around(shards=shards, _secrets_dir="secrets"), " (secret file)"
    assert len(found) == 1
    assert found[0].startswith(f"{name}{where}: there is no such setting; ")
    assert hint in found[0]
    assert "hunter2" not in found[0]


def test_a_misspelt_name_in_json_and_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_SHARDS", '{"eu_1": {"url": "sqlite+aiosqlite://", "wieght": 2}}')
    assert problems_around() == [
        "SHARDGATE_SHARDS (eu_1.wieght): there is no such setting; "
        "did you mean SHARDGATE_SHARDS (eu_1.weight)?"
    ]
    assert problems(shards=one(a=MEMORY), shard={}) == [
        "shard: there is no such setting; did you mean shards?"
    ]


def test_a_misspelt_folder_of_secrets() -> None:
    Path("secrets/shard/a").mkdir(parents=True)
    Path("secrets/shard/a/url").write_text(MEMORY)
    (problem,) = problems_around(_secrets_dir="secrets", shards=one(a=MEMORY))
    assert problem.startswith("shard/a/url (secret file): there is no such setting; did you mean")


def test_a_setting_given_twice_in_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_SHARDS__A__URL", MEMORY)
    monkeypatch.setenv("SHARDGATE_SHARDS__a__URL", MEMORY)
    (problem,) = problems_around()
    assert "is given twice (see SHARDGATE_SHARDS__" in problem


def test_a_shard_given_twice_by_case() -> None:
    found = problems(shards=one(EU_1=MEMORY, eu_1=MEMORY))
    assert found == ["shards.eu_1.url: is given twice (see shards.eu_1.url); remove one of them"]


def test_a_url_in_the_place_of_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_SHARDS__EU_1", POSTGRESQL)
    (problem,) = problems_around()
    assert problem.startswith("SHARDGATE_SHARDS__EU_1: must be one JSON object")
    assert problem.endswith("for the shard's URL alone use SHARDGATE_SHARDS__EU_1__URL")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"shards": "x"}, "shards: must be a table"),
        ({"shards": {"a": POSTGRESQL}}, "shards.a: must be a table"),
        ({"shards": {1: {}}}, "shards: has a key that is no text"),
        ({"shards": one(a=MEMORY), "engine_kwargs": 5}, "engine_kwargs: must be a table"),
    ],
)
def test_a_value_in_the_place_of_a_table(values: dict[str, Any], problem: str) -> None:
    assert problems(**values) == [problem]


# -- files


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"_config_file": "no.toml"}, 'SHARDGATE_CONFIG: the file "no.toml" does not exist'),
        ({"_secrets_dir": "none"}, 'SHARDGATE_SECRETS_DIR: there is no directory "none"'),
        ({"_env_file": "no.env"}, '"no.env": this file with variables does not exist'),
    ],
)
def test_a_named_file_that_is_missing(arguments: dict[str, Any], problem: str) -> None:
    assert problems_around(**arguments, shards=one(a=MEMORY)) == [problem]


def test_the_file_of_a_variable_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGATE_CONFIG", "no.toml")
    monkeypatch.setenv("SHARDGATE_SECRETS_DIR", "none")
    assert problems_around() == [
        'SHARDGATE_SECRETS_DIR: there is no directory "none"',
        'SHARDGATE_CONFIG: the file "no.toml" does not exist',
    ]


def test_a_directory_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError

    Path("secrets").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert problems_around(_secrets_dir="secrets", shards=one(a=MEMORY)) == [
        'SHARDGATE_SECRETS_DIR: the directory "secrets" cannot be read'
    ]


def test_broken_toml_tells_the_line_and_does_not_quote_it() -> None:
    Path("c.toml").write_text('[shards.a]\nurl = "hunter2\n')
    (problem,) = problems_around(_config_file="c.toml")
    assert problem == (
        'SHARDGATE_CONFIG: the file "c.toml" is not valid TOML (at line 2, column 15)'
    )


@pytest.mark.parametrize("kind", ["toml", "env", "secret"])
def test_a_file_that_is_no_text(kind: str) -> None:
    Path("secrets/shards/a").mkdir(parents=True)
    path = {"toml": "c.toml", "env": "c.env", "secret": "secrets/shards/a/url"}[kind]
    Path(path).write_bytes(b"hunter2\xff")
    argument = {"toml": "_config_file", "env": "_env_file", "secret": "_secrets_dir"}[kind]
    given = "secrets" if kind == "secret" else path
    (problem,) = problems_around(**{argument: given})
    assert "cannot be read as UTF-8 text" in problem


def test_a_name_without_value_in_dotenv() -> None:
    Path(".env").write_text("SHARDGATE_TABLE_PREFIX\n")
    found = problems_around(shards=one(a=MEMORY))
    assert found == ["SHARDGATE_TABLE_PREFIX (.env): has no value"]


def test_the_line_names_the_source_that_won(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.toml").write_text(
        f'operation_deadline = 1\n[shards.a]\nurl = "{MEMORY}"\nweight = -1\n'
    )
    Path(".env").write_text("SHARDGATE_OPERATION_DEADLINE=soon\n")
    monkeypatch.setenv("SHARDGATE_CONFIG", "c.toml")
    assert problems_around() == [
        "shards.a.weight (c.toml): must be a number of 0 or more, such as 1.0",
        "SHARDGATE_OPERATION_DEADLINE (.env): must be a number of seconds above 0, such as 10",
    ]


def test_several_mistakes_come_at_once() -> None:
    found = problems(
        shards={
            "a": {"url": "postgresql://h/d", "weight": -1},
            "b": {"url": MEMORY, "schema": "x"},
        },
        keyspaces={"eu": {"slots": 3}},
        tenants={"acme": "uk"},
        engine_kwargs={"pool_sise": 3},
        table_prefix="A",
    )
    named = [problem.partition(":")[0] for problem in found]
    assert named == [
        "engine_kwargs.pool_sise",
        "shards.a.url",
        "shards.a.weight",
        "shards.b.schema",
        "keyspaces.eu.slots",
        "keyspaces.eu",
        "tenants.acme",
        "table_prefix",
    ]
