"""Inputs that come from the task before: `{"name": …, "from": "<output>"}` in a chain, group or chord."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from samphire.errors import InvalidInputError
from samphire.wire.contract import InferRequest, InputTensor, Ref
from samphire.wire.envelope import parse


class ParentTensor(Struct):
    """An output of the task before; what else stands there is not looked at."""

    name: str
    datatype: str
    shape: list[int]
    data: Raw | UnsetType = UNSET
    raw: str | UnsetType = UNSET
    ref: Ref | UnsetType = UNSET


class ParentResult(Struct):
    """The result of the task before, of ours or of anybody who answers in the same form."""

    outputs: list[ParentTensor]


class JoinedTensor(InputTensor):
    """The outputs of a whole group, joined along their first dimension."""

    sources: tuple[InputTensor, ...] = ()


_decode = msgspec.json.Decoder(ParentResult | list[ParentResult]).decode


def sources_of(tensor: InputTensor) -> Sequence[InputTensor]:
    """The tensors that a tensor's bytes are made of, in order: most often itself."""
    return tensor.sources if isinstance(tensor, JoinedTensor) else (tensor,)


def resolve(infer: InferRequest, args: Sequence[Raw]) -> None:
    """Put the parent's outputs in the place of each `from`.

    Args:
        infer: the request; its inputs are replaced.
        args: positional arguments of the message; Celery puts the parent's result first.

    Raises:
        InvalidInputError: more than one argument, no parent, or no such output; says what there is.
    """
    if len(args) > 1:
        raise InvalidInputError(
            f"expected keyword arguments, and at most the result of the task before, given {len(args)} positional"
        )
    if all(tensor.from_ is UNSET and tensor.part is UNSET for tensor in infer.inputs):
        return
    for tensor in infer.inputs:
        if tensor.from_ is UNSET and tensor.part is not UNSET:
            raise InvalidInputError(f"input {tensor.name!r}: part goes with from, given part alone")
    parent = _parent(infer, args)
    infer.inputs = [tensor if tensor.from_ is UNSET else _taken(tensor, parent) for tensor in infer.inputs]


def _parent(infer: InferRequest, args: Sequence[Raw]) -> ParentResult | list[ParentResult]:
    tensor = next(t for t in infer.inputs if t.from_ is not UNSET)
    if not args:
        raise InvalidInputError(
            f"input {tensor.name!r}: from {tensor.from_!r} takes an output of the task before, and there is none: "
            "use it in a chain, after a group, or as a link"
        )
    expected = (
        f"input {tensor.name!r}: from {tensor.from_!r} expects the result of an inference as first argument, an object "
        "with outputs or a list of such"
    )
    parent: ParentResult | list[ParentResult] = parse(_decode, args[0], expected)
    return parent


def _taken(tensor: InputTensor, parent: ParentResult | list[ParentResult]) -> InputTensor:
    if not (tensor.data is UNSET and tensor.raw is UNSET and tensor.ref is UNSET):
        raise InvalidInputError(f"input {tensor.name!r}: expected exactly one of data, raw, ref and from")
    if isinstance(parent, ParentResult):
        if tensor.part not in (UNSET, 0):
            raise InvalidInputError(f"input {tensor.name!r}: part {tensor.part} of a single task's result")
        return _stated(tensor, _output(tensor, parent, ""))
    if tensor.part is not UNSET:
        if not 0 <= tensor.part < len(parent):
            raise InvalidInputError(
                f"input {tensor.name!r}: part {tensor.part} of a group of {len(parent)}; the first is 0"
            )
        return _stated(tensor, _output(tensor, parent[tensor.part], f" of part {tensor.part}"))
    if not parent:
        raise InvalidInputError(f"input {tensor.name!r}: the group before has no results")
    parts = [_output(tensor, result, f" of part {number}") for number, result in enumerate(parent)]
    first = parts[0]
    for number, part in enumerate(parts):
        if part.datatype != first.datatype or not part.shape or part.shape[1:] != first.shape[1:]:
            raise InvalidInputError(
                f"input {tensor.name!r}: the outputs of a group are joined along their first dimension; part 0 is "
                f"{first.datatype}{first.shape}, part {number} is {part.datatype}{part.shape}: take one with part"
            )
    rows = sum(part.shape[0] for part in parts)
    shape = [rows, *first.shape[1:]]
    return _stated(tensor, JoinedTensor(tensor.name, first.datatype, shape, sources=tuple(parts)))


def _output(tensor: InputTensor, result: ParentResult, of: str) -> InputTensor:
    for found in result.outputs:
        if found.name == tensor.from_:
            return InputTensor(tensor.name, found.datatype, found.shape, found.data, found.raw, found.ref)
    names = ", ".join(repr(found.name) for found in result.outputs) or "(none)"
    raise InvalidInputError(
        f"input {tensor.name!r}: the task before has{of} the outputs {names}, from asks for {tensor.from_!r}"
    )


def _stated(tensor: InputTensor, taken: InputTensor) -> InputTensor:
    """`taken`, if it is what the request says that it expects."""
    wanted: tuple[Any, Any] = (tensor.datatype or taken.datatype, tensor.shape or taken.shape)
    if wanted != (taken.datatype, taken.shape):
        raise InvalidInputError(
            f"input {tensor.name!r}: expected {wanted[0]}{wanted[1]}, {tensor.from_!r} of the task before is "
            f"{taken.datatype}{taken.shape}"
        )
    return taken
