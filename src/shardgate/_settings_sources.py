"""Where settings come from: arguments, environment, ``.env``, secrets directory, TOML file.

The sources of pydantic-settings are not used. They read a nested password ``123456`` as a number,
print values in their errors, forget which variable a value came from, and do not see a misspelt
one. Each source here becomes a tree in the shape of the settings, and remembers for every place in
the tree who wrote it, so that a mistake can be reported in the words of the person who made it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dotenv import dotenv_values
from pydantic import BaseModel

PREFIX = "SHARDGATE_"
CONFIG, SECRETS_DIR = "SHARDGATE_CONFIG", "SHARDGATE_SECRETS_DIR"
NAME = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*")
NAME_LENGTH = 63
NAME_RULE = "a-z, 0-9 and single _ between them, at most 63 characters"
ENGINE_WORDS = ("pool", "max_overflow", "connect_args", "echo")
DEEPEST = 8  # folders inside the secrets directory; links may form a circle

# What Kubernetes adds to every pod for each service whose name begins with "shardgate".
SERVICE = re.compile(
    r"SHARDGATE(?P<more>(?:_[A-Z0-9]+)*?)_(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?"
    r"|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)

Route = tuple[str, ...]
Form = Literal["variable", "file", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What may stand at one place of the settings: a value, named fields, or a map."""

    fields: Mapping[str, Shape] = field(default_factory=dict)
    each: Shape | None = None  # the shape behind any other key
    names: bool = False  # keys are shard or keyspace names
    folds: bool = True  # keys are compared in lower case
    free: bool = False  # any nesting: arguments of a database driver

    def child(self, key: str) -> Shape | None:
        if self.free:
            return self
        return self.fields.get(key, self.each)

    def is_table(self, value: object) -> bool:
        if self.free:
            return isinstance(value, Mapping)
        return bool(self.fields) or self.each is not None


VALUE = Shape()
DRIVER = Shape(free=True, folds=False)
OPTIONS = Shape(fields={"connect_args": Shape(each=DRIVER, folds=False)}, each=VALUE)
SHARD = Shape(
    fields={
        "url": VALUE,
        "engine_kwargs": OPTIONS,
        "schema": VALUE,
        "weight": VALUE,
        "keyspace": VALUE,
    }
)
KEYSPACE = Shape(fields={"slots": VALUE, "spread": VALUE})
GATEWAY = Shape(
    fields={
        "shards": Shape(each=SHARD, names=True),
        "keyspaces": Shape(each=KEYSPACE, names=True),
        "default_keyspace": VALUE,
        "tenants": Shape(each=VALUE, folds=False),
        "engine_kwargs": OPTIONS,
        "table_prefix": VALUE,
        "operation_deadline": VALUE,
        "operation_memory": VALUE,
        "create_tables": VALUE,
        "coalesce": VALUE,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A variable, a secret file, a TOML file or the arguments, and how settings are named there."""

    form: Form = "table"
    written: str = ""
    route: Route = ()
    where: str = ""

    @property
    def is_text(self) -> bool:
        return self.form != "table"

    def name(self, route: Route) -> str:
        """The setting at ``route``, as somebody would write it in this source."""
        if not self.written or route[: len(self.route)] != self.route[: len(route)]:
            return self._spell(route)
        rest = route[len(self.route) :]
        return f"{self.written} ({_dotted(rest)})" if rest else self.written

    def place(self, route: Route) -> str:
        """The setting at ``route`` and where it was found: the beginning of a problem's line."""
        return self.name(route) + self.where

    def _spell(self, route: Route) -> str:
        if self.form == "variable":
            return PREFIX + "__".join(route).upper()
        return "/".join(route) if self.form == "file" else _dotted(route)


def _dotted(route: Route) -> str:
    return ".".join(key if re.fullmatch(r"[\w-]+", key) else json.dumps(key) for key in route)


@dataclass(slots=True)
class Source:
    """What one source says, or several merged: values, who wrote them, and what is wrong."""

    tree: dict[str, Any] = field(default_factory=dict, repr=False)
    origins: dict[Route, Origin] = field(default_factory=dict, repr=False)
    problems: list[str] = field(default_factory=list)

    def place(self, route: Route) -> str:
        """Name a setting, given or missing, in the form of the nearest one that was given."""
        for length in range(len(route), -1, -1):
            origin = self.origins.get(route[:length])
            if origin is not None:
                return origin.place(route)
        return Origin(form="variable").place(route)

    def enter(
        self,
        table: Mapping[Any, Any],
        origin: Origin,
        *,
        shape: Shape = GATEWAY,
        node: dict[str, Any] | None = None,
        route: Route = (),
    ) -> None:
        """Add a table that ``origin`` wrote at ``route``."""
        node = self.tree if node is None else node
        self.origins.setdefault(route, origin)
        for written, value in table.items():
            key = self._key(written, shape, route, origin)
            inner = shape.child(key) if key is not None else None
            if key is not None and inner is not None:
                self._enter_value(_plain(value), origin, inner, node, (*route, key))

    def _enter_value(
        self, value: object, origin: Origin, shape: Shape, node: dict[str, Any], route: Route
    ) -> None:
        key, is_table = route[-1], shape.is_table(value)
        present = node.get(key)
        if key in node and not (is_table and isinstance(present, dict)):
            first, second = self.place(route), origin.place(route)
            self.problems.append(f"{second}: is given twice (see {first}); remove one of them")
        elif not is_table:
            node[key] = value
            self.origins[route] = origin
        else:
            inner = self._table(value, origin, route)
            if inner is not None:
                self.enter(inner, origin, shape=shape, node=node.setdefault(key, {}), route=route)

    def _table(self, value: object, origin: Origin, route: Route) -> Mapping[Any, Any] | None:
        if isinstance(value, str) and origin.is_text:
            value = _json_object(value)
        if isinstance(value, Mapping):
            return value
        wanted = "a table"
        hint = ""
        if origin.is_text:
            wanted = "one JSON object, without repeated keys and without quotes around it"
        if len(route) == 2 and route[0] == "shards" and origin.is_text:
            hint = f"; for the shard's URL alone use {origin.name(route)}__URL"
        self.problems.append(f"{origin.place(route)}: must be {wanted}{hint}")
        return None

    def _key(self, written: object, shape: Shape, route: Route, origin: Origin) -> str | None:
        """The key as the settings know it, or None after the problem has been noted."""
        if not isinstance(written, str):
            self.problems.append(f"{origin.place(route)}: has a key that is no text")
            return None
        key = written.lower() if shape.folds else written
        here = origin.place((*route, key))
        if shape.names and (not NAME.fullmatch(key) or len(key) > NAME_LENGTH):
            self.problems.append(f"{here}: is no valid name; names are made of {NAME_RULE}")
            return None
        if shape.child(key) is None:
            self.problems.append(f"{here}: there is no such setting{_hint(key, route, origin)}")
            return None
        return key


def _plain(value: object) -> object:
    if not isinstance(value, BaseModel):
        return value
    known = type(value).model_fields
    return {known[name].alias or name: getattr(value, name) for name in value.model_fields_set}


def _json_object(text: str) -> object:
    """The object in ``text``; None where it is anything else or repeats a key."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        return None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key is repeated")
    return table


def near(word: str, known: Mapping[str, object]) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.65)
    return found[0] if found else None


def _hint(key: str, route: Route, origin: Origin) -> str:
    shape = GATEWAY
    for step in route:
        shape = shape.child(step) or VALUE
    for field_name in ("shards", "keyspaces", "engine_kwargs"):
        if not route and origin.is_text and key.startswith(f"{field_name}_"):
            return f"; levels are separated by two underscores: {origin.name((field_name,))}__…"
    if "engine_kwargs" in shape.fields and key.startswith(ENGINE_WORDS):
        return f"; did you mean {origin.name((*route, 'engine_kwargs', key))}?"
    meant = near(key, shape.fields)
    if meant is not None:
        rest = origin.route[len(route) + 1 :]
        return f"; did you mean {origin.name((*route, meant, *rest))}?"
    return f"; known here: {', '.join(shape.fields)}"


def from_arguments(values: Mapping[str, Any]) -> Source:
    source = Source()
    source.enter(values, Origin())
    return source


def from_variables(variables: Mapping[str, str | None], where: str = "") -> Source:
    """Read ``SHARDGATE_…`` variables; their case does not matter, except inside JSON."""
    source = Source()
    for written, value in variables.items():
        if written.upper().startswith(PREFIX) and not _is_foreign(written, variables):
            route = tuple(written[len(PREFIX) :].lower().split("__"))
            origin = Origin(form="variable", written=written, route=route, where=where)
            _enter_text(source, origin, value)
    return source


def _is_foreign(written: str, variables: Mapping[str, str | None]) -> bool:
    service = SERVICE.fullmatch(written)
    if service and (not service["more"] or f"SHARDGATE{service['more']}_SERVICE_HOST" in variables):
        return True
    return written.upper() in (CONFIG, SECRETS_DIR)


def _enter_text(source: Source, origin: Origin, value: str | None) -> None:
    if value is None:
        source.problems.append(f"{origin.place(origin.route)}: has no value")
        return
    top, *nested = origin.route
    if top == "tenants" and nested:
        source.problems.append(
            f"{origin.place(origin.route)}: tenant ids are case-sensitive and cannot be part of a "
            f"name; write one JSON object in {Origin(form=origin.form).name(('tenants',))}"
        )
        return
    whole: Any = value
    for step in reversed(nested):
        whole = {step: whole}
    source.enter({top: whole}, origin)


def from_secrets(directory: Path, named_by: str) -> Source:
    """Read a directory of secrets: files named as variables, or folders (``shards/eu_1/url``).

    Without the prefix only folders and files named as a setting count: the directory may be
    shared with other programs. A trailing line break is no part of a secret.
    """
    source = Source()
    if not directory.is_dir():
        source.problems.append(f'{named_by}: there is no directory "{directory}"')
        return source
    try:
        paths = list(_secret_files(directory, DEEPEST))
    except OSError:
        source.problems.append(f'{named_by}: the directory "{directory}" cannot be read')
        return source
    for path in paths:
        _enter_secret(source, directory, path)
    return source


def _enter_secret(source: Source, directory: Path, path: Path) -> None:
    written = path.relative_to(directory).as_posix()
    route = tuple(step for part in written.split("/") for step in part.lower().split("__"))
    prefixed = route[0].startswith(PREFIX.lower())
    if prefixed:
        route = (route[0][len(PREFIX) :], *route[1:])
    elif route[0] not in GATEWAY.fields and not _is_misspelt_folder(route):
        return
    form: Form = "variable" if prefixed and "/" not in written else "file"
    origin = Origin(form=form, written=written, route=route, where=" (secret file)")
    text = _text(path)
    if text is None:
        source.problems.append(f"{origin.place(route)}: cannot be read as UTF-8 text")
    else:
        _enter_text(source, origin, text.rstrip("\r\n"))


def _secret_files(directory: Path, depth: int) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        # Kubernetes keeps the versions of a mounted secret in entries that begin with "..".
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and depth:
            yield from _secret_files(path, depth - 1)


def _is_misspelt_folder(route: Route) -> bool:
    return len(route) > 1 and near(route[0], GATEWAY.fields) is not None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def from_toml(path: Path, named_by: str) -> Source:
    source = Source()
    text = _text(path)
    if text is None:
        wrong = "cannot be read as UTF-8 text" if path.is_file() else "does not exist"
        source.problems.append(f'{named_by}: the file "{path}" {wrong}')
        return source
    table, mistake = _toml_table(text)
    if mistake is not None:
        source.problems.append(f'{named_by}: the file "{path}" is not valid TOML {mistake}')
    source.enter(table, Origin(where=f" ({path.name})"))
    return source


def _toml_table(text: str) -> tuple[dict[str, Any], str | None]:
    try:
        return tomllib.loads(text), None
    except tomllib.TOMLDecodeError as error:
        # Only the place: the rest of the message may quote the line.
        place = re.search(r"\(at [^)]*\)$", str(error))
        return {}, place[0] if place else ""


def read_all(
    arguments: Mapping[str, Any],
    *,
    env_file: str | Path | None,
    secrets_dir: str | Path | None,
    config_file: str | Path | None,
) -> Source:
    """Read every source and merge them, the strongest first."""
    dotenv, problem = _dotenv_variables(env_file)
    variables = {name.upper(): value for name, value in (dotenv | dict(os.environ)).items()}
    secrets_dir = variables.get(SECRETS_DIR) if secrets_dir is None else secrets_dir
    config_file = variables.get(CONFIG) if config_file is None else config_file
    sources = [from_variables(dict(os.environ)), from_variables(dotenv, " (.env)")]
    if arguments:
        sources.insert(0, from_arguments(arguments))
    if secrets_dir:
        sources.append(from_secrets(Path(secrets_dir).expanduser(), SECRETS_DIR))
    if config_file:
        sources.append(from_toml(Path(config_file).expanduser(), CONFIG))
    merged = _merged(sources)
    merged.problems[:0] = problem
    return merged


def _dotenv_variables(path: str | Path | None) -> tuple[dict[str, str | None], list[str]]:
    if path is None:
        return {}, []
    if Path(path).is_file():
        if _text(Path(path)) is None:
            return {}, [f'"{path}": cannot be read as UTF-8 text']
        return dotenv_values(path, encoding="utf-8"), []
    if str(path) == ".env":
        return {}, []
    return {}, [f'"{path}": this file with variables does not exist']


def _merged(sources: list[Source]) -> Source:
    whole = Source()
    for source in sources:
        whole.tree = overlaid(whole.tree, source.tree)
        whole.origins = source.origins | whole.origins
        whole.problems += source.problems
    return whole


def overlaid(strong: Mapping[str, Any], weak: Mapping[str, Any]) -> dict[str, Any]:
    """``weak`` with everything that ``strong`` says laid over it, table by table."""
    result = dict(weak)
    for key, value in strong.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = overlaid(value, below)
        result[key] = value
    return result
