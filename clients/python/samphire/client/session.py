"""What a client has open: its connections and its event stream, and what it knows of models and of time."""

from __future__ import annotations

import asyncio
import os
import uuid
from datetime import datetime
from typing import Any

from samphire.client.encoder import Encoded, Encoder, Inputs, unknown_datatype, when
from samphire.client.log_reader import LogReader
from samphire.client.models import ModelCatalogue
from samphire.client.results import InferResult
from samphire.client.waiter import Look, Waiter
from samphire.client.webhook_names import WebhookNames
from samphire.errors import (
    BrokerUnavailableError,
    ClientClosedError,
    InvalidInputError,
    ResultTimeoutError,
    SamphireError,
)
from samphire.transport.address import Broker
from samphire.transport.clock import BrokerClock
from samphire.transport.direct import DirectConnection
from samphire.transport.publisher import Publisher
from samphire.wire.keys import stream_name
from samphire.wire.signature import ModelSignature

NOT_READY_S = 3.0
"""A model may be seen not to be loaded for so long before Python's numbers for it are refused."""
NOT_READY_LOOK_S = 0.1


class Session:
    """The parts of one client that its tasks and maps use too; for one event loop of one process."""

    def __init__(self, broker: Broker, *, queue_limit: int, blob_ttl_s: int, validate: bool) -> None:
        self.stream = stream_name(uuid.uuid4().hex)
        self.broker = broker
        self.publisher = Publisher(broker, queue_limit=queue_limit, blob_ttl_s=blob_ttl_s)
        self.waiter = Waiter(broker, self.stream)
        self.logs = LogReader(broker)
        self.catalogue = ModelCatalogue(self.publisher.connection, broker.keys)
        self.webhooks = WebhookNames(self.publisher.connection, broker.keys)
        self.clock = BrokerClock(self.publisher.connection)
        self.looking = DirectConnection(broker.address)
        """For looks that take the broker longer than what every task waits for."""
        self._validate = validate
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closed = False

    async def close(self) -> None:
        """Close all connections; who still waits for a result gets `ClientClosedError`."""
        self.closed = True
        await self.waiter.close()
        await self.logs.close()
        await self.looking.close()
        await self.publisher.close()

    def check_usable(self) -> None:
        """Raise what says so, where this is closed, or another process or event loop uses it."""
        if self.closed:
            raise ClientClosedError
        if self._process != os.getpid():
            raise SamphireError("an AsyncClient does not survive a fork: make one in each process")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise SamphireError(
                "an AsyncClient belongs to the event loop that first used it: make one in each, or use Client, "
                "which threads and loops may share"
            )

    async def when(self, eta: datetime | None, delay_s: float | None, deadline_s: float | None) -> dict[str, Any]:
        """The headers that say when a task may start, and until when it is of use, by the broker's clock."""
        if eta is None and delay_s is None and deadline_s is None:
            return {}
        return when(eta, delay_s, deadline_s, await self.clock.fresh_now()).headers()

    async def signature(self, model: str, *, fresh: bool = False) -> ModelSignature | None:
        """What requests are checked against before anything is queued; None where they are not."""
        if not self._validate:
            return None
        try:
            return await self.catalogue.signature(model, fresh=fresh)
        except BrokerUnavailableError:
            return None  # the submit itself will say so, and waits longer for the broker

    async def encode(self, encode: Encoder, inputs: Inputs) -> Encoded:
        """One task's message.

        Raises:
            InvalidInputError: the inputs do not fit the model.
        """
        if self.catalogue.not_ready_s(encode.model) is not None and encode.is_guessing(inputs):
            await self._wait_until_loaded(encode)
        try:
            return encode(inputs)
        except InvalidInputError:
            # Perhaps the model has changed since its signature was read.
            if not encode.check_against(await self.signature(encode.model, fresh=True)):
                raise
            return encode(inputs)

    async def _wait_until_loaded(self, encode: Encoder) -> None:
        """Wait a moment for what a model takes: a worker that has just begun tells its name first.

        Raises:
            InvalidInputError: it is not loaded for longer, so it is not known what Python's numbers become.
        """
        while not encode.check_against(await self.signature(encode.model, fresh=True)):
            seen_s = self.catalogue.not_ready_s(encode.model)
            if seen_s is None:
                return  # nobody knows it any more
            if seen_s >= NOT_READY_S:
                raise unknown_datatype(encode.model)
            await asyncio.sleep(NOT_READY_LOOK_S)

    async def result(self, task_id: str, timeout_s: float | None, look: Look) -> InferResult:
        """Wait for a task's result; see `AsyncTask.result`."""
        self.check_usable()
        future = self.waiter.expect(task_id, look)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)  # others may wait for the same
        except TimeoutError as error:
            if future.done():
                raise  # the task's own error
            message = f"task {task_id} has no result after {timeout_s} s; it goes on"
            raise ResultTimeoutError(message) from error
        finally:
            self.waiter.forget([task_id])
