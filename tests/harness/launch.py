"""Become another program that cannot outlive its parent: leave root, bind to the parent, exec.

Run as a script, so that no code of ours runs between fork and exec in a process with threads::

    python -I -S launch.py ACCOUNT SIGNAL PARENT_PID PROGRAM [ARGUMENT...]

ACCOUNT may be empty: stay who we are. SIGNAL is sent by the kernel when the parent's thread that
started us ends (Linux only; elsewhere the parent has to end its programs itself).
"""

from __future__ import annotations

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(signal: int, parent: int) -> None:
    """Ask the kernel for ``signal`` when the parent dies; exit now if it is dead already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def become(account: str) -> None:
    """Give up root for good."""
    entry = pwd.getpwnam(account)
    os.initgroups(account, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def main() -> None:
    account, signal, parent, *command = sys.argv[1:]
    if account:
        become(account)
    # After the change of user: the kernel forgets the wish when credentials change.
    die_with_parent(int(signal), int(parent))
    os.execv(command[0], command)  # noqa: S606 - the whole point: no shell, same pid


if __name__ == "__main__":
    main()
