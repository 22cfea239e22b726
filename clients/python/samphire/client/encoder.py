"""From inputs to a message: arrays to tensors, large ones to claim checks, options to headers."""

from __future__ import annotations

import binascii
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET

from samphire.errors import InvalidInputError
from samphire.transport.clock import BrokerClock
from samphire.transport.publisher import IdempotencyKey
from samphire.wire import keys
from samphire.wire.contract import (
    INFER_TASK,
    LONGEST_S,
    Backoff,
    InferRequest,
    InputTensor,
    Ref,
    RequestedOutput,
    check_max_attempts,
    check_model_name,
)
from samphire.wire.envelope import describe, encode_task, new_task_id
from samphire.wire.signature import CHAMPION, ModelSignature, check_request_size
from samphire.wire.tensors import array_to_bytes

_canonical = msgspec.json.Encoder(order="deterministic").encode

FORMS_MAX = 256
Inputs = Mapping[str, Any]
"""Input name to an array, or to anything that numpy makes one of. Python's numbers become what the model takes."""

Parameters = Mapping[str, bool | int | float | str]

Blob = tuple[str, bytes]


class Encoded(NamedTuple):
    """One task, ready to be published with its claim checks."""

    task_id: str
    message: bytes
    blobs: list[Blob]


def idempotency(key: str, request: InferRequest, task_id: str, ttl_s: int) -> IdempotencyKey:
    """What tells a repeated submit from another: the key, of a tenant and model, and a digest of what is asked for.

    Raises:
        InvalidInputError: the key is no text of 1 to 255 characters.
    """
    key = plain_text("the idempotency key", key)
    if not 1 <= len(key) <= 255:
        raise InvalidInputError(f"expected an idempotency key of 1 to 255 characters, given {key!r}")
    scope = "\0".join((request.tenant, request.model_name, key))
    tensors = [(t.name, t.datatype, t.shape, t.ref.sha256 if isinstance(t.ref, Ref) else t.raw) for t in request.inputs]
    asked = (request.model_version, [output.name for output in request.outputs], request.parameters, tensors)
    name = hashlib.sha256(scope.encode()).hexdigest()
    return IdempotencyKey(name, task_id, hashlib.sha256(_canonical(asked)).hexdigest(), ttl_s)


@dataclass(frozen=True)
class Limits:
    """What a client lets through."""

    inline_bytes: int
    """Larger tensors travel as claim checks."""
    request_bytes: int


@dataclass(frozen=True)
class When:
    """When a task may start, and until when its answer is of use; points in time with a time zone."""

    eta: datetime | None = None
    deadline: datetime | None = None

    def headers(self) -> dict[str, Any]:
        """The headers that say so."""
        headers: dict[str, Any] = {}
        if self.eta is not None:
            headers["eta"] = self.eta.isoformat()
        if self.deadline is not None:
            headers["expires"] = self.deadline.isoformat()  # Celery's: not started after it
            headers["samphire_deadline"] = self.deadline.timestamp()
        return headers


def when(eta: datetime | None, delay_s: float | None, deadline_s: float | None, now_s: float) -> When:
    """Check and combine the options of a submit.

    Args:
        eta: not before this time.
        delay_s, deadline_s: from now.
        now_s: the time by the broker's clock, in s since 1970.

    Raises:
        InvalidInputError: a time without a time zone, a negative or endless number, or a deadline before the start.
    """
    now = datetime.fromtimestamp(now_s, UTC)
    if eta is not None and delay_s is not None:
        raise InvalidInputError("expected eta or delay_s, given both")
    if eta is not None and (not isinstance(eta, datetime) or eta.tzinfo is None):
        raise InvalidInputError(f"expected eta as a datetime with a time zone, given {eta!r}")
    if delay_s is not None:
        eta = now + timedelta(seconds=_seconds("delay_s", delay_s, least=0))
    deadline = None
    if deadline_s is not None:
        deadline = now + timedelta(seconds=_seconds("deadline_s", deadline_s, least=1e-3))
        if eta is not None and eta >= deadline:
            raise InvalidInputError(f"the deadline, in {deadline_s} s, comes before the start at {eta.isoformat()}")
    return When(eta, deadline)


def _seconds(name: str, value: float, least: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= LONGEST_S:
        raise InvalidInputError(f"expected {name} as a number of seconds of at least {least}, given {value!r}")
    return value


def priority_step(priority: str) -> int:
    """Celery's number of a priority.

    Raises:
        InvalidInputError: there is none of that name.
    """
    step = keys.PRIORITIES.get(priority) if isinstance(priority, str) else None
    if step is None:
        raise InvalidInputError(f"expected a priority {', '.join(keys.PRIORITIES)}, given {priority!r}")
    return step


def plain_text(what: str, value: Any) -> str:
    """A string of Python's own, of one that may be of a subclass, as numpy's are.

    Raises:
        InvalidInputError: it is none, or UTF-8 cannot hold it.
    """
    if not isinstance(value, str):
        raise InvalidInputError(f"expected {what} as text, given {value!r}")
    text = str.__getitem__(value, slice(None))  # of a subclass too it gives a str, whatever that calls its text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"expected {what} as text that UTF-8 can hold, given {text!a}") from error
    return text


def _plain_parameter(name: str, value: Any) -> bool | int | float | str:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return plain_text(f"parameter {name!r}", value)
    if isinstance(value, int):
        return int(value)
    if not isinstance(value, float):
        raise InvalidInputError(
            f"parameter {name!r}: expected a boolean, number or string, given {type(value).__name__}"
        )
    if not math.isfinite(value):
        raise InvalidInputError(f"parameter {name!r}: expected a finite number, given {value}, which JSON cannot hold")
    return float(value)


def request_for(
    model: str,
    version: str | int,
    outputs: Iterable[str],
    parameters: Parameters | None,
    tenant: str,
    max_attempts: int | None = None,
    backoff: Backoff | None = None,
    *,
    collect: bool = False,
    webhook: str | None = None,
) -> InferRequest:
    """A request without inputs.

    Raises:
        InvalidInputError: the model's name cannot be one, or an option has the wrong type.
    """
    model = plain_text("the model's name", model)
    check_model_name(model)
    if isinstance(outputs, str) or not isinstance(outputs, Iterable):
        raise InvalidInputError(f"expected outputs as a list of names, given {outputs!r}")
    if version != CHAMPION and not str(version).isdecimal():
        raise InvalidInputError(f"expected a version number or {CHAMPION!r}, given {version!r}")
    plain = {
        plain_text("a parameter's name", name): _plain_parameter(name, value)
        for name, value in (parameters or {}).items()
    }
    if max_attempts is not None:
        check_max_attempts(max_attempts)
    if backoff is not None and not isinstance(backoff, Backoff):
        raise InvalidInputError(f"expected backoff as a samphire.Backoff, given {backoff!r}")
    return InferRequest(
        model_name=model,
        inputs=[],
        model_version="" if version == CHAMPION else str(version),
        outputs=[RequestedOutput(plain_text("an output's name", name)) for name in outputs],
        parameters=plain,
        tenant=tenant,
        max_attempts=UNSET if max_attempts is None else int(max_attempts),
        backoff=UNSET if backoff is None else backoff,
        collect=collect or UNSET,
        webhook=plain_text("the webhook", webhook) if webhook is not None else "",
    )


class TensorEncoder:
    """Turns arrays into tensors of one task, and the large ones into claim checks."""

    __slots__ = ("_limits", "_nbytes", "_task_id", "blobs")

    def __init__(self, task_id: str, limits: Limits) -> None:
        self._task_id = task_id
        self._limits = limits
        self._nbytes = 0
        self.blobs: list[Blob] = []

    def tensor(self, name: str, value: Any, signature: ModelSignature | None) -> InputTensor:
        """One input, of a model that takes what `signature` tells; None: that is not known.

        Raises:
            InvalidInputError: no array of a known datatype, or over the limit of a request.
        """
        name = plain_text("an input's name", name)
        spec = signature.inputs.get(name) if signature is not None else None
        datatype, shape, data = array_to_bytes(name, value, spec.datatype if spec is not None else None)
        size = len(data)
        self._nbytes += size
        if self._nbytes > self._limits.request_bytes:
            check_request_size([("inputs before it", self._nbytes - size), (name, size)], self._limits.request_bytes)
        if size <= self._limits.inline_bytes:
            return InputTensor(name, datatype, shape, raw=binascii.b2a_base64(data, newline=False).decode())
        key = keys.blob_name(self._task_id, len(self.blobs))
        self.blobs.append((key, data))
        return InputTensor(name, datatype, shape, ref=Ref(key, size, hashlib.sha256(data).hexdigest()))


class Encoder:
    """Turns inputs into messages, for one model and one set of options.

    Python's numbers become what the model takes now, or took when that was known last (`last_signature`).
    """

    def __init__(
        self,
        template: InferRequest,
        priority: int,
        stream: str,
        limits: Limits,
        clock: BrokerClock,
        last_signature: ModelSignature | None = None,
    ) -> None:
        self._template = template
        self.model = template.model_name
        self.priority = priority
        self._stream = stream
        self._headers: Mapping[str, Any] = {"samphire_stream": stream}
        self._limits = limits
        self._clock = clock
        self.queue = keys.queue_name(template.model_name, template.tenant)
        self._signature: ModelSignature | None = None
        self._last_signature = last_signature
        self._forms: set[object] = set()
        self.request = template
        """The last one that was encoded."""

    def headers(self, headers: Mapping[str, Any]) -> None:
        """Headers of the messages from now on, beside that of the client."""
        self._headers = {"samphire_stream": self._stream, **headers}

    def check_against(self, signature: ModelSignature | None) -> bool:
        """Check what is encoded from now on against a model, None: nothing; whether that is new."""
        new = signature != self._signature
        self._signature = signature
        if signature is not None:
            self._last_signature = signature
        if new:
            self._forms.clear()
        return new

    def is_guessing(self, inputs: Inputs) -> bool:
        """Whether it is not known what Python's numbers become that are among these."""
        is_mapping = isinstance(inputs, Mapping)
        return self._last_signature is None and is_mapping and any(map(is_of_numbers, inputs.values()))

    def __call__(self, inputs: Inputs) -> Encoded:
        """One task.

        Raises:
            InvalidInputError: the inputs cannot be sent, or do not fit the model.
        """
        if not isinstance(inputs, Mapping):
            raise InvalidInputError(f"expected inputs as a mapping of name to array, given {type(inputs).__name__}")
        now = int(self._clock.now() * 1000) / 1000  # `round` takes ten times as long
        task_id = new_task_id(now)
        tensors = TensorEncoder(task_id, self._limits)
        request = self._template
        request.inputs = [tensors.tensor(name, value, self._last_signature) for name, value in inputs.items()]
        if self._signature is not None:
            self._check(self._signature, request)
        self.request = request
        message = encode_task(
            INFER_TASK,
            task_id,
            request,
            self.queue,
            self.priority,
            kwargsrepr=describe(request),
            headers=self._headers,
            sent_at=now,
        )
        return Encoded(task_id, message, tensors.blobs)

    def _check(self, signature: ModelSignature, request: InferRequest) -> None:
        form = tuple([part for t in request.inputs for part in (t.name, t.datatype, *t.shape)])
        if form in self._forms:
            return  # one of the same names, datatypes and shapes was checked already
        signature.resolve(request.version)
        signature.check(request)
        if len(self._forms) < FORMS_MAX:
            self._forms.add(form)


def unknown_datatype(model: str) -> InvalidInputError:
    """The error of Python's numbers for a model of which nobody can say what it takes."""
    return InvalidInputError(
        f"model {model!r} is not loaded, so it is not known which datatype Python's numbers become: send arrays, or "
        "submit it once it is loaded; `samphire models list` says why it is not"
    )


def is_of_numbers(value: Any) -> bool:
    """Whether these are Python's numbers, which have no datatype of their own."""
    try:
        return not hasattr(value, "dtype") and np.asarray(value).dtype.kind in "iuf"
    except ValueError:  # lists of unequal lengths: they are refused for that
        return False
