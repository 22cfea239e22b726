"""The wire contract: an Open Inference Protocol request and response inside Celery's message.

A task is `samphire.infer` with the fields of `InferRequest` as keyword arguments, in a Celery protocol-2
message (docs.celeryq.dev, "Message Protocol"), JSON. Its result is an `InferResponse`, stored where Celery
stores results, so that a plain `AsyncResult` reads it.

Sources: Open Inference Protocol v2 (inference request and response JSON objects); Celery 5 `app.amqp`
(`as_task_v2`) and kombu's virtual transport (`Message.serializable`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeGuard

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from samphire.errors import InvalidInputError
from samphire.wire.timings import Timings

CONTRACT_VERSION = 1
ID_MAX_CHARACTERS = 255
"""Of a task, or of a group of tasks."""

INFER_TASK = "samphire.infer"
CHORD_PART_TASK = "samphire.chord_part"
"""What a worker sends itself when a task of a chord has ended; no producer needs it."""
UNKNOWN_CHORD: dict[str, Any] = {
    "task": "samphire.unknown_chord",
    "args": [],
    "kwargs": {},
    "options": {},
    "subtask_type": None,
    "immutable": False,
}
"""The chord of a part whose message is not understood: whoever counts the parts knows it from another."""
ATTEMPTS_MAX = 100
LONGEST_S = 10 * 365 * 86_400
"""No wait, lifetime, lease or timeout is longer; Redis refuses much longer ones, and only when it is asked to keep
them."""
DELETED = b'{"deleted":true}'
"""What stands in the place of a result that was deleted on reading."""
BACKOFF_MAX_S = 7 * 86_400.0
DELIVER_TASK = "samphire.deliver"
"""A webhook on its way to its receiver; no producer needs it."""
CANVAS_TASK = "samphire.canvas"
"""A whole canvas, which a worker starts: so a client without Celery can send one."""

_TASK_ID = re.compile(rf"[^\s\x00-\x1f\x7f-\x9f]{{1,{ID_MAX_CHARACTERS}}}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
_TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Ref(Struct, forbid_unknown_fields=True):
    """A claim check: tensor bytes that lie beside the queue instead of in the message."""

    key: str
    size: int
    sha256: str


class InputTensor(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One input; exactly one of `data`, `raw`, `ref` and `from` says where the values are."""

    name: str
    datatype: str = ""
    shape: list[int] = []
    """Datatype and shape go without saying where `from` is given."""
    data: Raw | UnsetType = UNSET
    """JSON values, flat or nested, row-major; kept undecoded until the tensor is needed."""
    raw: str | UnsetType = UNSET
    """Base64 of little-endian bytes."""
    ref: Ref | UnsetType = UNSET
    from_: str | UnsetType = msgspec.field(name="from", default=UNSET)
    """Name of an output of the task before this one in a chain, whose result is the first argument."""
    part: int | UnsetType = UNSET
    """With `from` after a group: whose output of the group's; without it all are joined along the first dimension."""


class RequestedOutput(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """An output to return; without any, all of the model's outputs are."""

    name: str


class Backoff(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How long a task that failed waits for its next attempt: exponential, with full jitter by default, capped.

    The n-th wait is `min(cap_s, base_s * 2**(n-1))`, of which the part `jitter` (0 to 1) is drawn by lot.

    Raises:
        InvalidInputError: a value is no number, negative or endless, or `jitter` is over 1.
    """

    base_s: float = 0.5
    cap_s: float = 60.0
    jitter: float = 1.0

    def __post_init__(self) -> None:
        for name, most in (("base_s", BACKOFF_MAX_S), ("cap_s", BACKOFF_MAX_S), ("jitter", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise InvalidInputError(f"backoff: expected {name} from 0 to {most:g}, given {value!r}")


class InferRequest(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Keyword arguments of `samphire.infer`."""

    model_name: str
    inputs: list[InputTensor]
    model_version: str | int = ""
    """A version number, or "champion"; empty means champion. It is kept as text."""
    outputs: list[RequestedOutput] = []
    parameters: dict[str, Any] = {}
    tenant: str = ""
    contract: int = CONTRACT_VERSION
    max_attempts: int | UnsetType = UNSET
    """How often the task is tried; by default what is set for its model, or for all."""
    backoff: Backoff | UnsetType = UNSET
    """How long it waits in between."""
    collect: bool | UnsetType = UNSET
    """Of a model that streams: whether the result has all outputs; by default where a plain producer or the next step
    of a canvas waits for it."""
    webhook: str = ""
    """Who is told of its end: the name of a registered endpoint, or a URL."""

    def __post_init__(self) -> None:
        if not isinstance(self.model_version, str):
            self.model_version = str(self.model_version)

    @property
    def version(self) -> str:
        """The version as text."""
        return str(self.model_version)


class OutputTensor(Struct, omit_defaults=True):
    """One output; `data`, `raw` or `ref` as the request sent its inputs."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | UnsetType = UNSET
    raw: str | UnsetType = UNSET
    ref: Ref | UnsetType = UNSET


class Streamed(Struct):
    """What a task has given out as a stream."""

    outputs: int
    bytes: int


class InferResponse(Struct, omit_defaults=True):
    """The result of a task that succeeded."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    """Of a task that has streamed they are joined along the first dimension, or are in its log only."""
    streamed: Streamed | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class FailureInfo(Struct):
    """What Celery stores of an exception."""

    exc_type: str
    exc_message: Any
    exc_module: str = "samphire.errors"


class RetryInfo(FailureInfo, kw_only=True):
    """What is stored of a task that is to be tried again."""

    attempts: int | None = None
    """How often it was tried; None where a worker of an older version has written it."""


class TaskMeta(Struct, omit_defaults=False):
    """The stored result (`celery-task-meta-<id>`), as Celery's Redis backend reads and writes it."""

    status: str  # first, so that the scripts find it without reading the rest
    task_id: str
    result: Raw
    traceback: str | None = None
    children: list[Any] | None = None
    date_done: str | None = None


class Headers(Struct, forbid_unknown_fields=False, frozen=True):
    """The headers of a protocol-2 message that a lane looks at."""

    id: str
    task: str
    eta: str | None = None
    expires: str | float | None = None
    timelimit: tuple[float | None, float | None] | None = None
    """Hard and soft limit in s."""
    ignore_result: bool | None = None
    retries: int | None = None
    root_id: str | None = None
    parent_id: str | None = None
    compression: str | None = None
    samphire_stream: str = ""
    """Key of the event stream of the client that waits."""
    samphire_deadline: float | None = None
    """When the answer is of no use any more, in s since 1970."""
    samphire_sent_at: float | None = None
    """When it was submitted, in s since 1970."""
    samphire_watermark: int = 0
    """Of a delivery: its number at its endpoint."""


class Properties(Struct):
    """The properties of a kombu message that a lane looks at."""

    body_encoding: str = ""


class Envelope(Struct):
    """A message as it lies in a kombu Redis list, read."""

    body: str
    headers: Headers
    properties: Properties
    content_type: str = msgspec.field(name="content-type", default="application/json")
    content_encoding: str = msgspec.field(name="content-encoding", default="utf-8")


class CanvasFields(Struct):
    """What Celery sends beside the arguments: the next steps of a canvas."""

    callbacks: list[Any] | None = None
    errbacks: list[Any] | None = None
    chain: list[Any] | None = None
    chord: Any = None

    def __bool__(self) -> bool:
        """Whether there is a next step, or anybody to be told of a failure."""
        return bool(self.callbacks or self.errbacks or self.chain or self.chord)


Body = tuple[list[Raw], InferRequest, CanvasFields]
"""Body of a `samphire.infer` message: positional arguments, keyword arguments, canvas."""


class ChordMember(Struct, forbid_unknown_fields=True):
    """What Celery's backend reads of the request of a task that belongs to a chord."""

    id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARACTERS)]
    group: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARACTERS)]
    chord: dict[str, Any]
    group_index: int | float | None = None
    root_id: str | None = None
    parent_id: str | None = None


class ChordPart(Struct, forbid_unknown_fields=True):
    """Keyword arguments of `samphire.chord_part`: the end of a task that belongs to a chord."""

    request: ChordMember
    state: str
    result: Any


def _object(value: object) -> dict[str, Any]:
    """What may be any JSON, as an object; empty where it is none."""
    return value if isinstance(value, dict) else {}


class CanvasStart(Struct, forbid_unknown_fields=True):
    """Keyword arguments of `samphire.canvas`; the message's task id is that of the canvas's last task."""

    signature: dict[str, Any]
    """A Celery signature in JSON."""

    def last_arguments(self) -> dict[str, Any]:
        """The keyword arguments of the canvas's last task; empty where it cannot be told which that is."""
        found = self.signature
        while (kind := found.get("subtask_type")) in ("chain", "chord"):
            parts = _object(found.get("kwargs"))
            steps = [parts.get("body")] if kind == "chord" else parts.get("tasks")
            found = _object(steps[-1] if isinstance(steps, list) and steps else None)
        return _object(found.get("kwargs"))


Replay = Literal["", "test", "once", "again"]


class DeliveryRequest(Struct, forbid_unknown_fields=True):
    """Keyword arguments of `samphire.deliver`; the message's task id is that of the webhook, unless it is a replay."""

    endpoint: str
    event: str
    """The type of the event."""
    about: str
    """Id of the task that it tells of."""
    body: str
    """What is sent, byte for byte."""
    url: str
    """Of a task that has named one; "" where the endpoint has it."""
    tenant: str
    order: str
    """The task in whose order it goes; "" for none."""
    replay: Replay = ""
    """Of one that somebody has sent by hand: "test" and "once" have one attempt, "again" has the schedule's; none of
    them counts for the endpoint's health."""
    webhook_id: str = ""
    """Of a replay: the id of the webhook, which it has again."""


DeliveryBody = tuple[list[Raw], DeliveryRequest, Any]
ChordPartBody = tuple[list[Raw], ChordPart, Any]
CanvasStartBody = tuple[list[Raw], CanvasStart, Any]


def is_task_id(value: object) -> TypeGuard[str]:
    """Whether something can be a task's id."""
    return isinstance(value, str) and _TASK_ID.fullmatch(value) is not None


def check_task_id(task_id: object) -> None:
    """Check a task's id: events name several with spaces between, so none may have one in it.

    Raises:
        InvalidInputError: it is none.
    """
    if not is_task_id(task_id):
        raise InvalidInputError(
            f"expected a task id of 1 to {ID_MAX_CHARACTERS} characters without spaces and control characters, given "
            f"{str(task_id)[:300]!r}"
        )


def check_model_name(model: str) -> None:
    """Check that a model's name can name a queue and a folder.

    Raises:
        InvalidInputError: it cannot.
    """
    if not isinstance(model, str) or not _MODEL_NAME.fullmatch(model):
        raise InvalidInputError(
            "expected a model name of 1 to 128 letters, digits, '_', '.', '+' and '-', beginning with a letter "
            f"or digit, given {str(model)[:200]!r}"
        )


def check_max_attempts(max_attempts: int) -> None:
    """Check how often a task may be tried.

    Raises:
        InvalidInputError: it is no number from 1 to 100.
    """
    is_int = isinstance(max_attempts, int) and not isinstance(max_attempts, bool)
    if not is_int or not 1 <= max_attempts <= ATTEMPTS_MAX:
        raise InvalidInputError(f"expected max_attempts from 1 to {ATTEMPTS_MAX}, given {max_attempts!r}")


def check_tenant(tenant: str) -> None:
    """Check a tenant's name; the empty name is the tenant of those who name none.

    Raises:
        InvalidInputError: it has other characters or is too long.
    """
    if tenant and not _TENANT_NAME.fullmatch(tenant):
        raise InvalidInputError(
            "expected a tenant name of at most 64 letters, digits, '_', '.' and '-', beginning with a letter "
            f"or digit, given {tenant[:200]!r}"
        )
