"""What has to be said of a run so that its figures mean something."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.options import Options
    from benchmarks.servers import Servers

_PACKAGES = (
    "shardgate",
    "openai-agents",
    "google-adk",
    "langgraph-checkpoint-postgres",
    "redis",
    "sqlalchemy",
    "asyncpg",
    "aiomysql",
    "psycopg",
)


def before(options: Options) -> dict[str, Any]:
    """The day, the machine's size and load, the versions, and what was asked for."""
    return {
        "day": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "options": {name: value for name, value in asdict(options).items() if name != "results"},
    }


def after(servers: Servers) -> dict[str, Any]:
    """The servers that were started."""
    return {"servers": dict(servers.versions)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def sentence(told: dict[str, Any]) -> str:
    """The same in words."""
    servers = ", ".join(f"{name} {number}" for name, number in told.get("servers", {}).items())
    packages = ", ".join(f"{name} {number}" for name, number in told["packages"].items())
    options = told["options"]
    return (
        f"{told['day']}: {told['cores']} cores for callers and servers together, loopback, "
        f"{servers}, Python {told['python']} ({packages}); {options['rounds']} rounds of most "
        f"parts, slices of {options['seconds']} s, {options['connections']} connections for each "
        f"contestant. "
        f"Load average before the run: {told['load_before']}."
    )
