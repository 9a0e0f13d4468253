"""Session ids are exact, and what is no session id is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from shardgate.errors import UsageError

if TYPE_CHECKING:
    from contract.doors import Door

EXACT = [
    *("Chat-A", "chat-a", "chat-á", "chat-a\u0301", "chat-a ", " chat-a", "chat-a\t", "chat-a\n"),
    *("CHAT-A", "chat_a", "chat%a", "chat-a%", "%", "_", "*", "'", '"', "`", "\\", "\\'", "''"),
    *("' OR ''='", "; DROP TABLE agent_messages; --", "/*", "$1", ":x", "?", "%s", "%(tenant)s"),
    *("{sessions}", "X'41'", "A", "\u0430", "\u0391", "\uff21", "a", "ß", "ss"),
    *("\u0131", "i", "I", "\u0130"),
    *("\ufb01", "fi", "K", "\u212a", "\u017f", "s"),
    *(
        "😀",
        "😁",
        "👨‍👩‍👧",
        "a\u200bb",
        "ab",
        "\u202eab",
        "\ufeffab",
        "\x01",
        "\x7f",
        "\x1a",
        "\ufffd",
    ),
    *(
        "acme/chat",
        "acme",
        "/",
        "0",
        "00",
        "1e1",
        "10",
        "null",
        "None",
        "true",
        "x" * 254,
        "x" * 255,
    ),
    *("é" * 255, "😀" * 255, "\U0010ffff", " ", "  ", "\t", "\u00a0"),
]


async def test_each_id_is_a_session_of_its_own(door: Door) -> None:
    assert len(set(EXACT)) == len(EXACT)
    for n, session_id in enumerate(EXACT):
        await door.session(session_id).add_items([{"n": n}, {"id": session_id}])
    for n, session_id in enumerate(EXACT):
        assert await door.session(session_id).get_items() == [{"n": n}, {"id": session_id}]
    for session_id in EXACT[::2]:
        assert await door.session(session_id).pop_item() == {"id": session_id}
    for session_id in EXACT[::3]:
        await door.session(session_id).clear_session()
    for n, session_id in enumerate(EXACT):
        expected = [{"n": n}, {"id": session_id}][: 1 if n % 2 == 0 else 2]
        assert await door.session(session_id).get_items() == (expected if n % 3 else [])


async def test_what_is_no_id_is_refused(door: Door) -> None:
    wrong: list[Any] = ["", "x" * 256, "😀" * 256, "a\0b", "\ud800", b"chat", None, 7, ["chat"]]
    for session_id in wrong:
        with pytest.raises(UsageError, match="session_id"):
            door.session(session_id)


@pytest.mark.backends("sqlite")
def test_the_id_can_be_read_back(door: Door, kind: str) -> None:
    prefix = {"standalone": "", "gateway": "acme/"}[kind]
    for session_id in EXACT:
        assert door.session(session_id).session_id == prefix + session_id
