"""Every error that Shardgate raises, split by who has to act.

::

    ShardgateError
    ├── UsageError (ValueError)         the caller: the input is wrong, nothing was written
    │   ├── SettingsError               a setting is wrong; names the setting and its source
    │   ├── TenantRefused               no keyspace is configured for this tenant
    │   └── TablesMismatch              the tables belong to something else, or are missing
    ├── TransientError                  a retry may succeed; nothing was written
    │   ├── ShardUnavailable            the shard does not answer, or not in time
    │   ├── Contended                   the database kept refusing for lock or serialization reasons
    │   ├── MoveBusy                    somebody else is moving the slot
    │   ├── MoveLost                    somebody else has taken a move over, or has ended it
    │   └── FreezeTooLong               a slot could not be moved in the time it may be frozen
    ├── OutcomeUnknown                  the operation was sent and its answer was lost
    └── OperatorError                   somebody has to look: nothing heals by waiting
        ├── KeyspaceNotCreated          the shards hold no slot map yet
        ├── ShardQuarantined            a shard is not the one it is taken for, or an older copy
        ├── OwnershipConflict           the shards, or the settings, contradict each other
        ├── VerificationFailed          a copy is not the same; nothing was moved
        └── StandbysNotSafe             a standby may lack what was committed

Errors carry fields (``shard``, ``tenant``, ``keyspace``) and never a URL, which has a password.
"""

from __future__ import annotations


class ShardgateError(Exception):
    """Base of every error raised by Shardgate itself."""


class UsageError(ShardgateError, ValueError):
    """The caller's input is wrong. Nothing was sent to a database."""


class SettingsError(UsageError):
    """One or more settings are wrong; the message has one line for each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class TenantRefused(UsageError):
    """The tenant has no keyspace: it is not in the map and there is no default keyspace."""

    def __init__(self, message: str, *, tenant: str) -> None:
        self.tenant = tenant
        super().__init__(message)


class TablesMismatch(UsageError):
    """The named tables are missing, were made by another program, or belong to a gateway."""


class TransientError(ShardgateError):
    """The operation did not take effect; the same call may succeed later."""


class ShardUnavailable(TransientError):
    """A shard does not answer. Only sessions that live on it are concerned.

    ``shard`` is its configured name. The driver's error is the ``__cause__``.
    """

    def __init__(self, message: str, *, shard: str) -> None:
        self.shard = shard
        super().__init__(message)


class Contended(TransientError):
    """The database refused the operation again and again because of other writers."""


class MoveBusy(TransientError):
    """Somebody else is moving this slot."""


class MoveLost(TransientError):
    """Somebody else has taken this move over or has ended it, or the slot has gone elsewhere."""


class FreezeTooLong(TransientError):
    """The slot could not be moved within its budget, again and again; it is served as before."""


class OutcomeUnknown(ShardgateError):
    """The operation was sent and the answer was lost: it may or may not have taken effect.

    ``op_id`` names it: ``session.settle(op_id)`` tells whether it did, and if not, sees to it that
    it never will.
    """

    def __init__(self, message: str, *, shard: str, op_id: str | None = None) -> None:
        self.shard = shard
        self.op_id = op_id
        super().__init__(message)


class OperatorError(ShardgateError):
    """Waiting does not help: a person has to look at the shards or at the settings."""


class KeyspaceNotCreated(OperatorError):
    """No reachable shard of the keyspace holds a slot map."""

    def __init__(self, message: str, *, keyspace: str) -> None:
        self.keyspace = keyspace
        super().__init__(message)


class ShardQuarantined(OperatorError):
    """A shard is not the one that the settings or its peers take it for, or is an older copy of it.

    Nothing is written to it. The other shards serve. ``shard`` is its configured name.
    """

    def __init__(self, message: str, *, shard: str) -> None:
        self.shard = shard
        super().__init__(message)


class OwnershipConflict(OperatorError):
    """The shards contradict each other, or the settings, about who owns what."""

    def __init__(self, message: str, *, keyspace: str) -> None:
        self.keyspace = keyspace
        super().__init__(message)


class VerificationFailed(OperatorError):
    """What the target has stored of a session is not what the source has. Nothing was moved."""


class StandbysNotSafe(OperatorError):
    """A shard has standbys that may lack what was committed."""
