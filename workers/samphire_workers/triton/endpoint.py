"""The Triton adapter: gRPC to one endpoint, its errors in Samphire's words.

Source: the GRPCInferenceService of the Open Inference Protocol with Triton's extensions, as generated in
`tritonclient.grpc.service_pb2`. Requests are built on that level because a lane already holds a tensor's
bytes and needs no numpy in between.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from samphire.errors import (
    EndpointTimeoutError,
    EndpointUnavailableError,
    InvalidInputError,
    ModelFaultError,
    SamphireError,
    TransientError,
    UnknownModelError,
)
from samphire.wire.signature import ModelSignature, TensorSpec
from samphire_workers.triton.calls import (
    GIVEN_UP,
    Reader,
    Running,
    Watch,
    is_cancelled,
)
from samphire_workers.triton.errors import UnclearUnavailableError, translate
from samphire_workers.triton.messages import Tensor, flag, set_timeout, tensors_of

CONTROL_TIMEOUT_S = 5.0
"""A server that does not answer a simple question for so long hangs: nothing under way there is waited for."""
STATISTICS_TIMEOUT_S = 0.5
"""A task that has its answer waits for them."""
RELOAD_S = 60.0
END_S = 0.25
"""A stream that has failed may come to its end for so long before a moment is sought to cancel it."""
SPARE_S = 600.0
"""gRPC's deadline of a stream is so much later than its end, which the worker's own timer brings: it would cancel at a
moment that nobody has chosen (see `QUIET_S`)."""
PUSHBACK_MAX_S = 3600.0
"""Longest time that a server or proxy is left alone because it asks for it."""
ERROR_TEXT_MAX_BYTES = 8 * 2**20
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A channel's own pauses between two tries to connect grow to two minutes; a server that is back must be seen.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # The text of an error travels as metadata; gRPC's limit of 16 KB would hide what a model says.
    ("grpc.max_metadata_size", ERROR_TEXT_MAX_BYTES),
    ("grpc.absolute_max_metadata_size", ERROR_TEXT_MAX_BYTES),
]


def _pushback_s(error: grpc.aio.AioRpcError) -> float | None:
    """When the server, or a proxy before it, asks to be left alone; gRPC's A6 and HTTP's `retry-after`."""
    metadata: Any = error.trailing_metadata() or ()  # an iterable of pairs, whatever its type says
    for key, value in metadata:
        try:
            if key in ("grpc-retry-pushback-ms", "retry-after"):
                asked_s = int(value) / 1000 if key != "retry-after" else float(value)
                return min(max(0.0, asked_s), PUSHBACK_MAX_S) if math.isfinite(asked_s) else None
        except ValueError:
            continue
    return None


class Endpoint:
    """One Triton, reached by gRPC.

    Every method raises the translation of the gRPC error that it met (see `translate`).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._channel = grpc.aio.insecure_channel(url, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._running: set[Running] = set()
        self._left: set[asyncio.Task[None]] = set()
        """They read streams for which nobody waits any more."""
        self._seen: set[str] = set()
        """Models that were ready here once."""
        self.is_silent = False
        """Whether it has not answered the last probe in time, neither with yes nor with no."""

    def give_up_all(self, why: SamphireError) -> None:
        """End the wait for all requests under way here: who waits gets `why`.

        They are cancelled, but for streams where the server has not answered the last probe at all.
        """
        for running in list(self._running):
            (running.leave if self.is_silent else running.stop)(why)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(None)
        await asyncio.gather(*self._left, return_exceptions=True)

    async def _call(self, method: str, request: Any, timeout_s: float) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from error

    async def is_ready(self) -> bool:
        """Whether the server answers and is ready."""
        try:
            answer = await self._call("ServerReady", service_pb2.ServerReadyRequest(), CONTROL_TIMEOUT_S)
        except SamphireError as error:
            self.is_silent = isinstance(error, EndpointTimeoutError)
            return False
        self.is_silent = False
        return bool(answer.ready)

    async def is_model_ready(self, model: str, version: str) -> bool:
        """Whether the server answers, and says that this version of a model is ready."""
        request = service_pb2.ModelReadyRequest(name=model, version=version)
        try:
            answer = await self._call("ModelReady", request, CONTROL_TIMEOUT_S)
        except SamphireError:
            return False
        return bool(answer.ready)

    async def signature(self, model: str) -> ModelSignature:
        """What a model takes and returns.

        Raises:
            UnknownModelError: the server's repository has no such model.
            EndpointUnavailableError: the model is there and not ready, or the server is away.
        """
        try:
            metadata = await self._call(
                "ModelMetadata", service_pb2.ModelMetadataRequest(name=model), CONTROL_TIMEOUT_S
            )
            answer = await self._call("ModelConfig", service_pb2.ModelConfigRequest(name=model), CONTROL_TIMEOUT_S)
        except (UnknownModelError, InvalidInputError) as error:
            # A server that does not tell what its repository has may have unloaded what it had a moment ago.
            known = await self.models()
            if model in known or (not known and model in self._seen):
                raise EndpointUnavailableError(f"model {model!r} is not ready on {self.url}: {error}") from error
            raise UnknownModelError(f"no model {model!r} on {self.url}: {error}") from error
        config = answer.config
        self._seen.add(model)
        return ModelSignature(
            name=model,
            versions=tuple(sorted(metadata.versions, key=int)),
            inputs={tensor.name: _spec(tensor, optional=tensor.optional) for tensor in config.input},
            outputs={tensor.name: _spec(tensor) for tensor in config.output},
            max_batch_size=config.max_batch_size,
            decoupled=config.model_transaction_policy.decoupled,
            dynamic_batching=config.HasField("dynamic_batching"),
            sequence_batching=config.HasField("sequence_batching"),
        )

    async def models(self, *, ready: bool = False) -> set[str]:
        """Names of the models in the server's repository, or of those that are ready; none if it does not tell."""
        return set(await self.index(ready=ready))

    async def index(self, *, ready: bool = False) -> dict[str, str]:
        """Models of the server's repository, or those that are ready, each with why a version of it is not loaded.

        That is empty where the server gives no reason; there are no models if the server does not tell.
        """
        request = service_pb2.RepositoryIndexRequest(ready=ready)
        try:
            index = await self._call("RepositoryIndex", request, CONTROL_TIMEOUT_S)
        except TransientError as error:
            if "restricted" not in str(error):
                raise
            return {}
        except SamphireError:  # the control API is closed to us
            return {}
        reasons: dict[str, str] = {}
        for entry in index.models:
            reasons.setdefault(entry.name, "")
            if entry.state == "UNAVAILABLE" and entry.reason not in ("", "unloaded"):
                reasons[entry.name] = f"version {entry.version}: {entry.reason}"
        return reasons

    async def statistics(self, model: str, version: str) -> Any:
        """The `InferStatistics` of a version of a model; None where the server tells nothing of it."""
        request = service_pb2.ModelStatisticsRequest(name=model, version=version)
        answer = await self._call("ModelStatistics", request, STATISTICS_TIMEOUT_S)
        return answer.model_stats[0].inference_stats if answer.model_stats else None

    async def reload(self, model: str) -> None:
        """Unload a model and load it again: to load what is loaded already does nothing."""
        await self._call("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name=model), RELOAD_S)
        await self._call("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name=model), RELOAD_S)

    async def infer(self, request: Any, timeout_s: float, running: Running) -> list[Tensor]:
        """Run one request (see `infer_request`) and return its outputs, in the model's order.

        Raises:
            SamphireError: what `running` was stopped with.
        """
        set_timeout(request, timeout_s)
        self._running.add(running)
        try:
            answer = await running.wait(self._stub.ModelInfer(request, timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            raise await self._model_error(error, request.model_name, request.model_version) from error
        finally:
            self._running.discard(running)
        return tensors_of(request.model_name, answer)

    async def stream(
        self, request: Any, timeout_s: float, stall_s: float, running: Running
    ) -> AsyncGenerator[list[Tensor], None]:
        """Run one request of a decoupled model, and yield its outputs as they come, on a call of its own.

        Source: Triton's decoupled transaction policy; `triton_final_response` marks the last response, which is asked
        for also where it is empty. An error is a text in a response. With the header `triton_grpc_error` it would end
        the call with a status, but Triton 24.10 dies if the model sends its final response after that.

        Args:
            request, running: as for `infer`.
            timeout_s: how long it may take in all; `inf` for any time.
            stall_s: how long the model may give out nothing.

        Raises:
            ModelFaultError: the call ended, and no response was marked as the last: what came may not be all.
            EndpointTimeoutError: it took longer than `timeout_s`, or gave out nothing for `stall_s` (StalledError).
            SamphireError: what `running` was stopped with.
        """
        model, version = request.model_name, request.model_version
        set_timeout(request, timeout_s)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        # gRPC's `write` waits for ever where the call is cancelled while it connects; its writer of iterators does not.
        call = self._stub.ModelStreamInfer(
            iter([request]), timeout=None if timeout_s == math.inf else timeout_s + SPARE_S
        )
        del request  # a stream goes on for long: its inputs need not be held
        self._running.add(running)
        watch = Watch(running, model, timeout_s, stall_s)
        reader = Reader(call, running)
        try:
            running.attach(call, streams=True)
            is_complete = False
            while (answer := await reader.next_answer()) is not None:
                watch.seen()
                is_complete = is_complete or flag(answer.parameters, "triton_final_response")
                if answer.outputs:
                    watch.pause()  # who takes it may have to wait for the broker
                    yield tensors_of(model, answer)
                    watch.seen()
            if (code := await call.code()) is not grpc.StatusCode.OK:
                raise translate(code, await call.details() or "", None)
            if not is_complete:
                raise ModelFaultError(f"the stream of model {model!r} ended without a final response: it is not whole")
        except grpc.aio.AioRpcError as error:
            raise running.why or await self._model_error(error, model, version) from error
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise running.why or EndpointUnavailableError(GIVEN_UP) from None
        finally:
            watch.end()
            self._running.discard(running)
            if running.is_left:
                task = asyncio.create_task(reader.read_left())
                self._left.add(task)
                task.add_done_callback(self._left.discard)
            elif running.why is None:
                await reader.read_on(END_S)
            else:
                call.cancel()

    async def _model_error(self, error: grpc.aio.AioRpcError, model: str, version: str) -> SamphireError:
        """The translation of an error that a model or its server may have caused: the server is asked where unclear."""
        found = _translated(error)
        if isinstance(found, UnclearUnavailableError) and await self.is_model_ready(model, version):
            return ModelFaultError(f"model {model!r} answered: {found}")
        return found


def _translated(error: grpc.aio.AioRpcError) -> SamphireError:
    return translate(error.code(), error.details() or "", _pushback_s(error))


def _spec(tensor: Any, *, optional: bool = False) -> TensorSpec:
    name = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    datatype = "BYTES" if name == "STRING" else name
    return TensorSpec(tensor.name, datatype, tuple(tensor.dims), optional)
