"""Items as text: any JSON value survives, anything else is refused before it is sent.

JSON text keeps what a JSON column and faster encoders lose: U+0000, lone surrogates, integers
beyond 64 bits, NaN. Two things are not told apart, since JSON has no words for them: a tuple comes
back as a list, and a surrogate pair written as two halves comes back as one character.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from pydantic_core import from_json, to_json

from shardgate.errors import UsageError

MAX_DEPTH = 500
"""How deep an item may be nested: what this writes, every interpreter's decoder can read."""

_DIGITS = 4000
_LEAVES = (str, int, float, type(None))
_PLAIN = frozenset({str, bool, type(None)})
_INT64 = range(-(2**63), 2**63)
_to_ascii = json.JSONEncoder(separators=(",", ":")).encode
_to_text = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_from_json = partial(from_json, cache_strings="keys")  # what users say is not to be kept
_DELETE = b"\x7f"
"""ASCII, but the standard library escapes it."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARK = 2**62 + secrets.randbits(61)
"""A number of this process that nobody can have written into a text."""
MARKED = f",{_MARK},"
"""What is between texts that are joined into one."""
Texts = tuple[int, str] | list[str]
"""Several texts: how many, and all of them joined into one, ``MARKED`` between; or, where they are
long, a list, since to join and to split it would take its memory again."""
_PARSED_TOGETHER = 1 << 20
"""Characters: longer texts gain nothing by being parsed together."""


def encode(item: object, *, ensure_ascii: bool = True) -> str:
    """``item`` as JSON text.

    pydantic's encoder takes a quarter of the time of the standard library's, and writes the same
    text (decision 18) of what is plain and ASCII; the rest is for the other one.

    Raises:
        UsageError: it is not JSON; names the place.
    """
    if _is_plain(item):
        try:
            written = to_json(item)
        except ValueError:  # a lone surrogate, or deeper than pydantic goes
            pass
        else:
            if written.isascii() and _DELETE not in written:
                return written.decode()
    try:
        text = (_to_ascii if ensure_ascii else _to_text)(item)
    except ValueError as error:  # an integer of more digits than the interpreter converts
        raise UsageError(f"the item cannot be written as JSON: {error}") from None
    return text if text.isascii() else _SURROGATE.sub(_escaped, text)


def decode(text: str) -> Any:
    """The item of a stored text; raises ValueError, TypeError or RecursionError if it is none.

    pydantic's parser takes less than half of the time of the standard library's, and reads the same
    values (decision 18); what it refuses, such as lone surrogates, is for the other one.
    """
    try:
        return _from_json(text)
    except (ValueError, TypeError):  # a lone surrogate, unescaped, is a TypeError
        return _decode_slowly(text)


def joined(texts: list[str]) -> Texts:
    """Texts as one, where that is worth while."""
    if sum(map(len, texts)) < _PARSED_TOGETHER:
        return len(texts), MARKED.join(texts)
    return texts


def split(texts: Texts) -> list[str]:
    """Each of the texts."""
    if isinstance(texts, list):
        return texts
    count, text = texts
    return text.split(MARKED) if count else []


def decode_all(texts: Texts) -> list[Any]:
    """As :func:`decode` of each.

    Those that are joined are parsed as one array, which takes half of the time of parsing each
    (decision 18). The mark between any two shows that each is an item by itself: if all marks are
    found where they were put, outside of everything, with one value between them, then each text is
    that value, and not part of one that another text has begun.
    """
    if not isinstance(texts, list):
        count, text = texts
        if count > 1 and len(text) < _PARSED_TOGETHER:
            try:
                parsed: list[Any] = _from_json(f"[{text}]")
            except (ValueError, TypeError):
                pass
            else:
                if len(parsed) == 2 * count - 1 and parsed[1::2] == [_MARK] * (count - 1):
                    return parsed[::2]
    return [decode(text) for text in split(texts)]


def _decode_slowly(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of more digits than the interpreter converts at once
        return _LONG_INTEGERS.decode(text)


def check_items(items: object) -> list[Any]:
    """The items of one call; refuses what would be taken apart, and what no pop could return."""
    if type(items) is not list and (
        isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable)
    ):
        raise UsageError(f"items must be a list of items, not {type(items).__name__}")
    given = list(items)
    for item in given:
        if item is None:
            raise UsageError("an item is None: pop_item could not tell it from an empty session")
    return given


def check_text(text: object) -> str:
    """What an overridden ``_serialize_item`` gave, if a database can store it as text."""
    if not isinstance(text, str):
        raise UsageError(f"_serialize_item must return a str, not {type(text).__name__}")
    if "\0" in text or _SURROGATE.search(text):
        raise UsageError(
            "_serialize_item returned text with U+0000 or a lone surrogate, which databases cannot "
            "store: encode it, for example as JSON or base64"
        )
    return text


def _long_integer(digits: str) -> int:
    """By parts: the limit of the interpreter is on the digits of one conversion."""
    if len(digits) <= _DIGITS:
        return int(digits)
    head, tail = digits[:-_DIGITS], digits[-_DIGITS:]
    whole: int = _long_integer(head) * 10**_DIGITS
    return whole - int(tail) if digits.startswith("-") else whole + int(tail)


_LONG_INTEGERS = json.JSONDecoder(parse_int=_long_integer)


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match.group()):04x}"


def _is_plain(item: object) -> bool:
    """Whether it is made of plain types, without floats and long integers.

    A walk without recursion, so that depth is a number here and not a crash.

    Raises:
        UsageError: it is not JSON.
    """
    if type(item) is dict:
        for key, text in item.items():
            if type(key) is not str or type(text) is not str:
                break
        else:
            return True  # as most are
    plain = True
    stack: list[tuple[Iterable[object], int]] = [((item,), 0)]
    while stack:
        values, depth = stack.pop()
        for value in values:
            kind = type(value)
            if kind in _PLAIN or (kind is int and value in _INT64):
                continue
            if isinstance(value, _LEAVES):
                plain = False
            elif depth >= MAX_DEPTH:
                raise _too_deep()
            elif isinstance(value, dict):
                keys = set(map(type, value))
                plain &= kind is dict and keys <= {str}
                if not all(issubclass(key, str) for key in keys):
                    raise _refusal(item)
                stack.append((value.values(), depth + 1))
            elif isinstance(value, list | tuple):
                plain &= kind is list
                stack.append((value, depth + 1))
            else:
                raise _refusal(item)
    return plain


def _too_deep() -> UsageError:
    return UsageError(f"the item is nested more than {MAX_DEPTH} levels deep")


def _refusal(item: object) -> UsageError:
    """The error for the first thing in ``item`` that is not JSON, with its path."""
    stack: list[tuple[object, str, int]] = [(item, "item", 0)]
    while stack:
        value, path, depth = stack.pop()
        if isinstance(value, _LEAVES):
            continue
        if depth >= MAX_DEPTH:  # it may hold itself
            return _too_deep()
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    kind = type(key).__name__
                    return UsageError(f"{path} is not JSON: a key is a {kind}, not a str")
            children = [(child, f"{path}[{key!r}]", depth + 1) for key, child in value.items()]
        elif isinstance(value, list | tuple):
            children = [(child, f"{path}[{n}]", depth + 1) for n, child in enumerate(value)]
        else:
            kind = type(value).__name__
            return UsageError(f"{path} is not JSON: a {kind}; convert it first")
        stack += reversed(children)
    return UsageError("the item is not JSON")
