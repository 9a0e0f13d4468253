"""MariaDB from server programs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from harness.programs import HOST, account_for, run_program
from harness.servers import Backend, LocalServer

if TYPE_CHECKING:
    from harness.programs import RunFolder

PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))


def find() -> list[Backend]:
    """Return the MariaDB whose programs are in PATH or /usr/sbin, if there is one."""
    server, installer = _which("mariadbd", "mysqld"), _which("mariadb-install-db")
    if server is None or installer is None:
        return []
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"Ver (\d+\.\d+)(\.\d+)-MariaDB", said.stdout)
    if version is None:
        return []

    def make(backend: Backend, folder: RunFolder, durable: bool) -> MariaDBServer:
        return MariaDBServer(backend, folder, durable, server=server, installer=installer)

    return [
        Backend(
            id=f"mariadb-{version[1]}",
            family="mariadb",
            version=version[1] + version[2],
            how=f"programs in {server.parent}",
            make=make,
        )
    ]


def _which(*names: str) -> Path | None:
    found = (shutil.which(name, path=PATH) for name in names)
    return next((Path(path) for path in found if path), None)


class MariaDBServer(LocalServer):
    """A throwaway data directory; its one user with a password reaches it over TCP only."""

    stop_signal = signal.SIGTERM
    end_signal = signal.SIGKILL  # nobody needs the data again

    def __init__(
        self, backend: Backend, folder: RunFolder, durable: bool, *, server: Path, installer: Path
    ) -> None:
        self.account = account_for("mysql") or ""
        super().__init__(backend, folder, durable)
        self._server = server
        self._installer = installer
        self._options: tuple[str, ...] = ()

    def another(self, *options: str) -> MariaDBServer:
        """A further server with options of its own and this one's password; not started yet."""
        other = MariaDBServer(
            self.backend,
            self._run_folder,
            self.durable,
            server=self._server,
            installer=self._installer,
        )
        other._options = options
        other._password = self._password
        return other

    async def follow(self, primary: MariaDBServer) -> None:
        """Replicate all that another server has in its binary log, and what comes."""
        await self._execute(
            f"CHANGE MASTER TO master_host = '{HOST}', master_port = {primary.port},"
            f" master_user = '{primary.user}', master_password = '{primary._password}',"
            " master_use_gtid = slave_pos, master_connect_retry = 1",
            "START SLAVE",
        )

    async def execute(self, *statements: str) -> None:
        """Run statements as the user who may do anything."""
        await self._execute(*statements)

    async def _prepare(self) -> None:
        await run_program(
            [
                self._installer,
                "--no-defaults",
                f"--datadir={self._data}",
                f"--tmpdir={self._folder}",
                "--skip-test-db",
                "--skip-name-resolve",
                "--auth-root-authentication-method=socket",
            ],
            account=self.account,
        )
        at_start = self._folder / "init.sql"
        at_start.write_text(  # not in the log: a replica that follows it would be without its user
            "SET sql_log_bin = 0;\n"
            f"CREATE OR REPLACE USER '{self.user}'@'%' IDENTIFIED BY '{self._password}';\n"
            f"GRANT ALL PRIVILEGES ON *.* TO '{self.user}'@'%' WITH GRANT OPTION;\n"
        )
        at_start.chmod(0o644)  # the folder around it is the account's alone

    def _command(self) -> list[str | Path]:
        return [
            self._server,
            "--no-defaults",
            f"--datadir={self._data}",
            # Of its own: a server that starts removes the temporary tables that it finds.
            f"--tmpdir={self._folder}",
            f"--init-file={self._folder / 'init.sql'}",
            f"--bind-address={HOST}",
            f"--port={self.port}",
            "--socket=server.sock",
            "--pid-file=server.pid",
            "--skip-name-resolve",
            "--max-connections=300",
            "--max-allowed-packet=64M",
            "--innodb-buffer-pool-size=64M",
            # Not UTC on purpose: code that trusts the server's zone is found out.
            "--default-time-zone=+05:30",
            # 2 is safe when the server is killed, 1 also when the machine is.
            f"--innodb-flush-log-at-trx-commit={1 if self.durable else 2}",
            *self._options,
        ]
