"""What all commands share: where they print to, and a gateway of the environment's settings."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from shardgate.gateway import Gateway
from shardgate.settings import GatewaySettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

T = TypeVar("T")

output = Console()
errors = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def print_lines(lines: Iterable[str], *, style: str | None = None) -> None:
    """Print lines as they are, of whatever length."""
    for line in lines:
        output.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value for programs."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def with_gateway(act: Callable[[Gateway], Awaitable[T]]) -> T:
    """Run ``act`` with a gateway of the environment's settings, and close it."""

    async def run_it() -> T:
        gateway = Gateway(GatewaySettings())
        try:
            return await act(gateway)
        finally:
            await gateway.aclose()

    return asyncio.run(run_it())
