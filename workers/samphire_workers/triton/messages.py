"""Requests and responses of Triton's gRPC as the lane has them: tensors are bytes on both sides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tritonclient.grpc import service_pb2

from samphire.errors import InvalidInputError, ModelFaultError


class Tensor(NamedTuple):
    """A tensor's bytes: row-major little-endian, BYTES with length prefixes."""

    name: str
    datatype: str
    shape: list[int]
    data: bytes


def set_parameters(target: Any, parameters: Mapping[str, object]) -> None:
    """Put OIP parameters (bool, int, float, str) into a protobuf map of InferParameter.

    Raises:
        InvalidInputError: a value of another type, or an integer over 64 bits.
    """
    for name, value in parameters.items():
        try:
            if isinstance(value, bool):
                target[name].bool_param = value
            elif isinstance(value, int):
                target[name].int64_param = value
            elif isinstance(value, float):
                target[name].double_param = value
            elif isinstance(value, str):
                target[name].string_param = value
            else:
                raise InvalidInputError(
                    f"parameter {name!r}: expected a boolean, number or string, given {type(value).__name__}"
                )
        except ValueError as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(f"parameter {name!r}: {error}") from error


def infer_request(
    model: str, version: str, tensors: Sequence[Tensor], outputs: Iterable[str], parameters: Mapping[str, object]
) -> Any:
    """A ModelInferRequest; no `outputs` asks for all of them.

    Raises:
        InvalidInputError: a parameter that gRPC cannot carry.
    """
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    for tensor in tensors:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        request.raw_input_contents.append(tensor.data)
    for name in outputs:
        request.outputs.add(name=name)
    if parameters:
        set_parameters(request.parameters, parameters)
    return request


def set_timeout(request: Any, timeout_s: float) -> None:
    """Let the time that is left go along as Triton's `timeout`, unless the request says its own.

    A model whose queue policy lets requests say so drops what it has not begun by then.
    """
    if "timeout" not in request.parameters and timeout_s != math.inf:
        request.parameters["timeout"].int64_param = math.ceil(timeout_s * 1e6)


def tensors_of(model: str, answer: Any) -> list[Tensor]:
    """The outputs of a ModelInferResponse, in the model's order.

    Raises:
        ModelFaultError: an output came without its bytes.
    """
    if len(answer.raw_output_contents) != len(answer.outputs):
        raise ModelFaultError(
            f"model {model!r} answered {len(answer.outputs)} outputs with the bytes of "
            f"{len(answer.raw_output_contents)}"
        )
    return [
        Tensor(output.name, output.datatype, list(output.shape), data)
        for output, data in zip(answer.outputs, answer.raw_output_contents, strict=True)
    ]


def flag(parameters: Any, name: str) -> bool:
    """Whether a response says so in its parameters."""
    return name in parameters and bool(parameters[name].bool_param)
