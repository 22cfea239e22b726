"""The examples receive: real deliveries to real web servers, and what is no webhook of ours."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from samphire import AsyncClient
from samphire.webhooks.signing import SigningKey, new_secret, signed_content
from samphire_broker.embedded.ports import choose_port
from tests.stacks import Valkey
from tests.support.lane import fake_triton, in_a_loop, until, x
from tests.support.names import KEYS
from tests.support.webhooks import Hooks
from tests.test_examples import SERVERS, Server, serving


def post(server: Server, secret: str, body: bytes, *, at: int | None = None, tampered: bytes | None = None) -> int:
    """The status that a delivery gets which is signed with a secret."""
    timestamp = str(int(time.time()) if at is None else at)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": timestamp,
        "webhook-signature": SigningKey.parse(secret).sign(signed_content("msg_1", timestamp, body)),
    }
    return server.post("/webhooks", body if tampered is None else tampered, headers).status


@pytest.mark.parametrize("framework", SERVERS)
def test_it_takes_what_is_signed_and_nothing_else(
    framework: str, valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delivery of a real worker arrives; one that was tampered with, is old, or is signed by others gets 400."""
    hooks = Hooks(valkey, tmp_path)
    with hooks.registry() as registry:
        secret = registry.rotate_default("").secrets[0]
    monkeypatch.setenv("WEBHOOK_SECRETS", f"{new_secret()} {secret}")
    port = choose_port(0, "")
    hooks.ports.add(port)

    @in_a_loop
    async def deliver() -> None:
        async with fake_triton("one") as triton, hooks.worker(triton, webhook_timeout_s=20.0):
            await until(lambda: valkey.client.hexists(KEYS.webhook_names, "*"), "the policy")
            async with AsyncClient(valkey.url) as client:
                tasks = [await client.submit("one", x(), webhook=f"http://127.0.0.1:{port}/webhooks") for _ in range(5)]
                for task in tasks:
                    await task.result(timeout_s=20)
            await until(lambda: len(list(valkey.client.scan_iter("*webhook:delivery:*"))) == 5, "their ends")
            for key in valkey.client.scan_iter("*webhook:delivery:*"):
                assert valkey.client.hget(key, "state") == b"delivered"

    with serving(framework, tmp_path, valkey.url, port) as server:
        deliver()
        body = b'{"type":"task.succeeded","data":{"task_id":"t"}}'
        assert post(server, secret, body) == 200
        assert post(server, secret, body) == 200  # it may come again
        assert post(server, secret, body, tampered=body + b" ") == 400
        assert post(server, secret, body, at=int(time.time()) - 3600) == 400
        assert post(server, new_secret(), body) == 400
        assert post(server, secret, b"\xff not JSON") == 400
        assert server.post("/webhooks", body).status == 400
