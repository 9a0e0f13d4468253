"""deploy/README.md: what it tells a person to type exists."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from starlette.routing import Match

from deploy.files import DEPLOY, ROOT, compose, documents

README = (DEPLOY / "README.md").read_text()
IN_COMPOSE = compose()["services"]["create-tables"]["command"]
IN_THE_JOB = documents(DEPLOY / "kubernetes" / "create-tables.yaml")[0]["spec"]["template"]["spec"][
    "containers"
][0]["args"]
COMMANDS = {*re.findall(r"create-tables shardgate ([\w-]+)", README), IN_COMPOSE[1], IN_THE_JOB[1]}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_command_exists(command: str) -> None:
    asked = [sys.executable, "-m", "shardgate", command, "--help"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_compose_and_kubernetes_make_the_tables_in_the_same_way() -> None:
    assert IN_COMPOSE == IN_THE_JOB == ["shardgate", "create-tables"]


def test_the_files_exist() -> None:
    named = re.findall(r"^\| `([^`]+)` \|", README.partition("## With compose")[0], re.MULTILINE)
    assert named
    assert [name for name in named if not (DEPLOY / name).exists()] == []
    assert (DEPLOY / "make-secrets").stat().st_mode & 0o111


def test_the_services_exist() -> None:
    named = set(re.findall(r"docker compose (?:stop|start|run --rm) ([\w-]+)", README))
    assert {"mysql-1", "create-tables"} <= named
    assert named <= set(compose()["services"])


def test_the_addresses_are_routes(main: Any) -> None:
    asked = re.findall(r"curl (--json)?.*?http://127\.0\.0\.1:8000(/\S+)", README)
    assert asked
    for posts, path in asked:
        scope = {"type": "http", "path": path, "method": "POST" if posts else "GET"}
        matches = [route.matches(scope)[0] for route in main.app.routes]
        assert Match.FULL in matches, path


def test_kubectl_waits_for_things_that_are_applied() -> None:
    text = "".join(path.read_text() for path in (DEPLOY / "kubernetes").glob("*.yaml"))
    named = re.findall(r"(job|deployment|service)/([\w-]+)", README)
    assert len(named) == 3
    for kind, name in named:
        assert f"kind: {kind.capitalize()}\nmetadata:\n  name: {name}\n" in text


def test_the_statuses_are_those_of_the_application() -> None:
    source = (DEPLOY / "app" / "main.py").read_text()
    told = set(re.findall(r"^\| (\d{3}) \|", README, re.MULTILINE))
    assert told == set(re.findall(r"\b([45]\d\d)\b", source)) - {"500"}
