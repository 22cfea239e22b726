"""A model's answer checked against its signature, alone or in a micro-batch, before anybody gets it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from samphire.errors import InvalidInputError, ModelFaultError
from samphire.wire.signature import ModelSignature, TensorSpec
from samphire.wire.tensors import check_bytes, check_shape
from samphire_workers.triton.messages import Tensor


class UnevenRowsError(ModelFaultError):
    """A micro-batch was answered with another number of rows than it had: nobody can say whose they are."""


def check_answer(
    signature: ModelSignature, asked: Collection[str], rows: int, outputs: Sequence[Tensor], *, even: bool
) -> None:
    """Check that the outputs are those that the model promises, by name, datatype, shape and size.

    Args:
        signature: of the model.
        asked: names of the outputs that were asked for; none means all.
        rows: of the inputs.
        outputs: what came.
        even: whether every output must have as many rows as the inputs had.

    Raises:
        UnevenRowsError: an output has another number of rows.
        ModelFaultError: anything else that does not fit; says what was expected and what was given.
    """
    model = f"model {signature.name!r}"
    names = [output.name for output in outputs]
    if len(set(names)) != len(names):
        raise ModelFaultError(f"{model} answered an output twice: {', '.join(names)}")
    missing = _expected(signature, asked) - set(names)
    if missing or not names:
        raise ModelFaultError(
            f"{model}: expected the outputs {_list(asked or signature.outputs)}, answered {_list(names)}"
        )
    for output in outputs:
        spec = signature.outputs.get(output.name)
        if spec is None or (asked and output.name not in asked):
            raise ModelFaultError(f"{model} answered an output {output.name!r} that was not asked for")
        _check_output(model, signature.max_batch_size > 0, spec, output)
        if even and signature.max_batch_size and output.shape[0] != rows:
            raise UnevenRowsError(
                f"{model}, output {output.name!r}: expected {rows} rows for {rows} rows of input, "
                f"answered shape {output.shape}"
            )


def _expected(signature: ModelSignature, asked: Collection[str]) -> set[str]:
    if asked:
        return set(asked)
    if any(spec.optional for spec in signature.inputs.values()):
        return set()  # what was not given need not be answered
    return set(signature.outputs)


def _check_output(model: str, has_rows: bool, spec: TensorSpec, output: Tensor) -> None:
    what = f"{model}, output {spec.name!r}"
    if output.datatype != spec.datatype:
        raise ModelFaultError(f"{what}: expected {spec.datatype}, answered {output.datatype}")
    shape = output.shape[1:] if has_rows else output.shape
    fits = len(shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits or (has_rows and not output.shape):
        expected = ["rows", *spec.shape] if has_rows else list(spec.shape)
        raise ModelFaultError(
            f"{what}: expected shape [{', '.join(map(str, expected))}] (-1 is free), answered {output.shape}"
        )
    try:
        check_shape(spec.name, output.datatype, output.shape)
        check_bytes(spec.name, output.datatype, output.shape, output.data)
    except InvalidInputError as error:
        raise ModelFaultError(f"{what}: {error}") from error


def _list(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in names) or "(none)"
