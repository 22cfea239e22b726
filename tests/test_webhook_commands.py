"""`samphire webhooks` against the real stack; its receivers are hosts that no name server knows."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from samphire import Client
from samphire_broker.webhooks.secrets import SecretBox
from tests.stacks import ENDS_S, SAMPHIRE, Up, clean_environment, eventually
from tests.support.names import KEYS

URL = "https://receiver.invalid/hook/secret-token?key=secret-key"
IMAGE = {"image": np.zeros((1, 8, 8), np.float32)}


def webhooks(stack: Up, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `samphire webhooks` as an operator of the stack does."""
    own = {"SAMPHIRE_BROKER_URL": stack.broker_url, "SAMPHIRE_DATA_DIR": str(stack.data_dir)}
    ended = subprocess.run(
        [SAMPHIRE, "webhooks", *arguments],
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
        env=clean_environment() | own | variables,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended


def listed(stack: Up, name: str) -> dict[str, Any]:
    lines = webhooks(stack, "endpoints", "list", "--json").stdout.splitlines()
    return next((found for found in map(json.loads, lines) if found["name"] == name), {})


@pytest.fixture
def endpoint(stack: Up, request: pytest.FixtureRequest) -> Iterator[str]:
    """An endpoint of the test's own."""
    name = f"test{os.getpid()}.{abs(hash(request.node.name)) % 10**6}"
    added = webhooks(stack, "endpoints", "add", name, URL, "--schedule-s", "0", "--result-bytes", "2048")
    assert added.returncode == 0 and added.stdout.startswith("whsec_") and "not shown again" in added.stderr
    yield name
    webhooks(stack, "endpoints", "remove", name, "--yes")


def test_an_endpoints_life(stack: Up, endpoint: str) -> None:
    """Its secret is shown once; nothing of it, and of its URL, lies where producers read."""
    found = listed(stack, endpoint)
    assert (found["url"], found["disabled"], found["result_bytes"]) == (URL, "", 2048)
    assert webhooks(stack, "endpoints", "disable", endpoint).returncode == 0
    assert listed(stack, endpoint)["disabled"] == "operator"
    assert "0 deliveries go on" in webhooks(stack, "endpoints", "enable", endpoint).stdout
    rotated = webhooks(stack, "endpoints", "rotate", endpoint, "--grace-s", "60", "--json")
    (secret,) = json.loads(rotated.stdout)["secrets"]
    assert [bool(kept["expires_at"]) for kept in listed(stack, endpoint)["secrets"]] == [False, True]
    with stack.redis() as redis:
        assert json.loads(redis.hget(KEYS.webhook_names, endpoint) or b"") == {"has_secret": True}
        everything = redis.hget(KEYS.webhook_config, endpoint) or b""
        assert secret.removeprefix("whsec_").encode() not in everything
    assert webhooks(stack, "endpoints", "list").stdout.count(endpoint) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("endpoints", "add", "Orders", URL), "small letters"),
        (("endpoints", "add", "url-x", URL), "not with 'url-'"),
        (("endpoints", "add", "x", "http://receiver.invalid/"), "https://"),
        (("endpoints", "add", "x", "https://10.0.0.1/"), "not one that webhooks are sent to"),
        (("endpoints", "add", "x", URL, "--schedule-s", "1,x"), "seconds"),
        (("endpoints", "add", "x", URL, "--tenant", "a b"), "tenant"),
        (("endpoints", "rotate", "nobody"), "no webhook endpoint"),
        (("endpoints", "remove", "nobody"), "no webhook endpoint"),
        (("redeliver", "msg_nothing"), "no delivery"),
        (("recover", "nobody", "--since", "2026-01-01"), "no webhook endpoint"),
        (("test", "nobody"), "no webhook endpoint"),
    ],
)
def test_what_cannot_be_done_says_why(stack: Up, arguments: tuple[str, ...], said: str) -> None:
    """And nothing is written."""
    ended = webhooks(stack, *arguments)
    assert ended.returncode == 1 and said in ended.stderr, ended.stderr
    assert not listed(stack, "x") and "secret-token" not in ended.stderr


def test_a_key_that_the_workers_do_not_have_is_refused(stack: Up, endpoint: str) -> None:
    """They could not read what is encrypted with it."""
    with stack.redis() as redis:
        box = SecretBox("", stack.data_dir)

        def told() -> bool:
            return set(json.loads(redis.hget(KEYS.webhook_names, "*") or b"{}").get("key_ids", ())) == set(box.key_ids)

        eventually(told, 60, "the workers to tell of their key")
    other = "A" * 43 + "="
    ended = webhooks(stack, "endpoints", "rotate", endpoint, SAMPHIRE_SECRET_KEY=other)
    assert ended.returncode == 1 and "cannot read secrets" in ended.stderr
    malformed = webhooks(stack, "endpoints", "list", SAMPHIRE_SECRET_KEY="nonsense")
    assert malformed.returncode == 1 and "SAMPHIRE_SECRET_KEY" in malformed.stderr


def test_a_delivery_that_fails_is_shown_everywhere(stack: Up, client: Client, endpoint: str) -> None:
    """Its attempts, its letter, the endpoint in doctor and queues; no log has a part of the URL but its host."""
    task = client.submit("digits", IMAGE, webhook=endpoint)
    task.result(timeout_s=30)

    def failed() -> dict[str, Any] | None:
        lines = webhooks(stack, "deliveries", endpoint, "--json").stdout.splitlines()
        found: dict[str, Any] = json.loads(lines[0]) if lines else {}
        return found if found.get("state") == "failed" else None

    found = eventually(failed, 60, "the end of the delivery")
    assert (found["task_id"], found["event"], len(found["attempts"])) == (task.id, "task.succeeded", 1)
    assert found["attempts"][0]["error"]
    letter = client.dead_letters.get(found["id"])
    assert letter.reason == "undelivered"
    shown = webhooks(stack, "deliveries", endpoint).stdout
    assert found["id"] in shown and task.id in shown
    assert webhooks(stack, "redeliver", found["id"]).returncode == 1
    assert webhooks(stack, "test", endpoint).returncode == 1
    environment = clean_environment() | {"SAMPHIRE_BROKER_URL": stack.broker_url}
    queues = subprocess.run([SAMPHIRE, "queues"], capture_output=True, text=True, env=environment, check=True)
    assert f"webhook endpoint {endpoint}: 0 waiting, failing, 1 times in a row" in queues.stdout
    for log in (stack.data_dir / "logs").glob("*.log"):
        assert "secret-token" not in log.read_text() and "secret-key" not in log.read_text(), log
