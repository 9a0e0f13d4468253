"""Database servers in Docker, through testcontainers."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from harness.programs import HOST, ServerError, free_port
from harness.servers import DRIVERS, Backend, Family, Server

if TYPE_CHECKING:
    from harness.programs import RunFolder

SOCKETS = (Path("/var/run/docker.sock"), Path.home() / ".docker/run/docker.sock")
IMAGES: dict[Family, tuple[str, ...]] = {
    "postgresql": ("postgres:15", "postgres:18"),
    "mariadb": ("mariadb:10.11",),
    "mysql": ("mysql:8.4",),
}
PORT: dict[Family, int] = {"postgresql": 5432, "mariadb": 3306, "mysql": 3306}
USER: dict[Family, str] = {"postgresql": "postgres", "mariadb": "root", "mysql": "root"}
PASSWORD: dict[Family, str] = {
    "postgresql": "POSTGRES_PASSWORD",
    "mariadb": "MARIADB_ROOT_PASSWORD",
    "mysql": "MYSQL_ROOT_PASSWORD",
}
COMMAND: dict[Family, list[str]] = {
    "postgresql": ["postgres", "-c", "max_connections=300", "-c", "timezone=Asia/Kolkata"],
    "mariadb": ["--max-allowed-packet=64M", "--max-connections=300", "--default-time-zone=+05:30"],
    "mysql": ["--max-allowed-packet=64M", "--max-connections=300", "--default-time-zone=+05:30"],
}
FAST: dict[Family, list[str]] = {
    "postgresql": ["-c", "fsync=off", "-c", "full_page_writes=off"],
    "mariadb": ["--innodb-flush-log-at-trx-commit=2"],
    "mysql": ["--innodb-flush-log-at-trx-commit=2"],
}


def docker_answers() -> bool:
    """Whether a Docker daemon answers; decided within two seconds."""
    if not os.environ.get("DOCKER_HOST") and not any(path.exists() for path in SOCKETS):
        return False
    try:
        import docker  # type: ignore[import-untyped] # it ships no type hints
    except ImportError:
        return False
    try:
        client = docker.from_env(timeout=2)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except (docker.errors.DockerException, OSError):
        return False


def find(family: Family) -> list[Backend]:
    """Return a backend per image of ``family``; call only when Docker answers."""
    return [_backend(family, image) for image in IMAGES.get(family, ())]


def _backend(family: Family, image: str) -> Backend:
    def make(backend: Backend, _folder: RunFolder, durable: bool) -> ContainerServer:
        return ContainerServer(backend, durable, image=image)

    version = image.partition(":")[2]
    return Backend(
        id=f"{family}-{version}",
        family=family,
        version=version,
        how=f"Docker image {image}",
        make=make,
    )


class ContainerServer(Server):
    """A server in a container whose port on 127.0.0.1 stays the same over restarts."""

    seconds_to_start: float = 120

    def __init__(self, backend: Backend, durable: bool, *, image: str) -> None:
        super().__init__(backend)
        self._image = image
        self._durable = durable
        self._password = secrets.token_hex(8)
        self._container: Any = None
        self.port = 0

    @property
    def running(self) -> bool:
        if self._container is None:
            return False
        wrapped = self._container.get_wrapped_container()
        wrapped.reload()
        return bool(wrapped.status == "running")

    @property
    def pid(self) -> int:
        """The pid on the machine that Docker runs on."""
        if self._container is None:
            raise ServerError(f"{self.backend.id} was not started")
        wrapped = self._container.get_wrapped_container()
        wrapped.reload()
        return int(wrapped.attrs["State"]["Pid"])

    def url(self, database: str, *, driver: str | None = None) -> str:
        family = self.backend.family
        return URL.create(
            driver or DRIVERS[family],
            username=USER[family],
            password=self._password,
            host=HOST,
            port=self.port,
            database=database,
        ).render_as_string(hide_password=False)

    async def start(self) -> None:
        if self._container is None:
            await asyncio.to_thread(self._run)
        elif not self.running:
            await asyncio.to_thread(self._container.get_wrapped_container().start)
        await self._until_it_answers()

    def _run(self) -> None:
        from testcontainers.core.container import DockerContainer

        family = self.backend.family
        self.port = free_port()
        container = DockerContainer(self._image).with_env(PASSWORD[family], self._password)
        # Docker's SDK takes the pair too; the number alone would listen on every address.
        container.ports[str(PORT[family])] = (HOST, self.port)  # type: ignore[assignment]
        command = COMMAND[family] + ([] if self._durable else FAST[family])
        self._container = container.with_command(command).start()

    async def _until_it_answers(self) -> None:
        deadline = time.monotonic() + self.seconds_to_start
        while True:
            try:
                return await self._execute("SELECT 1")
            except (DBAPIError, OSError) as error:
                if time.monotonic() > deadline:
                    raise ServerError(f"{self.backend.id} does not answer: {error}") from None
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        await asyncio.to_thread(self._container.get_wrapped_container().stop)

    async def kill(self) -> None:
        await asyncio.to_thread(self._container.get_wrapped_container().kill)

    def close(self) -> None:
        if self._container is not None:
            self._container.stop()
            self._container = None
