"""The Dockerfiles, without a Docker engine: what they install is installed and run on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stacks import ENDS_S, clean_environment
from tests.support.compose import ROOT, TIMEOUT_S, services  # noqa: F401

DOCKERFILES = ("broker/Dockerfile", "workers/Dockerfile")


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The file's instructions: name and arguments, continued lines joined, comments left out."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / dockerfile).read_text()).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_images_run_as_nobody_in_particular(dockerfile: str) -> None:
    """On the slim base, as a user without rights, in the version that the tests run in."""
    steps = instructions(dockerfile)
    assert [rest.split()[0] for name, rest in steps if name == "FROM"] == ["python:3.11-slim"] * 2
    assert [rest for name, rest in steps if name == "USER"] == ["samphire"]
    assert any(name == "RUN" and rest.startswith("useradd") and rest.endswith(" samphire") for name, rest in steps)


BROKER = ["samphire --version", "celery -A samphire_workers.app flower --help"]
WORKER = ["celery -A samphire_workers.app report"]
IMAGES = [("broker/Dockerfile", "flower", BROKER), ("workers/Dockerfile", "worker", WORKER)]
if os.environ.get("SAMPHIRE_IMAGES") != "all":  # `make images`; else the one that has all that is in the other
    IMAGES = [("broker/Dockerfile", "flower", BROKER + WORKER)]


def test_the_workers_image_is_the_brokers_without_flower() -> None:
    """But for what it runs, and for the settings of its memory."""
    broker, worker = (
        [(name, rest) for name, rest in instructions(file) if name not in ("CMD", "ENV")] for file in DOCKERFILES
    )
    assert worker == [(name, rest.replace("[server,flower]", "[server]")) for name, rest in broker]


@pytest.mark.parametrize(("dockerfile", "service", "commands"), IMAGES)
def test_what_an_image_installs_runs(
    services: dict[str, Any], tmp_path: Path, dockerfile: str, service: str, commands: list[str]
) -> None:
    """Its COPY lines make the folder, its pip lines the environment, from wheels only: slim has no compiler."""
    assert services[service]["build"]["dockerfile"] == dockerfile
    context, target = tmp_path / "src", tmp_path / "samphire"
    context.mkdir()
    environment = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}
    environment |= {"PIP_ONLY_BINARY": ":all:", "PIP_NO_COMPILE": "1"}  # byte code takes longer than the rest
    for name, rest in instructions(dockerfile):
        if name == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, context / source)
        elif name == "RUN" and "/opt/samphire" in rest:
            line = rest.replace("/opt/samphire", str(target)).replace(" --no-cache-dir", "")
            line = re.sub(r"^python ", f"{sys.executable} ", line)
            done = subprocess.run(
                line, shell=True, cwd=context, env=environment, capture_output=True, text=True, timeout=ENDS_S
            )
            assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(context)  # an image has the environment alone
    for command in commands:
        done = subprocess.run(
            [target / "bin" / command.split()[0], *command.split()[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    frozen = subprocess.run([target / "bin" / "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    pinned = {line.lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    installed = {line.lower().replace("_", "-") for line in frozen.splitlines() if not line.startswith("samphire")}
    assert installed <= pinned, installed - pinned
