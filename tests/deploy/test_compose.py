"""compose.yaml: valid, whole, and an environment from which the settings load."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from deploy.files import DEPLOY, ROOT, SECRETS_DIR, Document, compose, strings
from shardgate.settings import GatewaySettings

if TYPE_CHECKING:
    from pathlib import Path

SERVICES: Document = compose()["services"]
RUN_THE_APPLICATION = ("app", "create-tables")


def render_secrets(service: str, directory: Path) -> dict[str, str]:
    """Write a service's secrets as compose mounts them; returns the values by secret."""
    directory.mkdir()
    values = {}
    for number, mounted in enumerate(SERVICES[service]["secrets"]):
        # Digits alone: the settings must not make numbers of them.
        values[mounted["source"]] = f"12345{number}"
        (directory / mounted["target"]).write_text(f"12345{number}\n")
    return values


@pytest.fixture(params=RUN_THE_APPLICATION)
def loaded(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[GatewaySettings, dict[str, str]]:
    """The settings that a container of the image sees, and its secrets."""
    environment = SERVICES[request.param]["environment"]
    assert environment[SECRETS_DIR] == "/run/secrets"
    secrets = render_secrets(request.param, tmp_path / "secrets")
    for name, value in (environment | {SECRETS_DIR: str(tmp_path / "secrets")}).items():
        monkeypatch.setenv(name, value)
    return GatewaySettings(), secrets


def test_follows_the_compose_specification() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def has_compose(docker: str) -> bool:
    asked = subprocess.run([docker, "compose", "version"], capture_output=True, check=False)
    return asked.returncode == 0


def test_docker_itself_reads_it() -> None:
    docker = shutil.which("docker")
    if docker is None or not has_compose(docker):
        pytest.skip("docker compose is not installed")
    done = subprocess.run(
        [docker, "compose", "--file", str(DEPLOY / "compose.yaml"), "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_has_two_postgresql_one_mysql_and_one_application() -> None:
    images = [SERVICES[name]["image"] for name in sorted(SERVICES)]
    assert [image.partition(":")[0] for image in images] == [
        "shardgate-app",
        "shardgate-app",
        "mysql",
        "postgres",
        "postgres",
    ]
    assert SERVICES["create-tables"]["restart"] == "no"


def test_the_settings_load(loaded: tuple[GatewaySettings, dict[str, str]]) -> None:
    settings, _ = loaded
    assert set(settings.shards_of("main")) == {"pg_1", "pg_2"}
    assert set(settings.shards_of("eu")) == {"mysql_1"}
    assert settings.keyspace_of("acme-eu") == "eu"
    assert settings.keyspace_of("anybody") == "main"
    assert settings.create_tables is False


def test_a_shard_is_the_database_that_its_url_names(
    loaded: tuple[GatewaySettings, dict[str, str]],
) -> None:
    settings, secrets = loaded
    for name, shard in settings.shards.items():
        url = shard.parsed_url
        given = SERVICES[str(url.host)]["environment"]
        maker = "POSTGRES" if url.drivername.startswith("postgresql") else "MYSQL"
        assert url.username == given[f"{maker}_USER"]
        assert url.database == given.get(f"{maker}_DB", given.get(f"{maker}_DATABASE"))
        password = settings.engine_options(name)["connect_args"]["password"]
        assert password == secrets[given[f"{maker}_PASSWORD_FILE"].removeprefix("/run/secrets/")]


def test_the_application_and_its_databases_share_a_network() -> None:
    for name in RUN_THE_APPLICATION:
        for database in ("pg-1", "pg-2", "mysql-1"):
            assert set(SERVICES[name]["networks"]) & set(SERVICES[database]["networks"])


def test_everything_named_is_declared_and_everything_declared_is_used() -> None:
    whole = compose()
    secrets = {
        mounted if isinstance(mounted, str) else mounted["source"]
        for service in SERVICES.values()
        for mounted in service["secrets"]
    }
    assert secrets == set(whole["secrets"])
    networks = {name for service in SERVICES.values() for name in service["networks"]}
    assert networks == set(whole["networks"])
    volumes = [v.partition(":")[0] for s in SERVICES.values() for v in s.get("volumes", ())]
    assert sorted(volumes) == sorted(whole["volumes"])


def test_a_database_reads_its_password_from_a_secret_that_it_has() -> None:
    for name in ("pg-1", "pg-2", "mysql-1"):
        service = SERVICES[name]
        files = [v for key, v in service["environment"].items() if key.endswith("_PASSWORD_FILE")]
        assert sorted(files) == sorted(f"/run/secrets/{secret}" for secret in service["secrets"])
        assert not [key for key in service["environment"] if key.endswith("_PASSWORD")]


def test_tables_wait_for_healthy_databases_and_the_application_for_tables() -> None:
    awaited = SERVICES["create-tables"]["depends_on"]
    assert set(awaited) == {"pg-1", "pg-2", "mysql-1"}
    for name, condition in awaited.items():
        assert condition == {"condition": "service_healthy"}
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES["app"]["depends_on"] == {
        "create-tables": {"condition": "service_completed_successfully"}
    }


def test_only_the_application_is_reached_from_outside_and_from_this_machine_alone() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["app"]
    assert SERVICES["app"]["ports"] == ["127.0.0.1:8000:8000"]
    assert compose()["networks"]["databases"]["internal"] is True


def test_no_password_is_written_in_the_file() -> None:
    for at, text in strings(compose()):
        assert "://shardgate:" not in text, at
    whole = compose()
    assert all(set(secret) == {"file"} for secret in whole["secrets"].values())


def test_the_application_cannot_write_or_gain_rights() -> None:
    for name in RUN_THE_APPLICATION:
        assert SERVICES[name]["read_only"] is True
        assert SERVICES[name]["cap_drop"] == ["ALL"]
        assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]


def test_the_image_is_built_from_the_checkout() -> None:
    build = SERVICES["app"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()


def test_every_variable_of_the_env_example_is_used() -> None:
    lines = (DEPLOY / ".env.example").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
    text = (DEPLOY / "compose.yaml").read_text()
    assert names == [name for name in names if f"${{{name}:-" in text]
    assert text.count("${") == len(names)


def test_make_secrets_makes_each_password_once(tmp_path: Path) -> None:
    script = shutil.copy(DEPLOY / "make-secrets", tmp_path)
    subprocess.run([script], check=True, capture_output=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert {f"secrets/{name}" for name in made} == {
        secret["file"] for secret in compose()["secrets"].values()
    }
    assert len(set(made.values())) == len(made)
    assert all(len(bytes.fromhex(password)) == 24 for password in made.values())

    subprocess.run([script], check=True, capture_output=True)
    assert made == {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}


def test_make_secrets_lets_containers_read_and_other_users_not_enter(tmp_path: Path) -> None:
    script = shutil.copy(DEPLOY / "make-secrets", tmp_path)
    subprocess.run([script], check=True, capture_output=True)
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    for path in (tmp_path / "secrets").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_passwords_cannot_be_committed() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    files = [f"deploy/{secret['file']}" for secret in compose()["secrets"].values()]
    names = [*files, "deploy/.env"]
    # Without the variables that git sets for a hook, which would name another repository.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        [git, "check-ignore", *names],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == names
