"""`samphire doctor` against servers that are as they should be, and that are not."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from samphire import Client
from samphire.wire import keys
from samphire_broker.inspection import checks as doctor
from tests.stacks import ENDS_S, SAMPHIRE, Up, Valkey, clean_environment, eventually, running_valkey, standing_still
from tests.support.names import KEYS

Findings = dict[str, dict[str, Any]]


def examine(broker_url: str, triton: str = "127.0.0.1:1", *options: str, **env: str) -> tuple[int, Findings]:
    """Exit code and findings by name."""
    environment = clean_environment() | {"SAMPHIRE_BROKER_URL": broker_url, "SAMPHIRE_TRITON_URLS": triton} | env
    ended = subprocess.run(
        [SAMPHIRE, "doctor", "--json", *options],
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
        env=environment,
    )
    assert "Traceback" not in ended.stderr
    findings = [json.loads(line) for line in ended.stdout.splitlines()]
    assert all(finding["remedy"] for finding in findings if finding["state"] in ("error", "warning"))
    return ended.returncode, {finding["name"]: finding for finding in findings}


def test_a_healthy_stack(stack: Up) -> None:
    """Nothing is wrong; numbers went through each Triton and through the queue, and came back the same."""
    code, found = examine(stack.broker_url, stack.triton_grpc)
    assert code == 0
    assert not [finding for finding in found.values() if finding["state"] == "error"]
    for name in (f"numbers through {stack.triton_grpc}", "numbers through the queue", "durability", "eviction"):
        assert found[name]["state"] == "ok", found[name]
    assert "digits" in found[f"models of {stack.triton_grpc}"]["found"]
    assert found["workers"]["state"] == "ok"
    people = subprocess.run(  # the stack's Triton is found by its data directory
        [SAMPHIRE, "doctor", "--broker-url", stack.broker_url, "--data-dir", str(stack.data_dir)],
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
        env=clean_environment(),
    )
    assert people.returncode == 0
    assert "ok    numbers through the queue: 8 values came back unchanged" in people.stdout


def test_servers_that_are_away() -> None:
    """Both are named, with what to do; nothing hangs."""
    code, found = examine("redis://127.0.0.1:1/0")
    assert code == 1
    assert found["broker"]["state"] == "error"
    assert found["endpoint 127.0.0.1:1"]["state"] == "error"
    assert found["numbers through the queue"]["state"] == "skipped"


def test_a_broker_that_forgets_and_evicts(tmp_path: Path) -> None:
    """No append-only file, an eviction policy, no limit; and tasks that nobody serves."""
    with running_valkey(tmp_path, "--appendonly", "no", "--maxmemory-policy", "allkeys-lru") as valkey:
        with Client(valkey.url) as client:
            client.submit("m", {"x": np.zeros(1)})
        code, found = examine(valkey.url)
        assert code == 1
        assert "every queued task" in found["durability"]["found"]
        assert "allkeys-lru" in found["eviction"]["found"]
        assert found["memory"]["state"] == "warning"
        assert found["workers"] == {
            "name": "workers",
            "state": "error",
            "found": "none, and 1 tasks wait",
            "remedy": "start one: celery -A samphire_workers.app worker",
        }
        valkey.client.config_set("maxmemory", valkey.client.info("memory")["used_memory"] + 100_000)
        assert examine(valkey.url)[1]["memory"]["state"] == "error"
        valkey.client.config_set("appendonly", "yes")
        valkey.client.config_set("appendfsync", "no")
        _, found = examine(valkey.url)
        assert found["durability"]["state"] == "error"
        assert "appendfsync no" in found["durability"]["found"]
        for mode, meaning in (("always", "survives a power failure"), ("everysec", "in the last 2 s")):
            valkey.client.config_set("appendfsync", mode)
            durability = examine(valkey.url)[1]["durability"]
            assert durability["state"] == "ok"
            assert durability["found"].startswith(f"{mode}: ") and meaning in durability["found"]


def test_a_queue_that_nobody_can_serve(valkey: Valkey) -> None:
    """Says why: no endpoint has its model, or it is not loaded, and for what reason."""
    valkey.client.sadd(KEYS.workers, "w")
    valkey.client.set(f"{KEYS.worker_prefix}w", "1")
    for model in ("absent", "unloaded", "broken", "served"):
        valkey.client.lpush(f"inference.{model}", "x")
    told = {keys.CATALOGUE_COMPLETE: "1", "unloaded": "", "broken": "", "!broken": "not today", "served": "{}"}
    valkey.client.hset(KEYS.catalogue, mapping=told)
    _, found = examine(valkey.url)
    whys = {name: finding["found"] for name, finding in found.items() if name.startswith("queue ")}
    assert whys == {
        "queue inference.absent": "1 tasks wait: no endpoint of the workers has the model absent",
        "queue inference.broken": "1 tasks wait: model broken is not loaded: not today",
        "queue inference.unloaded": "1 tasks wait: model unloaded is not loaded",
    }


def test_a_cluster_is_refused(tmp_path: Path) -> None:
    """With the reason."""
    with running_valkey(tmp_path, "--cluster-enabled", "yes") as valkey:
        code, found = examine(valkey.url)
    assert code == 1
    assert "different hash slots" in found["cluster"]["found"]


@pytest.mark.parametrize(
    ("setting", "value"), [("TRITON_URLS", "http://triton:8000"), ("MAX_ATTEMPTS", "-1"), ("LEASE_S", "soon")]
)
def test_settings_that_are_wrong(valkey: Valkey, setting: str, value: str) -> None:
    """Are named; the rest cannot be looked at."""
    environment = {f"SAMPHIRE_{setting}": value}
    code, found = examine(valkey.url, **({"triton": value} if setting == "TRITON_URLS" else environment))
    assert code == 1
    assert f"SAMPHIRE_{setting}" in found["settings"]["found"]


def test_a_model_that_does_not_load(stack: Up, client: Client) -> None:
    """Is named with Triton's reason; the other models go on, and so does the worker."""
    folder = stack.data_dir / "model_repository" / "broken"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text('name: "broken"\nbackend: "python"\nmax_batch_size: 1\n')
    (folder / "1" / "model.py").write_text("raise RuntimeError('not today')\n")
    try:
        with InferenceServerClient(stack.triton_grpc) as triton, pytest.raises(InferenceServerException):
            triton.load_model("broken")
        code, found = examine(stack.broker_url, stack.triton_grpc)
        assert code == 1
        assert "not today" in found["model broken"]["found"]
        assert found["numbers through the queue"]["state"] == "ok"
        assert client.submit("identity", {"input_fp32": np.ones((1, 1), np.float32)}).result(20)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("echo", [None, np.zeros((1, 8), np.float32), np.zeros((1, 0), np.float32)])
def test_numbers_that_come_back_changed(echo: Any) -> None:
    """As numpy 2 makes them beside the embedded Triton: no error, and nothing in them."""
    values = np.ones((1, 8), np.float32)
    finding = doctor._compare("numbers", values, lambda: echo)
    assert finding.state == "error"
    assert "numpy<2" in finding.remedy
    assert doctor._compare("numbers", values, lambda: values.copy()).state == "ok"


def test_old_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say what to install."""
    versions = {"celery": "5.6.9", "kombu": None, "numpy": "2.1.0", "nvidia-pytriton": "0.7.0"}
    monkeypatch.setattr(doctor, "installed", lambda package: versions.get(package, "99"))
    errors = {finding.name: finding.found for finding in doctor.check_versions() if finding.state == "error"}
    assert errors["celery"] == "5.6.9, expected at least 5.7"
    assert errors["kombu"] == "not installed"
    assert "empty outputs" in errors["numpy"]


def test_a_support_file_holds_no_secret(tmp_path: Path, stack: Up) -> None:
    """Findings, versions, queues, letters and logs; no password, wherever it may stand."""
    secrets = ["s3cret/word", "another-secret", "flower-secret"]
    data_dir = tmp_path / "data"
    (data_dir / "logs").mkdir(parents=True)
    (data_dir / "flower-password").write_text("flower-secret\n")
    lines = ["redis://:s3cret%2Fword@127.0.0.1 and s3cret/word", "postgres://me:else@host", "flower-secret", "kept"]
    (data_dir / "logs" / "worker1.log").write_text("\n".join(lines))
    with running_valkey(tmp_path / "valkey") as valkey:
        valkey.client.config_set("requirepass", "s3cret/word")
        url = valkey.url.replace("redis://", "redis://:s3cret%2Fword@")
        with Client(url) as client:
            client.submit("m", {"x": np.full(4, 718281.25)})
        bundle = tmp_path / "support.zip"
        environment = {"SAMPHIRE_FLOWER_PASSWORD": "another-secret"}
        code, found = examine(
            url, stack.triton_grpc, "--bundle", str(bundle), "--data-dir", str(data_dir), **environment
        )
    assert found["broker"]["state"] == "ok" and code == 1  # the tasks wait for a worker
    with zipfile.ZipFile(bundle) as packed:
        contents = {name: packed.read(name).decode() for name in packed.namelist()}
    assert {"findings.json", "versions.json", "environment.json", "overview.json", "broker.json"} <= set(contents)
    whole = "\n".join(contents.values())
    for secret in [*secrets, "s3cret%2Fword", "me:else@", "718281.25"]:
        assert secret not in whole, secret
    assert "kept" in contents["logs/worker1.log"]
    (queue,) = [queue for queue in json.loads(contents["overview.json"])["queues"] if queue["name"] == "inference.m"]
    assert queue["waiting"] == [0, 1, 0, 0]


def test_doctor_is_patient_with_a_hung_broker(valkey: Valkey) -> None:
    """It says so after a timeout instead of waiting for ever."""
    with standing_still(valkey.process.pid):
        code, found = examine(valkey.url)
        assert code == 1
        assert found["broker"]["state"] == "error"
    eventually(valkey.client.ping, 10, "the broker's answer")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("inference:3", "another sep"),
        ("inference.digits:6", "another sep"),
        ("inference\x06\x165", "other priority_steps"),
        ("inference.digits@acme\x06\x161", "other priority_steps"),
        ("shop_inference", "has global_keyprefix 'shop_', the workers have ''"),
        ("shop:inference.digits\x06\x163", "has global_keyprefix 'shop:'"),
        ("inference.digits:returned", "a key of another type lay"),
        ("inference.digits\x06\x163:returned", "a key of another type lay"),
    ],
)
def test_messages_in_lists_that_nobody_reads_are_found(valkey: Valkey, name: str, why: str) -> None:
    """With the setting of the producer that has put them there."""
    valkey.client.rpush(name, "a", "b")
    for read in ("inference", "inference.digits", "inference.digits\x06\x163", "inferences", "my-inference-cache2"):
        valkey.client.rpush(read, "c")
    _, found = examine(valkey.url)
    finding = found["unread list"]
    assert finding["state"] == "warning" and finding["remedy"]
    assert why in finding["found"] and "2 messages" in finding["found"]


def test_the_lists_of_another_deployment_are_its_own(valkey: Valkey) -> None:
    """As long as its workers tell so."""
    valkey.client.rpush("shop_inference.digits", "a")
    valkey.client.set("shop_samphire.namespace", "shop:")
    _, found = examine(valkey.url)
    assert "unread list" not in found
    valkey.client.delete("shop_samphire.namespace")
    _, found = examine(valkey.url)
    assert "of this deployment" in found["unread list"]["found"]


@pytest.mark.parametrize("name", ["sub:cancels", "sub:letters", "sub:deletes", "scheduled:messages"])
def test_an_own_key_of_another_type_is_named(valkey: Valkey, name: str) -> None:
    """Whoever may submit may have made it; what it is for stands still without a word."""
    valkey.client.sadd(f"samphire:{name}", "x")
    code, found = examine(valkey.url)
    assert code == 1 and found["own key"]["state"] == "error"
    assert f"'samphire:{name}' is a set, and a" in found["own key"]["found"]
