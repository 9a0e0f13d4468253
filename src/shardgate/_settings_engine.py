"""Database URLs and engine options: which are accepted, and what they mean together.

Settings arrive as text, and SQLAlchemy takes what it is given: ``pool_size="5"`` breaks the pool,
``pool_pre_ping="false"`` is true, and its own conversion knows seven options. So the options that
make sense for a gateway are listed here with their types, the others with the reason why not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, QueuePool, StaticPool

from shardgate._settings_sources import near, overlaid

SCHEMES = {
    "postgresql+asyncpg": ("postgresql", 5432),
    "mysql+aiomysql": ("mysql", 3306),
    "mariadb+aiomysql": ("mysql", 3306),
    "sqlite+aiosqlite": ("sqlite", 0),
}
MEANT_SCHEMES = {
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "mysql": "mysql+aiomysql",
    "mariadb": "mariadb+aiomysql",
    "sqlite": "sqlite+aiosqlite",
}
SUPPORTED = ", ".join(f"{scheme}://" for scheme in SCHEMES)

POOLS: dict[str, type[Pool]] = {
    pool.__name__: pool for pool in (AsyncAdaptedQueuePool, NullPool, StaticPool)
}
QUEUE_OPTIONS = ("pool_size", "max_overflow", "pool_timeout", "pool_use_lifo")
DEFAULT_OPTIONS = {"pool_size": 3, "max_overflow": 2, "pool_use_lifo": True}

TRUTHS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


class HiddenDict(dict[str, Any]):
    """A dict that never prints its content: arguments of a database driver may be passwords."""

    def __repr__(self) -> str:
        return "{**********}"


@dataclass(frozen=True, slots=True)
class Option:
    """One engine option: what is wanted, in words, and how a value is read."""

    wanted: str
    read: Callable[[object], object]


def _refuse() -> NoReturn:
    raise ValueError("not what is wanted")


def _truth(value: object) -> object:
    if isinstance(value, bool):
        return value
    known = TRUTHS.get(value.strip().lower()) if isinstance(value, str) else None
    return _refuse() if known is None else known


def _truth_or_debug(value: object) -> object:
    return "debug" if value == "debug" else _truth(value)


def _whole(least: int) -> Callable[[object], object]:
    def read(value: object) -> object:
        number = int(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            return _refuse()
        return number

    return read


def _seconds(value: object) -> object:
    number = float(value) if isinstance(value, str | int) and not isinstance(value, bool) else value
    if not isinstance(number, float) or not math.isfinite(number) or number <= 0:
        return _refuse()
    return number


def _name(value: object) -> object:
    return value if isinstance(value, str) and value else _refuse()


def _pool_class(value: object) -> object:
    if isinstance(value, type) and issubclass(value, tuple(POOLS.values())):
        return value
    return POOLS.get(value) or _refuse() if isinstance(value, str) else _refuse()


def _driver_arguments(value: object) -> object:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return _refuse()
    return HiddenDict(value)


OPTIONS: dict[str, Option] = {
    "connect_args": Option("a table (or one JSON object) of driver arguments", _driver_arguments),
    "echo": Option('true, false or "debug"', _truth_or_debug),
    "echo_pool": Option('true, false or "debug"', _truth_or_debug),
    "enable_from_linting": Option("true or false", _truth),
    "hide_parameters": Option("true or false", _truth),
    "insertmanyvalues_page_size": Option("a whole number, at least 1", _whole(1)),
    "label_length": Option("a whole number, at least 6", _whole(6)),
    "logging_name": Option("a name", _name),
    "max_identifier_length": Option("a whole number, at least 1", _whole(1)),
    "max_overflow": Option("a whole number, at least 0, or -1 for no limit", _whole(-1)),
    "pool_logging_name": Option("a name", _name),
    "pool_pre_ping": Option("true or false", _truth),
    "pool_recycle": Option("a whole number of seconds, or -1 for never", _whole(-1)),
    "pool_size": Option("a whole number, at least 1", _whole(1)),
    "pool_timeout": Option("a number of seconds above 0", _seconds),
    "pool_use_lifo": Option("true or false", _truth),
    "poolclass": Option(f"one of {', '.join(POOLS)}", _pool_class),
    "query_cache_size": Option("a whole number, at least 0", _whole(0)),
}

_A_FUNCTION = "is code, not a setting; hand the Gateway an engine of your own instead"
_OURS = "is chosen by Shardgate; remove it"
REFUSED: dict[str, str] = {
    "async_creator": _A_FUNCTION,
    "creator": _A_FUNCTION,
    "dialect": _A_FUNCTION,
    "module": _A_FUNCTION,
    "plugins": _A_FUNCTION,
    "pool": f"{_A_FUNCTION}, or name a class in poolclass",
    "pool_events": _A_FUNCTION,
    "json_deserializer": "has no effect: Shardgate stores JSON as text; remove it",
    "json_serializer": "has no effect: Shardgate stores JSON as text; remove it",
    "execution_options": _OURS,
    "future": _OURS,
    "implicit_returning": _OURS,
    "isolation_level": "is chosen by Shardgate: its statements are written for it; remove it",
    "paramstyle": _OURS,
    "pool_reset_on_return": "is chosen by Shardgate: a connection is always rolled back; remove it",
    "skip_autocommit_rollback": _OURS,
    "use_insertmanyvalues": _OURS,
}


def read_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Give the options with the types that SQLAlchemy wants, and what is wrong by option.

    Nothing inside ``connect_args`` is converted: a password of digits stays text.
    """
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for written, value in options.items():
        option = written.lower()
        if option not in OPTIONS:
            problems[option] = REFUSED.get(option) or _unknown(option)
            continue
        try:
            values[option] = OPTIONS[option].read(value)
        except ValueError:
            problems[option] = f"must be {OPTIONS[option].wanted}"
    return values, problems


def _unknown(option: str) -> str:
    meant = near(option, OPTIONS)
    hint = f"did you mean {meant}?" if meant else f"known are {', '.join(OPTIONS)}"
    return f"there is no such engine option; {hint}"


def url_problem(text: str) -> str | None:
    """What is wrong with a database URL, without quoting it."""
    scheme = text.partition("://")[0]
    if scheme not in SCHEMES:
        return _scheme_problem(text)
    if text != text.strip():
        return "begins or ends with a space or a line break; remove it"
    url = parsed(text)
    if url is None or "@" in (url.host or ""):
        return (
            "cannot be read as a URL; in the user name and the password write special "
            "characters percent-encoded, such as %40 for @, %2F for / and %3A for :"
        )
    if scheme == "postgresql+asyncpg" and "sslmode" in url.query:
        return "has ?sslmode=, which asyncpg does not know; write ?ssl= with the same value"
    if not is_sqlite(url) and not (url.database or {"database", "db"} & set(url.query)):
        return "names no database; end it with /name"
    return None


def _scheme_problem(text: str) -> str:
    found = re.match(r"(\w+)(?:\+\w+)?://", text)
    meant = MEANT_SCHEMES.get(found[1].lower()) if found else None
    if meant is not None:
        return f"does not name a supported asynchronous driver; begin it with {meant}://"
    return f"is no URL of a supported database; begin it, without quotes, with one of {SUPPORTED}"


def parsed(text: str) -> URL | None:
    try:
        return make_url(text)
    except (ArgumentError, ValueError):
        return None


def is_sqlite(url: URL) -> bool:
    return url.drivername.startswith("sqlite")


def is_memory(url: URL) -> bool:
    """Whether the database is SQLite in memory, in any of its spellings."""
    path = url.database or ":memory:"
    in_memory = path == ":memory:" or path.startswith("file::memory:")
    return is_sqlite(url) and (in_memory or url.query.get("mode") == "memory")


def pool_class(url: URL, options: Mapping[str, Any]) -> type[Pool]:
    if is_memory(url):
        return StaticPool
    chosen: type[Pool] = options.get("poolclass", AsyncAdaptedQueuePool)
    return chosen


def pool_problem(url: URL, poolclass: type[Pool]) -> str | None:
    """Why this pool cannot work for this database."""
    if is_memory(url) and not issubclass(poolclass, StaticPool):
        return "an in-memory SQLite database is lost with its connection; it needs StaticPool"
    if not is_sqlite(url) and issubclass(poolclass, StaticPool):
        return "StaticPool has one connection for all tasks, which only SQLite can bear"
    return None


def has_queue(poolclass: type[Pool]) -> bool:
    return issubclass(poolclass, QueuePool)


def for_pool(url: URL, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that the database's pool does not take."""
    poolclass = pool_class(url, options)
    kept = {
        option: value
        for option, value in options.items()
        if option not in QUEUE_OPTIONS or has_queue(poolclass)
    }
    return kept | {"poolclass": StaticPool} if is_memory(url) else kept


def merged_options(url: URL, own: Mapping[str, Any], gateway: Mapping[str, Any]) -> dict[str, Any]:
    """A shard's own options over the gateway's over the defaults, as its pool takes them."""
    options = for_pool(url, overlaid(own, overlaid(gateway, DEFAULT_OPTIONS)))
    if "connect_args" in options:
        options["connect_args"] = HiddenDict(options["connect_args"])
    return options


def most_connections(options: Mapping[str, Any]) -> float:
    """Connections that a pool may hold; pools that do not count theirs count as none."""
    overflow: int = options.get("max_overflow", 0)
    size: int = options.get("pool_size", 0)
    return math.inf if overflow < 0 else size + overflow


def location(url: URL, schema: str | None, driver: Mapping[str, Any]) -> tuple[object, ...] | None:
    """Where the data lies, alike for two spellings of one place; None: a place of its own."""
    if is_sqlite(url):
        return _sqlite_location(url)
    kind, default_port = SCHEMES[url.drivername]
    given = {**url.query, **driver}
    hosts = given.get("unix_socket") or given.get("host") or url.host or "localhost"
    port = given.get("port") or url.port or default_port
    servers = frozenset(
        _server(str(host), port)
        for host in (hosts if isinstance(hosts, list | tuple) else str(hosts).split(","))
    )
    database = given.get("database") or given.get("db") or url.database
    return kind, servers, database, (schema or "public") if kind == "postgresql" else None


def _server(host: str, port: object) -> tuple[str, str]:
    if host.startswith("/"):
        return host.rstrip("/"), str(port)
    if host.count(":") == 1:
        host, _, port = host.partition(":")
    host = host.lower().rstrip(".")
    return "localhost" if host == "127.0.0.1" else host, str(port)


def _sqlite_location(url: URL) -> tuple[object, ...] | None:
    path = url.database or ":memory:"
    shared = url.query.get("cache") == "shared" and path.startswith("file:")
    if is_memory(url):
        return ("sqlite", "memory", path) if shared else None
    return "sqlite", "file", str(Path(path.removeprefix("file:")).resolve())
