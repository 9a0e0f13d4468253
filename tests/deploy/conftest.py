"""What the tests of ``deploy/`` share: an environment without settings, and the application."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from deploy.files import DEPLOY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AGENT_VARIABLES = ("OPENAI_API_KEY", "APP_MODEL")


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("SHARDGATE_") or name in AGENT_VARIABLES:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module ``app.main``, imported as in the image."""
    monkeypatch.syspath_prepend(DEPLOY)
    yield importlib.import_module("app.main")
    for name in [name for name in sys.modules if name == "app" or name.startswith("app.")]:
        del sys.modules[name]
