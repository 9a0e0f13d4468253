"""The fixtures, as a test suite meets them: a small suite run by a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
SUITE = """
import asyncio
import pytest

TASKS = []

async def test_leaves_a_task():
    TASKS.append(asyncio.create_task(asyncio.sleep(3600)))

@pytest.mark.backends("sqlite")
async def test_leaves_a_connection(make_engine):
    TASKS.append(await make_engine().connect())

@pytest.mark.backends("sqlite")
async def test_watched_engine_leaves_a_connection(make_engine, database):
    from sqlalchemy.ext.asyncio import create_async_engine
    engine = create_async_engine(database.url)
    TASKS.append(await make_engine.watch(engine).connect())

@pytest.mark.backends("sqlite", "mysql")
def test_first(backend):
    assert backend.id == "sqlite"

@pytest.mark.backends("sqlite", "mysql")
def test_second(backend):
    assert backend.id == "sqlite"

@pytest.mark.soak
def test_long():
    pass
"""


def run_suite(folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    suite = folder / "test_suite.py"
    suite.write_text(SUITE)
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-c", str(TESTS.parent / "pyproject.toml")]
    options = [*("-p", "conftest"), *("-W", "ignore"), "-v", *arguments, str(suite)]
    nowhere = {"TEST_MYSQL_URLS": "mysql+aiomysql://someone:hush@127.0.0.1:1/x"}
    done = subprocess.run(
        [*command, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "300"} | nowhere | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> str:
    status, output = run_suite(tmp_path_factory.mktemp("suite"))
    assert status == 1, output
    return output


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("test_leaves_a_task", "left running at the end of the test"),
        ("test_leaves_a_connection[sqlite]", "1 connection(s) still checked out"),
        ("test_watched_engine_leaves_a_connection[sqlite]", "1 connection(s) still checked out"),
    ],
)
def test_a_leak_fails_its_test(ran: str, test: str, reason: str) -> None:
    errors = [line for line in ran.splitlines() if line.startswith("ERROR ") and test in line]
    assert errors, ran
    assert reason in errors[-1]


def test_a_missing_backend_is_skipped_once_and_named(ran: str) -> None:
    assert ran.count("[mysql] SKIPPED") == 1
    assert "database mysql: SKIPPED, TEST_MYSQL_URLS: URL 1 gives" in ran
    assert "to have it: start Docker or set TEST_MYSQL_URLS" in ran
    assert "hush" not in ran


def test_the_real_ones_are_named_with_version_and_use(ran: str) -> None:
    assert "database sqlite: real, " in ran
    assert "Python's own; 4 tests ran on it" in ran


def test_soak_runs_only_when_named(ran: str, tmp_path: Path) -> None:
    assert "test_long" not in ran
    status, output = run_suite(tmp_path, "-m", "soak")
    assert status == 0
    assert "test_long PASSED" in output


def test_a_required_backend_that_is_missing_fails_the_run(tmp_path: Path) -> None:
    status, output = run_suite(tmp_path, TEST_REQUIRE_BACKENDS="sqlite,mysql-8.4")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "TEST_REQUIRE_BACKENDS: not here: mysql-8.4" in output
