"""Streaming: the responses of a decoupled model, as they come, become outputs and progress in the task's log."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import aclosing

from samphire.errors import InvalidInputError, ModelFaultError, SamphireError
from samphire.wire.contract import Streamed
from samphire.wire.outputs import StreamedTensor
from samphire_broker.settings import Settings
from samphire_broker.store import Store
from samphire_workers.inference import batching
from samphire_workers.intake.checking import MICRO_BATCH
from samphire_workers.intake.loading import sha256_hex
from samphire_workers.intake.request import Request
from samphire_workers.monitoring.observers import Observers
from samphire_workers.repeat import persist
from samphire_workers.settlement.log_writer import ClaimLostError, LogWriter, TaskLog
from samphire_workers.triton.answers import check_answer
from samphire_workers.triton.endpoint import Endpoint, Running
from samphire_workers.triton.messages import StreamedResponse, Tensor

PROGRESS, MESSAGE = "samphire_progress", "samphire_message"
"""Parameters of a response by which a model tells how far it is: a number from 0 to 1, and a text."""

Starting = asyncio.Task[list[Request]]
"""The start of requests that is being written; its result are those that may run."""


class LimitError(ModelFaultError):
    """A model gave out more than is allowed: it would do so again."""

    default_message = "The model gave out more than is allowed."
    retryable = False


class Streaming:
    """Streams requests, each on a call of its own.

    Args:
        settings: have the limits.
        store: keeps large tensors.
        writer: writes the logs.
        observers: are told of progress.
    """

    def __init__(self, settings: Settings, store: Store, writer: LogWriter, observers: Observers) -> None:
        self._settings = settings
        self._store = store
        self._writer = writer
        self._observers = observers

    async def run(
        self, request: Request, endpoint: Endpoint, running: Running, timeout_s: float, starting: Starting | None
    ) -> list[Tensor]:
        """Ask an endpoint, and write what it gives out until its end.

        Args:
            request: of a decoupled model.
            endpoint, running: who is asked, and how that is given up.
            timeout_s: how long it may take in all.
            starting: where its start is not written yet; nothing stands before it in the log.

        Returns:
            All outputs joined, where the request wants them collected; else nothing.

        Raises:
            SamphireError: what has ended the stream before its end; what came before is in the log.
        """
        log = TaskLog(self._writer, request, running.stop)
        collected = Collected(self._settings.collect_max_bytes) if request.collects else None
        infer, taken = request.request, _Taken(self._settings)
        responses = endpoint.stream(
            request.model,
            request.version,
            batching.merge([request]),
            [output.name for output in infer.outputs],
            {name: value for name, value in infer.parameters.items() if name != MICRO_BATCH},
            timeout_s,
            self._settings.triton_timeout_s,
            running,
        )
        try:
            async with aclosing(responses):
                async for response in responses:
                    if starting is not None and request not in await starting:
                        raise ClaimLostError
                    starting = None
                    await self._take(request, response, log, taken, collected)
            await log.flush()
        except SamphireError:
            if not request.over and log.error is None:
                await log.flush()  # what came is told before it is told what became of it
            raise
        finally:
            log.close()
            self._observers.streamed(request.model, log.outputs, log.nbytes)
        request.streamed = Streamed(log.outputs, log.nbytes)
        return [] if collected is None else collected.joined()

    async def _take(
        self, request: Request, response: StreamedResponse, log: TaskLog, taken: _Taken, collected: Collected | None
    ) -> None:
        tensors = response.tensors
        if PROGRESS in response.parameters or MESSAGE in response.parameters:
            self._progress(request, response, log)
        if not tensors:
            return
        signature, infer = request.signature, request.request
        assert signature is not None
        check_answer(signature, [output.name for output in infer.outputs], request.rows, tensors, even=False)
        nbytes = sum(len(tensor.data) for tensor in tensors)
        taken.add(nbytes)
        if collected is not None:
            collected.add(tensors, nbytes)
        above = self._settings.inline_output_bytes
        if nbytes > above and any(len(tensor.data) > above for tensor in tensors):
            streamed = await self._with_claim_checks(request, tensors, above, taken.outputs)
        else:
            streamed = [StreamedTensor(*tensor) for tensor in tensors]
        await log.output(streamed, nbytes)

    def _progress(self, request: Request, response: StreamedResponse, log: TaskLog) -> None:
        fraction, message = response.parameters.get(PROGRESS), str(response.parameters.get(MESSAGE, ""))
        is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool) and math.isfinite(fraction)
        known = min(1.0, max(0.0, float(fraction))) if is_number else None  # type: ignore[arg-type]
        log.progress(known, message)
        self._observers.progress(request, known, message)

    async def _with_claim_checks(
        self, request: Request, tensors: Sequence[Tensor], above: int, number: int
    ) -> list[StreamedTensor]:
        streamed = []
        for name, datatype, shape, data in tensors:
            if len(data) <= above:
                streamed.append(StreamedTensor(name, datatype, shape, data))
                continue
            digest, tenant, task_id = await sha256_hex(data), request.request.tenant, request.task_id
            ref = await persist(
                lambda d=data, h=digest, t=tenant, i=task_id: self._store.write_blob(t, i, number, d, h)  # type: ignore[misc]
            )
            streamed.append(StreamedTensor(name, datatype, shape, ref))
        return streamed


class _Taken:
    """What a stream has given out so far, held to its limits."""

    def __init__(self, settings: Settings) -> None:
        self._most, self._most_bytes = settings.stream_max_outputs, settings.stream_max_bytes
        self.outputs = self._nbytes = 0

    def add(self, nbytes: int) -> None:
        """One output more.

        Raises:
            LimitError: it is one too many.
        """
        self.outputs += 1
        self._nbytes += nbytes
        if self.outputs > self._most:
            raise LimitError(
                f"the stream was stopped after {self._most} outputs: a task may give out so many "
                "(SAMPHIRE_STREAM_MAX_OUTPUTS)"
            )
        if self._nbytes > self._most_bytes:
            raise LimitError(
                f"the stream was stopped at output {self.outputs}: expected at most {self._most_bytes} bytes of "
                f"outputs, given {self._nbytes} (SAMPHIRE_STREAM_MAX_BYTES)"
            )


class Collected:
    """All outputs of a stream, for a result that has them joined along the first dimension."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._nbytes = 0
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, tensors: Sequence[Tensor], nbytes: int) -> None:
        """Keep one output.

        Raises:
            LimitError: together they are too large.
            InvalidInputError: its shape does not fit to those before it.
        """
        self._nbytes += nbytes
        if self._nbytes > self._most_bytes:
            raise LimitError(
                f"expected at most {self._most_bytes} bytes of outputs where a result collects them, given more: "
                "read them as a stream (SAMPHIRE_COLLECT_MAX_BYTES)"
            )
        for tensor in tensors:
            parts = self._parts.setdefault(tensor.name, [])
            if parts and (parts[0].datatype, parts[0].shape[1:]) != (tensor.datatype, tensor.shape[1:]):
                raise InvalidInputError(
                    f"output {tensor.name!r} cannot be collected: expected shapes alike but for the first dimension, "
                    f"given {parts[0].shape} and {tensor.shape}: read it as a stream"
                )
            parts.append(tensor)

    def joined(self) -> list[Tensor]:
        """Each output's parts, one after the other; numbers without a dimension become a vector."""
        joined = []
        for name, parts in self._parts.items():
            rows = sum(part.shape[0] if part.shape else 1 for part in parts)
            shape = [rows, *parts[0].shape[1:]]
            joined.append(Tensor(name, parts[0].datatype, shape, b"".join([part.data for part in parts])))
        return joined
