"""The checks that look at all settings together, and the words for every mistake.

Nothing here prints a value, except names of keyspaces that have proved to be names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from shardgate import _settings_engine as engine
from shardgate import _settings_sources as sources

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardgate.settings import KeyspaceSettings, ShardSettings

MOST_SLOTS = 65536
TENANT_ID = re.compile(r"[!-.0-~]{1,64}")

# What a field must be, in words, for every mistake that has no words of its own.
WANTED = {
    "url": "must be the text of a database URL",
    "engine_kwargs": "must be a table of engine options",
    "schema": "must be the name of a PostgreSQL schema, at most 63 bytes",
    "weight": "must be a number of 0 or more, such as 1.0",
    "keyspace": f"must be the name of a keyspace: {sources.NAME_RULE}",
    "slots": f"must be a power of two from 1 to {MOST_SLOTS}, such as 4096",
    "spread": "must be a whole number from 1 to the keyspace's slots, or be left out",
    "default_keyspace": f"must be the name of a keyspace ({sources.NAME_RULE}), or empty for none",
    "tenants": "must map tenant ids to names of keyspaces",
    "table_prefix": "must begin with a letter or _, go on with a-z, 0-9 and _, and have at most "
    "30 characters; SQLite reserves sqlite_ for itself",
    "operation_deadline": "must be a number of seconds above 0, such as 10",
    "operation_memory": "must be a number of seconds above 0, such as 86400",
    "create_tables": "must be true or false",
    "coalesce": "must be true or false",
}

_NO_WEIGHT = (
    "is 0, and so is that of all other shards of keyspace {keyspace}: one of them must be above 0"
)


def folded(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Model = TypeVar("Model")


class Draft:
    """The settings on their way: validated part by part, so that every mistake is found at once."""

    def __init__(
        self,
        given: sources.Source,
        *,
        make_shard: type[ShardSettings],
        make_keyspace: type[KeyspaceSettings],
    ) -> None:
        self.given = given
        self.problems = list(given.problems)
        tree = given.tree
        self.raw_shards: Mapping[str, dict[str, Any]] = tree.get("shards", {})
        self.used = self._used_keyspaces()
        self.options = self._options(tree, ())
        self.shards = self._parts(make_shard, "shards")
        self.keyspaces = self._parts(make_keyspace, "keyspaces")
        self._check_shards_exist()
        self._check_keyspaces()
        self._check_weights()
        self._check_pools()
        self._check_databases_differ()

    def add(self, route: sources.Route, text: str) -> None:
        self.problems.append(f"{self.given.place(route)}: {text}")

    def accept(self, route: sources.Route, make: Callable[..., Model]) -> Model | None:
        """Make a part of the values at ``route``, or note what is wrong with them."""
        try:
            return make(**self._values(route))
        except ValidationError as error:
            for found in error.errors(include_input=False, include_url=False):
                self._note((*route, *map(str, found["loc"])), found["type"], found["msg"])
        return None

    def _note(self, route: sources.Route, kind: str, text: str) -> None:
        # Errors inside the tenants' map were noted with better words by _check_tenants.
        if kind == "missing":
            self.add(route, f"is missing; it {WANTED[route[-1]]}")
        elif route[0] != "tenants":
            self.add(route, text if kind == "shardgate" else WANTED.get(route[-1], "is not valid"))

    def _values(self, route: sources.Route) -> dict[str, Any]:
        if route:
            node: dict[str, Any] = self.given.tree[route[0]][route[1]]
            options = self._options(node, route) if "engine_kwargs" in node else None
            return node if options is None else node | {"engine_kwargs": options}
        every: dict[str, object] = {name: self.keyspaces.get(name, {}) for name in self.used}
        return self.given.tree | {
            "shards": self.shards,
            "keyspaces": every,
            "default_keyspace": self._default_keyspace(),
            "engine_kwargs": self.options,
        }

    def _options(self, node: Mapping[str, Any], route: sources.Route) -> dict[str, Any]:
        options, problems = engine.read_options(node.get("engine_kwargs", {}))
        for option, text in problems.items():
            self.add((*route, "engine_kwargs", option), text)
        return options

    def _parts(self, make: type[Model], field_name: str) -> dict[str, Model]:
        parts = {
            name: self.accept((field_name, name), make)
            for name in self.given.tree.get(field_name, {})
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _used_keyspaces(self) -> list[str]:
        # From what was written: a shard with another mistake still uses its keyspace.
        named = (folded(shard.get("keyspace", "main")) for shard in self.raw_shards.values())
        return list(dict.fromkeys(name for name in named if isinstance(name, str)))

    def _check_shards_exist(self) -> None:
        # A mistake in reading may have hidden the shards.
        if not self.raw_shards and not self.problems:
            self.add(("shards", "NAME", "url"), "there is no shard; give at least one its URL")

    def _default_keyspace(self) -> object:
        name = folded(self.given.tree.get("default_keyspace", ""))
        if "default_keyspace" in self.given.tree:
            return name or None
        return self.used[0] if len(self.used) == 1 else None

    def _check_keyspaces(self) -> None:
        if not self.used:
            return
        for name in self.given.tree.get("keyspaces", {}):
            if name not in self.used:
                self.add(("keyspaces", name), f"no shard is in this keyspace; {self._known()}")
        default = self._default_keyspace()
        if default is not None:
            self._check_keyspace(("default_keyspace",), default)
        for tenant, keyspace in self.given.tree.get("tenants", {}).items():
            self._check_tenant(("tenants", tenant), tenant, folded(keyspace))

    def _check_weights(self) -> None:
        for keyspace in self.used:
            of = [name for name, one in self.shards.items() if one.keyspace == keyspace]
            if of and not any(self.shards[name].weight for name in of):
                self.add(("shards", of[0], "weight"), _NO_WEIGHT.format(keyspace=keyspace))

    def _check_tenant(self, route: sources.Route, tenant: str, keyspace: object) -> None:
        if not TENANT_ID.fullmatch(tenant):
            self.add(
                route, "is no tenant id; one has 1 to 64 printable ASCII characters, no space, no /"
            )
        self._check_keyspace(route, keyspace)

    def _check_keyspace(self, route: sources.Route, keyspace: object) -> None:
        if not isinstance(keyspace, str) or not sources.NAME.fullmatch(keyspace):
            if route[0] == "tenants":  # pydantic notes the others
                self.add(route, WANTED["keyspace"])
        elif keyspace not in self.used:
            self.add(route, f'no shard is in the keyspace "{keyspace}"; {self._known()}')

    def _known(self) -> str:
        named = [name for name in self.used if sources.NAME.fullmatch(name)]
        return f"the keyspaces of the shards: {', '.join(named)}"

    def _check_pools(self) -> None:
        self._check_queue_options((), self.options, self.options.get("poolclass"))
        for name, shard in self.shards.items():
            own, route = shard.engine_kwargs, ("shards", name)
            chosen = own.get("poolclass", self.options.get("poolclass"))
            problem = chosen and engine.pool_problem(shard.parsed_url, chosen)
            if problem:
                at = route if "poolclass" in own else ()
                self.add((*at, "engine_kwargs", "poolclass"), f"shard {name}: {problem}")
            options = {**self.options, **own}
            self._check_queue_options(route, own, engine.pool_class(shard.parsed_url, options))

    def _check_queue_options(
        self, route: sources.Route, options: Mapping[str, Any], poolclass: type | None
    ) -> None:
        if poolclass is None or engine.has_queue(poolclass):
            return
        for option in engine.QUEUE_OPTIONS:
            if option in options:
                text = f"the pool in use, {poolclass.__name__}, does not take it; remove it"
                self.add((*route, "engine_kwargs", option), text)

    def _check_databases_differ(self) -> None:
        first: dict[object, str] = {}
        for name, shard in self.shards.items():
            options = engine.merged_options(shard.parsed_url, shard.engine_kwargs, self.options)
            driver = options.get("connect_args", {})
            place = engine.location(shard.parsed_url, shard.schema_, driver)
            other = name if place is None else first.setdefault(place, name)
            if other != name:
                self.add(
                    ("shards", name, "url"),
                    f"is the same database as {self.given.place(('shards', other, 'url'))}; "
                    "each shard needs a database, or on PostgreSQL a schema, of its own",
                )
