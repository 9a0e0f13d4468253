"""What a run of the benchmark is asked to do."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

PARTS = (
    "exchange",
    "mariadb",
    "sqlite",
    "history",
    "sessions",
    "shards",
    "wal",
    "routing",
    "moves",
)
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run. ``seconds`` is how long a slice begins exchanges for; each slice ends by itself."""

    parts: tuple[str, ...] = PARTS
    callers: tuple[int, ...] = (1, 8, 32, 128, 512)
    few_callers: tuple[int, ...] = (1, 32)
    shards: tuple[int, ...] = (1, 4, 16)
    histories: tuple[int, ...] = (20, 200, 5000)
    sessions: tuple[int, ...] = (1_000, 100_000)
    usual_sessions: int = 1_000
    contestants: tuple[str, ...] = ()
    rounds: int = 5
    seconds: float = 0.6
    warm_up: float = 0.5
    connections: int = 32
    servers: int = 1
    appends: int = 1_000
    moved_sessions: int = 20_000
    moved_history: int = 50
    quiet_seconds: float = 15.0
    results: Path = RESULTS
    write_readme: bool = False

    def chosen(self, contestant: str) -> bool:
        """Whether a contestant takes part; all do where none is named."""
        return not self.contestants or contestant in self.contestants


QUICK = Options(
    parts=("exchange", "mariadb", "sqlite", "history", "shards", "routing", "moves"),
    callers=(1, 32, 128),
    shards=(1, 4),
    histories=(20, 2000),
    sessions=(1_000, 10_000),
    usual_sessions=200,
    rounds=3,
    seconds=0.25,
    warm_up=0.2,
    appends=200,
    moved_sessions=2_000,
    moved_history=25,
    quiet_seconds=4.0,
)


def read_options(arguments: list[str] | None = None) -> Options:
    """The options of a command line; ends the program where they are mistaken."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    start = QUICK if given.pop("quick") else Options()
    options = replace(start, **{name: value for name, value in given.items() if value is not None})
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure Shardgate beside its peers, on servers that this starts itself.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="shorter, without wal and sessions: three minutes")
    add("--only", dest="parts", type=_words, metavar="PARTS", help=f"of {','.join(PARTS)}")
    add("--contestants", type=_words, metavar="NAMES", help="for example gateway,raw,sdk")
    add("--callers", type=_numbers, metavar="N,N", help="callers at the same time (exchange)")
    add("--shards", type=_numbers, metavar="N,N", help="numbers of shards")
    add("--histories", type=_numbers, metavar="N,N", help="items in a session at the start")
    add("--sessions", type=_numbers, metavar="N,N", help="numbers of sessions")
    add("--rounds", type=int, metavar="N", help="rounds; medians are taken over them")
    add("--seconds", type=float, metavar="S", help="length of a slice")
    add("--connections", type=int, metavar="N", help="connections of each contestant, at most 40")
    add("--servers", type=int, metavar="N", help="servers that the shards are spread over")
    add("--appends", type=int, metavar="N", help="appends for the part wal")
    add("--results", type=Path, metavar="FOLDER", help="where the figures and charts go")
    add(
        "--write-readme",
        action="store_const",
        const=True,
        help="put this run's tables and charts into benchmarks/README.md",
    )
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word.replace("_", "")) for word in text.split(","))
