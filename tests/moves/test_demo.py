"""``make demo`` runs, ends with a rebalance under running conversations, and can be run again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = Path(__file__).parents[2] / "config" / "demo.toml"
VERIFIED = (
    r"\d+ slots moved, \d+ items verified, frozen \d+ ms at most; every conversation is whole"
)


@pytest.fixture
def demo(tmp_path: Path) -> Callable[[], str]:
    """Run the demo in a folder of its own: what it says."""
    (tmp_path / "config").mkdir()
    shutil.copy(CONFIG, tmp_path / "config")
    known = {name: value for name, value in os.environ.items() if name[:10] != "SHARDGATE_"}
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "shardgate.testing.demo"],
            cwd=tmp_path,
            env=known | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_it_ends_with_a_shard_that_is_added(demo: Callable[[], str]) -> None:
    said = demo()
    assert re.search(VERIFIED, said)
    assert re.search(r"running-\d +\d+  s\d -> s4$", said, re.MULTILINE)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_it_can_be_run_again(demo: Callable[[], str]) -> None:
    demo()
    said = demo()
    assert "shard s4 owns no slot" in said
    assert "(message 4 here)" in said
    assert re.search(VERIFIED, said)
