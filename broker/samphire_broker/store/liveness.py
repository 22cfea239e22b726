"""Who lives: a worker's lease, what it sees of the others, and the return of what lost ones held."""

from __future__ import annotations

import re
from dataclasses import asdict

import msgspec

from samphire.transport.connection import key_text
from samphire.transport.direct import Argument, DirectConnection
from samphire.wire.keys import SCHEMA_VERSION
from samphire_broker.store.calls import RUN_ID, Calls
from samphire_broker.store.records import OtherDeploymentError, Reaped, WorkerInfo

_CONNECTION_NAME = re.compile(rb" name=(\S+)")
_UPTIME = re.compile(rb"uptime_in_seconds:(-?\d+)")


class Liveness(Calls):
    """All of it may be repeated after a lost reply."""

    async def beat(self, info: WorkerInfo, connection: DirectConnection) -> int:
        """Renew the lease, on the worker's named connection; 1 means that it had been lost, or is new."""
        key_names = [self._lease, f"{self._lease}:info", self.keys.workers, self.keys.namespace_mark]
        told = {**asdict(info), "clock_ahead_s": round(self.clock.skew_s, 1)}
        args: list[Argument] = [self.worker_id, self._settings.lease_ms, msgspec.json.encode(told)]
        return int(await self._run("beat", key_names, args, connection))

    async def enter(self) -> None:
        """Take part in this deployment.

        Raises:
            OtherDeploymentError: its queues are served by workers of another namespace, or its keys are of another
                schema.
        """
        args: list[Argument] = [SCHEMA_VERSION, self._settings.lease_ms]
        schema, namespace = map(key_text, await self._run("enter", [self.keys.schema, self.keys.namespace_mark], args))
        if schema != str(SCHEMA_VERSION):
            raise OtherDeploymentError(
                f"the keys under {self.keys.namespace!r} are of schema {schema[:20]!r}, this worker knows schema "
                f"{SCHEMA_VERSION}: install the version of samphire that the other workers have, or set another "
                "SAMPHIRE_NAMESPACE"
            )
        if namespace != self.keys.namespace:
            raise OtherDeploymentError(
                f"workers of the namespace {namespace[:80]!r} serve the queues of this database, and this worker's "
                f"namespace is {self.keys.namespace!r}: set SAMPHIRE_CELERY_KEY_PREFIX to what no other deployment "
                f"has, for workers and producers, or stop those workers and wait {self._settings.lease_s:g} s"
            )

    async def others(self) -> dict[str, int | None]:
        """The other registered workers with their lease's counter; None where the lease has lapsed."""
        members = await self._rest.execute("SMEMBERS", self.keys.workers)
        ids = sorted({key_text(member) for member in members} - {self.worker_id})
        if not ids:
            return {}
        beats = await self._rest.execute("MGET", *(self.keys.worker_prefix + worker_id for worker_id in ids))
        return {worker_id: None if beat is None else int(beat) for worker_id, beat in zip(ids, beats, strict=True)}

    async def connected(self) -> set[str]:
        """Ids of the workers whose named connection is open.

        Raises:
            BrokerRightError: this user may not ask (CLIENT LIST).
        """
        listing = await self._rest.execute("CLIENT", "LIST", "TYPE", "NORMAL")
        prefix = self.keys.connection_prefix
        names = [key_text(name) for name in _CONNECTION_NAME.findall(listing)]
        return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    async def broker_run(self) -> tuple[str, int]:
        """Which run of the broker this is, and for how many s it says to have run: by its clock, so it may be anything.

        Raises:
            BrokerRightError: this user may not ask (INFO).
        """
        told = await self._rest.execute("INFO", "server")
        run_id, uptime_s = RUN_ID.search(told), _UPTIME.search(told)
        return run_id[1].decode() if run_id else "", int(uptime_s[1]) if uptime_s else 0

    async def hostname(self, worker_id: str) -> str:
        """What a worker calls itself; its id where that is not known any more."""
        raw = await self._rest.execute("GET", f"{self.keys.worker_prefix}{worker_id}:info")
        return worker_id if raw is None else str(msgspec.json.decode(raw).get("hostname", worker_id))

    async def reap(self, worker_id: str, last_beat: int | None, attempt: str) -> Reaped:
        """Return a lost worker's messages to their lists, at most `BATCH_MAX` a call.

        What had started is an `attempt` (JSON) of its task.
        """
        lease = self.keys.worker_prefix + worker_id
        key_names = [lease, f"{lease}:info", f"{lease}:inflight", f"{lease}:started", self.keys.workers]
        key_names += [self.keys.tried, self.keys.alone]
        args = [worker_id, "" if last_beat is None else last_beat, self.keys.meta_prefix, self.keys.task_prefix]
        args += [self._settings.dead_letter_ttl_s, attempt]
        return Reaped(*await self._run("reap", key_names, args))

    async def leave(self) -> None:
        """Drop the lease of a worker that ends; if it holds nothing nobody need reap it."""
        key_names = [self._lease, f"{self._lease}:info", self._inflight, self.keys.workers, self.keys.namespace_mark]
        await self._run("leave", key_names, [self.worker_id])
