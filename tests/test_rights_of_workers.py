"""A worker whose broker user lacks a right, or is given it back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from samphire import AsyncClient, BrokerRightError, ModelFaultError
from samphire.client.ended import ended_states
from samphire.transport.address import broker_of
from samphire.wire import keys
from samphire_broker.settings import Settings
from samphire_broker.store import Settlement, Store, Turn
from samphire_workers.upkeep import reaper
from samphire_workers.upkeep.reaper import BrokerAge, Reaper
from samphire_workers.upkeep.rights import check_rights
from tests.stacks import ENDS_S, Valkey, clean_environment, eventually
from tests.support.lane import fake_triton, lane_worker, until, x
from tests.support.names import KEYS
from tests.test_doctor import examine
from tests.test_rights import (
    EVERYTHING,
    FAILURE,
    PASSWORD,
    cancel_some,
    claim_more,
    letter,
    reap_other,
    return_due,
    rules,
    serve_letters,
    settle_all,
    user_of,
)
from tests.test_store import QUEUE, Worker, everywhere, push, run


def test_a_worker_that_lacks_a_right_does_not_start_and_names_it(valkey: Valkey) -> None:
    """Instead of claiming tasks that it cannot end."""
    url = user_of(valkey, "limited", *EVERYTHING, "-setex")
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "samphire_workers.app", "worker", "--loglevel", "INFO"],
        env={**clean_environment(), "SAMPHIRE_BROKER_URL": url, "SAMPHIRE_TRITON_URLS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
    )
    assert ended.returncode == os.EX_CONFIG
    assert "lacks rights on the broker: SETEX celery-task-meta-id 1 x (results)" in ended.stderr
    assert "Traceback" not in ended.stderr and PASSWORD not in ended.stderr


def test_a_worker_goes_on_once_a_right_is_given_back(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    """What it holds stays as it is meanwhile, and the log says what is missing."""
    from samphire_workers import repeat as module

    async def test() -> None:
        url = user_of(valkey, "limited", *EVERYTHING)
        w = Worker(url, "w1")
        await w.beat()
        push(valkey, "a")
        (claim,) = await w.claim()
        valkey.client.execute_command("ACL", "SETUSER", "limited", "-setex")
        settling = asyncio.create_task(module.persist(lambda: w.settle(claim)))
        while "SETEX" not in caplog.text:
            await asyncio.sleep(0.01)
        assert everywhere(valkey) == ["a"]
        valkey.client.execute_command("ACL", "SETUSER", "limited", "+setex")
        assert await settling == 1
        await w.named.close()
        await w.store.close()

    run(test)


@pytest.mark.parametrize("right", ["-ltrim", "-hset", "&none"])
def test_a_lane_goes_on_once_a_right_to_claim_is_given_back(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, right: str
) -> None:
    """Nothing is claimed, or no wake-up heard, meanwhile; the lane is the same one."""

    async def test() -> None:
        url = user_of(valkey, "limited", *EVERYTHING)
        async with (
            fake_triton("one") as triton,
            AsyncClient(valkey.url, validate=False) as sdk,
            lane_worker(url, triton) as worker,
        ):
            assert (await (await sdk.submit("one", x(1))).result(20)).outputs
            rules = ["resetchannels", right] if right.startswith("&") else [right]
            valkey.client.execute_command("ACL", "SETUSER", "limited", *rules)
            task = await sdk.submit("one", x(2))
            said = "wake-ups are not heard" if right.startswith("&") else "nothing is claimed"
            await until(lambda: said in caplog.text, "the log", 40)
            valkey.client.execute_command("ACL", "SETUSER", "limited", "+@all", "allchannels")
            assert (await task.result(20)).outputs["y"].tolist() == [[3.0]]
            assert not any(one.done() for one in worker.tasks)

    run(test)


def test_a_lost_worker_is_reaped_without_the_right_to_look_at_connections(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lapsed lease is enough; what is missing is said once, with its effect (F3)."""
    monkeypatch.setattr(reaper, "REAP_INTERVAL_S", 0.05)

    async def test() -> None:
        url = user_of(valkey, "limited", *EVERYTHING, "-info", "-client|list")
        lost, w, living = Worker(url, "w1", lease_s=1), Worker(url, "w2", lease_s=1), Worker(url, "w3")
        for worker in (lost, w, living):
            await worker.beat()
        push(valkey, "a")
        await lost.claim()
        await lost.named.close()
        reaping = asyncio.create_task(reaper.reap_others(w.store, w.settings))
        while not valkey.client.llen(QUEUE):
            await asyncio.sleep(0.02)
        reaping.cancel()
        await asyncio.gather(reaping, return_exceptions=True)
        assert await w.store.others() == {"w3": 1}
        await check_rights(w.store, lambda: False)  # it starts all the same
        for worker in (lost, w, living):
            await worker.named.close()
            await worker.store.close()

    with caplog.at_level(logging.WARNING):
        run(test)
    warned = [record.getMessage() for record in caplog.records if record.name == reaper.logger.name]
    assert len([line for line in warned if "found only once its lease of 1 s has lapsed" in line]) == 1
    assert len([line for line in warned if "told from connections that break" in line]) == 1


class Broker(Store):
    """A broker that says of itself what the test wants."""

    def __init__(self, *told: tuple[str, int]) -> None:
        self.told = list(told)

    async def broker_run(self) -> tuple[str, int]:
        return self.told.pop(0)


@pytest.mark.parametrize(
    ("told", "ages"),
    [
        ([("a", 500), ("a", 500)], [500, 510]),  # it was there before this worker
        ([("a", 3), ("a", -7000), ("a", -6990)], [3, 13, 23]),  # its clock was set back past its start (F4)
        ([("a", -7000), ("a", -6990)], [0, 10]),
        ([("a", 3), ("a", 99999)], [3, 13]),  # and forward
        ([("a", 500), ("b", 0), ("b", 10)], [500, 0, 10]),  # it was started again
        ([("a", 500), ("b", 99999), ("b", 99999)], [500, 0, 10]),
    ],
)
def test_how_long_the_broker_has_run_is_told_by_a_clock_of_ones_own(
    told: list[tuple[str, int]], ages: list[float]
) -> None:
    """Its own clock may be set; within one lease of its start nobody is taken for lost, after it somebody is (F4)."""
    now = itertools.count(1000, 10)

    async def test() -> None:
        age = BrokerAge(Settings(), clock=lambda: float(next(now)))
        broker = Broker(*told)
        assert [await age.seconds(broker) for _ in ages] == ages

    run(test)


def test_a_lease_that_lapses_for_a_moment_is_no_loss(valkey: Valkey) -> None:
    """As when the broker's clock is set forward: the worker beats again before the second look (F4)."""

    async def test() -> None:
        living, w = Worker(valkey.url, "w1"), Worker(valkey.url, "w2", lease_s=1)
        await living.beat()
        push(valkey, "a")
        await living.claim()
        reaper = Reaper(w.store, Settings(broker_url=valkey.url, lease_s=1))
        while await reaper._age.seconds(w.store) <= 1:
            await asyncio.sleep(0.1)
        valkey.client.delete("samphire:worker:w1")
        await reaper.look()
        await living.beat()
        await reaper.look()
        assert valkey.client.hlen("samphire:worker:w1:inflight") == 1
        valkey.client.delete("samphire:worker:w1")
        await reaper.look()
        await reaper.look()
        assert valkey.client.llen(QUEUE) == 1
        await reaper._age.close()
        for worker in (living, w):
            await worker.named.close()
            await worker.store.close()

    run(test)


def test_doctor_names_the_right_that_is_missing(valkey: Valkey) -> None:
    """And not the password (F3)."""
    url = user_of(valkey, "limited", *EVERYTHING, "-info", "-client|list", "-setex")
    _, found = examine(url)
    assert found["broker"]["state"] == "ok"
    assert found["broker version"]["state"] == "warning" and "may not run INFO" in found["broker version"]["found"]
    lines = examine_rights(url)
    assert {line["state"] for line in lines} == {"error", "warning"}
    assert any("SETEX celery-task-meta-id" in line["found"] and "+setex" in line["remedy"] for line in lines)
    assert any("CLIENT LIST" in line["found"] and "+client|list" in line["remedy"] for line in lines)
    no_scripts = user_of(valkey, "limited", *EVERYTHING, "-@scripting")
    (line,) = examine_rights(no_scripts)
    assert "may not run scripts" in line["found"]
    eventually(lambda: valkey.client.ping(), 5, "the broker")


def examine_rights(url: str) -> list[dict[str, str]]:
    from samphire_broker.inspection.checks import check_rights as look
    from samphire_broker.inspection.overview import broker_connection

    with broker_connection(broker_of(url)) as client:
        return [vars(finding) for finding in look(client, KEYS) if finding.state != "ok"]


def test_the_documented_rule_is_enough_for_a_worker(valkey: Valkey) -> None:
    """Nothing is missing, not even what is only advisable; and all transitions go through."""

    async def test() -> None:
        url = user_of(valkey, "worker", "on", f">{PASSWORD}", *rules()["worker"].split(" "))
        w = Worker(url, "w1")
        assert await w.store.missing_rights() == []
        await w.beat()
        push(valkey, "a", "b", "c", "d")
        claims = {claim.message.decode(): claim for claim in await w.claim()}
        await w.start(list(claims.values()))
        assert await settle_all(w, claims) == [1, 1, 1, 1]
        for call in (return_due, cancel_some, serve_letters, claim_more, reap_other):
            await call(w, {})
        assert await w.store.lead("m") == 1
        await w.store.leave()
        await w.named.close()
        await w.store.close()

    run(test)


def test_the_documented_rule_is_enough_for_a_producer(valkey: Valkey) -> None:
    """Submit, wait, cancel, delete, and look at letters; it can write to nothing that workers own."""

    async def test() -> None:
        url = user_of(valkey, "producer", "on", f">{PASSWORD}", *rules()["producer"].split(" "))
        async with AsyncClient(url, validate=False) as client:
            task = await client.submit("m", {"x": np.ones((1, 5000), np.float32)}, idempotency_key="k")
            w = Worker(valkey.url, "w1")
            await w.beat()
            (claim,) = await w.store.claim([Turn(keys.queue_list("inference.m", 3), 1, 0)], [1], 1, 10**9)
            ended = Settlement(
                claim.field, task.id, "failed", FAILURE % task.id, client._session.stream, letter=letter(task.id)
            )
            assert await w.store.settle([ended]) == [1]
            with pytest.raises(ModelFaultError):
                await task.result(10)
            assert await task.cancel() is False
            assert await ended_states(client._session.publisher.connection, KEYS, [task.id]) == {task.id: "failed"}
            (found,) = await client.dead_letters.list()
            assert found.task_id == task.id
            for key in ((KEYS.meta_prefix + task.id), KEYS.ended, KEYS.dead, "worker:w1:inflight"):
                with pytest.raises(BrokerRightError):
                    await client._session.publisher.connection.execute("DEL", key)
            await w.named.close()
            await w.store.close()

    run(test)
