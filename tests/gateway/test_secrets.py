"""Passwords stay in the URL: no error, log, warning or repr has them."""

from __future__ import annotations

import io
import logging
import traceback
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_plus

import pytest
from sqlalchemy.engine import make_url

from gateway.shards import item, named, session_on, settings_at
from harness.proxy import CuttingProxy
from shardgate import Gateway, OutcomeUnknown, ShardgateError, ShardUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeDatabases
    from gateway.conftest import Gateways

PASSWORD = "Zq9/pä:ss@w%rd secret"  # noqa: S105 - the word to look for
WRONG = {PASSWORD, quote_plus(PASSWORD), PASSWORD.encode().hex()}


def _with_password(url: str, password: str) -> str:
    return make_url(url).set(password=password).render_as_string(hide_password=False)


def _all_texts(error: BaseException) -> str:
    """What a program could show of an error: the whole chain, and the fields of each."""
    chain, texts = [error], []
    for one in chain:
        chain += [other for other in (one.__cause__, one.__context__) if other is not None]
        texts += [str(one), repr(one), repr(one.args), repr(vars(one))]
    return "\n".join([*texts, *traceback.format_exception(error)])


def _without(words: set[str], *texts: str) -> None:
    for word in words:
        assert not [text for text in texts if word in text], "a password is shown"


async def _errors(*acts: Callable[[], Any]) -> list[ShardgateError]:
    """What each of these raises, one after the other."""
    errors: list[ShardgateError] = []
    for act in acts:
        with pytest.raises((ShardUnavailable, OutcomeUnknown)) as caught:
            await act()
        errors.append(caught.value)
    return errors


def _reads(gateway: Gateway, session_id: str) -> list[Callable[[], Any]]:
    tenant = gateway.tenant("acme")
    return [tenant.session(session_id).get_items, tenant.list_sessions]


def _writes(gateway: Gateway, session_id: str) -> list[Callable[[], Any]]:
    tenant = gateway.tenant("acme")
    session = tenant.session(session_id)
    return [
        lambda: session.add_items([item("one")]),
        session.pop_item,
        session.clear_session,
        lambda: tenant.delete_session(session_id),
    ]


@pytest.mark.backends("postgresql", "mariadb", "mysql")
async def test_a_wrong_password_is_not_shown(
    databases: MakeDatabases, gateways: Gateways, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    urls = named(await databases(2))
    await (await gateways.open(settings_at(urls))).aclose()
    urls["b"] = _with_password(urls["b"], PASSWORD)
    gateway = gateways.make(settings_at(urls))
    printed = io.StringIO()
    with redirect_stderr(printed):
        errors = await _errors(gateway.create_tables)
        await gateway.open()
        id_ = session_on(gateway, "b")
        errors += await _errors(*_reads(gateway, id_), *_writes(gateway, id_))
        report = await gateway.check()
    shown = [repr(thing) for thing in (gateway, gateway.settings, gateway.shards, report)]
    shown += [str(gateway.settings), str(report), repr(gateway.shards["b"].engine)]
    _without(WRONG, *map(_all_texts, errors), *shown, caplog.text, printed.getvalue())
    assert not report.shards["b"].reachable


@pytest.mark.backends("postgresql", "mariadb", "mysql")
async def test_the_right_password_is_not_shown_when_the_connection_is_lost(
    databases: MakeDatabases, gateways: Gateways, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    urls = named(await databases(2))
    password = str(make_url(urls["b"]).password)
    async with CuttingProxy.in_front_of(urls["b"]) as proxy:
        urls["b"] = proxy.url(urls["b"])
        gateway = await gateways.open(settings_at(urls))
        id_ = session_on(gateway, "b")
        await gateway.tenant("acme").session(id_).add_items([item("one")])
        errors: list[BaseException] = []
        for write in _writes(gateway, id_):
            await gateway.tenant("acme").session(id_).get_items()  # on a connection that works
            proxy.cut_after(server=0)
            await write()  # a connection that is lost is ridden over
        proxy.refusing = True
        proxy.cut()
        errors += await _errors(*_reads(gateway, id_), *_writes(gateway, id_))
    assert all("shard 'b'" in str(error) for error in errors)
    _without({password}, *map(_all_texts, errors), caplog.text, repr(gateway.settings))


async def test_settings_and_shards_hide_what_they_connect_with() -> None:
    settings = settings_at(
        {
            "a": {
                "url": f"postgresql+asyncpg://u:{quote_plus(PASSWORD)}@db.example/one",
                "engine_kwargs": {"connect_args": {"password": PASSWORD}},
            }
        },
        engine_kwargs={"connect_args": {"passfile": PASSWORD}},
    )
    gateway = Gateway(settings)
    shown = [repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()]
    shown += [repr(gateway), repr(gateway.shards), repr(gateway.shards["a"].engine)]
    shown += [repr(gateway.settings.engine_options("a"))]
    _without(WRONG, *shown)
    await gateway.aclose()
