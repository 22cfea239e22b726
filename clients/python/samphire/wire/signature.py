"""Checking a request against a model, before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec import UNSET

from samphire.errors import InvalidInputError, PayloadTooLargeError, UnknownModelError
from samphire.wire.contract import InferRequest, InputTensor
from samphire.wire.tensors import check_shape

CHAMPION = "champion"
SEQUENCE_PARAMETERS = frozenset({"sequence_id", "sequence_start", "sequence_end"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model: `shape` without the batch dimension, -1 where it is free."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """What a model takes and returns. `max_batch_size` 0: no batch dimension."""

    name: str
    versions: tuple[str, ...]
    """Version numbers that are ready, ascending."""
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    max_batch_size: int
    decoupled: bool = False
    dynamic_batching: bool = False
    """The model's config lets requests be joined along the batch dimension: its rows do not depend on each other."""
    sequence_batching: bool = False
    """The model keeps state between the requests of a sequence."""

    @property
    def champion(self) -> str:
        """The version that serves requests without one: the newest."""
        return self.versions[-1]

    def resolve(self, version: str) -> str:
        """Return the number of a version or alias.

        Raises:
            UnknownModelError: the model has no such version that is ready.
        """
        if version in ("", CHAMPION):
            return self.champion
        if version in self.versions:
            return version
        raise UnknownModelError(
            f"model {self.name!r} has the versions {', '.join(self.versions)} and the alias {CHAMPION}, "
            f"given {version!r}"
        )

    def check(self, request: InferRequest) -> int:
        """Check a request's tensors by name, datatype and shape; return its number of rows.

        Without a batch dimension the number of rows is 1.

        Raises:
            InvalidInputError: with what was expected and what was given.
        """
        if not self.sequence_batching and (found := SEQUENCE_PARAMETERS & request.parameters.keys()):
            raise InvalidInputError(
                f"model {self.name!r} has no sequence_batching in its config, and nothing keeps the order of its "
                f"requests: take out the parameters {_names(found)}"
            )
        count = self._check_inputs(request)
        for output in request.outputs:
            if output.name not in self.outputs:
                raise InvalidInputError(
                    f"model {self.name!r} has the outputs {_names(self.outputs)}, asked for {output.name!r}"
                )
        if self.max_batch_size and count > self.max_batch_size:
            raise InvalidInputError(
                f"model {self.name!r} takes at most {self.max_batch_size} rows (its max_batch_size), "
                f"given {count}: submit the rows as several tasks"
            )
        return count

    def _check_inputs(self, request: InferRequest) -> int:
        given = {tensor.name for tensor in request.inputs}
        if len(given) != len(request.inputs):
            raise InvalidInputError(f"model {self.name!r}: an input was given twice")
        for spec in self.inputs.values():
            if spec.name not in given and not spec.optional:
                raise InvalidInputError(
                    f"model {self.name!r}: expected the inputs {_names(self.inputs)}, missing {spec.name!r}"
                )
        if not given:
            raise InvalidInputError(f"model {self.name!r}: expected at least one input, given none")
        rows: dict[str, int] = {}
        for tensor in request.inputs:
            if tensor.from_ is UNSET:
                rows[tensor.name] = self._check_tensor(tensor)
            else:
                self._spec_of(tensor)  # the rest is known when the task before has ended
        counts = set(rows.values()) or {1}
        if len(counts) > 1:
            given_rows = ", ".join(f"{name}: {count}" for name, count in rows.items())
            raise InvalidInputError(f"model {self.name!r}: expected as many rows in every input, given {given_rows}")
        (count,) = counts
        return count

    def _spec_of(self, tensor: InputTensor) -> TensorSpec:
        spec = self.inputs.get(tensor.name)
        if spec is None:
            raise InvalidInputError(f"model {self.name!r} has the inputs {_names(self.inputs)}, given {tensor.name!r}")
        return spec

    def _check_tensor(self, tensor: InputTensor) -> int:
        spec = self._spec_of(tensor)
        if tensor.datatype != spec.datatype:
            given = tensor.datatype or "no datatype"
            raise InvalidInputError(
                f"input {tensor.name!r} of model {self.name!r}: expected {spec.datatype}, given {given}"
            )
        check_shape(tensor.name, tensor.datatype, tensor.shape)
        shape = tensor.shape[1:] if self.max_batch_size else tensor.shape
        fits = len(shape) == len(spec.shape) and all(
            want in (-1, have) for want, have in zip(spec.shape, shape, strict=True)
        )
        if not fits or (self.max_batch_size and not tensor.shape):
            expected = ["rows", *spec.shape] if self.max_batch_size else list(spec.shape)
            raise InvalidInputError(
                f"input {tensor.name!r} of model {self.name!r}: expected shape "
                f"[{', '.join(map(str, expected))}] (-1 is free), given {tensor.shape}"
            )
        if not self.max_batch_size:
            return 1
        if tensor.shape[0] == 0:
            raise InvalidInputError(
                f"input {tensor.name!r} of model {self.name!r}: expected at least 1 row, given shape {tensor.shape}"
            )
        return tensor.shape[0]


def _names(names: Mapping[str, object] | frozenset[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "(none)"


def check_request_size(tensors: Sequence[tuple[str, int]], max_bytes: int) -> None:
    """Check the sum of a request's tensors, each (name, bytes).

    Raises:
        PayloadTooLargeError: it is over `max_bytes`; names the largest tensor.
    """
    total = sum(size for _, size in tensors)
    if total > max_bytes:
        name, size = max(tensors, key=lambda item: item[1])
        raise PayloadTooLargeError(
            f"expected tensors of at most {max_bytes} bytes a request, given {total} ({name!r} alone has {size})"
        )
