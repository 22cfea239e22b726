"""Endpoints for tests, on a broker of the test's own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from samphire_broker.settings import Settings
from samphire_broker.webhooks.deliveries import Deliveries
from samphire_broker.webhooks.endpoint import Endpoint
from samphire_broker.webhooks.registry import Registry, open_registry
from tests.stacks import Valkey
from tests.support.lane import FakeTriton, LaneWorker, lane_worker
from tests.support.receiver import Receiver

LOOPBACK: dict[str, Any] = {
    "webhook_schemes": "http,https",
    "webhook_allow_private": True,
}
"""Settings for receivers on loopback; their ports are added."""


class Hooks:
    """What a test of webhooks has."""

    def __init__(self, valkey: Valkey, folder: Path) -> None:
        self.valkey = valkey
        self.folder = folder
        self.ports: set[int] = set()

    def settings(self, **more: Any) -> dict[str, Any]:
        """Of a worker, and of an operator."""
        ports = ",".join(map(str, sorted(self.ports | {443})))
        return {**LOOPBACK, "webhook_ports": ports, "data_dir": self.folder, **more}

    @contextlib.contextmanager
    def registry(self, **more: Any) -> Iterator[Registry]:
        """As an operator has it."""
        with open_registry(Settings(broker_url=self.valkey.url, **self.settings(**more))) as registry:
            yield registry

    @contextlib.contextmanager
    def deliveries(self, **more: Any) -> Iterator[Deliveries]:
        """As an operator has them."""
        settings = Settings(broker_url=self.valkey.url, **self.settings(**more))
        with open_registry(settings) as registry:
            yield Deliveries(registry)

    def add(self, name: str, to: Receiver, *, signature: str = "v1", **options: Any) -> str:
        """Register an endpoint; returns its secret."""
        self.ports.add(to.port)
        with self.registry() as registry:
            return registry.add(Endpoint(name, to.url, **options), signature).secrets[0]

    @contextlib.asynccontextmanager
    async def worker(self, triton: FakeTriton, **more: Any) -> AsyncIterator[LaneWorker]:
        """A worker that delivers."""
        async with lane_worker(self.valkey.url, triton, **self.settings(**more)) as worker:
            yield worker
