"""Keys of the caller's choice, and settling what nobody knows: on every database, by both doors."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from contract.doors import gateway_settings
from shardgate import Gateway, OutcomeUnknown, UsageError
from shardgate.sql.dialect import Operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from contract.conftest import OpenDoor
    from contract.doors import Door
    from once.conftest import Wire

AB: list[Any] = [{"id": "a"}, {"id": "b"}]
NETWORKED = ("postgresql", "mariadb", "mysql")


async def _add(door: Door, items: list[Any], key: str, session_id: str = "chat-1") -> None:
    session: Any = door.session(session_id)
    await session.add_items(items, idempotency_key=key)


async def test_the_same_again_changes_nothing(door: Door, open_door: OpenDoor) -> None:
    await _add(door, AB, "k")
    await _add(door, AB, "k")
    await _add(await open_door(), AB, "k")
    assert await door.session().get_items() == AB
    assert await door.counters() == (2, sum(map(len, await door.stored())))


async def test_twenty_at_once_from_two_places(door: Door, open_door: OpenDoor) -> None:
    doors = [door, await open_door()]
    await asyncio.gather(*(_add(doors[n % 2], AB, f"k{n % 3}") for n in range(20)))
    assert await door.session().get_items() == AB * 3


async def test_what_was_popped_or_cleared_does_not_come_back(door: Door) -> None:
    session = door.session()
    await _add(door, AB, "k")
    assert await session.pop_item() == {"id": "b"}
    await _add(door, AB, "k")
    assert await session.get_items() == [{"id": "a"}]
    await session.clear_session()
    await _add(door, AB, "k")
    assert await session.get_items() == []


async def test_what_was_deleted_does_not_come_back(door: Door) -> None:
    await _add(door, AB, "k")
    assert await door.delete()
    await _add(door, AB, "k")
    assert await door.session().get_items() == []
    assert not await door.delete()


async def test_the_key_with_other_items(door: Door) -> None:
    await _add(door, AB, "k")
    for others in (AB[:1], [{"id": "a"}, {"id": "c"}], AB[::-1], [AB]):
        with pytest.raises(UsageError, match="'k' was used before"):
            await _add(door, others, "k")
    await _add(door, ["ab", "c"], "k2")
    with pytest.raises(UsageError, match="'k2' was used before"):
        await _add(door, ["a", "bc"], "k2")
    assert await door.session().get_items() == [*AB, "ab", "c"]


async def test_a_key_is_of_its_session(door: Door) -> None:
    await _add(door, AB, "k", "chat-1")
    await _add(door, AB[:1], "k", "chat-2")
    await _add(door, AB[1:], "k", "CHAT-1")
    assert await door.session("chat-1").get_items() == AB
    assert await door.session("chat-2").get_items() == AB[:1]
    assert await door.session("CHAT-1").get_items() == AB[1:]


@pytest.mark.parametrize("kind", ["gateway"], indirect=True)
async def test_a_key_is_of_its_tenant(door: Door, urls: list[str]) -> None:
    async with Gateway(gateway_settings(urls)) as gateway:
        for tenant in ("one", "two"):
            session: Any = gateway.tenant(tenant).session("chat-1")
            await session.add_items([{"of": tenant}], idempotency_key="k")
            assert await session.get_items() == [{"of": tenant}]


async def test_any_text_is_a_key_and_is_compared_exactly(door: Door) -> None:
    keys = ["k", "K", "k ", " ", "é", "e", "e\u0301", "ß", "ss", "'\"\\%s=", "=k"]
    keys += ["x" * 127, "x" * 126, "€" * 127, "\U0001f511" * 127]
    for key in keys:
        await _add(door, [{"of": key}], key)
    for key in keys:
        await _add(door, [{"of": key}], key)
    assert await door.session().get_items() == [{"of": key} for key in keys]


async def test_bad_keys_are_refused(door: Door) -> None:
    bad: list[Any] = ["", "x" * 128, 7, b"k", "\0", "\ud800", True]
    for key in bad:
        with pytest.raises(UsageError, match=r"^idempotency_key "):
            await _add(door, AB, key)
    assert await door.session().get_items() == []


async def _repeat(door: Door, operation: Operation) -> None:
    """Send an append of this operation once more, as a first attempt that comes late does."""
    await door.session()._perform(
        lambda store, place: store.append(place, operation, ['{"id":"late"}'])
    )


async def test_settling_what_has_landed(door: Door) -> None:
    session: Any = door.session()
    operation = Operation("0" * 32, "append")
    await _repeat(door, operation)
    assert [await session.settle(operation.op_id) for _ in range(2)] == [True, True]
    await _repeat(door, operation)
    assert await session.get_items() == [{"id": "late"}]


async def test_what_was_settled_before_it_came_never_takes_effect(door: Door) -> None:
    session: Any = door.session()
    operation = Operation("1" * 32, "append")
    assert [await session.settle(operation.op_id) for _ in range(2)] == [False, False]
    with pytest.raises(UsageError):
        await _repeat(door, operation)
    assert await session.get_items() == []
    await session.add_items(AB)
    assert await session.settle(operation.op_id) is False


async def test_settling_a_key(door: Door) -> None:
    session: Any = door.session()
    await _add(door, AB, "k")
    assert await session.settle("=k")
    assert not await session.settle("=other")
    with pytest.raises(UsageError, match="'other' was settled as not landed; use a new one"):
        await _add(door, AB, "other")
    assert await session.get_items() == AB


async def test_only_an_op_id_can_be_settled(door: Door) -> None:
    session: Any = door.session()
    for bad in ("", "x" * 129, "\0", "a\udc00", None, 7, b"x", True):
        with pytest.raises(UsageError, match=r"^op_id "):
            await session.settle(bad)
    assert not await session.settle("€" * 128)


async def test_a_replacement_that_was_burnt_does_not_claim_to_have_landed(door: Door) -> None:
    session: Any = door.session()
    await session.add_items(AB)
    tail = await session._perform(lambda store, place: store.tail(place, 9))
    burnt, landing = Operation("5" * 32, "replace"), Operation("6" * 32, "replace")
    assert not await session.settle(burnt.op_id)
    new = ['{"id":"new"}']

    async def replace_all(operation: Operation) -> Any:
        return await session._perform(lambda store, at: store.replace_all(at, operation, new))

    async def replace_tail(operation: Operation) -> Any:
        return await session._perform(
            lambda store, place: store.replace(
                place, operation, tail, start=1, items=new, prune=None
            )
        )

    assert [await replace_all(burnt), await replace_tail(burnt)] == [False, False]
    assert await session.get_items() == AB
    assert [await replace_tail(landing) for _ in range(2)] == [True, True]
    assert await session.get_items() == [AB[0], {"id": "new"}]


async def test_settling_against_the_operation_itself(door: Door, open_door: OpenDoor) -> None:
    """Whichever is first decides, and both agree about it."""
    session: Any = (await open_door()).session()
    expected = []
    for n in range(12):
        operation = Operation(f"{n:032}", "append")
        landed, *settled = await asyncio.gather(
            _repeat(door, operation),
            *(session.settle(operation.op_id) for _ in range(3)),
            return_exceptions=True,
        )
        again = await session.settle(operation.op_id)
        assert again is (landed is None)
        assert all(one is again for one in settled), (landed, settled)
        expected += [{"id": "late"}] * again
        assert await session.get_items() == expected


ACTS: dict[str, Callable[[Any], Any]] = {
    "append": lambda session: session.add_items([{"id": "new"}]),
    "pop": lambda session: session.pop_item(),
    "clear": lambda session: session.clear_session(),
}
LEFT: dict[str, list[Any]] = {"append": [*AB, {"id": "new"}], "pop": AB[:1], "clear": []}


@pytest.mark.backends(*NETWORKED)
@pytest.mark.parametrize("kind", ["gateway"], indirect=True)
@pytest.mark.parametrize("arrives", ["before", "after"])
@pytest.mark.parametrize("act", list(ACTS))
async def test_settling_tells_the_truth(proxied: Wire, act: str, arrives: str) -> None:
    """The statement is held on the wire beyond the deadline, and arrives before or after settle."""
    await proxied.past.session().add_items(AB)
    session: Any = proxied.through.session()
    await session.get_items()
    (shard,) = proxied.through.gateway.shards.values()
    await ACTS[act](proxied.through.session("warm"))
    shard.deadline = 0.3
    proxied.proxy.hold_next()
    with pytest.raises(OutcomeUnknown, match="may or may not") as caught:
        await ACTS[act](session)
    op_id = caught.value.op_id
    assert isinstance(op_id, str)
    shard.deadline = 20
    proxied.proxy.drop_clients()
    if arrives == "before":
        await proxied.proxy.arrive()
    landed = await session.settle(op_id)
    if arrives == "after":
        assert landed is False
        await proxied.proxy.arrive()
    assert landed is (arrives == "before")
    assert await proxied.items() == (LEFT[act] if landed else AB)
    assert await session.settle(op_id) is landed
