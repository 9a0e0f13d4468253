"""``make demo``: three tenants on four SQLite shards, with the real Runner and a scripted model.

Two processes, one after the other, hold the same conversations: what the second one's model is
given came out of the shards. Then a fifth shard is added, while further conversations go on. Run it
again, and the conversations go on from there.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tomllib
from pathlib import Path

from agents import Agent, RunConfig, Runner

from shardgate.gateway import Gateway
from shardgate.settings import GatewaySettings
from shardgate.testing.growth import ADDED, FILE, FOLDER, TALKS, grow, grown, show, take_back
from shardgate.testing.model import ScriptedModel, said_by_user

CONFIG = Path("config/demo.toml")

CONVERSATIONS = {
    ("acme", "chat-1"): ("My name is Ada.", "What is my name?"),
    ("acme", "support/42"): ("The printer is on fire.", "Is it still?"),
    ("globex", "chat-1"): ("My name is Hank.", "What is my name?"),
    ("initech", "chat-1"): ("I need the report.", "Did you get my note?"),
    ("initech", "TPS rapport é"): ("Which cover sheet?", "The new one?"),
}


def remember(said: list[str]) -> str:
    """The scripted answer: it tells what the model was given of the conversation."""
    return f"(message {len(said)} here) The first that you ever told me was: {said[0]!r}"


async def talk(gateway: Gateway, turn: int) -> None:
    """One turn of every conversation, all at the same time."""
    agent = Agent(name="Demo", model=ScriptedModel(remember))
    quiet = RunConfig(tracing_disabled=True)
    results = await asyncio.gather(
        *(
            Runner.run(
                agent,
                said[turn],
                session=gateway.tenant(tenant).session(session),
                run_config=quiet,
            )
            for (tenant, session), said in CONVERSATIONS.items()
        )
    )
    for ((tenant, session), said), result in zip(CONVERSATIONS.items(), results, strict=True):
        show(f"  {tenant + '/' + session:22} {said[turn]:26} {result.final_output}")


async def show_placement(gateway: Gateway) -> None:
    """Where each session lives, and what each tenant sees."""
    show("\nWhere each session lives:")
    show(f"  {'tenant':10} {'session':16} {'slot':>5}  {'shard':6} {'items':>5}")
    for tenant_id in sorted({tenant for tenant, _ in CONVERSATIONS}):
        page = await gateway.tenant(tenant_id).list_sessions()
        for session in sorted(page.sessions, key=lambda session: session.session_id):
            route = gateway.route(tenant_id, session.session_id)
            show(
                f"  {tenant_id:10} {session.session_id:16} {route.slot:>5}  {route.shard:6} "
                f"{session.item_count:>5}"
            )
    show("\nWhat each tenant sees of a session named 'chat-1':")
    for tenant_id in sorted({tenant for tenant, _ in CONVERSATIONS}):
        items = await gateway.tenant(tenant_id).session("chat-1").get_items(limit=4)
        show(f"  {tenant_id:10} {said_by_user(items)}")


async def main(settings: GatewaySettings, turn: int) -> None:
    """Hold one turn; the last one also shows where everything is."""
    async with Gateway(settings) as gateway:
        await talk(gateway, turn)
        if turn == 1:
            await show_placement(gateway)


def run() -> None:
    """The first turn here, the second in a process of its own; then a shard is added."""
    if not CONFIG.exists():
        sys.exit(f"the demo reads {CONFIG}: run it in the project's folder, with 'make demo'")
    values = tomllib.loads(CONFIG.read_text())
    settings = GatewaySettings.from_dict(values)
    if sys.argv[1:] == ["second"]:
        asyncio.run(main(settings, 1))
        return
    FOLDER.mkdir(exist_ok=True)
    if FILE.exists():
        show(f"The shard {ADDED} is there from the last time. It is drained, to be added again.")
        if not take_back(grown(values)):
            sys.exit(f"the shard {ADDED} could not be drained")
        show("")
    show("First process: each tenant says something.")
    asyncio.run(main(settings, 0))
    show("\nSecond process: the conversations go on.")
    second = [sys.executable, "-m", "shardgate.testing.demo", "second"]
    if subprocess.run(second, check=False).returncode != 0:  # noqa: S603 - this same program
        sys.exit("the second process failed")
    show(f"\nA fifth shard, {ADDED}, is added while {len(TALKS)} further conversations go on.")
    asyncio.run(grow(grown(values)))
    show(f"\nThe shards are the files in {FOLDER}/. Run 'make demo' again: it goes on from there.")


if __name__ == "__main__":
    run()
