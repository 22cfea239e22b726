"""Chains of inferences: each stage takes outputs of the one before.

>>> seen = Step("digits", {"image": images})
>>> kept = Step("identity", {"input_fp32": seen["probabilities"]})
>>> client.chain(seen, kept).result(timeout_s=10)

A stage is a step, or a list of steps that run side by side. After such a list a step takes the output of one of
them, or, as a list, those of all, joined along their first dimension: `{"x": [left["y"], right["y"]]}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from samphire.client.encoder import (
    Blob,
    Encoded,
    Inputs,
    Limits,
    Parameters,
    TensorEncoder,
    is_of_numbers,
    plain_text,
    request_for,
    unknown_datatype,
)
from samphire.client.session import Session
from samphire.errors import InvalidInputError
from samphire.wire import keys
from samphire.wire.contract import CANVAS_TASK, INFER_TASK, CanvasStart, InputTensor, check_model_name
from samphire.wire.envelope import describe, encode_task, new_task_id
from samphire.wire.signature import ModelSignature


@dataclass(frozen=True)
class Output:
    """An output of a step, as the input of one in the next stage."""

    step: Step
    name: str


class Step:
    """One inference of a chain.

    Args:
        model: name in the model repository.
        inputs: input name to array, to an output of a step (`step["name"]`), or to a list of outputs of all steps
            of the stage before.
        version, outputs, parameters: as in `Client.submit`.
    """

    def __init__(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str | int = "champion",
        outputs: Iterable[str] = (),
        parameters: Parameters | None = None,
    ) -> None:
        if not isinstance(inputs, Mapping):
            raise InvalidInputError(f"expected inputs as a mapping of name to array, given {type(inputs).__name__}")
        if isinstance(outputs, str) or not isinstance(outputs, Iterable):
            raise InvalidInputError(f"expected outputs as a list of names, given {outputs!r}")
        model = plain_text("the model's name", model)
        check_model_name(model)
        self.model = model
        self.inputs = dict(inputs)
        self.version = version
        self.outputs = list(outputs)
        self.parameters = parameters

    def __repr__(self) -> str:
        return f"Step({self.model!r}, {{{', '.join(map(repr, self.inputs))}}})"

    def __getitem__(self, output: str) -> Output:
        return Output(self, output)


Stage = Step | Sequence[Step]


def stages_of(stages: Sequence[Stage]) -> list[list[Step]]:
    """The stages as lists.

    Raises:
        InvalidInputError: there is nothing to run, or no single step at the end, whose result it could be.
    """
    listed = [[stage] if isinstance(stage, Step) else list(stage) for stage in stages]
    _check_stages(listed)
    positions: dict[int, int] = {}
    for number, stage in enumerate(listed, 1):
        for step in stage:
            if id(step) in positions:
                raise InvalidInputError(f"{step!r} stands in stages {positions[id(step)]} and {number}")
            positions[id(step)] = number
    for number, stage in enumerate(listed, 1):
        before = listed[number - 2] if number > 1 else []
        for step in stage:
            for name, value in step.inputs.items():
                for output in _outputs_in(value):
                    _check_place(number, name, output, positions.get(id(output.step)))
                _check_joined(name, value, before)
    return listed


def _check_stages(listed: list[list[Step]]) -> None:
    if not listed:
        raise InvalidInputError("expected at least one step, given none")
    for number, stage in enumerate(listed, 1):
        for step in stage:
            if not isinstance(step, Step):
                raise InvalidInputError(f"stage {number}: expected a Step or a list of such, given {step!r}")
        if not stage:
            raise InvalidInputError(f"stage {number} is an empty list")
    if len(listed[-1]) > 1:
        raise InvalidInputError(
            f"the last stage has {len(listed[-1])} steps, and a chain has one result: end with a step that joins "
            "them, or submit several chains"
        )


def _outputs_in(value: Any) -> list[Output]:
    if isinstance(value, Output):
        return [value]
    if isinstance(value, list | tuple) and any(isinstance(part, Output) for part in value):
        return [part for part in value if isinstance(part, Output)]
    return []


def _check_place(stage: int, name: str, output: Output, place: int | None) -> None:
    if place == stage - 1:
        return
    what = f"stage {stage}: input {name!r} takes {output.name!r} of {output.step!r}"
    if place is None:
        raise InvalidInputError(f"{what}, which is not in the chain")
    if place >= stage:
        raise InvalidInputError(f"{what}, which comes in stage {place}: the steps would wait for each other in a cycle")
    raise InvalidInputError(f"{what} of stage {place}: only the stage right before can be taken from; pass it through")


def _check_joined(name: str, value: Any, before: Sequence[Step]) -> None:
    outputs = _outputs_in(value)
    if not outputs or isinstance(value, Output):
        return
    whole = len(value) == len(outputs) == len(before)
    whole = whole and all(output.step is step for output, step in zip(outputs, before, strict=True))
    if not whole or len({output.name for output in outputs}) > 1:
        raise InvalidInputError(
            f"input {name!r}: a list of outputs joins one output of every step of the stage before, in their order"
        )


@dataclass(frozen=True)
class StepOptions:
    """What all steps of a chain share."""

    tenant: str
    priority: int
    headers: Mapping[str, Any]
    limits: Limits
    session: Session
    webhook: str | None = None
    """Who is told of the end of the last one."""


def encode_chain(
    stages: Sequence[Sequence[Step]], options: StepOptions, signatures: Mapping[str, ModelSignature | None]
) -> Encoded:
    """The message that starts a chain; the task's id is that of its last step.

    Raises:
        InvalidInputError: a step's inputs cannot be sent, do not fit its model, or not the step before.
    """
    blobs: list[Blob] = []
    links: list[dict[str, Any]] = []
    last_id = ""
    for number, stage in enumerate(stages):
        before = stages[number - 1] if number else []
        tasks = []
        for step in stage:
            last_id = new_task_id(options.session.clock.now())
            webhook = options.webhook if number == len(stages) - 1 else None
            tasks.append(_signature(step, last_id, before, options, signatures, blobs, webhook))
        group = {"task": "celery.group", "args": [], "kwargs": {"tasks": tasks}, "options": {}, "subtask_type": "group"}
        links.append(tasks[0] if len(tasks) == 1 else {**group, "immutable": False})
    chain = {"task": "celery.chain", "args": [], "kwargs": {"tasks": links}, "options": {}, "subtask_type": "chain"}
    start = CanvasStart({**chain, "immutable": False} if len(links) > 1 else links[0])
    shown = " -> ".join(" + ".join(step.model for step in stage) for stage in stages)
    message = encode_task(
        CANVAS_TASK,
        last_id,
        start,
        keys.INTAKE,
        options.priority,
        kwargsrepr=shown[:400],
        headers=options.headers,
    )
    return Encoded(last_id, message, blobs)


def _signature(
    step: Step,
    task_id: str,
    before: Sequence[Step],
    options: StepOptions,
    signatures: Mapping[str, ModelSignature | None],
    blobs: list[Blob],
    webhook: str | None,
) -> dict[str, Any]:
    request = request_for(step.model, step.version, step.outputs, step.parameters, options.tenant, webhook=webhook)
    tensors = TensorEncoder(task_id, options.limits)
    signature = signatures.get(step.model)
    for name, value in step.inputs.items():
        outputs = _outputs_in(value)
        if not outputs:
            is_loaded = options.session.catalogue.not_ready_s(step.model) is None
            if not is_loaded and signature is None and is_of_numbers(value):
                raise unknown_datatype(step.model)
            request.inputs.append(tensors.tensor(name, value, signature))
            continue
        part = before.index(outputs[0].step) if isinstance(value, Output) and len(before) > 1 else None
        tensor = InputTensor(name, from_=outputs[0].name)
        if part is not None:
            tensor.part = part
        request.inputs.append(tensor)
        for output in outputs:
            _check_fit(name, output, signature, signatures.get(output.step.model))
    if signature is not None:
        signature.resolve(request.version)
        signature.check(request)
    blobs += tensors.blobs
    times = {"expires": options.headers["expires"]} if "expires" in options.headers else {}
    return {
        "task": INFER_TASK,
        "args": [],
        "kwargs": msgspec.to_builtins(request),
        "options": {
            "task_id": task_id,
            "queue": keys.queue_name(step.model, options.tenant),
            "priority": options.priority,
            "kwargsrepr": describe(request),
            "headers": {name: value for name, value in options.headers.items() if name.startswith("samphire_")},
            **times,
        },
        "subtask_type": None,
        "immutable": False,
    }


def _check_fit(name: str, output: Output, taker: ModelSignature | None, giver: ModelSignature | None) -> None:
    if giver is None:
        return
    given = giver.outputs.get(output.name)
    asked = output.step.outputs
    if given is None or (asked and output.name not in asked):
        names = ", ".join(map(repr, asked or sorted(giver.outputs)))
        raise InvalidInputError(f"input {name!r}: {output.step!r} returns {names}, asked for {output.name!r}")
    wanted = taker.inputs.get(name) if taker is not None else None
    if taker is None or wanted is None:
        return  # an input that the model does not have is found when the request is checked
    have = (-1, *given.shape) if giver.max_batch_size else given.shape
    want = (-1, *wanted.shape) if taker.max_batch_size else wanted.shape
    fits = len(have) == len(want) and all(-1 in (a, b) or a == b for a, b in zip(have, want, strict=True))
    if given.datatype != wanted.datatype or not fits:
        raise InvalidInputError(
            f"input {name!r} of model {taker.name!r}: expected {wanted.datatype}{list(want)}, output "
            f"{output.name!r} of model {giver.name!r} is {given.datatype}{list(have)} (-1 is free)"
        )
