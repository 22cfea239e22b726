"""`make dist`: a wheel with the tag's version, and that wheel alone, in an empty folder, as a new user has it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stacks import ENDS_S, clean_environment, need_servers, running_stack

ROOT = Path(__file__).parents[1]
INSTALL_S = 600
TAG = "9.8.7"
TUTORIAL = (ROOT / "docs" / "models.md").read_text()


def environment(home: Path) -> dict[str, str]:
    """The environment of a user who has nothing yet."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_CONSTRAINT")
    left = {name: value for name, value in clean_environment().items() if name not in ours}
    return left | {"HOME": str(home)}


def run(folder: Path, *command: str | Path, timeout_s: float = ENDS_S) -> str:
    """Output of a command in `folder`."""
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment(folder), timeout=timeout_s, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist` builds of a repository with these files and a tag."""
    checkout = tmp_path_factory.mktemp("dist") / "checkout"
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main")
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        timeout=ENDS_S,
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    (checkout / ".venv").symlink_to(Path(sys.executable).parents[1])
    with (checkout / ".gitignore").open("a") as ignored:
        ignored.write(".venv\n")
    for command in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "-m", "all"), ("tag", f"v{TAG}")):
        run(checkout, *git, *command)
    # The environment is that of these tests, and is there already.
    run(checkout, "make", "--assume-old=.venv/.dev", "dist", timeout_s=INSTALL_S)
    return checkout / "dist"


def test_the_version_is_that_of_the_tag(dist: Path) -> None:
    """Of both files; the sdist has what it takes to build the wheel again."""
    assert sorted(path.name for path in dist.iterdir()) == [
        f"samphire-{TAG}-py3-none-any.whl",
        f"samphire-{TAG}.tar.gz",
    ]


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with an environment that has the wheel and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("user")
    run(folder, sys.executable, "-m", "venv", "venv")
    (wheel,) = dist.glob("*.whl")
    pip = folder / "venv" / "bin" / "pip"
    run(folder, pip, "install", "--quiet", "--disable-pip-version-check", f"{wheel}[embedded]", timeout_s=INSTALL_S)
    return folder


def test_the_wheel_alone_runs_the_demo(installed: Path) -> None:
    """With the versions that pip chooses, without a clone."""
    need_servers()
    said = run(installed, installed / "venv" / "bin" / "samphire", "demo")
    assert "accuracy: 0.9" in said and "Flower shows the tasks" in said, said
    version = run(installed, installed / "venv" / "bin" / "python", "-c", VERSION).strip()
    assert version == TAG


VERSION = "import importlib.metadata; print(importlib.metadata.version('samphire'))"


def test_the_wheel_alone_runs_the_tutorial(installed: Path) -> None:
    """The page's script and its three commands, from nothing to an answer."""
    need_servers()
    script = re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL)[0]
    make, serve, submit = [line.removeprefix("$ ") for line in re.findall(r"^\$ .*$", TUTORIAL, re.MULTILINE)]
    bin_folder = installed / "venv" / "bin"
    (installed / "iris.py").write_text(script)
    run(installed, bin_folder / "python", *make.split()[1:])
    options = [str(installed / word) if word == "models" else word for word in serve.split()[2:]]
    with running_stack(installed / "stack", *options, env=NOTHING, samphire=bin_folder / "samphire") as up:
        said = subprocess.run(
            submit.replace("samphire", str(bin_folder / "samphire"), 1),
            shell=True,
            cwd=installed,
            env=environment(installed) | {"SAMPHIRE_BROKER_URL": up.broker_url},
            capture_output=True,
            text=True,
            timeout=ENDS_S,
            check=True,
        ).stdout
    assert "iris version 1, task " in said and "probabilities FP32[1, 3]: " in said


NOTHING = {"PYTHONPATH": "", "VIRTUAL_ENV": ""}
"""Of what leads to the checkout."""
