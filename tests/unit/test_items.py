"""Items as text, without a database."""

from __future__ import annotations

import json
import re
from collections import Counter, OrderedDict
from enum import StrEnum
from http import HTTPStatus
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardgate.errors import UsageError
from shardgate.items import (
    MARKED,
    MAX_DEPTH,
    check_text,
    decode,
    decode_all,
    encode,
    joined,
    split,
)

TEXTS = st.text(st.characters(exclude_categories=()))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=20,
)


def nested(depth: int, value: Any = 0) -> Any:
    for _ in range(depth):
        value = [value]
    return value


@given(VALUES, st.booleans())
def test_what_is_encoded_comes_back(value: Any, ensure_ascii: bool) -> None:
    text = encode(value, ensure_ascii=ensure_ascii)
    assert json.dumps(decode(text), sort_keys=True) == json.dumps(value, sort_keys=True)


@given(VALUES, st.booleans())
def test_every_database_can_store_the_text(value: Any, ensure_ascii: bool) -> None:
    text = encode(value, ensure_ascii=ensure_ascii)
    text.encode()  # no lone surrogate
    assert "\0" not in text
    assert text.isascii() or not ensure_ascii
    assert check_text(text) == text


def test_ascii_only_if_asked() -> None:
    assert encode("é", ensure_ascii=False) == '"é"'
    assert encode("é") == '"\\u00e9"'
    assert encode("\ud800é", ensure_ascii=False) == '"\\ud800é"'


def test_depth_is_bounded_before_anything_recurses() -> None:
    assert decode(encode(nested(MAX_DEPTH))) == nested(MAX_DEPTH)
    assert encode(nested(MAX_DEPTH)) == json.dumps(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(UsageError, match=str(MAX_DEPTH)):
            encode(nested(depth))


def test_a_value_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    mixed: list[Any] = []
    mixed += [mixed, object(), mixed]
    keyed: dict[Any, Any] = {}
    keyed.update(me=keyed, other=object(), also=keyed)
    for value in (endless, mixed, keyed, [endless, {1: 2}, endless], nested(MAX_DEPTH, object())):
        with pytest.raises(UsageError, match="nested"):
            encode(value)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"a": [0, {1}]}, r"item\['a'\]\[1\] is not JSON: a set"),
        ({"a": {"b": b""}}, r"item\['a'\]\['b'\] is not JSON: a bytes"),
        ({"a": {1: 2}}, r"item\['a'\] is not JSON: a key is a int"),
        ([{"ok": 1}, (2, object())], r"item\[1\]\[1\] is not JSON: a object"),
        (complex(1), "item is not JSON: a complex"),
    ],
)
def test_the_error_names_the_place(item: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        encode(item)


def test_a_number_with_too_many_digits() -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        encode({"n": 10**5000})


@pytest.mark.parametrize("text", ["", "{", "nul", '"\\u12"', "[" * 5000, "{'a': 1}", "\ufeff{}"])
def test_what_is_no_json_cannot_be_decoded(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        decode(text)


@pytest.mark.parametrize("text", [None, b"", 7, "a\0b", "\ud800", "x\udfff"])
def test_text_that_no_database_stores(text: Any) -> None:
    with pytest.raises(UsageError, match="_serialize_item"):
        check_text(text)


_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
)
_DIGITS = st.text("0123456789", min_size=1, max_size=40)


@st.composite
def almost_json(draw: st.DrawFn) -> str:
    """JSON in which a character or two were put in the place of others."""
    text = json.dumps(draw(_ANY_JSON), ensure_ascii=draw(st.booleans()))
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(text)))
        put = draw(st.text('{}[],:"\\u0189dDeE+-.NaIn \0\x0b', max_size=2))
        text = text[:at] + put + text[at + draw(st.integers(0, 2)) :]
    return text


@given(
    text=st.one_of(
        st.text(),
        st.builds(
            "{}{}{}".format,
            st.text(" \n\t\r\ufeff"),
            _ANY_JSON.map(json.dumps),
            st.text(" \n\t]},"),
        ),
        almost_json(),
        st.builds("{}{}.{}".format, st.sampled_from(["", "-"]), _DIGITS, _DIGITS),
        st.builds("{}.{}e{}".format, st.integers(-9, 9), _DIGITS, st.integers(-400, 400)),
        st.integers(-(2**70), 2**70).map(str),
    )
)
def test_texts_are_read_as_the_standard_library_reads_them(text: str) -> None:
    def read(function: Any) -> tuple[str, str]:
        try:
            return "item", repr(function(text))
        except ValueError as error:
            return "error", str(error)

    assert read(decode) == read(json.loads)


_PIECES = [
    '{"a":1}',
    "1",
    "[]",
    '"\ud800"',
    "7" * 5000,
    "{",
    "",
    "1,[2",
    "3]",
    "1,2",
    " ",
    "]",
    "[",
    '"',
]


@given(texts=st.lists(st.sampled_from(_PIECES) | almost_json() | VALUES.map(encode)))
@example(texts=["1,[2", "3]"])
@example(texts=["1],[2", "3"])
@example(texts=['{"a":[{}', "{}]}", "{},{}"])
@example(texts=["", "1,2"])
def test_several_are_read_as_each_of_them(texts: list[str]) -> None:
    """Also where damaged ones would be whole if they were one text."""

    def read(function: Any) -> str:
        try:
            return repr(function())
        except ValueError:
            return "no item"

    assert split(joined(texts)) == split(texts) == texts
    one_by_one = read(lambda: list(map(decode, texts)))
    assert read(lambda: decode_all(joined(texts))) == one_by_one
    assert read(lambda: decode_all(texts)) == one_by_one


def test_several_are_parsed_at_once() -> None:
    parsed: list[str] = []

    def parse(text: str) -> Any:
        parsed.append(text)
        return json.loads(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardgate.items._from_json", parse)
        texts = ['{"n": 1}', '"two"', "3"]
        assert decode_all(joined(texts)) == [{"n": 1}, "two", 3]
        assert len(parsed) == 1


def test_long_texts_are_not_joined() -> None:
    """It would take their memory again, and four times that if one character of all is far off."""
    texts = ['"' + "x" * 300_000 + '"'] * 4
    assert joined(texts) is texts
    assert decode_all(texts) == [text[1:-1] for text in texts]
    assert decode_all((4, MARKED.join(texts))) == [text[1:-1] for text in texts]


def test_lone_surrogates_are_read_escaped_or_not() -> None:
    assert decode('"\ud800"') == decode('"\\ud800"') == "\ud800"


@pytest.mark.parametrize("digits", [19, 20, 4300, 4301, 9000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_integers_of_any_length_are_read(digits: int, sign: str) -> None:
    sevens = 7 * (10**digits - 1) // 9
    read = decode(f'{{"n": {sign}{"7" * digits}}}')["n"]
    assert read == (-sevens if sign else sevens)


@given(value=VALUES | _ANY_JSON, ensure_ascii=st.booleans())
@example(value="\x7f", ensure_ascii=True)
@example(value=["\x7f", {"\x7f": 1e22}], ensure_ascii=False)
@example(value={"n": -(10**40), "s": "\ud800é\U0001f600\u2028"}, ensure_ascii=True)
def test_texts_are_written_as_the_standard_library_writes_them(
    value: Any, ensure_ascii: bool
) -> None:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=ensure_ascii)
    escaped = re.sub("[\ud800-\udfff]", lambda lone: f"\\u{ord(lone[0]):04x}", text)
    assert encode(value, ensure_ascii=ensure_ascii) == escaped


class Role(StrEnum):
    USER = "user"


class Text(str):
    __slots__ = ()


class Pair(NamedTuple):
    left: int
    right: str


@pytest.mark.parametrize(
    "value",
    [
        Role.USER,
        {"role": Role.USER},
        {Role.USER: 1},
        Text("text"),
        {Text("key"): [Text("text")]},
        Pair(1, "a"),
        (1, (2,)),
        OrderedDict(b=1, a=2),
        HTTPStatus.OK,
        Counter(a=1),
    ],
)
def test_what_is_of_a_type_of_its_own_is_written_as_the_standard_library_does(value: Any) -> None:
    assert encode(value) == json.dumps(value, separators=(",", ":"))
