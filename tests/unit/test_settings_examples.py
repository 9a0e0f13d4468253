"""The files in config/ load, say the same, and leave no setting out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from shardgate import _settings_sources as sources
from shardgate._settings_engine import OPTIONS
from shardgate.settings import GatewaySettings

CONFIG = Path(__file__).parents[2] / "config"
TOML, ENV, DEMO = (
    CONFIG / name for name in ("shardgate.example.toml", "shardgate.example.env", "demo.toml")
)


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("SHARDGATE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def from_toml() -> GatewaySettings:
    return GatewaySettings(_config_file=TOML)


def from_env() -> GatewaySettings:
    return GatewaySettings(_env_file=ENV)


def test_both_examples_say_the_same() -> None:
    by_table, by_variable = from_toml(), from_env()
    assert by_table == by_variable
    for name in by_table.shards:
        assert by_table.engine_options(name) == by_variable.engine_options(name)


def test_the_variables_work_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in sources.dotenv_values(ENV).items():
        monkeypatch.setenv(name, value or "")
    assert GatewaySettings() == from_toml()


@pytest.mark.parametrize("path", [TOML, ENV])
def test_no_setting_is_missing(path: Path) -> None:
    source = sources.from_toml(path, "") if path == TOML else None
    if source is None:
        source = sources.from_variables(sources.dotenv_values(path))
    assert not source.problems
    routes = set(source.origins)
    last = {route[-1] for route in routes if route}
    assert set(sources.GATEWAY.fields) <= {route[0] for route in routes if route}
    assert set(sources.SHARD.fields) <= last
    assert set(sources.KEYSPACE.fields) <= last


def test_no_engine_option_is_missing() -> None:
    text = TOML.read_text()
    written = set(re.findall(r"^(?:# )?(\w+) = ", text, re.MULTILINE))
    assert set(OPTIONS) - {"connect_args"} <= written
    assert ".connect_args]" in text


def test_options_in_comments_are_valid() -> None:
    lines = TOML.read_text().splitlines()
    start = lines.index("# Rarely needed:") + 1
    end = lines.index("", start)
    for line in lines[start:end]:
        text = "\n".join([*lines[: start - 1], line.removeprefix("# "), *lines[end:]])
        Path("one.toml").write_text(text)
        if "poolclass" not in line:  # excludes the sizes above it
            assert GatewaySettings(_config_file="one.toml").shards


def test_the_sources_are_named_in_the_variables() -> None:
    assert {sources.CONFIG, sources.SECRETS_DIR} <= set(
        re.findall(r"SHARDGATE_\w+", ENV.read_text())
    )


def test_the_demo() -> None:
    settings = GatewaySettings(_config_file=DEMO)
    assert list(settings.shards) == ["s0", "s1", "s2", "s3"]
    assert settings.create_tables
    for tenant in ("acme", "globex", "initech"):
        assert settings.keyspace_of(tenant) == "main"
    for shard in settings.shards.values():
        assert str(shard.parsed_url.database).startswith(".demo/")
