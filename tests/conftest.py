"""Real databases for every test.

The backends found on this machine are listed in the header and the summary, with the reason and
the remedy for each that is missing; docs/development.md tells where they are looked for. Servers
start when the first test needs them and are shared by the whole run; every test has databases of
its own.

Fixtures
    backend          a `harness.servers.Backend`; runs the test once for each backend found
    database         a fresh `Database`: `.url`, `.backend`, `.server`
    databases        `await databases(4)`: fresh databases on the shared server;
                     `await databases(4, servers=2)`: spread over two servers
    make_engine      `make_engine(url=None, **engine_kwargs)`: an AsyncEngine; at teardown all are
                     disposed and no connection may be out. `make_engine.watch(engine)` includes
                     an engine that something else made
    start_server     `await start_server(backend, durable=False)`: a server of its own, for tests
                     that stop or kill it; ended at teardown
    children         `harness.processes.Children`: `await children.run("module:function", [...])`
    long_outages     what is killed or cut may take as long to come back as a busy machine needs
    no_task_left     used by every test by itself: no asyncio task outlives its test

Markers
    backends("postgresql", "sqlite")   only these families or ids
    soak                               long; deselected unless -m names it (`make soak`)
    processes                          starts child processes

Environment
    TEST_POSTGRESQL_URLS, TEST_MARIADB_URLS, TEST_MYSQL_URLS   use these servers
    TEST_REQUIRE_BACKENDS=postgresql-15,mariadb,sqlite         a missing one fails the run
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest
import pytest_asyncio

from harness.backends import Found, find_backends
from harness.engines import EngineMaker, settle
from harness.fleet import Fleet
from harness.processes import Children
from harness.servers import Backend, Database, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

FOUND = pytest.StashKey[Found]()
FLEET = pytest.StashKey[Fleet]()
USED = pytest.StashKey[dict[str, int]]()


class StartServer(Protocol):
    async def __call__(self, backend: Backend, *, durable: bool = False) -> Server: ...


class MakeDatabases(Protocol):
    async def __call__(self, count: int, *, servers: int = 1) -> list[Database]: ...


ONE_VERSION = ("agents", "contract", "gateway", "isolation", "moves")
"""Folders whose tests are about what is above the statements: one version of a database will do.
What the statements do is tested in each version by the others."""


def pytest_configure(config: pytest.Config) -> None:
    found = find_backends()
    if found.unmet:
        lines = "\n".join(_lines(found))
        names = ", ".join(found.unmet)
        raise pytest.UsageError(f"TEST_REQUIRE_BACKENDS: not here: {names}\n{lines}")
    config.stash[FOUND] = found
    config.stash[FLEET] = Fleet()
    config.stash[USED] = {}
    config.add_cleanup(config.stash[FLEET].close)


def _lines(found: Found) -> Iterable[str]:
    for backend in found.backends:
        yield f"database {backend.id}: real, {backend.version}, {backend.how}"
    for missing in found.missing:
        yield f"database {missing.family}: SKIPPED, {missing.text}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Have one of several test processes (pytest-xdist) tell what its tests ran on."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["used"] = session.config.stash[USED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    used = node.config.stash[USED]
    for name, count in getattr(node, "workeroutput", {}).get("used", {}).items():
        used[name] = used.get(name, 0) + count


def pytest_report_header(config: pytest.Config) -> list[str]:
    return list(_lines(config.stash[FOUND]))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.section("databases")
    used = config.stash[USED]
    for backend in config.stash[FOUND].backends:
        line = f"{backend.id}: real, {backend.version}, {backend.how}"
        terminalreporter.line(f"{line}; {used.get(backend.id, 0)} tests ran on it")
    for missing in config.stash[FOUND].missing:
        terminalreporter.line(f"{missing.family}: SKIPPED, {missing.text}", yellow=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    backend = _backend_of(item)
    if isinstance(backend, Backend):
        used = item.config.stash[USED]
        used[backend.id] = used.get(backend.id, 0) + 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that needs a backend on each one, with a skip for each that is missing."""
    if "backend" not in metafunc.fixturenames:
        return
    found = metafunc.config.stash[FOUND]
    marker = metafunc.definition.get_closest_marker("backends")
    wanted = set(marker.args) if marker else None
    backends = found.backends
    if metafunc.definition.path.parent.name in ONE_VERSION:
        backends = tuple(_newest(backends))
    params = [
        pytest.param(backend, id=backend.id)
        for backend in backends
        if wanted is None or wanted & {backend.id, backend.family}
    ]
    params += [
        pytest.param(missing.family, id=missing.family, marks=pytest.mark.skip(missing.text))
        for missing in found.missing
        if wanted is None or any(name.partition("-")[0] == missing.family for name in wanted)
    ]
    metafunc.parametrize("backend", params, indirect=True)


def _newest(backends: Iterable[Backend]) -> list[Backend]:
    """Of each family the backend with the highest version."""
    best: dict[str, Backend] = {}
    for backend in backends:
        best[backend.family] = max(best.get(backend.family, backend), backend, key=_version)
    return list(best.values())


def _version(backend: Backend) -> list[int]:
    return [int(part) for part in backend.version.split(".") if part.isdigit()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one skipped item per module and missing backend; leave soak tests to those who ask."""
    told: set[tuple[object, str]] = set()
    items[:] = [item for item in items if not _said_before(item, told)]
    if "soak" in str(config.option.markexpr):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]


def _said_before(item: pytest.Item, told: set[tuple[object, str]]) -> bool:
    backend = _backend_of(item)
    if not isinstance(backend, str):
        return False
    key = (item.path, backend)
    if key in told:
        return True
    told.add(key)
    return False


def _backend_of(item: pytest.Item) -> object:
    """Return the backend of a parametrised test, the name of a missing one, or None."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("backend") if callspec is not None else None


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    assert isinstance(request.param, Backend)
    return request.param


@pytest_asyncio.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    yield
    left = await settle()
    assert not left, f"left running at the end of the test: {left}"


@pytest_asyncio.fixture
async def databases(backend: Backend, pytestconfig: pytest.Config) -> AsyncIterator[MakeDatabases]:
    fleet = pytestconfig.stash[FLEET]
    made: list[Database] = []

    async def make(count: int, *, servers: int = 1) -> list[Database]:
        running = [await fleet.shared(backend, index) for index in range(servers)]
        chosen = [running[index % servers] for index in range(count)]
        fresh = [Database(url=await one.create_database(), server=one) for one in chosen]
        made.extend(fresh)
        return fresh

    yield make
    for database in made:
        await database.server.start()  # a test may have stopped it
        await database.server.drop_database(database.url)


@pytest_asyncio.fixture
async def database(databases: MakeDatabases) -> Database:
    return (await databases(1))[0]


@pytest_asyncio.fixture
async def make_engine(database: Database) -> AsyncIterator[EngineMaker]:
    maker = EngineMaker(database.url)
    yield maker
    await maker.finish()


@pytest_asyncio.fixture
async def start_server(pytestconfig: pytest.Config) -> AsyncIterator[StartServer]:
    started: list[Server] = []

    async def start(backend: Backend, *, durable: bool = False) -> Server:
        server = await pytestconfig.stash[FLEET].start(backend, durable=durable)
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


@pytest.fixture
def long_outages(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it takes until a server answers again is a question of the machine."""
    monkeypatch.setattr("shardgate.shards.Database.outage", 18.0)


@pytest_asyncio.fixture
async def children() -> AsyncIterator[Children]:
    async with Children() as some:
        yield some
