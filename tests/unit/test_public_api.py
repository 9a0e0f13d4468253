"""The public names and their signatures. A change here is a change for every platform.

What is imported by ``import shardgate`` is pinned as well: optional packages stay optional.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

import shardgate
import shardgate.testing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic.fields import FieldInfo

# Methods that the SDK or a subclass calls although their names begin with an underscore.
CALLED_BY_OTHERS = {
    "__aenter__",
    "__aexit__",
    "_deserialize_item",
    "_get_compaction_snapshot",
    "_serialize_item",
}

PYDANTIC = {"model_config", "settings_customise_sources"}

API = """
class Contended(TransientError)
class FreezeTooLong(TransientError)
class Gateway
    __init__(settings: GatewaySettings, *, engines: Mapping[str, AsyncEngine] | None = None,
        engine_factory: EngineFactory | None = None) -> None
    async __aenter__() -> Self
    async __aexit__(*_: object) -> None
    async aclose() -> None
    async check() -> HealthReport
    async create_tables() -> None
    classmethod from_env(**options: Any) -> Self
    async open() -> None
    async purge_operations() -> dict[str, int]
    route(tenant_id: str, session_id: str, *, keyspace: str | None = None) -> Route
    shards: Mapping[str, Shard] (property)
    tenant(tenant_id: str, *, keyspace: str | None = None) -> Tenant
class GatewaySession(StoredSession)
    __init__(tenant_id: str, session_id: str, *, gateway: Gateway, keyspace: str,
        session_settings: SessionSettings | dict[str, Any] | None = None, ensure_ascii: bool =
        True) -> None
    async _deserialize_item(item: str) -> TResponseInputItem
    async _get_compaction_snapshot(limit: int, *, prune_prefix: Callable[[TResponseInputItem],
        bool] | None = None) -> CompactionSnapshot | None
    async _serialize_item(item: TResponseInputItem) -> str
    async add_items(items: list[TResponseInputItem], *, idempotency_key: str | None = None,
        wrapper: object = None) -> None
    async clear_session(*, wrapper: object = None) -> None
    async get_items(limit: int | None = None, *, wrapper: object = None) ->
        list[TResponseInputItem]
    key: SessionKey (property)
    async pop_item(*, wrapper: object = None) -> TResponseInputItem | None
    session_settings: SessionSettings | None (property, settable)
    async settle(op_id: str) -> bool
class GatewaySettings(BaseSettings)
    shards: dict[str, ShardSettings]
    keyspaces: dict[str, KeyspaceSettings] = {}
    default_keyspace: KeyspaceName | None = None
    tenants: dict[str, KeyspaceName] = {}
    engine_kwargs: EngineOptions = {}
    table_prefix: str = 'shardgate_'
    operation_deadline: Positive = 10.0
    operation_memory: Positive = 86400.0
    create_tables: bool = False
    coalesce: bool = True
    engine_options(shard_name: str) -> dict[str, Any]
    classmethod from_dict(values: Mapping[str, Any]) -> Self
    keyspace(name: str) -> KeyspaceSettings
    keyspace_of(tenant_id: str) -> str
    shards_of(keyspace: str) -> dict[str, ShardSettings]
class HealthReport
    __init__(shards: Mapping[str, ShardHealth], problems: tuple[str, ...] = ()) -> None
    ok: bool (property)
class KeyspaceNotCreated(OperatorError)
    __init__(message: str, *, keyspace: str) -> None
class KeyspaceSettings(BaseModel)
    slots: Whole = 4096
    spread: Annotated[Whole | None, BeforeValidator(_empty_is_none)] = None
class MoveBusy(TransientError)
class MoveLost(TransientError)
class OperatorError(ShardgateError)
class OutcomeUnknown(ShardgateError)
    __init__(message: str, *, shard: str, op_id: str | None = None) -> None
class OwnershipConflict(OperatorError)
    __init__(message: str, *, keyspace: str) -> None
class PoolSizeWarning(UserWarning)
class Route
    __init__(*, keyspace: str, slot: int, shard: str, epoch: int, h: int) -> None
class SQLAlchemySession(StoredSession)
    __init__(session_id: str, *, engine: AsyncEngine, create_tables: bool = False, sessions_table:
        str = 'agent_sessions', messages_table: str = 'agent_messages', session_settings:
        SessionSettings | dict[str, Any] | None = None, ensure_ascii: bool = True) -> None
    async _deserialize_item(item: str) -> TResponseInputItem
    async _get_compaction_snapshot(limit: int, *, prune_prefix: Callable[[TResponseInputItem],
        bool] | None = None) -> CompactionSnapshot | None
    async _serialize_item(item: TResponseInputItem) -> str
    async aclose() -> None
    async add_items(items: list[TResponseInputItem], *, idempotency_key: str | None = None,
        wrapper: object = None) -> None
    async clear_session(*, wrapper: object = None) -> None
    engine: AsyncEngine (property)
    classmethod from_url(session_id: str, *, url: str, engine_kwargs: dict[str, Any] | None =
        None, **kwargs: Any) -> Self
    async get_items(limit: int | None = None, *, wrapper: object = None) ->
        list[TResponseInputItem]
    async pop_item(*, wrapper: object = None) -> TResponseInputItem | None
    session_settings: SessionSettings | None (property, settable)
    async settle(op_id: str) -> bool
class SessionInfo
    __init__(session_id: str, item_count: int, byte_count: int, created_at: datetime, updated_at:
        datetime, listed_at: datetime) -> None
class SessionKey
    __init__(tenant_id: str, session_id: str) -> None
class SessionPage
    __init__(sessions: tuple[SessionInfo, ...], next_cursor: str | None, unavailable_shards:
        tuple[str, ...] = ()) -> None
class SettingsError(UsageError)
    __init__(problems: list[str]) -> None
class ShardHealth
    __init__(name: str, keyspace: str, reachable: bool, server: str | None = None, latency: float
        | None = None, slots: int | None = None, map_version: int | None = None, error: str | None
        = None) -> None
    ok: bool (property)
class ShardQuarantined(OperatorError)
    __init__(message: str, *, shard: str) -> None
class ShardSettings(BaseModel)
    url: SecretStr
    engine_kwargs: EngineOptions = {}
    schema: Annotated[str | None, BeforeValidator(_empty_is_none)] = None
    weight: NotNegative = 1.0
    keyspace: KeyspaceName = 'main'
    parsed_url: URL (property)
class ShardUnavailable(TransientError)
    __init__(message: str, *, shard: str) -> None
class ShardgateError(Exception)
class StandbysNotSafe(OperatorError)
class TablesMismatch(UsageError)
class Tenant
    __init__(gateway: Gateway, tenant_id: str, keyspace: str) -> None
    async delete_session(session_id: str) -> bool
    async list_sessions(*, limit: int = 50, cursor: str | None = None, allow_partial: bool =
        False) -> SessionPage
    session(session_id: str, *, session_settings: SessionSettings | dict[str, Any] | None = None,
        ensure_ascii: bool = True) -> GatewaySession
class TenantRefused(UsageError)
    __init__(message: str, *, tenant: str) -> None
class TransientError(ShardgateError)
class UsageError(ShardgateError, ValueError)
class VerificationFailed(OperatorError)
metadata(*, table_prefix: str = 'shardgate_', schema: str | None = None) -> MetaData
"""


def _described(module: ModuleType) -> str:
    names = sorted(module.__all__)
    lines = (line for name in names for line in _of(name, getattr(module, name)))
    return "\n".join(wrapped for line in lines for wrapped in _wrapped(line))


def _wrapped(line: str) -> list[str]:
    """A long line in several: what goes on is indented twice as deep."""
    return textwrap.wrap(line, 98, subsequent_indent=" " * 8, break_long_words=False) or [line]


def _of(name: str, thing: Any) -> Iterator[str]:
    if not inspect.isclass(thing):
        yield f"{name}{_signature(thing)}"
        return
    bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
    yield f"class {name}({bases})" if bases else f"class {name}"
    if issubclass(thing, BaseModel):
        yield from (f"    {line}" for line in _fields(thing))
    elif inspect.isfunction(thing.__init__):
        yield f"    __init__{_signature(thing.__init__, bound=True)}"
    yield from (f"    {line}" for line in _members(thing))


def _fields(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        default = "" if field.is_required() else f" = {_default(field)}"
        yield f"{field.alias or name}: {model.__annotations__[name]}{default}"


def _default(field: FieldInfo) -> str:
    return repr(field.get_default(call_default_factory=True))


def _members(kind: type) -> Iterator[str]:
    ours = [one for one in kind.__mro__ if one.__module__.startswith("shardgate")]
    for name in sorted({name for one in ours for name in vars(one)}):
        if (name.startswith("_") and name not in CALLED_BY_OTHERS) or name in PYDANTIC:
            continue
        member = inspect.getattr_static(kind, name)
        if isinstance(member, property):
            settable = "" if member.fset is None else ", settable"
            yield f"{name}: {_signature(member.fget).rpartition(' -> ')[2]} (property{settable})"
        elif isinstance(member, classmethod):
            yield f"classmethod {name}{_signature(getattr(kind, name))}"
        elif inspect.isfunction(member):
            asynchronous = "async " if inspect.iscoroutinefunction(member) else ""
            yield f"{asynchronous}{name}{_signature(member, bound=True)}"


def _signature(thing: Callable[..., Any] | None, *, bound: bool = False) -> str:
    assert thing is not None
    signature = inspect.signature(thing)
    parameters = list(signature.parameters.values())[int(bound) :]
    return f"({', '.join(_parameters(parameters))}) -> {_annotation(signature.return_annotation)}"


def _parameters(parameters: list[inspect.Parameter]) -> Iterator[str]:
    starred = False
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and not starred:
            yield "*"
        starred = starred or one.kind in (one.KEYWORD_ONLY, one.VAR_POSITIONAL)
        stars = "*" * (int(one.kind is one.VAR_POSITIONAL) + 2 * int(one.kind is one.VAR_KEYWORD))
        default = "" if one.default is one.empty else f" = {one.default!r}"
        yield f"{stars}{one.name}: {_annotation(one.annotation)}{default}"


def _annotation(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else str(annotation)


def test_every_public_name_is_pinned() -> None:
    assert _described(shardgate) == API.strip()


def test_nothing_else_looks_public() -> None:
    names = {name for name in vars(shardgate) if not name.startswith("_")}
    modules = {name for name in names if isinstance(getattr(shardgate, name), ModuleType)}
    names -= modules | {"annotations", "TYPE_CHECKING"}
    names -= {"TableNames", "build_tables"}  # what metadata() is made of
    assert names == set(shardgate.__all__)
    assert sorted(shardgate.__all__) == sorted(set(shardgate.__all__))


def test_the_testing_helper_is_pinned() -> None:
    signature = _signature(shardgate.testing.sqlite_gateway)
    assert signature.startswith("(*, shards: int = 2, **settings: Any)")


def test_every_public_thing_says_what_it_is() -> None:
    silent = [name for name in shardgate.__all__ if not getattr(shardgate, name).__doc__]
    for name in shardgate.__all__:
        thing = getattr(shardgate, name)
        if inspect.isclass(thing):
            silent += [
                f"{name}.{member}"
                for member, value in vars(thing).items()
                if not member.startswith("_") and inspect.isfunction(value) and not value.__doc__
            ]
    assert silent == []


def _imported_by(statement: str) -> set[str]:
    """The top-level packages in a new process after this statement."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    source = Path(shardgate.__file__).parents[1]
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=os.environ | {"PYTHONPATH": str(source)},
        check=True,
        capture_output=True,
        text=True,
    )
    return set(said.stdout.split())


@pytest.mark.parametrize(
    "package",
    ["agents", "alembic", "openai", "pytest", "rich", "testcontainers", "typer"],
)
def test_the_library_does_without(package: str, packages: set[str]) -> None:
    assert package not in packages


@pytest.fixture(scope="module")
def packages() -> set[str]:
    found = _imported_by("import shardgate")
    assert {"shardgate", "sqlalchemy"} <= found
    return found
