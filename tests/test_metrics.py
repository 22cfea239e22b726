"""Metrics: what each counts, checked by what really happened, and by Prometheus' own tool."""

from __future__ import annotations

import asyncio
import re
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from samphire import AsyncClient, Client, ModelFaultError
from samphire_broker.store import Claimed
from samphire_workers.intake.request import Request
from samphire_workers.monitoring.metrics import LISTS_MAX, MODELS_MAX, OTHER, Metrics, metrics_for
from samphire_workers.monitoring.observers import LaneSeen, Observer, Observers, QueueSeen, TaskSeen
from tests.stacks import Up, Valkey, eventually
from tests.support.lane import body, broken, fake_triton, lane_worker, state, until, x
from tests.support.names import KEYS
from tests.support.plain import plain_celery
from tests.support.tools import tool

TIMEOUT_S = 30
PAGE = Path(__file__).parents[1] / "docs/metrics.md"


def read(text: str) -> dict[tuple[str, ...], float]:
    """Values by name and the values of the labels, in the order of their names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_what_a_lane_does_is_counted(valkey: Valkey) -> None:
    """Successes, retries, a dead letter, cancellations, waits: as many as there were."""

    async def test() -> None:
        metrics, server = metrics_for("w@host", "127.0.0.1", 0) or pytest.fail("not served")
        try:
            async with fake_triton("one", "bad") as triton:
                triton.behave["bad"] = broken
                async with (
                    lane_worker(valkey.url, triton, observers=[metrics], backoff_base_s=0, max_attempts=2) as w,
                    AsyncClient(valkey.url) as client,
                ):
                    for task in [await client.submit("one", x()) for _ in range(5)]:
                        await task.result(TIMEOUT_S)
                    with pytest.raises(ModelFaultError):
                        await (await client.submit("bad", x())).result(TIMEOUT_S)
                    late = await client.submit("one", x(), delay_s=3600)
                    await until(lambda: valkey.client.zcard(KEYS.scheduled) == 1, "it to wait")
                    await late.cancel()
                    triton.is_up = False
                    await until(lambda: w.endpoints.away() or not w.endpoints.some_ready.is_set(), "an outage")
                    with plain_celery(valkey.url) as app:
                        app.send_task("samphire.infer", kwargs=body("one"), queue="inference.one", priority=3)
                    waiting = await client.submit("one", x(), priority="low")
                    depth = ("samphire_queue_depth", "6", "inference.one")
                    await until(lambda: read(scrape(server.url)).get(depth) == 1, "a depth")
                    seen = read(scrape(server.url))
                    triton.is_up = True
                    await waiting.result(TIMEOUT_S)
            assert seen[("samphire_tasks_total", "one", "succeeded")] == 5
            assert seen[("samphire_tasks_total", "bad", "failed")] == 1
            assert seen[("samphire_tasks_total", OTHER, "cancelled")] == 1
            assert seen[("samphire_retries_total", "ModelFaultError", "bad")] == 1
            assert seen[("samphire_dead_letters_total", "bad", "model_fault")] == 1
            assert seen[("samphire_claims_total", "bad")] == 2
            assert seen[("samphire_queue_seconds_count", "one")] == 5
            assert seen[("samphire_batch_tasks_sum", "one")] == 5
            assert seen[("samphire_triton_errors_total", "ModelFaultError", "bad")] == 2
            assert seen[("samphire_settle_seconds_count",)] > 0
            assert seen[("samphire_queue_depth", "6", "inference.one")] == 1
            assert 0 <= seen[("samphire_queue_oldest_seconds", "6", "inference.one")] < 3600
            assert ("samphire_queue_oldest_seconds", "3", "inference.one") not in seen, "Celery does not say when"
            assert seen[("samphire_endpoint_up", triton.address)] == 0
        finally:
            server.close()

    asyncio.run(test())


def test_labels_are_bounded() -> None:
    """Producers name models and tenants."""
    metrics = Metrics("w")
    for number in range(MODELS_MAX + 50):
        metrics.served(f"m{number}")
        metrics.claimed(f"inference.m{number}", 1)
    metrics.claimed(f"inference.{'x' * 10**6}", 1)  # is not served
    metrics.counted([QueueSeen(f"inference.m{n}", 0, n + 1, None) for n in range(LISTS_MAX + 50)])
    metrics.looked(LaneSeen(1, 2, {"a:1": True}, [("a:1", f"b{n}") for n in range(100)]))
    seen = read(generate_latest(metrics.registry).decode())
    claims = {name[1]: value for name, value in seen.items() if name[0] == "samphire_claims_total"}
    assert len(claims) == MODELS_MAX + 1 and claims[OTHER] == 51
    depths = {name[2]: value for name, value in seen.items() if name[0] == "samphire_queue_depth"}
    assert len(depths) == LISTS_MAX + 1 and depths[OTHER] == sum(range(1, 51))
    assert sum(name[0] == "samphire_breaker_open" for name in seen) == 1, "all of them are other models"


def test_a_port_that_is_taken_is_logged_and_the_worker_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """It says which, and what to do."""
    made = metrics_for("w", "127.0.0.1", 0) or pytest.fail("not served")
    try:
        assert metrics_for("w", "127.0.0.1", made[1].port) is None
    finally:
        made[1].close()
    assert f"no metrics are served on 127.0.0.1:{made[1].port}" in caplog.text and "free the port" in caplog.text


def test_an_observer_that_fails_slows_nobody(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged; the others are told, and the lane goes on."""

    class Failing(Observer):
        def started(self, tasks: Sequence[TaskSeen]) -> None:
            raise RuntimeError("of the observer's own")

        async def run(self) -> None:
            raise RuntimeError("of the observer's own")

    async def test() -> None:
        metrics = Metrics("w")
        async with fake_triton("one") as triton:
            observers = [Failing(), metrics]
            async with lane_worker(valkey.url, triton, observers=observers), AsyncClient(valkey.url) as client:
                task = await client.submit("one", x())
                await task.result(TIMEOUT_S)
                assert metrics.registry.get_sample_value("samphire_queue_seconds_count", {"model": "one"}) == 1
                assert state(valkey.client, task.id) == "SUCCESS"

    asyncio.run(test())
    assert "Failing has failed in started()" in caplog.text and "Failing has ended" in caplog.text


def test_records_are_frozen() -> None:
    """What an observer is told no other can change."""
    told: list[TaskSeen] = []

    class Changing(Observer):
        def succeeded(self, tasks: Sequence[TaskSeen], timings: Sequence[object]) -> None:
            told.extend(tasks)
            tasks[0].model = "another"  # type: ignore[misc]

    Observers(Changing(), Changing()).succeeded([Request(Claimed("1:inference.one", 0, b""), "t")])
    assert [task.model for task in told] == ["one", "one"]


def test_workers_of_the_stack_answer_prometheus(stack: Up) -> None:
    """What they say passes Prometheus' own check, and stands on the page."""
    with Client(stack.broker_url) as client:
        client.submit("identity", {"input_fp32": np.ones((1, 1), np.float32)}).result(TIMEOUT_S)
    url = stack.ready["metrics_urls"][0]
    success = 'samphire_tasks_total{model="identity",outcome="succeeded"}'
    eventually(lambda: success in scrape(url), TIMEOUT_S, "a success")
    text = scrape(url)
    promtool = tool("prometheus", "promtool")
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr + checked.stdout
    names = {family.name for family in text_string_to_metric_families(text)}
    documented = set(re.findall(r"^\| `(samphire_\w+)`", PAGE.read_text(), re.MULTILINE))
    counters = set(re.findall(r"^# TYPE (samphire_\w+)_total counter", text, re.MULTILINE))
    ours = {f"{name}_total" if name in counters else name for name in names if not name.endswith("_created")}
    assert documented == ours
