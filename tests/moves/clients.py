"""What the processes of a storm do: clients that use sessions, and movers that move slots."""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.shards import settings_at
from moves.broken import break_it, slow_down
from moves.history import UNTOLD, End, recorder
from shardgate import Gateway, OutcomeUnknown, ShardgateError
from shardgate.agreement import Plan
from shardgate.control.moves import Limits, Mover
from shardgate.control.remains import find_unfinished, remove_remains
from shardgate.errors import (
    FreezeTooLong,
    MoveBusy,
    MoveLost,
    TransientError,
)
from shardgate.handover import RELEASED
from shardgate.records import read_records
from shardgate.slotmap import build_map

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from moves.history import Name, Recorder
    from shardgate import GatewaySettings
    from shardgate.control.remains import Unfinished

SLOTS = 16
CLIENTS = 64
TENANTS = ("acme", "Acme", "acme-2")
SHARED, BRIEF = 30, 24
"""Sessions that several clients use; the brief ones are deleted and made again all the time."""
LONGEST = 40
"""Items of a session, about, before it is cleared."""
PAUSE, SHORT_PAUSE = 0.6, 0.1
"""A client's longest pause between two operations, in seconds; and where little time is left."""
AT_ONCE = 3
"""Slots that a mover moves at a time; they may be the same."""
SETTLING = 30
"""For how many seconds a client asks what has become of an operation."""
LONG_LIVED = {
    "append": 10,
    "read": 4,
    "tail": 5,
    "pop": 4,
    "clear": 0.3,
    "delete": 0.3,
    "list": 0.2,
}
SHORTEST_LIVED = {"append": 1, "read": 1, "delete": 1}
SHORT_LIVED = {
    "append": 4,
    "read": 3,
    "tail": 1,
    "pop": 0.3,
    "clear": 0.2,
    "delete": 3,
    "list": 0.1,
}
LIMITS = Limits(freeze_seconds=5, bytes_per_second=None, patience_seconds=5)
EXPECTED = (TransientError, OutcomeUnknown, MoveLost, MoveBusy, FreezeTooLong)
"""Errors of a move or of a removal among many others, with connections cut."""


def sessions_of(client: int) -> list[Name]:
    """A client's sessions: one of its own, and others; ids are the same in all tenants."""

    def name(kind: str, number: int) -> Name:
        return TENANTS[number % len(TENANTS)], f"{kind}-{number // len(TENANTS)}"

    shared = {client % SHARED, (7 * client + 3) % SHARED}
    brief = name("brief", client % BRIEF)
    return [name("own", client), *(name("shared", number) for number in sorted(shared)), brief]


def settings_of(urls: dict[str, str], **more: Any) -> GatewaySettings:
    return settings_at(urls, slots=SLOTS, create_tables=False, operation_deadline=10, **more)


async def use_sessions(argument: dict[str, Any]) -> dict[str, int]:
    """Run in a child process: clients at work until they are to stop; what they made.

    ``argument``: the shards' ``urls``, the ``clients`` by number, a ``name`` for the process, the
    ``path`` to write to, a ``seed``, the ``settings`` and what is ``broken``; whether statements
    are ``slow``; and ``stop``: a file that is there as soon as they are to stop.
    """
    break_it(argument["broken"])
    if argument["slow"]:
        slow_down()
    made: dict[str, int] = {}
    settings = settings_of(argument["urls"], **argument["settings"])
    with recorder(Path(argument["path"])) as notes:
        async with Gateway(settings) as gateway, asyncio.TaskGroup() as group:
            for number in argument["clients"]:
                name = f"{argument['name']}-{number}"
                one = Client(name, number, gateway, notes, seed=f"{argument['seed']} {name}")
                if argument["broken"]:
                    one.hurry()
                group.create_task(one.live(Path(argument["stop"]), made))
    return made


class Client:
    """Does one thing after the other in its sessions, and notes each."""

    def __init__(
        self, name: str, number: int, gateway: Gateway, notes: Recorder, *, seed: str
    ) -> None:
        self._name = name
        self._sessions = sessions_of(number)
        self._gateway = gateway
        self._notes = notes
        self._random = random.Random(seed)
        self._sent = 0
        self._end = End.DONE
        self._pause = PAUSE
        self._brief: dict[str, float] = SHORT_LIVED

    def hurry(self) -> None:
        """Do more, and more of what is seldom right by chance."""
        self._pause, self._brief = SHORT_PAUSE, SHORTEST_LIVED
        self._sessions += [name for name in self._sessions if name[1].startswith("brief")] * 3

    async def live(self, stop: Path, made: dict[str, int]) -> None:
        while not stop.exists():  # noqa: ASYNC240 - soon answered
            tenant, session = self._random.choice(self._sessions)
            weights = self._brief if session.startswith("brief") else LONG_LIVED
            (kind,) = self._random.choices([*weights], [*weights.values()])
            await getattr(self, f"_{kind}")(tenant, session)
            made[kind] = made.get(kind, 0) + 1
            await asyncio.sleep(self._random.uniform(0, self._pause))

    def _session(self, tenant: str, session: str) -> Any:
        return self._gateway.tenant(tenant).session(session)

    async def _append(self, tenant: str, session: str) -> None:
        ids = [f"{self._name}.{self._sent + place}" for place in range(self._random.randint(1, 3))]
        self._sent += len(ids)
        items = [{"role": "user", "content": id_} for id_ in ids]
        door = self._session(tenant, session)
        if self._random.random() < 0.5:
            await self._note("append", tenant, session, door.add_items(items), ids=ids)
            return
        key = ids[0]
        append = door.add_items(items, idempotency_key=key)
        await self._note("append", tenant, session, append, ids=ids)
        if self._end is not End.FAILED and self._random.random() < 0.2:  # this changes nothing
            await self._again(tenant, session, items)

    async def _again(self, tenant: str, session: str, items: list[Any]) -> None:
        key = items[0]["content"]
        try:
            await self._session(tenant, session).add_items(items, idempotency_key=key)
        except (TransientError, OutcomeUnknown):
            return
        except ShardgateError as error:
            if "settled as not landed" in str(error):
                return
            number = self._notes.begin(
                kind="append", tenant=tenant, session=session, client=self._name
            )
            self._notes.end(number, End.FAILED, error=repr(error))

    async def _read(self, tenant: str, session: str) -> None:
        call = self._session(tenant, session).get_items()
        items = await self._note("read", tenant, session, call)
        if items is not None and len(items) > self._random.uniform(LONGEST, 2 * LONGEST):
            await self._clear(tenant, session)

    async def _tail(self, tenant: str, session: str) -> None:
        limit = self._random.randint(1, 5)
        call = self._session(tenant, session).get_items(limit)
        await self._note("read", tenant, session, call, limit=limit)

    async def _pop(self, tenant: str, session: str) -> None:
        await self._note("pop", tenant, session, self._session(tenant, session).pop_item())

    async def _clear(self, tenant: str, session: str) -> None:
        await self._note("clear", tenant, session, self._session(tenant, session).clear_session())

    async def _delete(self, tenant: str, session: str) -> None:
        call = self._gateway.tenant(tenant).delete_session(session)
        await self._note("delete", tenant, session, call)

    async def _list(self, tenant: str, _session: str) -> None:
        await self._note("list", tenant, "", listed(self._gateway, tenant))

    async def _note(
        self, kind: str, tenant: str, session: str, call: Awaitable[Any], **fields: Any
    ) -> Any:
        """Make an operation; if nobody knows what came of it, find out. What it returned."""
        number = self._notes.begin(
            kind=kind, tenant=tenant, session=session, client=self._name, **fields
        )
        try:
            answer = await call
        except OutcomeUnknown as error:
            self._end = await self._settle(self._session(tenant, session), error)
            self._notes.end(number, self._end, error=str(error))
            return None
        except ShardgateError as error:
            self._end = End.FAILED
            self._notes.end(number, self._end, error=repr(error))
            return None
        self._end = End.DONE
        self._notes.end(number, self._end, answer=_answer(kind, answer))
        return answer

    async def _settle(self, door: Any, error: OutcomeUnknown) -> End:
        assert error.op_id is not None
        give_up = time.monotonic() + SETTLING
        while time.monotonic() < give_up:
            try:
                return End.DONE if await door.settle(error.op_id) else End.FAILED
            except (TransientError, OutcomeUnknown):
                await asyncio.sleep(self._random.uniform(0, self._pause))
        return End.UNKNOWN


def _answer(kind: str, answer: Any) -> Any:
    if kind == "read":
        return [item["content"] for item in answer]
    if kind == "pop":
        return None if answer is None else answer["content"]
    return UNTOLD if answer is None else answer


async def listed(gateway: Gateway, tenant: str) -> dict[str, int]:
    """The sizes of a tenant's sessions, which are fewer than a page has."""
    page = await gateway.tenant(tenant).list_sessions(limit=1000)
    assert page.next_cursor is None
    found = {info.session_id: info.item_count for info in page.sessions}
    assert len(found) == len(page.sessions)
    return found


async def move_slots(argument: dict[str, Any]) -> None:
    """Run in a child process: slots to and fro, several at a time; what was done goes to a file.

    ``argument``: as for the clients; and ``drained``: the shard that is to have no slots from the
    moment ``drained_from`` on.
    """
    break_it(argument["broken"])
    async with Gateway(settings_of(argument["urls"])) as gateway:
        # Lines of a mover, now and then: nobody waits for them.
        with Path(argument["path"]).open("a", buffering=1) as notes:  # noqa: ASYNC230
            shifter = Shifter(gateway, notes, argument)
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(shifter.work(Path(argument["stop"])))


class Shifter:
    """Moves slots at random, and goes on with, ends or removes what others have left."""

    def __init__(self, gateway: Gateway, notes: Any, argument: dict[str, Any]) -> None:
        self._gateway = gateway
        self._notes = notes
        self._random = random.Random(f"{argument['seed']} {argument['name']}")
        self._drained = argument["drained"]
        self._drained_from = argument["drained_from"]
        self._mover = Mover(Plan.of(gateway.settings, "main"), gateway.shards, limits=LIMITS)

    async def work(self, stop: Path) -> None:
        while not stop.exists():  # noqa: ASYNC240 - soon answered
            began = time.monotonic()
            act = self._random.choices([self._move, self._mend, self._tidy], [8, 2, 1])[0]
            line: dict[str, Any] = {}
            try:
                await act(line)
            except EXPECTED as error:
                line["error"] = repr(error)
            except ShardgateError as error:
                line |= {"error": repr(error), "wrong": True}
            except BaseException as error:
                line |= {"error": repr(error), "wrong": True}
                raise
            finally:
                if line:
                    line |= {"began": began, "seconds": time.monotonic() - began}
                    self._notes.write(json.dumps(line) + "\n")
            await asyncio.sleep(self._random.uniform(0, 0.05))

    async def _move(self, line: dict[str, Any]) -> None:
        """Move a slot; often the one that another mover moves too."""
        owners = await self.owners()
        slot = self._random.randrange(SLOTS)
        if self._random.random() < 0.3:
            slot = int(time.monotonic() * 2) * 7 % SLOTS
        retired = self._drained if time.monotonic() > self._drained_from else None
        to_drain = [number for number, name in owners.items() if name == retired]
        if to_drain and self._random.random() < 0.7:
            slot = self._random.choice(to_drain)
        targets = [name for name in self._created() if name not in (owners.get(slot), retired)]
        if slot not in owners or not targets:
            return
        source, target = owners[slot], self._random.choice(targets)
        line |= {"moved": slot, "source": source, "target": target}
        made = await self._mover.move(slot, source, target, takes_over=self._random.random() < 0.4)
        line["frozen"] = made.frozen

    async def owners(self) -> dict[int, str]:
        """Who serves the slots, by what each shard says of itself."""
        if any(shard.uuid is None for shard in self._gateway.shards.values()):
            await self._gateway.check()  # one may have joined
        records, _ = await read_records(self._gateway.shards)
        created = {name: record for name, record in records.items() if record is not None}
        return dict(enumerate(build_map(self._mover.plan, created).owners))

    def _created(self) -> list[str]:
        return [name for name, shard in self._gateway.shards.items() if shard.uuid is not None]

    def _known(self) -> dict[str, Any]:
        return {name: self._gateway.shards[name] for name in self._created()}

    async def _mend(self, line: dict[str, Any]) -> None:
        """Finish or end a move that somebody is at, or was."""
        halfway = [one for one in await find_unfinished(self._known()) if not one.is_rest]
        if halfway:
            await self.finish(self._random.choice(halfway), line)

    async def finish(self, one: Unfinished, line: dict[str, Any]) -> None:
        if one.peer is None:
            return
        at_source = one.row.state != "importing"
        source, target = (one.shard, one.peer) if at_source else (one.peer, one.shard)
        ends = not at_source or self._random.random() < 0.5
        line |= {"ended" if ends else "resumed": one.row.slot, "source": source, "target": target}
        if ends:
            await self._mover.end(one.row.slot, source, target)
        else:
            await self._mover.move(one.row.slot, source, target, takes_over=True)

    async def _tidy(self, line: dict[str, Any]) -> None:
        """Remove what moves have left behind."""
        rests = [one for one in await find_unfinished(self._known()) if one.is_rest]
        if rests:
            await self.remove(self._random.choice(rests), line)

    async def tell(self, rest: Unfinished) -> None:
        """Have all shards know of a decision: its mover may have died before he had told them."""
        if rest.row.state == RELEASED and rest.peer is not None:
            await self._mover.end(rest.row.slot, rest.shard, rest.peer)

    async def remove(self, rest: Unfinished, line: dict[str, Any]) -> None:
        line |= {"removed": rest.row.slot, "source": rest.shard}
        plan, known = self._mover.plan, self._known()
        line["kept"] = await remove_remains(plan, known, rest, grace_seconds=0)


async def clear_up(gateway: Gateway, argument: dict[str, Any]) -> list[str]:
    """Finish or end every move, empty the drained shard, and remove what is left behind.

    Returns what is left all the same.
    """
    one = Shifter(gateway, None, argument)
    kept: dict[str, Any] = {}
    for _ in range(20):
        halfway = [row for row in await find_unfinished(one._known()) if not row.is_rest]
        for row in halfway:
            with suppress(*EXPECTED):  # it may be over by now
                await one.finish(row, {})
        for _ in [name for name in (await one.owners()).values() if name == argument["drained"]]:
            with suppress(*EXPECTED):
                await one._move({})
        rests = [row for row in await find_unfinished(one._known()) if row.is_rest]
        for row in rests:
            await one.tell(row)
            await one.remove(row, kept)
        owners = await one.owners()
        left = await find_unfinished(one._known())
        if not left and argument["drained"] not in owners.values():
            return []
    return [*map(str, left), f"{kept}; slots are owned by {set(owners.values())}"]
