"""The examples run as a reader runs them: under uvicorn, a preforking gunicorn and Celery's prefork pool."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener
from uuid import uuid4

import numpy as np
import pytest

from samphire import Client
from samphire.wire import keys
from samphire_broker.digits import load_split
from samphire_broker.embedded.ports import choose_port
from tests.stacks import ENDS_S, Up, bound, clean_environment, eventually, running_valkey
from tests.support.names import KEYS
from tests.support.plain import plain_celery

EXAMPLES = Path(__file__).parents[1] / "clients" / "python" / "examples"
GUNICORN = ("gunicorn", "--preload", "--workers", "2", "--no-control-socket", "--bind", "127.0.0.1:{port}")
SERVERS = {
    "fastapi": ("uvicorn", "--host", "127.0.0.1", "--port", "{port}", "fastapi_app:app"),
    "flask": (*GUNICORN, "flask_app:app"),
    "django": (*GUNICORN, "django_app:application"),
}
TIMEOUT_S = 30


@functools.cache
def hundred() -> tuple[np.ndarray, np.ndarray]:
    """Held-out images and their labels."""
    digits = load_split()
    return digits.held_out_images[:100], digits.held_out_labels[:100]


open_url = build_opener(ProxyHandler({})).open


@contextlib.contextmanager
def running(folder: Path, broker_url: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of an example in a group of its own, which is ended with all of it."""
    environment = {**clean_environment(), "SAMPHIRE_BROKER_URL": broker_url}
    output = folder / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(
            bound([sys.executable, "-m", *command]),
            cwd=EXAMPLES,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield process
        process.terminate()
        process.wait(20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "Traceback" not in output.read_text(), output.read_text()


@dataclass
class Answer:
    """What a server answered."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """A running web application."""

    address: str

    def get(self, path: str) -> Answer:
        return self._ask(Request(self.address + path))

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        return self._ask(Request(self.address + path, body, {"Content-Type": "application/json", **(headers or {})}))

    def post_image(self, image: Any) -> Answer:
        return self.post("/digits", json.dumps({"image": image}).encode())

    def answers(self) -> bool:
        try:
            return self.get("/").status == 404
        except OSError:
            return False

    def _ask(self, request: Request) -> Answer:
        try:
            reply = open_url(request, timeout=TIMEOUT_S)
        except HTTPError as error:
            reply = error
        with reply:
            return Answer(reply.status, reply.read(), {name.title(): value for name, value in reply.headers.items()})


@contextlib.contextmanager
def serving(framework: str, folder: Path, broker_url: str, on_port: int = 0) -> Iterator[Server]:
    """A web application, by default on a free port."""
    port = str(choose_port(on_port, ""))
    with running(folder, broker_url, *(part.format(port=port) for part in SERVERS[framework])) as process:
        server = Server(f"http://127.0.0.1:{port}")
        eventually(lambda: server.answers() or process.poll() is not None, TIMEOUT_S, "the server's answer")
        yield server


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, stack: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each of the web applications, in front of the session's stack."""
    with stack.redis() as broker:
        eventually(lambda: broker.hget(KEYS.catalogue, "digits"), TIMEOUT_S, "the catalogue")
    with serving(request.param, tmp_path_factory.mktemp(request.param), stack.broker_url) as server:
        yield server


def ended(server: Server, path: str) -> Answer:
    """The answer of a task once it has ended."""

    def look() -> Answer | None:
        answer = server.get(path)
        waits = answer.status == 200 and answer.json["status"] in ("queued", "running")
        return None if waits else answer

    found: Answer = eventually(look, TIMEOUT_S, f"the end of {path}")
    return found


# -- web applications -------------------------------------------------------------------------------


def test_a_hundred_images_in_ten_threads(server: Server, client: Client) -> None:
    """Each is answered with its own digit: what the SDK itself is told, and right in at least 97 of 100."""

    def recognize(image: np.ndarray) -> tuple[int, float]:
        queued = server.post_image(image.tolist())
        assert queued.status == 202, queued.body
        assert queued.headers["Location"] == f"/digits/{queued.json['task_id']}"
        answer = ended(server, queued.headers["Location"])
        assert (answer.status, answer.json["status"]) == (200, "succeeded")
        assert answer.json["task_id"] == queued.json["task_id"]
        return answer.json["digit"], answer.json["probability"]

    with ThreadPoolExecutor(10) as pool:
        digits, probabilities = zip(*pool.map(recognize, hundred()[0]), strict=True)
    results = client.map("digits", ({"image": image[np.newaxis]} for image in hundred()[0]))
    expected = np.concatenate([result.outputs["probabilities"] for result in results])
    np.testing.assert_array_equal(digits, expected.argmax(axis=1))
    np.testing.assert_allclose(probabilities, expected.max(axis=1), rtol=1e-4)
    assert np.mean(digits == hundred()[1]) >= 0.97


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"image": [[0.5] * 8] * 7}, "expected shape [rows, 8, 8]"),
        ({"image": [[[0.5] * 8] * 8] * 2}, ""),
        ({"image": [[0.5] * 8, [0.5]]}, "inhomogeneous"),
        ({"image": [["0.5x"] * 8] * 8}, ""),
        ({"image": [[2.0] * 8] * 8}, "to 1"),
        ({"image": [[float("nan")] * 8] * 8}, "to 1"),
        ({"image": None}, "image"),
        ({"picture": [[0.5] * 8] * 8}, "image"),
        ([], ""),
    ],
    ids=["shape", "dimensions", "ragged", "strings", "too large", "NaN", "null", "missing", "list"],
)
def test_a_bad_image_is_refused(server: Server, body: Any, said: str) -> None:
    """With 422 and what is wrong with it."""
    answer = server.post("/digits", json.dumps(body).encode())
    assert answer.status == 422, answer.body
    assert said in answer.json["error"]


def test_what_is_no_json_is_refused(server: Server) -> None:
    """Like a bad image."""
    assert server.post("/digits", b"{").status == 422


def test_ids_that_are_none_of_ours(server: Server, client: Client) -> None:
    """No id, and another model's task: 404. An id that nobody knows counts as queued, as in Celery."""
    assert server.get("/digits/nonsense").status == 404
    other = client.submit("identity", {"input_fp32": np.ones((1, 2), np.float32)})
    other.result(TIMEOUT_S)
    assert server.get(f"/digits/{other.id}").status == 404
    unknown = str(uuid4())
    assert server.get(f"/digits/{unknown}").json == {"task_id": unknown, "status": "queued"}


def test_a_failed_task_says_why(server: Server, stack: Up) -> None:
    """With 502, as often as it is asked for."""
    with Client(stack.broker_url, validate=False) as careless:
        task = careless.submit("digits", {"image": np.ones((1, 7, 8), np.float32)})
    for _ in range(2):
        answer = ended(server, f"/digits/{task.id}")
        assert (answer.status, answer.json["status"]) == (502, "failed")
        assert "expected shape [rows, 8, 8]" in answer.json["error"]


@pytest.mark.parametrize("framework", SERVERS)
def test_while_the_broker_is_away(framework: str, tmp_path: Path) -> None:
    """503 with a time to come back after; the same process serves once the broker is there."""
    port = choose_port(0, "")
    image = hundred()[0][0].tolist()
    with serving(framework, tmp_path, f"redis://127.0.0.1:{port}/0") as server:
        for answer in (server.post_image(image), server.get(f"/digits/{uuid4()}")):
            assert answer.status == 503, answer.body
            assert int(answer.headers["Retry-After"]) >= 1
            assert "broker is away" in answer.json["error"]
        with running_valkey(tmp_path / "valkey", port=port) as broker:
            queued = server.post_image(image)
            assert queued.status == 202, queued.body
            assert server.get(queued.headers["Location"]).json["status"] == "queued"
            assert broker.client.llen(keys.queue_list(keys.queue_name("digits"), keys.PRIORITIES["normal"])) == 1
        assert server.post_image(image).status == 503


# -- Celery applications ----------------------------------------------------------------------------


def test_a_plain_celery_application(stack: Up, tmp_path: Path) -> None:
    """Its single task and its chain, in a process that does not import the SDK."""
    code = (
        "import json, sys, celery_app\n"
        "pixels = json.loads(sys.stdin.read())\n"
        "results = [queue(pixels).get(timeout=30) for queue in (celery_app.recognize, celery_app.recognize_and_copy)]\n"
        "print(json.dumps([results, 'samphire' in sys.modules]))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(hundred()[0][0].ravel().tolist()),
        cwd=EXAMPLES,
        env={**clean_environment(), "SAMPHIRE_BROKER_URL": stack.broker_url},
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=True,
    ).stdout
    (single, copied), sdk_loaded = json.loads(printed)
    assert not sdk_loaded
    assert (single["model_name"], copied["model_name"]) == ("digits", "identity")
    assert single["outputs"][0]["name"] == "probabilities"
    assert np.argmax(single["outputs"][0]["data"]) == hundred()[1][0]
    assert copied["outputs"][0]["name"] == "output_fp32"
    assert copied["outputs"][0]["data"] == pytest.approx(single["outputs"][0]["data"], rel=1e-4)


def test_a_celery_task_as_producer(stack: Up, client: Client, tmp_path: Path) -> None:
    """Two forked children queue a hundred images, each through a client of its own."""
    name = "examples@localhost"
    worker = ("celery", "-A", "celery_producer", "worker", "--concurrency", "2", "--hostname", name)
    with (
        plain_celery(stack.broker_url) as producers,
        running(tmp_path, stack.broker_url, *worker, "--queues", "examples"),
    ):
        sent = [
            producers.send_task("celery_producer.recognize", [image.tolist()], queue="examples")
            for image in hundred()[0]
        ]
        tasks = [client.task(one.get(timeout=TIMEOUT_S)) for one in sent]
        pool = producers.control.inspect([name], timeout=10).stats()[name]["pool"]
    digits = [task.result(TIMEOUT_S).outputs["probabilities"].argmax() for task in tasks]
    assert np.mean(digits == hundred()[1]) >= 0.97
    written = [int(count) for count in pool["writes"]["raw"].split(", ")]
    assert len(written) == 2 and min(written) > 0, "both children worked"
