"""A Celery worker of the embedded stack."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from samphire.errors import SamphireError
from samphire.transport.address import Broker, environment_of
from samphire.transport.connection import key_text
from samphire.transport.direct import DirectConnection
from samphire.wire.keys import Keys
from samphire_broker.embedded.process import PartSpec


def worker_spec(
    data_dir: Path, number: int, broker: Broker, triton_urls: str, metrics_port: int = 0, webhook_port: int = 0
) -> PartSpec:
    """One worker process; ready once its lane has taken up its lease.

    It answers Prometheus if a port is given for that, and webhooks go to one port of this machine if that is given.
    """
    name = f"worker{number}"
    command = [sys.executable, "-m", "celery", "-A", "samphire_workers.app", "worker"]
    command += ["--loglevel", "INFO", "--hostname", f"{name}@%h", "--without-gossip", "--without-mingle"]

    async def wait_ready(pid: int) -> None:
        connection = DirectConnection(broker.address)
        try:
            while not await _is_registered(connection, broker.keys, pid):
                await asyncio.sleep(0.1)
        finally:
            await connection.close()

    return PartSpec(
        name=name,
        command=command,
        env={
            **environment_of(broker),
            "SAMPHIRE_TRITON_URLS": triton_urls,
            "SAMPHIRE_METRICS_PORT": str(metrics_port),
            "SAMPHIRE_DATA_DIR": str(data_dir),  # where the key of the secrets is
            **(_loopback(webhook_port) if webhook_port else {}),
            # glibc keeps freed memory: in an arena a thread, and in the heap where it once saw a large buffer
            # freed. Few arenas and a fixed threshold give the buffers of large tensors back at once.
            "MALLOC_ARENA_MAX": "2",
            "MALLOC_MMAP_THRESHOLD_": str(2**20),
            "MALLOC_TRIM_THRESHOLD_": str(2**20),
            "PYTHONWARNINGS": "ignore::celery.platforms.SecurityWarning",
        },
        log_file=data_dir / "logs" / f"{name}.log",
        address=f"queues of {broker.address}",
        wait_ready=wait_ready,
        stop_timeout_s=70.0,  # a warm stop finishes what is in flight
    )


def _loopback(port: int) -> dict[str, str]:
    return {
        "SAMPHIRE_WEBHOOK_SCHEMES": "http",
        "SAMPHIRE_WEBHOOK_PORTS": str(port),
        "SAMPHIRE_WEBHOOK_ALLOW_PRIVATE": "true",
    }


async def _is_registered(connection: DirectConnection, keys: Keys, pid: int) -> bool:
    try:
        for worker in await connection.execute("SMEMBERS", keys.workers):
            info = await connection.execute("GET", f"{keys.worker_prefix}{key_text(worker)}:info")
            if info and json.loads(info)["pid"] == pid:
                return True
    except SamphireError:  # the broker is starting again
        return False
    return False
