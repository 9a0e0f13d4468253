"""The command line. It needs the extra: ``pip install 'shardgate[cli]'``."""

from __future__ import annotations

import sys


def main() -> None:
    """The ``shardgate`` command."""
    try:
        from shardgate.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit("the command line needs typer and rich: pip install 'shardgate[cli]'")
    run()
