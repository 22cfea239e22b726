"""The embedded stack: started in order, watched, restarted, stopped; nothing is left behind."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import json
import signal
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tritonclient.grpc.aio import InferenceServerClient

from samphire.errors import BrokerUnavailableError
from samphire.transport.address import Broker, broker_of
from samphire_broker.embedded.flower import (
    FLOWER_USER,
    PASSWORD_VARIABLE,
    flower_spec,
    given_password,
    kept_password,
)
from samphire_broker.embedded.ports import choose_port, choose_ports
from samphire_broker.embedded.process import Part, PartError, PartSpec
from samphire_broker.embedded.tritonserver import triton_spec
from samphire_broker.embedded.valkey import valkey_spec
from samphire_broker.embedded.worker import worker_spec
from samphire_broker.inspection.overview import broker_connection
from samphire_broker.repository.changes import Changes, say_ignored, watch
from samphire_broker.repository.folder import Model
from samphire_broker.repository.loads import Loads
from samphire_broker.repository.mirror import Mirror
from samphire_broker.repository.record import LOCK, RECORD, Record, note_trouble, write_record
from samphire_broker.settings import FsyncPolicy, Settings, read_settings, shipped_model_repository

TRITON_PORTS = ("--triton-grpc-port", "--triton-http-port", "--triton-metrics-port")

BROKER_WAIT_S = 60.0
BROKER_PAUSE_S = 0.5
LOCK_TRIES = 5
LOCK_PAUSE_S = 0.05


@dataclass(frozen=True)
class StackOptions:
    """What `samphire up` was asked for; a port of 0 means a free one."""

    data_dir: Path
    workers: int = 1
    broker_port: int = 6379
    triton_grpc_port: int = 8001
    triton_http_port: int = 8000
    triton_metrics_port: int = 8002
    flower_port: int = 5555
    broker_memory_bytes: int = 4 * 2**30
    broker_fsync: FsyncPolicy = "always"
    model_repository: Path | None = None
    """Models to serve; by default those that ship."""
    watch_models: bool = False
    """Whether changes of these are taken over while the stack runs."""
    ready_file: Path | None = None
    external_broker_url: str | None = None
    external_triton_urls: str | None = None
    loopback_webhooks: bool = False
    """Whether webhooks go to one port of this machine, for a receiver of the stack's own job."""
    is_temporary: bool = False
    """Whether nothing of it was kept, nor will be: then its parts start together, and are killed in the end."""


class Stack:
    """The parts of one machine. Use as an asynchronous context manager, on the main thread."""

    def __init__(self, options: StackOptions, progress: Callable[[str], None]) -> None:
        self._options = options
        self._began = time.monotonic()
        self._say = progress
        self._broker: Part | None = None
        self._triton: Part | None = None
        self._workers: list[Part] = []
        self.metrics_ports: list[int] = []
        self._flower: Part | None = None
        self._mirror: Mirror | None = None
        self._note = functools.partial(note_trouble, options.data_dir)
        self._models: dict[str, Model] = {}
        """What the folder of models had as it was mirrored."""
        self._keepers: list[asyncio.Task[None]] = []
        self._lock: Any = None
        self.broker_url = options.external_broker_url or ""
        self.triton_grpc = (options.external_triton_urls or "").split(",")[0]
        self.triton_http: str | None = None
        self.flower_url = ""
        self.flower_password_file: Path | None = None
        """None: the password is that of the environment."""
        self.webhook_port = choose_port(0, "") if options.loopback_webhooks else 0

    @property
    def parts(self) -> list[Part]:
        """The parts that the stack runs, in the order of their start."""
        return [part for part in (self._broker, self._triton, *self._workers, self._flower) if part is not None]

    @property
    def model_folder(self) -> Path:
        """The folder of models that is served."""
        return self._options.model_repository or shipped_model_repository()

    @property
    def watches_models(self) -> bool:
        """Whether changes of that folder are taken over."""
        return self._options.watch_models

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    def settings(self) -> Settings:
        """The settings of its workers, for an operator."""
        webhooks: dict[str, Any] = {}
        if self.webhook_port:
            webhooks = {
                "webhook_schemes": ("http",),
                "webhook_ports": (self.webhook_port,),
                "webhook_allow_private": True,
            }
        return read_settings(broker_url=self.broker_url, data_dir=self._options.data_dir, **webhooks)

    async def wait_failed(self) -> None:
        """Return only by raising: when a keeper itself has failed."""
        done, _ = await asyncio.wait(self._keepers, return_when=asyncio.FIRST_COMPLETED)
        for keeper in done:
            keeper.result()

    def _progress(self, line: str) -> None:
        self._say(f"[{time.monotonic() - self._began:5.1f} s] {line}")

    def _choose_ports(self) -> dict[str, int]:
        """The port of each flag of the parts that this stack runs."""
        options = self._options
        asked = {"--flower-port": options.flower_port}
        if options.external_broker_url is None:
            asked["--broker-port"] = options.broker_port
        if options.external_triton_urls is None:
            triton = (options.triton_grpc_port, options.triton_http_port, options.triton_metrics_port)
            asked |= zip(TRITON_PORTS, triton, strict=True)
        return choose_ports(asked)

    def _make_specs(self, ports: dict[str, int]) -> list[PartSpec]:
        options = self._options
        specs = []
        if options.external_broker_url is None:
            spec = valkey_spec(
                options.data_dir, ports["--broker-port"], options.broker_memory_bytes, options.broker_fsync
            )
            self.broker_url = spec.address
            specs.append(spec)
        if options.external_triton_urls is None:
            grpc_port, http_port, metrics_port = (ports[flag] for flag in TRITON_PORTS)
            spec = triton_spec(options.data_dir, grpc_port, http_port, metrics_port, self._progress, self._note)
            self.triton_grpc = spec.address
            self.triton_http = f"{spec.address.rpartition(':')[0]}:{http_port}"
            specs.append(spec)
        return specs

    def _make_flower_spec(self, port: int) -> PartSpec:
        data_dir = self._options.data_dir
        password = given_password()
        if password is None:
            self.flower_password_file = data_dir / "flower-password"
            password = kept_password(self.flower_password_file)
        spec = flower_spec(data_dir, port, broker_of(self.broker_url), password)
        self.flower_url = spec.address
        return spec

    async def _start(self) -> None:
        options = self._options
        options.data_dir.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        ports = self._choose_ports()
        specs = self._make_specs(ports)
        self._flower = Part(self._make_flower_spec(ports["--flower-port"]))
        if options.external_broker_url is not None:
            await self._wait_for_broker(options.external_broker_url)
        if options.external_triton_urls is None:
            await self._mirror_models()
        parts = [Part(spec) for spec in specs]
        for part in parts:
            if part.spec.name == "broker":
                self._broker = part
            else:
                self._triton = part
        if self._broker is not None:
            await self._start_together([self._broker])
        self.metrics_ports = [choose_port(0, "") for _ in range(options.workers)]
        triton_urls = options.external_triton_urls or self.triton_grpc
        self._workers = [
            Part(
                worker_spec(
                    options.data_dir,
                    n + 1,
                    broker_of(self.broker_url),
                    triton_urls,
                    port,
                    webhook_port=self.webhook_port,
                )
            )
            for n, port in enumerate(self.metrics_ports)
        ]
        # Workers wait for Triton themselves; but a task that was kept may not meet one whose numbers were not probed.
        triton = [] if self._triton is None else [self._triton]
        begun = [*triton, self._flower, *(self._workers if options.is_temporary else [])]
        await self._start_together(begun)
        await self._start_together([worker for worker in self._workers if worker not in begun])
        self._keepers = [asyncio.create_task(part.keep_running(self._on_change)) for part in self.parts]
        if options.watch_models:
            self._keepers.append(asyncio.create_task(self._watch_models()))
        self._write_ready_file()
        for part in self.parts:
            self._say(f"  {part.spec.name:<8} {part.spec.address:<32} log: {part.spec.log_file}")
        where = f"in {self.flower_password_file}" if self.flower_password_file else f"that of {PASSWORD_VARIABLE}"
        self._say(f"  metrics of the workers: {', '.join(self.metrics_urls)}")
        self._say(f"  flower's user is {FLOWER_USER}, the password is {where}")

    async def _wait_for_broker(self, url: str) -> None:
        """Wait for a broker that this stack does not run.

        Raises:
            BrokerUnavailableError: it has not answered for `BROKER_WAIT_S`.
            InvalidInputError: it refuses the credentials.
            BrokerRightError: this user may do nothing there.
        """
        gives_up_at, told = time.monotonic() + BROKER_WAIT_S, False
        while True:
            try:
                return await asyncio.to_thread(_ping, broker_of(url))
            except BrokerUnavailableError as error:
                if time.monotonic() >= gives_up_at:
                    raise
                if not told:
                    self._progress(
                        f"broker: {error}; waiting for it, for at most {BROKER_WAIT_S:.0f} s: SAMPHIRE_BROKER_URL "
                        "names it, and without that variable a broker is started here"
                    )
                told = True
                await asyncio.sleep(BROKER_PAUSE_S)

    async def _mirror_models(self) -> None:
        options = self._options
        source = self.model_folder
        self._mirror = Mirror(source, options.data_dir)
        self._models = await self._mirror.begin()
        for name, model in self._models.items():
            say_ignored(name, model, self._progress)
            if model.trouble:
                self._progress(f"model {name} is not served: {model.trouble}")
        troubles = {name: model.trouble for name, model in self._models.items() if model.trouble}
        is_own = options.model_repository is not None
        write_record(options.data_dir, Record(self.triton_grpc, str(source), is_own, troubles))

    async def _watch_models(self) -> None:
        assert self._mirror is not None and self._triton is not None
        async with InferenceServerClient(self.triton_grpc) as client:
            loads = Loads(client, self._triton.spec.log_file)
            changes = Changes(self._mirror, loads, self._progress, self._note)
            await watch(self._mirror, changes, self._models, self._progress)

    async def _start_together(self, parts: list[Part]) -> None:
        async def start(part: Part) -> None:
            self._progress(f"{part.spec.name}: starting")
            await part.start()
            self._progress(f"{part.spec.name}: ready")

        starts = [asyncio.create_task(start(part)) for part in parts]
        try:
            await asyncio.gather(*starts)
        finally:
            for task in starts:
                task.cancel()
            await asyncio.gather(*starts, return_exceptions=True)

    def _take_lock(self) -> None:
        self._lock = (self._options.data_dir / LOCK).open("w")
        for tries_left in reversed(range(LOCK_TRIES)):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not tries_left:
                    raise PartError(
                        f"another stack runs in {self._options.data_dir}: stop it, or choose another --data-dir"
                    ) from error
                time.sleep(LOCK_PAUSE_S)  # a command looks whether a stack runs

    @property
    def metrics_urls(self) -> list[str]:
        """Where each worker answers Prometheus."""
        return [f"http://127.0.0.1:{port}/metrics" for port in self.metrics_ports]

    def _on_change(self, line: str) -> None:
        self._progress(line)
        self._write_ready_file()

    def _write_ready_file(self) -> None:
        path = self._options.ready_file
        if path is None:
            return
        ready = {
            "broker_url": self.broker_url,
            "triton_grpc": self.triton_grpc,
            "triton_http": self.triton_http,
            "flower_url": self.flower_url,
            "flower_user": FLOWER_USER,
            "flower_password_file": str(self.flower_password_file) if self.flower_password_file else None,
            "metrics_urls": self.metrics_urls,
            "pids": {
                "broker": self._broker.pid if self._broker else None,
                "triton": self._triton.pid if self._triton else None,
                "worker": [worker.pid for worker in self._workers],
                "flower": self._flower.pid if self._flower else None,
            },
        }
        draft = path.with_name(path.name + ".part")
        draft.unlink(missing_ok=True)
        draft.touch(mode=stat.S_IRUSR | stat.S_IWUSR)  # the URL in it has a password
        draft.write_text(json.dumps(ready, indent=2) + "\n")
        draft.replace(path)  # a reader sees the old file or the new one, never half of one

    async def _stop(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._options.ready_file is not None:
            self._options.ready_file.unlink(missing_ok=True)
        if self.parts:
            self._progress("stopping")
        if self._mirror is not None:
            (self._options.data_dir / RECORD).unlink(missing_ok=True)
        # On a broker that goes on, a worker that was killed would hold what it has until its lease has lapsed.
        at_once = self._options.is_temporary and self._options.external_broker_url is None
        flower = [] if self._flower is None else [self._flower]
        await asyncio.gather(*(part.stop(at_once=at_once) for part in [*self._workers, *flower]))
        for part in (self._triton, self._broker):
            if part is not None:
                await part.stop(at_once=at_once)
        if self._lock is not None:
            self._lock.close()


def _ping(broker: Broker) -> None:
    with broker_connection(broker) as client:
        client.ping()


Job = Callable[[Stack], Awaitable[None]]


async def serve(stack: Stack) -> None:
    """The job of `samphire up`: nothing, until a signal comes."""
    await stack.wait_failed()


async def run_stack(options: StackOptions, progress: Callable[[str], None], job: Job = serve) -> None:
    """Start a stack, do a job with it, stop it. SIGINT and SIGTERM end the job, also while parts start.

    Raises:
        PartError, PortTakenError: a part cannot start; what had started is stopped.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signals = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        for number in signals:  # stopping takes seconds: a second Ctrl-C must not break it off
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        task.cancel()

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        async with Stack(options, progress) as stack:
            await job(stack)
    except asyncio.CancelledError:
        progress("stopped")
