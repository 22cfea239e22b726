"""Micro-batches: requests merged along the batch dimension, and their answers taken apart again.

Row-major tensors whose shapes differ only in the first dimension are merged by joining their bytes, so
no number is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from samphire.wire.signature import ModelSignature
from samphire.wire.tensors import join_elements, split_elements
from samphire_workers.intake.checking import MICRO_BATCH
from samphire_workers.intake.request import Request
from samphire_workers.triton.messages import Tensor, infer_request

BATCH_MAX_BYTES = 4 * 2**20
"""A micro-batch grows no further than this; a single request may be larger."""


def group(requests: Sequence[Request], signature: ModelSignature) -> list[list[Request]]:
    """Divide requests of one model into micro-batches of at most its `max_batch_size` rows."""
    batches: list[list[Request]] = []
    open_batches: dict[object, tuple[list[Request], int, int]] = {}
    for request in requests:
        key = request.batch_key
        if key is None:
            batches.append([request])
            continue
        if request.times.limit != inf or request.times.soft_limit != inf:
            key = (key, request.times.limit, request.times.soft_limit)  # nobody's limit is another's
        members, rows, nbytes = open_batches.get(key, ([], 0, 0))
        rows += request.rows
        nbytes += request.nbytes
        if not members or rows > signature.max_batch_size or nbytes > BATCH_MAX_BYTES:
            members, rows, nbytes = [], request.rows, request.nbytes
            batches.append(members)
        members.append(request)
        open_batches[key] = (members, rows, nbytes)
    return batches


def merge(batch: Sequence[Request], more_outputs: Sequence[str] = ()) -> Any:
    """The ModelInferRequest of a micro-batch: each input's rows, one request after the other.

    Args:
        batch: at least one request, all with the same outputs and parameters.
        more_outputs: asked for too, where the requests name the outputs that they want.

    Raises:
        InvalidInputError: a parameter that gRPC cannot carry.
    """
    first = batch[0]
    outputs = [output.name for output in first.request.outputs]
    parameters = {name: value for name, value in first.request.parameters.items() if name != MICRO_BATCH}
    wanted = [*outputs, *more_outputs] if outputs else []
    return infer_request(first.model, first.version, _merged(batch), wanted, parameters)


def _merged(batch: Sequence[Request]) -> list[Tensor]:
    first = batch[0]
    if len(batch) == 1:
        loaded, first.tensors = first.tensors, []  # alone it is asked once: nobody else needs them
        return [
            Tensor(tensor.name, tensor.datatype, tensor.shape, data)
            for tensor, data in zip(first.request.inputs, loaded, strict=True)
        ]
    rows = sum(request.rows for request in batch)
    return [
        Tensor(
            tensor.name,
            tensor.datatype,
            [rows, *tensor.shape[1:]],
            b"".join([request.tensors[i] for request in batch]),
        )
        for i, tensor in enumerate(first.request.inputs)
    ]


def split(batch: Sequence[Request], outputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Each request's own outputs, in the order of `batch`; the outputs have as many rows as the inputs had."""
    if len(batch) == 1:
        return [list(outputs)]
    total = sum(request.rows for request in batch)
    shares: list[list[Tensor]] = [[] for _ in batch]
    for output in outputs:
        for share, part in zip(shares, _parts(batch, output, total), strict=True):
            share.append(part)
    return shares


def _parts(batch: Sequence[Request], output: Tensor, total: int) -> list[Tensor]:
    name, datatype, shape, data = output
    parts: list[Tensor] = []
    if datatype == "BYTES":
        elements = list(split_elements(name, data))
        width, begin = len(elements) // total, 0
        for request in batch:
            end = begin + request.rows * width
            parts.append(Tensor(name, datatype, [request.rows, *shape[1:]], join_elements(elements[begin:end])))
            begin = end
        return parts
    width, begin = len(data) // total, 0
    for request in batch:
        end = begin + request.rows * width
        parts.append(Tensor(name, datatype, [request.rows, *shape[1:]], data[begin:end]))
        begin = end
    return parts
