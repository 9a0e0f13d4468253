"""The files of ``deploy/`` as Docker, compose and Kubernetes would read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = DEPLOY / "kubernetes"
SECRETS_DIR = "SHARDGATE_SECRETS_DIR"

Document = dict[str, Any]


def compose() -> Document:
    """The compose file, with each ``${NAME:-default}`` as it is without a ``.env``."""
    text = (DEPLOY / "compose.yaml").read_text()
    loaded: Document = yaml.safe_load(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text))
    return loaded


def manifests() -> list[Document]:
    """Every object that the kustomization applies, in its order."""
    return [each for name in kustomization()["resources"] for each in documents(MANIFESTS / name)]


def kustomization() -> Document:
    return documents(MANIFESTS / "kustomization.yaml")[0]


def documents(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text()))


def strings(value: object, at: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a document, with the path to it."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(inner, f"{at}/{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from strings(inner, f"{at}/{index}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction of a Dockerfile; ``stage`` counts the FROMs, from 0."""

    word: str
    text: str
    stage: int

    @property
    def operands(self) -> list[str]:
        """The words after the options."""
        return [word for word in self.text.split() if not word.startswith("--")]

    @property
    def array(self) -> list[str]:
        """The program and its arguments; ValueError where a shell would be needed."""
        loaded: list[str] = json.loads(self.text[self.text.index("[") :])
        return loaded


def dockerfile() -> list[Instruction]:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    found: list[Instruction] = []
    stage = -1
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word:
            stage += word == "FROM"
            found.append(Instruction(word=word, text=rest.strip(), stage=stage))
    return found
