"""The settings of a gateway, checked as a whole before anything connects.

``GatewaySettings()`` reads, strongest first: its arguments, the environment (``SHARDGATE_…``,
levels separated by ``__``), ``.env``, the secrets directory that ``SHARDGATE_SECRETS_DIR`` names,
and the TOML file that ``SHARDGATE_CONFIG`` names. The sources are merged setting by setting, so
that a TOML file may describe the shards and a secrets directory add their URLs. ``config/`` has an
example with every setting. Names of shards and keyspaces are folded to lower case in every source.

Every mistake is one line of one ``SettingsError``; values are never printed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_serializer,
    field_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy.engine import URL, make_url

from shardgate import _settings_engine as engine
from shardgate import _settings_sources as sources
from shardgate._settings_check import MOST_SLOTS, WANTED, Draft, folded
from shardgate.errors import SettingsError, TenantRefused, UsageError

if TYPE_CHECKING:
    from pathlib import Path

MOST_CONNECTIONS = 200  # per process, before a warning
TABLE_PREFIX = re.compile(r"[a-z_][a-z0-9_]{0,29}")


class PoolSizeWarning(UserWarning):
    """One process may open more connections than most servers allow."""


def _number(value: object) -> object:
    """Keep ``true`` from becoming the number 1."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


KeyspaceName = Annotated[
    str,
    BeforeValidator(folded),
    Field(pattern=f"^{sources.NAME.pattern}$", max_length=sources.NAME_LENGTH),
]
Whole = Annotated[int, BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]


def _mistake(text: str) -> PydanticCustomError:
    return PydanticCustomError("shardgate", "{text}", {"text": text})


def _read_options(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    options, problems = engine.read_options(value)
    if problems:
        raise _mistake("; ".join(f"{option} {text}" for option, text in problems.items()))
    return options


def _shown_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options as a dump may show them: without driver arguments, classes by name."""
    shown = {name: v.__name__ if isinstance(v, type) else v for name, v in options.items()}
    return shown | {"connect_args": "**********"} if "connect_args" in shown else shown


EngineOptions = Annotated[dict[str, Any], BeforeValidator(_read_options)]


class ShardSettings(BaseModel):
    """One shard: a database, or on PostgreSQL a schema of one.

    ``weight`` is its share of the slots, compared with the others of its keyspace; one of 0 is to
    have none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: SecretStr
    engine_kwargs: EngineOptions = Field(default_factory=dict)
    schema_: Annotated[str | None, BeforeValidator(_empty_is_none)] = Field(
        default=None, alias="schema"
    )
    weight: NotNegative = 1.0
    keyspace: KeyspaceName = "main"

    @field_validator("url")
    @classmethod
    def _has_async_driver(cls, url: SecretStr) -> SecretStr:
        problem = engine.url_problem(url.get_secret_value())
        if problem is not None:
            raise _mistake(problem)
        return url

    @field_validator("schema_")
    @classmethod
    def _has_schemas(cls, schema: str | None, info: ValidationInfo) -> str | None:
        url: SecretStr | None = info.data.get("url")
        if schema is None:
            return None
        if url is not None and not url.get_secret_value().startswith("postgresql"):
            raise _mistake("only PostgreSQL has schemas; remove it, or name the database in url")
        if len(schema.encode()) > 63 or "\0" in schema:
            raise _mistake(WANTED["schema"])
        return schema

    @field_serializer("engine_kwargs")
    def _hide_connect_args(self, options: dict[str, Any]) -> dict[str, Any]:
        return _shown_options(options)

    @property
    def parsed_url(self) -> URL:
        """The URL as SQLAlchemy knows it; printing it hides the password."""
        return make_url(self.url.get_secret_value())


class KeyspaceSettings(BaseModel):
    """The shape of a keyspace, fixed for good when the keyspace is created."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    slots: Whole = 4096
    spread: Annotated[Whole | None, BeforeValidator(_empty_is_none)] = None

    @field_validator("slots")
    @classmethod
    def _is_power_of_two(cls, slots: int) -> int:
        if not 1 <= slots <= MOST_SLOTS or slots & (slots - 1):
            raise _mistake(WANTED["slots"])
        return slots

    @field_validator("spread")
    @classmethod
    def _fits(cls, spread: int | None, info: ValidationInfo) -> int | None:
        if spread is not None and not 1 <= spread <= info.data.get("slots", MOST_SLOTS):
            raise _mistake(WANTED["spread"])
        return spread


class GatewaySettings(BaseSettings):
    """All settings of a gateway. The only constructor that reads nothing else is ``from_dict``.

    ``operation_deadline`` is in seconds, and so is ``operation_memory``: for so long, at least, a
    shard recognises an operation that is sent again, an idempotency key, and the op_id that
    ``settle`` asks about. What comes later is new to it: a key is accepted anew, and ``settle``
    says of an operation that has landed that it has not. ``engine_kwargs`` counts for every shard,
    below the shard's own. ``coalesce``: whether appends and short readings that would wait for a
    database are sent together, where it can take them so. Raises SettingsError with one line for
    each mistake; warns with PoolSizeWarning.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        env_prefix=sources.PREFIX,
        env_nested_delimiter="__",
    )

    shards: dict[str, ShardSettings]
    keyspaces: dict[str, KeyspaceSettings] = Field(default_factory=dict)
    default_keyspace: KeyspaceName | None = None
    tenants: dict[str, KeyspaceName] = Field(default_factory=dict)
    engine_kwargs: EngineOptions = Field(default_factory=dict)
    table_prefix: str = "shardgate_"
    operation_deadline: Positive = 10.0
    operation_memory: Positive = 86400.0
    create_tables: bool = False
    coalesce: bool = True

    def __init__(
        self,
        *,
        _env_file: str | Path | None = ".env",
        _secrets_dir: str | Path | None = None,
        _config_file: str | Path | None = None,
        _source: sources.Source | None = None,
        **values: Any,
    ) -> None:
        given = _source or sources.read_all(
            values, env_file=_env_file, secrets_dir=_secrets_dir, config_file=_config_file
        )
        draft = Draft(given, make_shard=ShardSettings, make_keyspace=KeyspaceSettings)
        draft.accept((), lambda **settled: super(GatewaySettings, self).__init__(**settled))
        # Raised here and not in an ``except``: the first error would hang on as the context, and
        # it holds the values.
        if draft.problems:
            raise SettingsError(draft.problems)
        self._warn_of_many_connections()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make settings of ``values`` alone: reads no environment and no file."""
        return cls(_source=sources.from_arguments(values))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Everything has been read by the time that pydantic is asked."""
        return (init_settings,)

    @field_validator("table_prefix")
    @classmethod
    def _is_identifier(cls, prefix: str) -> str:
        if not TABLE_PREFIX.fullmatch(prefix) or prefix.startswith("sqlite_"):
            raise _mistake(WANTED["table_prefix"])
        return prefix

    @field_serializer("engine_kwargs")
    def _hide_connect_args(self, options: dict[str, Any]) -> dict[str, Any]:
        return _shown_options(options)

    def keyspace_of(self, tenant_id: str) -> str:
        """The keyspace of a tenant; raises TenantRefused where none is configured."""
        keyspace = self.tenants.get(tenant_id, self.default_keyspace)
        if keyspace is None:
            raise TenantRefused(
                f"tenant {tenant_id!r} is not in the setting tenants, and there is no "
                "default_keyspace",
                tenant=tenant_id,
            )
        return keyspace

    def keyspace(self, name: str) -> KeyspaceSettings:
        """The settings of a keyspace that has shards; raises UsageError for any other name."""
        if name not in self.keyspaces:
            known = ", ".join(self.keyspaces)
            raise UsageError(f"there is no keyspace {name!r}; the settings have {known}")
        return self.keyspaces[name]

    def shards_of(self, keyspace: str) -> dict[str, ShardSettings]:
        """The shards of a keyspace by name; raises UsageError for an unknown keyspace."""
        self.keyspace(keyspace)
        return {name: shard for name, shard in self.shards.items() if shard.keyspace == keyspace}

    def engine_options(self, shard_name: str) -> dict[str, Any]:
        """Keyword arguments for ``create_async_engine``; raises UsageError for an unknown shard."""
        if shard_name not in self.shards:
            known = ", ".join(self.shards)
            raise UsageError(f"there is no shard {shard_name!r}; the settings have {known}")
        shard = self.shards[shard_name]
        return engine.merged_options(shard.parsed_url, shard.engine_kwargs, self.engine_kwargs)

    def _warn_of_many_connections(self) -> None:
        most = sum(engine.most_connections(self.engine_options(name)) for name in self.shards)
        if most > MOST_CONNECTIONS:
            warnings.warn(
                f"{len(self.shards)} shards may open {most:g} connections per process, more than "
                f"{MOST_CONNECTIONS}; lower engine_kwargs pool_size and max_overflow",
                PoolSizeWarning,
                stacklevel=3,
            )
