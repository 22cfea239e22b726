"""What of an operator's settings docker-compose.yml gives to which container, as docker-compose renders it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import pytest

from samphire.transport.address import broker_of, environment_of
from samphire_broker.settings import ENV_PREFIX, Settings, read_settings
from samphire_workers.bootstep import HAND_BACK_S
from tests.support.compose import ROOT, SECRETS, bytes_of, option, seconds, services, services_with, words  # noqa: F401

VARIABLES = {name: ENV_PREFIX + name.upper() for name in Settings.model_fields}

OTHERS = {
    "broker_url": "redis://:abc@broker.example:6380/1",
    "namespace": "shop",
    "celery_key_prefix": "shop_",
    "triton_urls": "one:8001,two:8001",
    "backoff_jitter": "0.5",
    "unserved_timeout_s": "300",
    "model_retries": '{"digits": {"max_attempts": 5}}',
    "micro_batch": '{"digits": false}',
    "queue_weights": '{"digits": 2}',
    "metrics_host": "127.0.0.2",
    "data_dir": "/elsewhere",
    "secret_key": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
    "gateway_url": "https://inference.example.com",
    "webhook_schemes": "https,http",
    "webhook_ports": "443",
    "webhook_nameservers": "192.0.2.1",
    "webhook_schedule_s": "0,5",
}
"""Values that are not the default; numbers and switches have theirs from their default."""

OF_THE_FILE = {"broker_url", "triton_urls", "metrics_port", "metrics_host"}
"""Settings that are another by default in a container."""


def another(name: str) -> str:
    """A value of a setting that is not its default."""
    default = Settings.model_fields[name].default
    if name in OTHERS:
        return OTHERS[name]
    assert isinstance(default, bool | int | float), f"{name}: give it another value in OTHERS"
    return json.dumps(not default if isinstance(default, bool) else default + 1)


def settings_in(environment: Mapping[str, str | None], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What a part reads in a container with this environment; what is None is not there."""
    for name in os.environ:
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    return read_settings()


def test_every_setting_reaches_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one too: the list is that of the code."""
    given = {variable: another(name) for name, variable in VARIABLES.items()}
    worker = services_with(SECRETS | given)["worker"]["environment"]
    assert {variable: worker.get(variable) for variable in given} == given
    read, default = settings_in(worker, monkeypatch), Settings.model_fields
    assert [
        name for name in VARIABLES if getattr(read, name) == default[name].get_default(call_default_factory=True)
    ] == []


def test_what_is_not_set_keeps_its_default(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No empty text is given for it, which another program could take for a value."""
    worker = services["worker"]["environment"]
    assert {name for name, variable in VARIABLES.items() if worker[variable] is not None} == OF_THE_FILE
    read = settings_in(worker, monkeypatch).model_dump(exclude=OF_THE_FILE)
    assert read == settings_in({}, monkeypatch).model_dump(exclude=OF_THE_FILE)


def test_flower_gets_what_names_the_broker_and_no_more() -> None:
    """As every other process that is to find the same; secrets of webhooks are none of its business."""
    needed = set(environment_of(broker_of("redis://valkey:6379/0")))
    given = {variable: another(name) for name, variable in VARIABLES.items()}
    flower = services_with(SECRETS | given)["flower"]["environment"]
    assert {name: flower[name] for name in needed} == {name: given[name] for name in needed}
    assert {name for name in flower if name.startswith(ENV_PREFIX)} == needed


@pytest.mark.parametrize("timeout_s", [None, "0", "300", "90.5"])
def test_a_worker_may_finish_what_it_holds(timeout_s: str | None) -> None:
    """It is not killed before it has handed back the rest."""
    given = {} if timeout_s is None else {"SAMPHIRE_SHUTDOWN_TIMEOUT_S": timeout_s}
    worker = services_with(SECRETS | given)["worker"]
    takes_s = float(timeout_s or Settings.model_fields["shutdown_timeout_s"].default) + HAND_BACK_S
    assert takes_s + 10 <= seconds(worker["stop_grace_period"]) <= takes_s + 20


def test_every_variable_of_the_file_is_told(services: dict[str, Any]) -> None:
    """In the table of docs/deployment.md; the number of workers is one of them."""
    variables = set(re.findall(r"\$\{(SAMPHIRE_\w+)", (ROOT / "docker-compose.yml").read_text()))
    table = [
        line for line in (ROOT / "docs" / "deployment.md").read_text().splitlines() if line.startswith("| `SAMPHIRE_")
    ]
    told = set(re.findall(r"SAMPHIRE_\w+", "".join(line.split("|")[1] for line in table)))
    assert variables - told - set(VARIABLES.values()) == set()
    assert told - variables == set()
    assert services["worker"]["scale"] == 1
    assert services_with(SECRETS | {"SAMPHIRE_WORKERS": "4"})["worker"]["scale"] == 4


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """By the folder in the container: what is mounted there, and whether it may be written to."""
    found = {}
    for mount in service["volumes"]:  # a text from docker-compose 1, a mapping from 2
        if isinstance(mount, str):
            source, target, *mode = mount.split(":")
            found[target] = (source, mode != ["ro"])
        else:
            found[mount["target"]] = (mount["source"], not mount.get("read_only", False))
    return found


@pytest.mark.parametrize("name", ["triton-gpu", "triton-cpu"])
def test_models_and_their_packages_are_an_operators_folders(services: dict[str, Any], name: str) -> None:
    """Mounted read-only; by default the models of the checkout, and no packages."""
    assert mounts(services[name])["/models"] == (str(ROOT / "model_repository"), False)
    assert mounts(services[name])["/packages"] == ("model-packages", False)
    folders = {"SAMPHIRE_MODEL_REPOSITORY": "/srv/models", "SAMPHIRE_MODEL_PACKAGES": "/srv/packages"}
    triton = services_with(SECRETS | folders)[name]
    assert mounts(triton) == {"/models": ("/srv/models", False), "/packages": ("/srv/packages", False)}
    assert "--model-repository=/models" in triton["command"]
    assert triton["environment"]["PYTHONPATH"] == "/packages"


# -- limits -----------------------------------------------------------------------------------------

LIMITED = {"valkey": "BROKER", "triton-gpu": "TRITON", "triton-cpu": "TRITON", "worker": "WORKER", "flower": "FLOWER"}
"""Each service, and what the variables of its limits are called by."""


def test_every_service_is_bounded(services: dict[str, Any]) -> None:
    """In capabilities, memory, processes and logs; all but Triton write nowhere but where they are told to."""
    assert set(services) == set(LIMITED)
    for name, service in services.items():
        assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"]), name
        assert "cap_add" not in service and "privileged" not in service, name
        assert bytes_of(service["mem_limit"]) >= 2**29 and 0 < service["pids_limit"] <= 4096, name
        assert service["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "5"}}, name
        assert service.get("read_only", False) is not name.startswith("triton"), name


def test_limits_are_an_operators(services: dict[str, Any]) -> None:
    """Without a word of his no CPU is counted: the engine refuses a limit over what the machine has."""
    assert {float(service.get("cpus", 0)) for service in services.values()} == {0}
    variables = {f"SAMPHIRE_{part}_CPUS": "1.5" for part in LIMITED.values()}
    variables |= {f"SAMPHIRE_{part}_MEMORY": "700mb" for part in LIMITED.values()}
    variables |= {"SAMPHIRE_BROKER_MEMORY_LIMIT": "2gb", "SAMPHIRE_TRITON_SHARED_MEMORY": "2gb"}
    given = services_with(SECRETS | variables)
    assert {float(service["cpus"]) for service in given.values()} == {1.5}
    limits = {name: bytes_of(service["mem_limit"]) for name, service in given.items()}
    assert limits.pop("valkey") == 2 * 2**30
    assert set(limits.values()) == {700 * 2**20}
    assert option(words(given["valkey"]["command"]), "--maxmemory") == "700mb"
    assert bytes_of(given["triton-cpu"]["shm_size"]) == bytes_of(given["triton-gpu"]["shm_size"]) == 2 * 2**30


def test_the_broker_may_take_twice_what_it_keeps(services: dict[str, Any]) -> None:
    """The child that rewrites the append-only file shares its pages, until they change."""
    kept = bytes_of(option(words(services["valkey"]["command"]), "--maxmemory"))
    assert bytes_of(services["valkey"]["mem_limit"]) >= 2 * kept


def test_only_users_without_rights_run(services: dict[str, Any]) -> None:
    """The images of Samphire say so themselves (test_images.py)."""
    users = {name: service.get("user") for name, service in services.items()}
    triton = "triton-server"
    assert users == {"valkey": "valkey", "triton-gpu": triton, "triton-cpu": triton, "worker": None, "flower": None}
