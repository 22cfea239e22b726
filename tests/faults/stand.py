"""The servers, workers and clients that faults are tried on: each a process of its own, started and watched here.

`samphire up` restarts what dies by itself. Here the same parts are started one by one, so that a trial decides
what runs and knows by its exit status what has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from samphire.transport.address import broker_of
from samphire.wire import keys
from samphire_broker.embedded.ports import choose_port
from samphire_broker.embedded.process import Part, PartError, PartSpec
from samphire_broker.embedded.tritonserver import triton_spec
from samphire_broker.embedded.valkey import valkey_spec
from samphire_broker.embedded.worker import worker_spec
from samphire_broker.settings import FsyncPolicy, Settings, shipped_model_repository
from tests.faults.client import MODEL
from tests.faults.ledger import Ledger
from tests.faults.parts import LOOK_S, alone, is_stopped, running, until, until_async
from tests.support.names import KEYS

MODELS = Path(__file__).parent / "models"
ROOT = Path(__file__).parents[2]
BROKER_MEMORY_BYTES = 4 * 2**30
NUMBERS_A_CLIENT = 10**8
WEBHOOKS = keys.WEBHOOKS.encode()
ANSWER_TIMEOUT_S = 45.0
READ_ALL_S = 45.0
EVERYSEC_BOUND_S = 2.0
"""What `appendfsync everysec` may forget: it puts off writing for up to two seconds while the disk is busy."""


class Stand:
    """Valkey, Triton, workers and clients in a folder. `start` it; `stop` ends all of it, whatever happened."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 4,
        outstanding: int = 100,
        rest_s: float = 0.0,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.fsync: FsyncPolicy = "everysec"
        self.broker_port = choose_port(0, "")
        self.outstanding = outstanding
        self.rest_s = rest_s
        self.webhook_port = choose_port(0, "")
        self.webhooks: dict[str, Any] = {
            "webhook_schemes": "http",
            "webhook_ports": str(self.webhook_port),
            "webhook_allow_private": "true",
        }
        """Settings for a receiver on loopback."""
        self._variables = {"SAMPHIRE_MICRO_BATCH": '{"recorder": true}', **(settings or {})}
        self._variables |= {f"SAMPHIRE_{name.upper()}": value for name, value in self.webhooks.items()}
        self.broker = Part(self._broker_spec())
        self.broker_url = self.broker.spec.address
        grpc, http, metrics = (choose_port(0, "") for _ in range(3))
        self.triton_grpc = f"127.0.0.1:{grpc}"
        self.triton = Part(alone(triton_spec(folder, grpc, http, metrics, lambda _line: None)))
        self.workers = [
            Part(alone(worker_spec(folder, n + 1, broker_of(self.broker_url), self.triton_grpc), **self._variables))
            for n in range(workers)
        ]
        self.clients: list[Part] = []
        self.starting: dict[Part, asyncio.Task[None]] = {}
        """Replacements that are not ready yet."""
        self.ledger = Ledger(self.broker_url, folder / "model_repository" / MODEL / "executions")
        self._redis = redis.asyncio.Redis.from_url(self.broker_url, retry=Retry(NoBackoff(), 0), socket_timeout=5)
        self.forgotten: list[tuple[float, float]] = []
        """When Valkey was killed in the mode `everysec`, and when it was back."""
        self.spared: set[Part] = set()
        """Workers that are not to be chosen for a fault."""
        self._turn = 0
        self._numbers = 0
        self._ids: dict[int, str] = {}

    def _broker_spec(self) -> PartSpec:
        return alone(valkey_spec(self.folder, self.broker_port, BROKER_MEMORY_BYTES, self.fsync))

    # -- start and end ------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the servers and the workers."""
        repository = self.folder / "model_repository"
        for model in ("identity", "token_stream"):
            shutil.copytree(shipped_model_repository() / model, repository / model)
        shutil.copytree(MODELS, repository, dirs_exist_ok=True)
        await asyncio.gather(self.broker.start(), self.triton.start())
        if not self.workers:
            return
        await asyncio.gather(*(worker.start() for worker in self.workers))
        await until_async(
            lambda: self.ask("HEXISTS", KEYS.catalogue, keys.CATALOGUE_COMPLETE), ANSWER_TIMEOUT_S, "the catalogue"
        )
        self.ledger.start()

    async def may_reap(self) -> None:
        """Wait until the broker has run for longer than a lease: nobody is taken for lost before."""
        lease_s = float(self._variables.get("SAMPHIRE_LEASE_S", Settings.model_fields["lease_s"].default))

        async def old_enough() -> bool:
            return bool((await self.ask("INFO", "server"))["uptime_in_seconds"] > lease_s)

        await until_async(old_enough, ANSWER_TIMEOUT_S, "a broker that has run for a lease")

    async def stop(self) -> None:
        """End everything."""
        for task in self.starting.values():
            task.cancel()
        await asyncio.gather(*self.starting.values(), return_exceptions=True)
        for part in (*self.clients, *self.workers, self.triton, self.broker):
            if part.process is not None and part.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    part.process.send_signal(signal.SIGCONT)  # a trial that failed may have left it standing still
        try:
            await self.ledger.stop()
        finally:
            await asyncio.gather(*(part.stop() for part in (*self.clients, *self.workers)))
            await self.triton.stop()
            await self._redis.aclose()
            await self.broker.stop()

    async def set_fsync(self, fsync: FsyncPolicy) -> None:
        """Change how durable the broker is, now and after its next start."""
        self.fsync = fsync
        self.broker.spec = self._broker_spec()
        await self.ask("CONFIG", "SET", "appendfsync", fsync)

    async def start_client(self) -> Part:
        """Start one more client, which submits until it is ended."""
        number = self._numbers
        self._numbers += 1
        name = f"client{number}"
        journal = self.folder / f"{name}.journal"

        async def wait_ready(_pid: int) -> None:
            while not journal.exists() or journal.read_text().count("\nA ") < 1:
                await asyncio.sleep(LOOK_S)

        command = [sys.executable, "-m", "tests.faults.client", self.broker_url, str(journal)]
        command += [str(self.outstanding), str(number * NUMBERS_A_CLIENT), str(self.rest_s)]
        spec = PartSpec(name, command, self.folder / "logs" / f"{name}.log", "", wait_ready, {"PYTHONPATH": str(ROOT)})
        client = Part(alone(spec))
        self.clients.append(client)
        await client.start()
        self.ledger.follow(name, journal)
        return client

    async def load(self, clients: int) -> None:
        """Let so many clients submit: those that were told to rest go on, others are started."""
        for client in self.clients:
            self.ledger.resting.discard(client.spec.name)
            running(client).send_signal(signal.SIGUSR2)
        for _ in range(clients - len(self.clients)):
            await self.start_client()

    async def rest(self) -> dict[str, bool]:
        """Tell the clients to submit no more, and wait until they have read all their results.

        Returns the names of those that have not, which are ended, and whether they had ended by themselves.
        """
        deaf: dict[str, bool] = {}
        for client in self.clients:
            if running(client).returncode is None:
                running(client).send_signal(signal.SIGUSR1)
        for client in list(self.clients):
            name = client.spec.name
            try:
                await until(lambda: self.ledger.has_read_all(name), READ_ALL_S, f"the results of {name}")  # noqa: B023
                assert running(client).returncode is None
            except (TimeoutError, AssertionError):
                deaf[name] = running(client).returncode is not None
                self.clients.remove(client)
                await client.stop()
        return deaf

    def restart_later(self, part: Part) -> None:
        """Start a part again while other things go on; `all_ready` waits for it."""

        async def start() -> None:
            try:
                await part.start()
            except PartError:  # while servers are away it may not be ready in time
                await part.stop()
                await part.start()
            del self.starting[part]

        self.starting[part] = asyncio.create_task(start())

    async def all_ready(self) -> None:
        """Wait for what is being started."""
        await asyncio.gather(*self.starting.values())

    async def goes_on(self) -> None:
        """Wait until a task that is accepted from now on has ended."""
        since = time.monotonic()
        await until(
            lambda: any(entry.accepted_at > since and entry.ends for entry in self.ledger.entries.values()),
            ANSWER_TIMEOUT_S,
            "a new task to end",
        )

    # -- what is under way --------------------------------------------------------------------------

    async def ask(self, *command: str | int) -> Any:
        """Ask the broker, however long it is away."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            try:
                return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]
            except RedisError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(LOOK_S)

    async def worker_id(self, worker: Part) -> str:
        """The id under which the worker holds tasks; its process has one for life."""
        if worker.pid not in self._ids:
            for member in await self.ask("SMEMBERS", KEYS.workers):
                info = await self.ask("GET", f"{KEYS.worker_prefix}{member.decode()}:info")
                if info is not None:
                    self._ids[json.loads(info)["pid"]] = member.decode()
        return self._ids[worker.pid]

    async def inflight_key(self, worker: Part) -> str:
        """The hash of what the worker has claimed and not settled."""
        return f"{KEYS.worker_prefix}{await self.worker_id(worker)}:inflight"

    async def held(self, worker: Part) -> set[str]:
        """Ids of the clients' tasks that the worker has claimed and not settled; others are accounted for elsewhere."""
        fields = await self.ask("HGETALL", await self.inflight_key(worker))
        messages = [message for field, message in fields.items() if f".{MODEL}".encode() in field]
        return {json.loads(message)["headers"]["id"] for message in messages}

    async def deliveries_of(self, worker: Part) -> set[str]:
        """Ids of the webhooks that the worker is delivering."""
        fields = await self.ask("HGETALL", await self.inflight_key(worker))
        return {json.loads(message)["headers"]["id"] for field, message in fields.items() if WEBHOOKS in field}

    async def delivering_worker(self, endpoint: str) -> Part:
        """The worker that leads an endpoint of webhooks, while some are on their way and another worker is ready.

        Raises:
            TimeoutError: there is none.
        """
        model, _ = keys.parse_queue(keys.delivery_queue(endpoint))

        async def find() -> Part | None:
            leader = await self.ask("HGET", KEYS.leaders, model)
            ready = self.ready_workers()
            for worker in ready if len(ready) > 1 else ():
                if leader == (await self.worker_id(worker)).encode() and await self.deliveries_of(worker):
                    return worker
            return None

        found = await until_async(find, ANSWER_TIMEOUT_S, "a worker that delivers webhooks")
        assert found is not None
        return found

    async def started(self, worker: Part) -> int:
        """How many of them it has given to Triton."""
        return int(await self.ask("HLEN", f"{KEYS.worker_prefix}{await self.worker_id(worker)}:started"))

    def ready_workers(self) -> list[Part]:
        """Workers that run, in the order in which it is their turn."""
        turned = self.workers[self._turn :] + self.workers[: self._turn]
        return [worker for worker in turned if worker not in self.starting and not is_stopped(worker)]

    async def busy_worker(self, others: int = 1) -> Part:
        """The next worker that has given tasks to Triton, while `others` are there to go on.

        Raises:
            TimeoutError: none has any.
        """

        async def find() -> Part | None:
            ready = self.ready_workers()
            if len(ready) <= others:
                return None
            for worker in ready:
                if worker not in self.spared and await self.started(worker):
                    return worker
            return None

        victim = await until_async(find, ANSWER_TIMEOUT_S, "a worker with tasks at Triton")
        assert victim is not None
        self._turn = (self.workers.index(victim) + 1) % len(self.workers)
        return victim

    async def busy_client(self) -> Part:
        """A client that waits for results."""
        client = self.clients[0]
        await until(lambda: self.ledger.unended(client.spec.name), ANSWER_TIMEOUT_S, "a client to wait for results")
        return client

    async def all_held(self) -> set[str]:
        """What all workers hold; waits until some of it is at Triton."""

        async def look() -> bool:
            return any([await self.started(worker) for worker in self.ready_workers()])

        await until_async(look, ANSWER_TIMEOUT_S, "tasks at Triton")
        held: set[str] = set()
        for worker in self.ready_workers():
            held |= await self.held(worker)
        return held

    async def attempts(self) -> int:
        """Attempts that tasks under way have lost."""
        count = 0
        for task_id in await self.ask("SMEMBERS", KEYS.tried):
            if task_id.startswith(b"msg_"):  # a delivery, whose receiver is away at times
                continue
            count += int(await self.ask("HGET", KEYS.task_prefix + task_id.decode(), "attempts") or 0)
        return count

    def may_be_forgotten(self, moment: float) -> bool:
        """Whether this was in the last moments before Valkey was killed in the mode `everysec`."""
        return any(killed_at - EVERYSEC_BOUND_S <= moment <= back_at for killed_at, back_at in self.forgotten)

    async def left_behind(self) -> int:
        """Messages that are in a queue, scheduled or in flight."""
        count = int(await self.ask("ZCARD", KEYS.scheduled))
        for key in keys.queue_lists(keys.queue_name(MODEL)):
            count += int(await self.ask("LLEN", key))
        for member in await self.ask("SMEMBERS", KEYS.workers):
            count += int(await self.ask("HLEN", f"{KEYS.worker_prefix}{member.decode()}:inflight"))
        return count

    async def memory_by_kind(self) -> dict[str, int]:
        """Bytes of the broker's data, by the first word of its keys."""
        found: Counter[str] = Counter()
        async for key in self._redis.scan_iter(count=1000):
            kind = re.split("[:-]", key.decode(errors="replace"))[0]
            found[kind] += int(await self.ask("MEMORY", "USAGE", key) or 0)
        return dict(found.most_common())
