"""Multi-tenant, sharded conversation history for the OpenAI Agents SDK.

::

    async with Gateway.from_env() as gateway:
        session = gateway.tenant("acme").session("chat-1")
        result = await Runner.run(agent, "Hello", session=session)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardgate.errors import (
    Contended,
    FreezeTooLong,
    KeyspaceNotCreated,
    MoveBusy,
    MoveLost,
    OperatorError,
    OutcomeUnknown,
    OwnershipConflict,
    SettingsError,
    ShardgateError,
    ShardQuarantined,
    ShardUnavailable,
    StandbysNotSafe,
    TablesMismatch,
    TenantRefused,
    TransientError,
    UsageError,
    VerificationFailed,
)
from shardgate.gateway import Gateway, HealthReport, ShardHealth, Tenant
from shardgate.listing import SessionPage
from shardgate.router import Route
from shardgate.session import GatewaySession, SessionKey, SQLAlchemySession
from shardgate.settings import GatewaySettings, KeyspaceSettings, PoolSizeWarning, ShardSettings
from shardgate.sql.schema import TableNames, build_tables
from shardgate.sql.transactions import SessionInfo

if TYPE_CHECKING:
    from sqlalchemy import MetaData

__all__ = [
    "Contended",
    "FreezeTooLong",
    "Gateway",
    "GatewaySession",
    "GatewaySettings",
    "HealthReport",
    "KeyspaceNotCreated",
    "KeyspaceSettings",
    "MoveBusy",
    "MoveLost",
    "OperatorError",
    "OutcomeUnknown",
    "OwnershipConflict",
    "PoolSizeWarning",
    "Route",
    "SQLAlchemySession",
    "SessionInfo",
    "SessionKey",
    "SessionPage",
    "SettingsError",
    "ShardHealth",
    "ShardQuarantined",
    "ShardSettings",
    "ShardUnavailable",
    "ShardgateError",
    "StandbysNotSafe",
    "TablesMismatch",
    "Tenant",
    "TenantRefused",
    "TransientError",
    "UsageError",
    "VerificationFailed",
    "metadata",
]


def metadata(*, table_prefix: str = "shardgate_", schema: str | None = None) -> MetaData:
    """The tables of a gateway's shard, for a platform's own Alembic: its ``target_metadata``."""
    return build_tables(TableNames.gateway(table_prefix), schema=schema).metadata
