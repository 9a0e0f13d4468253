"""Server programs of this machine: accounts, folders, ports, and processes that end with us."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LAUNCH = Path(__file__).with_name("launch.py")
PREFIX = "shardgate-tests-"
HOST = "127.0.0.1"
# Below the range from which the kernel takes ports for outgoing connections: a server that was
# killed finds its port free when it comes back.
PORTS = range(15000, 32000)
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8"}


class ServerError(Exception):
    """A server program ended, or did not answer in time; the message has the end of its log."""


def account_for(*names: str) -> str | None:
    """Return the account to run servers as: "" for our own, None if root finds no other.

    Database servers refuse root, so root looks for the first account of ``names`` and ``nobody``.
    """
    if os.geteuid() != 0:
        return ""
    for name in (*names, "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


def open_to_all(path: Path) -> bool:
    """Whether an unprivileged account can enter ``path``."""
    folders = (path.resolve(), *path.resolve().parents)
    return all(folder.stat().st_mode & 0o001 for folder in folders)


def free_port() -> int:
    """Return a port on 127.0.0.1 where nothing listens at this moment."""
    for port in random.sample(PORTS, 200):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((HOST, port))
            return port
    raise ServerError("no free port found on 127.0.0.1")


class RunFolder:
    """The temporary folder of one test run; a killed run's folder is removed by the next run.

    A run holds a lock on its folder, so whoever gets the lock knows that the run is over.
    """

    def __init__(self) -> None:
        root = _temporary_root()
        _sweep(root)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        self.path.chmod(0o711)
        self._lock = (self.path / "lock.new").open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / "lock.new").rename(self.path / "lock")

    def subfolder(self, name: str, account: str = "") -> Path:
        """Make a fresh private folder, owned by ``account``."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.path))
        if account:
            entry = pwd.getpwnam(account)
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        return folder

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _temporary_root() -> Path:
    for folder in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")):  # noqa: S108 - mkdtemp follows
        if folder.is_dir() and (os.geteuid() != 0 or open_to_all(folder)):
            return folder
    return Path(tempfile.gettempdir())


def _sweep(root: Path) -> None:
    for lock in root.glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


class Program:
    """One server process, started again and again with the same command.

    Start it from the main thread: the kernel ends it when the thread that started it ends.
    It has a session of its own, so Ctrl-C reaches the tests only, which then stop it in order.
    """

    def __init__(
        self, command: Sequence[str | Path], *, account: str, death_signal: int, log: Path
    ) -> None:
        self._command = [str(part) for part in command]
        self._account = account
        self._death_signal = death_signal
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerError("the server was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        launch = [sys.executable, "-I", "-S", str(LAUNCH)]
        binding = [self._account, str(int(self._death_signal)), str(os.getpid())]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*launch, *binding, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
                env=ENVIRONMENT,
            )

    def signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    async def wait(self, *, seconds: float) -> None:
        """Wait for the end of the process, and kill it when the time is up."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        if self.running:
            self.kill()

    def kill(self) -> None:
        """SIGKILL the process and its children at once, and wait until all are gone."""
        if self._process is None or not self.running:
            return
        self._process.send_signal(signal.SIGSTOP)  # or it would see its children die, and react
        children = children_of(self._process.pid)
        for pid in (self._process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        _wait_gone(children)

    def end(self, number: int, *, seconds: float) -> None:
        """Stop without an event loop: at the end of the run, when there may be none."""
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self, lines: int = 15) -> str:
        if not self._log.exists():
            return "(no log)"
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


def _stat(pid: int) -> tuple[str, int] | None:
    """Return (state, parent's pid), None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def children_of(pid: int) -> list[int]:
    """Return the pids of a process's direct children; none on systems without /proc."""
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return [child for child in pids if (found := _stat(child)) and found[1] == pid]


def _wait_gone(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 10
    for pid in pids:
        while (found := _stat(pid)) and found[0] != "Z" and time.monotonic() < deadline:
            time.sleep(0.005)


async def run_program(command: Sequence[str | Path], *, account: str) -> None:
    """Run a program to its end as ``account``; ServerError with its output if it fails."""
    launch = [sys.executable, "-I", "-S", str(LAUNCH), account]
    binding = [str(int(signal.SIGKILL)), str(os.getpid())]
    process = await asyncio.create_subprocess_exec(
        *launch,
        *binding,
        *(str(part) for part in command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        env=ENVIRONMENT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise ServerError(f"{command[0]}: {output.decode(errors='replace')[-2000:]}")
