"""Streaming: the responses of a decoupled model, as they come, become outputs and progress in the task's log."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from samphire.errors import InvalidInputError, SamphireError, StreamLimitError
from samphire.wire.contract import Ref, Streamed
from samphire.wire.outputs import StreamedTensor
from samphire_broker.settings import Settings
from samphire_broker.store import Store
from samphire_workers.inference import batching
from samphire_workers.intake.request import Request
from samphire_workers.monitoring.observers import Observers
from samphire_workers.repeat import persist
from samphire_workers.settlement import outcome
from samphire_workers.settlement.endings import Endings
from samphire_workers.settlement.log_writer import ClaimLostError, TaskLog
from samphire_workers.triton.answers import check_answer
from samphire_workers.triton.calls import Running
from samphire_workers.triton.endpoint import Endpoint
from samphire_workers.triton.messages import Tensor

PROGRESS, MESSAGE = "samphire_progress", "samphire_message"
"""Outputs by which a model tells how far it is, FP32 [1] from 0 to 1 and BYTES [1]; they are no outputs of the task."""

BLOB_TTL_S = 86_400
"""Least lifetime of a large output's claim check: the stream may go on for long after it."""

Starting = asyncio.Task[list[Request]]
"""The start of requests that is being written; its result are those that may run."""


class Streaming:
    """Streams requests, each on a call of its own.

    Args:
        settings: have the limits.
        store: keeps large tensors.
        endings: writes the logs, and tells of progress.
        observers: are told of it too.
    """

    def __init__(self, settings: Settings, store: Store, endings: Endings, observers: Observers) -> None:
        self._settings = settings
        self._store = store
        self._endings = endings
        self._writer = endings.log_writer
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
        taken = _Taken(self._settings)
        asked = [output.name for output in request.request.outputs]
        assert request.signature is not None
        told = [name for name in (PROGRESS, MESSAGE) if name in request.signature.outputs]
        expected = replace(
            request.signature,
            outputs={name: spec for name, spec in request.signature.outputs.items() if name not in told},
        )
        responses = endpoint.stream(
            batching.merge([request], told), timeout_s, self._settings.triton_timeout_s, running
        )
        checked: object = None  # form of the last output that was found to fit: those alike but for their numbers fit
        try:
            async with aclosing(responses):
                async for tensors in responses:
                    if starting is not None and request not in await starting:
                        raise ClaimLostError
                    starting = None
                    if outputs := self._without_progress(request, tensors, log, told):
                        if (form := _form(outputs)) is None or form != checked:
                            check_answer(expected, asked, request.rows, outputs, even=False)
                            checked = form
                        nbytes = taken.add(outputs)
                        if collected is not None:
                            collected.add(outputs, nbytes)
                        await log.output(await self._streamed(request, outputs, nbytes), nbytes)
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

    def _without_progress(
        self, request: Request, tensors: list[Tensor], log: TaskLog, told: Sequence[str]
    ) -> list[Tensor]:
        """The tensors that are an output; of the others it is told how far the task is."""
        if not told:
            return tensors
        found = {tensor.name: tensor for tensor in tensors if tensor.name in told}
        if found:
            fraction = _fraction(found.get(PROGRESS))
            message = _text(found.get(MESSAGE))
            log.progress(fraction, message)
            self._observers.progress(request, fraction, message)
            self._endings.tell_progress(request, fraction, message)
        return [tensor for tensor in tensors if tensor.name not in found]

    async def _streamed(self, request: Request, tensors: Sequence[Tensor], nbytes: int) -> list[StreamedTensor]:
        """An output as its log has it: large tensors as claim checks."""
        above = self._settings.inline_output_bytes
        refs: Mapping[str, Ref] = {}
        if nbytes > above:
            refs = await persist(lambda: outcome.store_large(request, tensors, self._store, above, BLOB_TTL_S))
        return [StreamedTensor(name, datatype, shape, refs.get(name, data)) for name, datatype, shape, data in tensors]


class _Taken:
    """What a stream has given out so far, held to its limits."""

    def __init__(self, settings: Settings) -> None:
        self._most, self._most_bytes = settings.stream_max_outputs, settings.stream_max_bytes
        self.outputs = self._nbytes = 0

    def add(self, tensors: Sequence[Tensor]) -> int:
        """One output more; returns its bytes.

        Raises:
            StreamLimitError: it is one too many.
        """
        nbytes = sum([len(tensor.data) for tensor in tensors])
        self.outputs += 1
        self._nbytes += nbytes
        if self.outputs > self._most:
            raise StreamLimitError(
                f"the stream was stopped after {self._most} outputs: a task may give out so many "
                "(SAMPHIRE_STREAM_MAX_OUTPUTS)"
            )
        if self._nbytes > self._most_bytes:
            raise StreamLimitError(
                f"the stream was stopped at output {self.outputs}: expected at most {self._most_bytes} bytes of "
                f"outputs, given {self._nbytes} (SAMPHIRE_STREAM_MAX_BYTES)"
            )
        return nbytes


class Collected:
    """All outputs of a stream, for a result that has them joined along the first dimension."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._nbytes = 0
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, tensors: Sequence[Tensor], nbytes: int) -> None:
        """Keep one output.

        Raises:
            StreamLimitError: together they are too large.
            InvalidInputError: its shape does not fit to those before it.
        """
        self._nbytes += nbytes
        if self._nbytes > self._most_bytes:
            raise StreamLimitError(
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


def _form(tensors: Sequence[Tensor]) -> object:
    """What the check of an output depends on; None where it depends on its bytes too."""
    form = [(name, datatype, tuple(shape), len(data)) for name, datatype, shape, data in tensors]
    return None if any(datatype == "BYTES" for _, datatype, _, _ in form) else form


def _fraction(tensor: Tensor | None) -> float | None:
    """What a progress says; None for what is no number from 0 to 1."""
    if tensor is None or tensor.datatype != "FP32" or len(tensor.data) != 4:
        return None
    (value,) = struct.unpack("<f", tensor.data)
    return float(value) if 0 <= value <= 1 else None


def _text(tensor: Tensor | None) -> str:
    return "" if tensor is None else tensor.data[4:].decode(errors="replace")
