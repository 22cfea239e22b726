"""A receiver of webhooks beside the other clients of a round, which is away at times: each end arrives all the same."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np

from samphire import AsyncClient, SamphireError
from samphire.wire.keys import delivery_queue
from samphire_broker.settings import Settings
from samphire_broker.webhooks.endpoint import Endpoint
from samphire_broker.webhooks.registry import open_registry
from tests.faults.matrix import WEBHOOK_ENDPOINT as NAME
from tests.faults.parts import until_async
from tests.faults.stand import Stand
from tests.support.names import KEYS
from tests.support.receiver import Received, Receiver
from tests.support.serving import serving

SCHEDULE_S = (0.0, 0.2, 0.5, 1.0, 1.0, 2.0, 2.0, 5.0, 5.0, 5.0, 10.0, 10.0, 10.0)
PAUSE_S = 0.04
"""Between two submits."""
THERE_S, AWAY_S = 3.0, 0.5
ANSWER_S = 0.05
"""How long the receiver takes: one or two are on their way at any moment."""
END_TIMEOUT_S = 90.0
VALUE = np.ones((1, 2), np.float32)


class Webhooks:
    """Tasks that name a webhook, and the receiver of it."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._secret = ""
        self._receiver = Receiver(self._take)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._accepted: dict[str, float] = {}
        """Tasks whose submit has returned, and when it did, in s since 1970."""
        self._arrived: dict[str, set[str]] = {}
        """Ids of the webhooks that have arrived, by task."""
        self._ids: set[str] = set()
        self.repeats = 0
        """Webhooks that arrived again, under the same id."""
        self.absences = 0
        """Times that the receiver was away."""
        self.lost = 0
        """Tasks whose submit has returned, and whose webhook has not arrived."""
        self.untrue: list[str] = []
        """What was not as it must be."""

    @property
    def arrived(self) -> int:
        """Tasks whose webhook has arrived."""
        return len(self._arrived)

    async def start(self) -> None:
        """Register the endpoint, receive, and submit."""
        self._receiver.port = self._stand.webhook_port
        self._secret = await asyncio.to_thread(self._register)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._submit())]

    async def rest(self) -> None:
        """Submit no more, and wait until nothing is to be delivered any more."""
        self._stopping = True
        receiving, submitting = self._tasks
        await submitting
        try:
            await until_async(self._nothing_waits, END_TIMEOUT_S, "the end of all deliveries")
        except TimeoutError as error:
            self.untrue.append(f"{error}: {await self._why()}")
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        for task_id, accepted_at in self._accepted.items():
            arrived = self._arrived.get(task_id, set())
            if not arrived and not self._stand.may_be_forgotten(accepted_at):
                self.lost += 1
                self.untrue.append(f"the webhook of {task_id} has not arrived")
            if len(arrived) > 1:
                self.untrue.append(f"{len(arrived)} webhooks tell of the end of {task_id}")

    def _register(self) -> str:
        settings = Settings(broker_url=self._stand.broker_url, data_dir=self._stand.folder, **self._stand.webhooks)
        with open_registry(settings) as registry:
            with contextlib.suppress(SamphireError):
                registry.remove(NAME)
            return registry.add(Endpoint(NAME, self._receiver.url, schedule_s=SCHEDULE_S), "v1").secrets[0]

    async def _nothing_waits(self) -> bool:
        waiting = await self._stand.ask("ZCARD", KEYS.waiting_deliveries(NAME))
        return not waiting and not await self._stand.ask("LLEN", KEYS.of_celery(delivery_queue(NAME)))

    async def _why(self) -> str:
        """Where it stands still."""
        waiting = await self._stand.ask("ZCARD", KEYS.waiting_deliveries(NAME))
        queued = await self._stand.ask("LLEN", KEYS.of_celery(delivery_queue(NAME)))
        health = await self._stand.ask("HGET", KEYS.webhook_health, NAME)
        leaders = await self._stand.ask("HGETALL", KEYS.leaders)
        workers = await self._stand.ask("SMEMBERS", KEYS.workers)
        scheduled = await self._stand.ask("ZCARD", KEYS.scheduled)
        held = {key: await self._stand.ask("HKEYS", f"{KEYS.worker_prefix}{key.decode()}:inflight") for key in workers}
        receives = not self._tasks[0].done()
        return (
            f"{waiting} wait, {queued} in the queue, {scheduled} scheduled, held {held}, health {health!r}, led by "
            f"{leaders}, receiving: {receives}"
        )

    async def _receive(self) -> None:
        while True:
            async with serving(self._receiver.serve, self._receiver.port):
                await asyncio.sleep(THERE_S)
                while self._stopping:  # to the end of the round
                    await asyncio.sleep(THERE_S)
            self.absences += 1
            await asyncio.sleep(AWAY_S)

    async def _take(self, receiver: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        event = received.verified(self._secret)
        self.repeats += event.id in self._ids
        self._ids.add(event.id)
        self._arrived.setdefault(event.data["task_id"], set()).add(event.id)
        if event.type != "task.succeeded":
            self.untrue.append(f"{event.type} of {event.data['task_id']}: {event.data.get('error')}")
        await asyncio.sleep(ANSWER_S)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async def _submit(self) -> None:
        async with AsyncClient(self._stand.broker_url) as client:
            while not self._stopping:
                try:
                    task = await client.submit("identity", {"input_fp32": VALUE}, webhook=NAME)
                except SamphireError:  # the broker is away: nothing was promised
                    await asyncio.sleep(0.2)
                    continue
                self._accepted[task.id] = time.time()
                await asyncio.sleep(PAUSE_S)
