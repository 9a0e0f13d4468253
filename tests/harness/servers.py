"""One running database server, as tests see it, whatever runs it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from harness.engines import DriverConnections
from harness.programs import HOST, Program, ServerError, free_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.programs import RunFolder

Family = Literal["sqlite", "postgresql", "mariadb", "mysql"]

DRIVERS: dict[Family, str] = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "mariadb": "mysql+aiomysql",
    "mysql": "mysql+aiomysql",
}
# latin1 on purpose: a table that does not state its own character set loses text, and is found out.
CREATE: dict[Family, str] = {
    "postgresql": 'CREATE DATABASE "{name}"',
    "mariadb": "CREATE DATABASE `{name}` CHARACTER SET latin1",
    "mysql": "CREATE DATABASE `{name}` CHARACTER SET latin1",
}
DROP: dict[Family, tuple[str, ...]] = {
    "postgresql": ('DROP DATABASE IF EXISTS "{name}" WITH (FORCE)',),
    # A leaked transaction would block the drop for a day by default.
    "mariadb": ("SET SESSION lock_wait_timeout = 10", "DROP DATABASE IF EXISTS `{name}`"),
    "mysql": ("SET SESSION lock_wait_timeout = 10", "DROP DATABASE IF EXISTS `{name}`"),
}
ADMIN_DATABASE: dict[Family, str] = {
    "postgresql": "postgres",
    "mariadb": "mysql",
    "mysql": "mysql",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A database that can be had: its ``id`` names it in test ids, ``how`` says where it is from.

    ``servers`` is how many servers can run at once (None: any number); ``endable`` whether tests
    may stop and kill them.
    """

    id: str
    family: Family
    version: str
    how: str
    make: Callable[[Backend, RunFolder, bool], Server] = field(repr=False, compare=False)
    servers: int | None = None
    endable: bool = True

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """A fresh, empty database for one test."""

    url: str = field(repr=False)
    server: Server

    @property
    def backend(self) -> Backend:
        return self.server.backend


class Server(ABC):
    """A database server; the base knows SQL, the subclasses how to run one."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.backend.id}>"

    @property
    def version(self) -> str:
        return self.backend.version

    @property
    @abstractmethod
    def running(self) -> bool: ...

    @property
    @abstractmethod
    def pid(self) -> int: ...

    @abstractmethod
    def url(self, database: str, *, driver: str | None = None) -> str:
        """Return the SQLAlchemy URL of a database; ``driver`` such as "mariadb+aiomysql"."""

    @abstractmethod
    async def start(self) -> None:
        """Start, again on the same data and port if it ran before; returns when it answers."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop in order, cutting open connections."""

    @abstractmethod
    async def kill(self) -> None:
        """End every process of the server with SIGKILL; what was not committed is lost."""

    @abstractmethod
    def close(self) -> None:
        """End for good, without an event loop."""

    async def create_database(self, name: str | None = None) -> str:
        """Create an empty database and return its URL."""
        name = name or f"test_{secrets.token_hex(6)}"
        await self._execute(CREATE[self.backend.family].format(name=name))
        return self.url(name)

    async def drop_database(self, url: str) -> None:
        name = make_url(url).database
        await self._execute(*(part.format(name=name) for part in DROP[self.backend.family]))

    def _admin_url(self) -> str:
        return self.url(ADMIN_DATABASE[self.backend.family])

    async def _execute(self, *statements: str, url: str | None = None) -> None:
        """Run statements one by one, each committed, in the admin database or that of ``url``."""
        engine = create_async_engine(
            url or self._admin_url(),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
        )
        drivers = DriverConnections(engine)
        try:
            async with engine.connect() as connection:
                for statement in statements:
                    await connection.exec_driver_sql(statement)
        finally:
            drivers.close_lost()


class SQLiteServer(Server):
    """A folder of database files; there is nothing to start or to kill."""

    def __init__(self, backend: Backend, folder: RunFolder, durable: bool) -> None:
        super().__init__(backend)
        self._folder = folder.subfolder("sqlite")

    @property
    def running(self) -> bool:
        return True

    @property
    def pid(self) -> int:
        raise ServerError("SQLite has no server process")

    def url(self, database: str, *, driver: str | None = None) -> str:
        return f"{driver or 'sqlite+aiosqlite'}:///{self._folder / database}.db"

    async def create_database(self, name: str | None = None) -> str:
        return self.url(name or f"test_{secrets.token_hex(6)}")

    async def drop_database(self, url: str) -> None:
        path = make_url(url).database or ""
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(path + suffix).unlink(missing_ok=True)  # noqa: ASYNC240 - microseconds, and a test

    async def start(self) -> None:
        """Nothing to start."""

    async def stop(self) -> None:
        raise ServerError("SQLite has no server to stop")

    async def kill(self) -> None:
        raise ServerError("SQLite has no server to kill")

    def close(self) -> None:
        """Nothing to end: the files go with the run's folder."""


class GivenServer(Server):
    """A server that somebody else runs, named by a URL in the environment."""

    def __init__(self, backend: Backend, url: str) -> None:
        super().__init__(backend)
        self._url = make_url(url)

    @property
    def running(self) -> bool:
        return True

    @property
    def pid(self) -> int:
        raise ServerError(f"{self.backend.id} is run by somebody else: its pid is unknown")

    def url(self, database: str, *, driver: str | None = None) -> str:
        return _text(self._url.set(database=database, drivername=driver or self._url.drivername))

    def _admin_url(self) -> str:
        return _text(self._url)

    async def start(self) -> None:
        """It runs already."""

    async def stop(self) -> None:
        raise ServerError(f"{self.backend.id} is run by somebody else: not ours to stop")

    async def kill(self) -> None:
        raise ServerError(f"{self.backend.id} is run by somebody else: not ours to kill")

    def close(self) -> None:
        """Not ours to end."""


class LocalServer(Server):
    """A server program on 127.0.0.1; subclasses prepare the data and write the command line."""

    account: str
    stop_signal: int
    end_signal: int
    user: str = "shardgate"
    seconds_to_start: float = 60

    def __init__(self, backend: Backend, folder: RunFolder, durable: bool) -> None:
        super().__init__(backend)
        self.durable = durable
        self.port = 0
        self._password = secrets.token_hex(8)
        self._run_folder = folder
        self._folder = folder.subfolder(backend.id, self.account)
        self._data = self._folder / "data"
        self._program: Program | None = None

    @abstractmethod
    async def _prepare(self) -> None:
        """Make the data directory inside ``self._folder``."""

    @abstractmethod
    def _command(self) -> list[str | Path]: ...

    @property
    def running(self) -> bool:
        return self._program is not None and self._program.running

    @property
    def pid(self) -> int:
        if self._program is None:
            raise ServerError(f"{self.backend.id} was not started")
        return self._program.pid

    def url(self, database: str, *, driver: str | None = None) -> str:
        return _text(
            URL.create(
                driver or DRIVERS[self.backend.family],
                username=self.user,
                password=self._password,
                host=HOST,
                port=self.port,
                database=database,
            )
        )

    async def start(self) -> None:
        if self.running:
            return
        if self._program is None:
            await self._start_first()
        else:
            await self._launch(self._program)

    async def _start_first(self) -> None:
        await self._prepare()
        for attempts_left in (2, 1, 0):
            self.port = free_port()  # somebody may take it before the server does: try another
            program = Program(
                self._command(),
                account=self.account,
                death_signal=self.end_signal,
                log=self._run_folder.path / f"{self._folder.name}.log",
            )
            try:
                await self._launch(program)
            except ServerError:
                if not attempts_left or program.running:
                    raise
                continue
            self._program = program
            return

    async def _launch(self, program: Program) -> None:
        program.start()
        deadline = time.monotonic() + self.seconds_to_start
        while program.running and time.monotonic() < deadline:
            with contextlib.suppress(DBAPIError, OSError):
                await self._execute("SELECT 1")
                return
            await asyncio.sleep(0.02)
        program.kill()
        raise ServerError(f"{self.backend.id} did not start:\n{program.log_tail()}")

    async def stop(self) -> None:
        if self._program is not None:
            self._program.signal(self.stop_signal)
            await self._program.wait(seconds=30)

    async def kill(self) -> None:
        if self._program is not None:
            self._program.kill()

    def save(self) -> Path:
        """Copy the data of this server, which must not be running; returns where it is."""
        copy = self._folder / f"copy-{secrets.token_hex(4)}"
        self._copy(self._data, copy)
        return copy

    def restore(self, copy: Path) -> None:
        """Put a copy in the place of the data of this server, which must not be running."""
        shutil.rmtree(self._data)
        self._copy(copy, self._data)

    def _copy(self, source: Path, target: Path) -> None:
        if self.running:
            raise ServerError(f"{self.backend.id} is running: its data cannot be copied")
        subprocess.run(["cp", "-a", source, target], check=True)  # with its owner

    def close(self) -> None:
        if self._program is not None:
            self._program.end(self.end_signal, seconds=20)
        shutil.rmtree(self._folder, ignore_errors=True)


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)
