"""One address for all parts: each form of URL through SDK, worker, Celery, command and doctor; the rest refused."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import redis

from samphire import Client, InvalidInputError, Step
from samphire.transport.address import Address, broker_of, redact
from samphire.transport.connection import client_of
from samphire_broker.embedded.ports import choose_port
from samphire_workers.celery_settings import celery_settings, refuse_other_addresses
from tests.stacks import ENDS_S, Up, bound, clean_environment, eventually, samphire, standing_still
from tests.support.plain import plain_celery
from tests.support.tools import tool
from tests.workers import running_worker

ODD_PASSWORD = "p#a/s?s@w:o%r&d=é +"
"""What has a meaning in a URL, all of it."""
SECRET = "hunter2"
ROOT_RULES = ("on", "~*", "&*", "+@all")


class RealRedis:
    """Debian's Redis: on a port, on one with TLS, and on a socket; with a user who has an odd password."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.tls_port = choose_port(0, ""), choose_port(0, "")
        self.socket = folder / "a socket"
        self.pid = 0

    def start(self) -> subprocess.Popen[bytes]:
        """Start it; the binary that checks files is the server under another name."""
        server = self.folder / "redis-server"
        server.symlink_to(tool("redis-tools", "redis-check-rdb"))
        self._make_certificate()
        command = [str(server), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        command += ["--tls-port", str(self.tls_port), "--tls-auth-clients", "no", "--unixsocket", str(self.socket)]
        command += ["--tls-cert-file", f"{self.folder}/cert", "--tls-key-file", f"{self.folder}/key"]
        command += ["--tls-ca-cert-file", f"{self.folder}/cert", "--appendonly", "yes", "--save", ""]
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(bound(command, "KILL"), stdout=log, stderr=log, start_new_session=True)
        self.pid = process.pid
        return process

    def _make_certificate(self) -> None:
        command = [tool("openssl", "openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-keyout", f"{self.folder}/key", "-out", f"{self.folder}/cert", "-subj", "/CN=localhost"]
        command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run(command, check=True, capture_output=True, timeout=ENDS_S)

    def url(self, kind: str) -> str:
        """A URL of each kind that is served."""
        secret = quote(ODD_PASSWORD, safe="")
        user = f"odd%40one:{secret}@"
        ca = f"ssl_ca_certs={quote(str(self.folder / 'cert'), safe='')}"
        return {
            "valkey": f"valkey://127.0.0.1:{self.port}/1",
            "user": f"redis://{user}127.0.0.1:{self.port}/2",
            "password in the query": f"redis://127.0.0.1:{self.port}?db=3&username=odd%40one&password={secret}",
            "unix": f"unix://{user}{quote(str(self.socket))}?db=4",
            "redis+socket": f"redis+socket://{user}{quote(str(self.socket))}?virtual_host=5",
            "tls": f"rediss://{user}localhost:{self.tls_port}/6?{ca}",
            "tls, CERT_REQUIRED": f"rediss://localhost:{self.tls_port}/7?{ca}&ssl_cert_reqs=CERT_REQUIRED",
            "tls, none": f"rediss://127.0.0.1:{self.tls_port}/8?ssl_cert_reqs=none",
            "tls, no authority": f"rediss://localhost:{self.tls_port}/9",
        }[kind]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    """One server for all of this file."""
    made = RealRedis(tmp_path_factory.mktemp("redis"))
    process = made.start()
    client = redis.Redis(port=made.port, socket_timeout=10)
    try:
        eventually(lambda: answers(client), 20, "the broker's answer")
        client.execute_command("ACL", "SETUSER", "odd@one", f">{ODD_PASSWORD}", *ROOT_RULES)
        client.execute_command("ACL", "SETUSER", "default", f">{SECRET}", "nopass", *ROOT_RULES)
        yield made
    finally:
        client.close()
        process.terminate()
        process.wait(10)


CLOSING = """
import asyncio, gc, sys
from samphire.transport.address import Address
from samphire.transport.direct import DirectConnection

async def test():
    address = Address.parse(sys.argv[1])
    idle, waiting = DirectConnection(address), DirectConnection(address)
    await waiting.ask("PING")
    wait = asyncio.create_task(waiting.execute("BLPOP", "nothing", 60))
    print(await idle.ask("PING"), flush=True)
    sys.stdin.readline()
    await idle.close()
    wait.cancel()
    await asyncio.wait([wait])

asyncio.run(test())
gc.collect()
"""


def test_a_connection_is_closed_whatever_the_other_side_does(real: RealRedis) -> None:
    """An idle one, and one whose reply is awaited. TLS has a goodbye, for which nobody waits.

    Python complains of what was left open.
    """
    command = [sys.executable, "-W", "always", "-c", CLOSING, real.url("tls")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=clean_environment(), **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        assert process.stdout.readline() == "b'PONG'\n"
        with standing_still(real.pid):
            _, complaints = process.communicate("\n", timeout=ENDS_S)
    assert process.returncode == 0 and "ResourceWarning" not in complaints, complaints


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@pytest.mark.parametrize("kind", ["valkey", "user", "unix", "redis+socket", "tls", "tls, CERT_REQUIRED", "tls, none"])
def test_every_part_takes_the_same_address(real: RealRedis, stack: Up, tmp_path: Path, kind: str) -> None:
    """A worker, the SDK, a canvas (Celery's own connections), plain Celery's result, the command and the doctor."""
    url = real.url(kind)
    with running_worker(tmp_path / "w", url, stack.triton_grpc) as worker, Client(url) as client:
        one = {"input_fp32": np.ones((1, 1), np.float32)}
        first = Step("identity", one)
        chain = client.chain(first, Step("identity", {"input_fp32": first["output_fp32"]}))
        assert chain.result(60).outputs["output_fp32"][0, 0] == 1
        tensor = {"name": "input_fp32", "datatype": "FP32", "shape": [1, 1], "data": [3.0]}
        with plain_celery("memory://") as app:
            app.conf.update(celery_settings(broker_of(url)))
            kwargs = {"model_name": "identity", "inputs": [tensor]}
            sent = app.send_task("samphire.infer", kwargs=kwargs, queue="inference")
            assert sent.get(timeout=60)["outputs"][0]["data"] == [3]
        ended = samphire(url, "queues", "--json")
        assert ended.returncode == 0, ended.stderr
        findings = [json.loads(line) for line in samphire(url, "doctor", "--json").stdout.splitlines()]
        states = {found["name"]: found["state"] for found in findings}
        assert (states["broker"], states["rights"], states["workers"]) == ("ok", "ok", "ok")
        for text in (worker.log(), ended.stderr, json.dumps(findings), repr(client)):
            assert ODD_PASSWORD not in text and quote(ODD_PASSWORD, safe="") not in text


def test_a_server_that_is_not_trusted_is_not_used(real: RealRedis) -> None:
    """Without its authority the certificate is none."""
    ended = samphire(real.url("tls, no authority"), "queues")
    assert ended.returncode != 0 and "certificate verify failed" in ended.stderr


@pytest.mark.parametrize("place", ["in the middle", "in the query"])
def test_a_wrong_password_is_said_once_and_ends_the_worker(
    real: RealRedis, stack: Up, tmp_path: Path, place: str
) -> None:
    """At once, in one line, and without the password."""
    where = "odd%40one:wr0ng@127.0.0.1" if place == "in the middle" else "127.0.0.1"
    query = "" if place == "in the middle" else "?username=odd%40one&password=wr0ng"
    environment = {**os.environ, "SAMPHIRE_TRITON_URLS": stack.triton_grpc}
    environment["SAMPHIRE_BROKER_URL"] = f"redis://{where}:{real.port}/1{query}"
    command = [sys.executable, "-m", "celery", "-A", "samphire_workers.app", "worker", "--loglevel", "INFO"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=ENDS_S, check=False, env=environment)
    assert ended.returncode == 78
    said = [line for line in ended.stderr.splitlines() if "refused the credentials" in line]
    assert len(said) == 1 and "wr0ng" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://host", "expected a broker URL"),
        ("sentinel://a:26379/0", "expected a broker URL"),
        ("redis://host:port/0", "percent-encode"),
        ("redis://host:0/0", "port 0"),
        ("redis://host/abc", "the number of a database, given 'abc'"),
        ("redis://host/-1", "the number of a database"),
        ("redis://host?db=x", "the number of a database"),
        ("redis://host?protocol=3", "an option that is not known"),
        ("redis://host?decode_responses=true", "an option that is not known"),
        ("redis://host?ssl_cert_reqs=none", "no TLS: expected rediss://"),
        ("rediss://host?ssl_cert_reqs=maybe", "required, optional or none, given 'maybe'"),
        ("rediss://host?ssl_ca_certs=/no/such/file", "expected a file as ssl_ca_certs"),
        ("rediss://host?ssl_check_hostname=perhaps", "true or false"),
        ("unix://", "unix:///path/to/socket"),
        ("unix://host/path", "unix:///path/to/socket"),
        (f"redis://user:{SECRET}#x@host/0", "percent-encode"),
        (f"redis://user:{SECRET}?x@host/0", "percent-encode"),
        (f"redis://user:{SECRET}/x@host/0", "percent-encode"),
        (f"redis://user:[{SECRET}@host/0", "percent-encode"),
        (f"rediss://host?ssl_cert_reqs=none;password={SECRET}", "given something else"),
        (f"rediss://host?ssl_check_hostname=yes;password={SECRET}", "given something else"),
        (f"rediss://host?ssl_ca_certs=/ca;password={SECRET}", "given something else"),
        (f"redis://host?db=0;password={SECRET}", "given something else"),
    ],
)
def test_what_is_no_address_is_refused_in_one_line(url: str, text: str) -> None:
    """By name, and without any part of a password."""
    with pytest.raises(InvalidInputError, match=text) as error:
        Client(url)
    assert SECRET not in str(error.value) and "\n" not in str(error.value)
    assert SECRET not in redact(url)
    ended = samphire(url, "queues")
    assert ended.returncode != 0 and SECRET not in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://user:{SECRET}@host:1/2", "redis://user:***@host:1/2"),
        (f"redis://:{SECRET}@[::1]/2", "redis://:***@[::1]:6379/2"),
        (f"redis://host?password={SECRET}&db=1", "redis://:***@host:6379/1"),
        (f"valkeys://a:{SECRET}@host", "rediss://a:***@host:6379/0"),
        (f"unix://a:{SECRET}@/run/r.sock?db=1", "unix://a:***@/run/r.sock?db=1"),
        ("redis://host", "redis://host:6379/0"),
        (f"amqp://a:{SECRET}@host", "***"),
        (SECRET, "***"),
        (f"user:{SECRET}@redis://host", "***"),
    ],
)
def test_an_address_is_shown_without_its_password(url: str, shown: str) -> None:
    """In every text; and the whole one leads to the same."""
    assert redact(url) == shown
    if shown != "***":
        address = Address.parse(url)
        assert SECRET not in repr(address) and Address.parse(address.url) == address


def test_tls_options_in_every_spelling() -> None:
    """Checked by default, and only then against the host's name."""
    required = dict(Address.parse("rediss://host").tls or ())
    assert required == {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
    for spelling in ("none", "CERT_NONE", "None"):
        found: dict[str, Any] = dict(Address.parse(f"rediss://host?ssl_cert_reqs={spelling}").tls or ())
        assert found == {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}


def test_celerys_own_variables_do_not_split_a_worker(tmp_path: Path) -> None:
    """Celery would take them for a part of it, so a worker with them does not start."""
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
        with pytest.raises(InvalidInputError, match=f"{name} is set"):
            refuse_other_addresses({name: "redis://elsewhere"})
    refuse_other_addresses({"CELERY_BROKER_URL": "", "OTHER": "x"})


def test_a_client_for_looking_around(real: RealRedis) -> None:
    """The blocking one, over each kind of connection."""
    for kind in ("user", "password in the query", "unix", "tls"):
        with client_of(Address.parse(real.url(kind)), 5) as client:
            assert client.ping()
