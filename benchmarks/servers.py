"""The servers of a run: started on free ports of the loopback, ended with the run."""

from __future__ import annotations

import asyncio
import importlib
import secrets
import shutil
import sqlite3
import subprocess
import time
from typing import TYPE_CHECKING, Any, Self

import asyncpg

from harness import mariadb, postgresql
from harness.programs import HOST, Program, RunFolder, account_for, free_port

if TYPE_CHECKING:
    from pathlib import Path

    from harness.servers import Server

# The tests' server is small and odd on purpose; a benchmark's should be neither. Durability stays
# at PostgreSQL's defaults: fsync, full_page_writes and synchronous_commit are on.
TUNED = {"shared_buffers": "512MB", "max_wal_size": "4GB", "timezone": "UTC"}
_CREATE = """CREATE DATABASE "{name}" TEMPLATE template0 LOCALE_PROVIDER libc LOCALE 'C.UTF-8'"""
_SECONDS_TO_START = 20


class MissingError(Exception):
    """A server or a peer that this machine does not have; the message is for the report."""


class Servers:
    """Starts what is asked for, once, and ends all of it. Use it with ``async with``."""

    def __init__(self) -> None:
        self._folder = RunFolder()
        self._postgresql: list[Server] = []
        self._mariadb: list[Server] = []
        self._redis: dict[bool, RedisServer] = {}
        self._server_of: dict[str, Server] = {}
        self.versions: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        postgresql.SETTINGS.update(TUNED)
        return self

    async def __aexit__(self, *_: object) -> None:
        for database in (*self._postgresql, *self._mariadb):
            database.close()
        for redis in self._redis.values():
            redis.close()
        self._folder.close()

    async def postgresql(self, *, server: int = 0) -> str:
        """The URL of a new database on PostgreSQL server number ``server``: the newest version."""
        while len(self._postgresql) <= server:
            self._postgresql.append(await self._start(postgresql.find()[-1:], "PostgreSQL"))
        name = f"bench_{secrets.token_hex(6)}"
        chosen = self._postgresql[server]
        await execute(chosen.url("postgres"), _CREATE.format(name=name))
        url = chosen.url(name)
        self._server_of[url] = chosen
        return url

    async def drop_postgresql(self, url: str) -> None:
        """Drop a database that was made here."""
        await self._server_of.pop(url).drop_database(url)

    async def mariadb(self) -> str:
        """The URL of a new database on MariaDB."""
        if not self._mariadb:
            self._mariadb.append(await self._start(mariadb.find(), "MariaDB"))
        return await self._mariadb[0].create_database()

    async def _start(self, found: list[Any], name: str) -> Server:
        if not found:
            raise MissingError(f"no {name} on this machine")
        backend = found[0]
        server: Server = backend.make(backend, self._folder, True)  # True: durable
        await server.start()
        self.versions[name] = backend.version
        return server

    async def sqlite(self) -> str:
        """The URL of a new database file."""
        self.versions["SQLite"] = sqlite3.sqlite_version
        return f"sqlite+aiosqlite:///{self._folder.subfolder('sqlite') / 'bench.db'}"

    async def redis(self, *, durable: bool) -> str:
        """The URL of a Redis that syncs each write to disk, or of one as it comes."""
        if durable not in self._redis:
            server = RedisServer(self._folder, durable=durable)
            await server.start()
            self._redis[durable] = server
            self.versions["Redis"] = server.version
        return self._redis[durable].url


class RedisServer:
    """A throwaway Redis. Not ``durable``: its defaults, a snapshot every now and then."""

    def __init__(self, folder: RunFolder, *, durable: bool) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            raise MissingError("no redis-server on this machine")
        self.version = _version(program)
        self._port = free_port()
        account = account_for("redis") or ""
        data = folder.subfolder("redis", account)
        self._program = Program(
            [program, *self._arguments(data, durable=durable)],
            account=account,
            death_signal=9,
            log=folder.path / f"{data.name}.log",
        )

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self._port}/0"

    def _arguments(self, data: Path, *, durable: bool) -> list[str]:
        arguments = ["--port", str(self._port), "--bind", HOST, "--dir", str(data)]
        always = ["--appendonly", "yes", "--appendfsync", "always"]
        return [*arguments, *always] if durable else arguments

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        client = require("redis.asyncio").from_url(self.url)
        self._program.start()
        deadline = time.monotonic() + _SECONDS_TO_START
        try:
            while not await _answers(client):
                if time.monotonic() > deadline:
                    raise MissingError(f"Redis did not start: {self._program.log_tail()}")
                await asyncio.sleep(0.05)
        finally:
            await client.aclose()

    def close(self) -> None:
        self._program.end(15, seconds=10)


async def _answers(client: Any) -> bool:
    try:
        return bool(await client.ping())
    except (OSError, require("redis.exceptions").ConnectionError):
        return False


def _version(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)  # noqa: S603 - found in PATH, by name
    return said.stdout.split("v=")[1].split()[0]


def require(module: str) -> Any:
    """A module of an optional peer. Raises MissingError with what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(f"not installed: {error.name or module}") from None


def driver_url(url: str) -> str:
    """A SQLAlchemy URL as PostgreSQL's own drivers take it."""
    return url.replace("postgresql+asyncpg://", "postgresql://")


async def execute(url: str, *statements: str) -> None:
    """Run statements one by one, each committed."""
    connection = await asyncpg.connect(driver_url(url))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()
