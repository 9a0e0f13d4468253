"""The Dockerfile: every file that it copies is there, the wheel builds, nothing runs as root."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from deploy.files import DEPLOY, ROOT, Instruction, dockerfile

if TYPE_CHECKING:
    from collections.abc import Iterable

KNOWN = {
    *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL"),
    *("ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
}
INSTRUCTIONS = dockerfile()
LAST_STAGE = [each for each in INSTRUCTIONS if each.stage == INSTRUCTIONS[-1].stage]


def named(word: str, among: Iterable[Instruction] = INSTRUCTIONS) -> list[Instruction]:
    return [each for each in among if each.word == word]


def copied_from_the_checkout() -> list[tuple[str, str]]:
    """Source and destination of each COPY that does not take from another stage."""
    return [
        (source, copy.operands[-1])
        for copy in named("COPY")
        if "--from=" not in copy.text
        for source in copy.operands[:-1]
    ]


def test_every_instruction_is_known() -> None:
    assert {each.word for each in INSTRUCTIONS} <= KNOWN
    assert INSTRUCTIONS[0].word == "FROM"


def test_base_images_are_pinned_to_a_python_that_the_package_supports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for start in named("FROM"):
        match = re.fullmatch(r"python:(\d+\.\d+)-slim-\w+", start.operands[0])
        assert match, start.text
        assert match[1] in SpecifierSet(project["requires-python"])
        assert f"Programming Language :: Python :: {match[1]}" in project["classifiers"]


def test_everything_copied_exists_and_is_sent_to_the_builder() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    admitted = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert rules[0] == "*"
    for source, _ in copied_from_the_checkout():
        assert (ROOT / source).exists(), source
        assert any(f"{source}/".startswith(f"{path}/") for path in admitted), source
    used = " ".join(source for source, _ in copied_from_the_checkout())
    assert all(path in used for path in admitted)


def test_a_stage_copies_from_a_stage_before_it() -> None:
    stages = [start.operands[-1] for start in named("FROM")]
    for copy in named("COPY"):
        from_stage = re.search(r"--from=(\S+)", copy.text)
        if from_stage:
            assert from_stage[1] in stages[: copy.stage]


def test_the_wheel_builds_from_what_is_copied(tmp_path: Path) -> None:
    build = tmp_path / "build"
    build.mkdir()
    ours = (each for each in copied_from_the_checkout() if not each[0].startswith("deploy/"))
    for source, destination in ours:
        place = build / destination
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place)
        else:
            shutil.copy(ROOT / source, place)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel"],
        cwd=build,
        check=True,
        capture_output=True,
    )
    (wheel,) = (build / "dist").iterdir()
    assert wheel.match("shardgate-*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    assert {"shardgate/__init__.py", "shardgate/py.typed", "shardgate/settings.py"} <= set(inside)
    assert not [name for name in inside if not name.startswith(("shardgate/", "shardgate-"))]


def test_the_wheel_is_installed_with_extras_that_the_package_has() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (asked,) = re.findall(r'"\$\{wheel\}\[([\w,]+)\]"', (DEPLOY / "Dockerfile").read_text())
    assert asked.split(",") == ["agents", "cli"]
    assert set(asked.split(",")) <= set(extras)


def test_it_runs_as_a_numbered_user_that_is_not_root() -> None:
    # Kubernetes can check runAsNonRoot only for a number.
    (user,) = named("USER", LAST_STAGE)
    uid, gid = (int(part) for part in user.text.split(":"))
    assert uid > 0
    assert gid > 0
    after = LAST_STAGE[LAST_STAGE.index(user) :]
    assert not named("RUN", after)
    assert not named("COPY", after)
    assert f"--uid {uid} " in " ".join(run.text for run in named("RUN", LAST_STAGE))


def test_its_command_starts_the_application(main: Any) -> None:
    (command,) = named("CMD", LAST_STAGE)
    program, target, *options = command.array
    assert program == "uvicorn"
    assert target == "app.main:app"
    assert callable(main.app)
    (port,) = named("EXPOSE", LAST_STAGE)
    assert f"--port={port.text}" in options
    (place,) = [copy.operands for copy in named("COPY", LAST_STAGE) if "deploy" in copy.text]
    (workdir,) = named("WORKDIR", LAST_STAGE)
    assert place == ["deploy/app", f"{workdir.text}/app"]


def test_its_health_check_asks_a_route_that_the_application_has(main: Any) -> None:
    (check,) = named("HEALTHCHECK", LAST_STAGE)
    program, flag, code = check.array
    assert (program, flag) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    match = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", code)
    assert match
    assert match[1] == named("EXPOSE", LAST_STAGE)[0].text
    assert match[2] in {route.path for route in main.app.routes}


def test_no_secret_is_put_into_the_image() -> None:
    for each in (*named("ENV"), *named("ARG")):
        assert not re.search(r"PASSWORD|SECRET|TOKEN|KEY|SHARDGATE_", each.text)


def test_the_requirements_admit_the_versions_that_the_tests_run_on() -> None:
    lines = (DEPLOY / "app" / "requirements.txt").read_text().splitlines()
    for line in (line for line in lines if line and not line.startswith("#")):
        requirement = Requirement(line)
        assert version(requirement.name) in requirement.specifier


def test_hadolint_finds_nothing() -> None:
    beside = str(Path(sys.executable).parent)
    hadolint = shutil.which("hadolint", path=beside) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
