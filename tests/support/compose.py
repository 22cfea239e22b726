"""docker-compose.yml as docker-compose reads it, and its services as processes on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from samphire import Client
from samphire_broker.embedded.tritonserver import triton_spec
from samphire_broker.embedded.valkey import server_binary
from tests.stacks import bound, clean_environment
from tests.support.tools import tool

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60
SECRETS = {
    "SAMPHIRE_FLOWER_PASSWORD": "a-password",
    "SAMPHIRE_BROKER_URL": "redis://:0a1B2c3D@valkey:6379/0",
}

NAMED = {"SAMPHIRE_NAMESPACE": "shop", "SAMPHIRE_CELERY_KEY_PREFIX": "shop_"}
"""Names of an operator's own, which every part has to know."""


def compose_config(variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What docker-compose makes of the file, with both profiles, and these variables in the place of `.env`."""
    with tempfile.NamedTemporaryFile("w") as file:
        file.writelines(f"{name}={value}\n" for name, value in variables.items())
        file.flush()
        command = [tool("docker-compose", "docker-compose"), "--file", str(ROOT / "docker-compose.yml")]
        command += ["--env-file", file.name, "--profile", "gpu", "--profile", "cpu", "config"]
        return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=TIMEOUT_S)


def services_with(variables: Mapping[str, str]) -> dict[str, Any]:
    """The services of the file by name, where these variables are set."""
    done = compose_config(variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout)["services"]
    return found


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services with nothing set but what is required."""
    return services_with(SECRETS)


def words(command: str | list[str]) -> list[str]:
    """The words of a command: what is asked for by `$$` is a `$`."""
    return [word.replace("$$", "$") for word in (shlex.split(command) if isinstance(command, str) else command)]


def option(command: list[str], name: str) -> str:
    """What stands behind an option."""
    return command[command.index(name) + 1]


def seconds(duration: str) -> float:
    """A duration of compose, as 1m20s."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|[hms])", duration))


def bytes_of(size: str | int) -> int:
    """Of a size as 4gb."""
    number, unit = re.fullmatch(r"(\d+)([kmg]?)b?", str(size)).groups()
    return int(number) * {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}[unit]


@dataclass
class Deployment:
    """The services as processes, and where they are."""

    services: dict[str, Any]
    places: dict[str, str]
    """What a container calls something, and what it is here."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def here(self, text: str) -> str:
        """`text` with the places of containers replaced by those of this machine."""
        pattern = "|".join(re.escape(place) for place in sorted(self.places, key=len, reverse=True))
        return re.sub(pattern, lambda match: self.places[match[0]], text)

    @property
    def broker_url(self) -> str:
        return self.here(SECRETS["SAMPHIRE_BROKER_URL"])

    def client(self) -> Client:
        """A client as a backend of this machine has it."""
        return Client(
            self.broker_url,
            namespace=NAMED["SAMPHIRE_NAMESPACE"],
            celery_key_prefix=NAMED["SAMPHIRE_CELERY_KEY_PREFIX"],
        )

    def environment(self, name: str) -> dict[str, str]:
        given = self.services[name].get("environment", {})
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        told = {key: self.here(value) for key, value in given.items() if value is not None}
        return clean_environment() | {"PATH": path} | told

    def healthy(self, name: str, replace: tuple[str, str] = ("", ""), before: Sequence[str] = ()) -> bool:
        """Run the service's health check as Docker would, with something replaced in it, or before it."""
        kind, *check = words(self.services[name]["healthcheck"]["test"])
        command = [self.here(word.replace(*replace) if replace[0] else word) for word in check]
        if kind == "CMD-SHELL":
            command = ["sh", "-c", *command]
        done = subprocess.run(
            [*before, *command],
            env=self.environment(name),
            capture_output=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        return done.returncode == 0


def may_confine() -> bool:
    """Whether this user may take capabilities and writable folders from a process."""
    if os.geteuid() != 0:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, timeout=TIMEOUT_S).returncode == 0


def confined(service: Mapping[str, Any], command: list[str], writable: Path) -> list[str]:
    """The command with what its service takes from it, as far as that can be done without a container.

    That is capabilities, new privileges, and a root that can be written to: but for the one folder.
    """
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    writable.mkdir(exist_ok=True)
    less = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--pdeathsig", "TERM"]
    if not service.get("read_only"):
        return [*less, *command]
    mounts = 'mount --bind "$0" "$0"; mount -o remount,bind,ro /; exec "$@"'
    return ["unshare", "--mount", "sh", "-ec", mounts, str(writable), *less, *command]


@contextlib.contextmanager
def process(command: list[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        child = subprocess.Popen(
            bound(command), stdout=out, stderr=out, env=environment, cwd=log.parent, start_new_session=True
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def valkey_here(deployment: Deployment, folder: Path) -> list[str]:
    """The file's command for the server of this machine, with its data in a folder."""
    command = [deployment.here(word) for word in words(deployment.services["valkey"]["command"])]
    command[command.index("valkey-server")] = server_binary()
    return [*command, "--bind", "127.0.0.1", "--port", deployment.places["6379"], "--dir", str(folder)]


def triton_here(deployment: Deployment, folder: Path) -> tuple[list[str], Mapping[str, str], Any]:
    """The file's command for the tritonserver of this machine: its flags, and where things are here."""
    ports = [int(deployment.places[port]) for port in ("8001", "8000", "8002")]
    spec = triton_spec(folder, *ports, progress=print)
    flags = ("--backend-", "--grpc-address", "--grpc-port", "--http-", "--metrics-")
    placed = [flag for flag in spec.command if flag.startswith(flags)]
    command = [deployment.here(word) for word in words(deployment.services["triton-cpu"]["command"])]
    command[command.index("tritonserver")] = spec.command[0]
    return [*command, *placed], clean_environment() | dict(spec.env), spec
