"""Samphire's SDK: submit inference tasks to Celery queues in front of Triton, and read their results.

>>> from samphire import Client
>>> with Client() as client:
...     task = client.submit("digits", {"image": image})        # float32 [1, 8, 8]
...     task.result(timeout_s=10).outputs["probabilities"]      # float32 [1, 10]
"""

from samphire.client.aio import AsyncClient
from samphire.client.dead_letters import Attempt, DeadLetter, LetterFilter
from samphire.client.detail import TaskDetail
from samphire.client.events import TaskEvent
from samphire.client.models import ServedModel
from samphire.client.pipeline import Output, Step
from samphire.client.prepared import PreparedTask
from samphire.client.results import InferResult
from samphire.client.sync import Client
from samphire.client.sync_parts import Task
from samphire.client.task import AsyncTask
from samphire.client.webhooks import DeliveryAttempt, WebhookDelivery, WebhookEndpoint
from samphire.errors import (
    BrokerMemoryFullError,
    BrokerRightError,
    BrokerUnavailableError,
    ClientClosedError,
    EndpointTimeoutError,
    EndpointUnavailableError,
    IdempotencyConflictError,
    InternalError,
    InvalidInputError,
    LetterGoneError,
    LetterRefusedError,
    ModelFaultError,
    PayloadTooLargeError,
    ProtocolError,
    QueueFullError,
    ResultDeletedError,
    ResultExpiredError,
    ResultTimeoutError,
    SamphireError,
    StreamDiffersError,
    StreamLimitError,
    TaskCancelledError,
    TaskExpiredError,
    TaskGoneError,
    TransientError,
    UnknownModelError,
    UnknownTaskError,
    WebhookVerificationError,
    WorkerCrashError,
)
from samphire.wire.contract import Backoff
from samphire.wire.signature import ModelSignature, TensorSpec
from samphire.wire.timings import Timings

__all__ = [
    "AsyncClient",
    "AsyncTask",
    "Attempt",
    "Backoff",
    "BrokerMemoryFullError",
    "BrokerRightError",
    "BrokerUnavailableError",
    "Client",
    "ClientClosedError",
    "DeadLetter",
    "DeliveryAttempt",
    "EndpointTimeoutError",
    "EndpointUnavailableError",
    "IdempotencyConflictError",
    "InferResult",
    "InternalError",
    "InvalidInputError",
    "LetterFilter",
    "LetterGoneError",
    "LetterRefusedError",
    "ModelFaultError",
    "ModelSignature",
    "Output",
    "PayloadTooLargeError",
    "PreparedTask",
    "ProtocolError",
    "QueueFullError",
    "ResultDeletedError",
    "ResultExpiredError",
    "ResultTimeoutError",
    "SamphireError",
    "ServedModel",
    "Step",
    "StreamDiffersError",
    "StreamLimitError",
    "Task",
    "TaskCancelledError",
    "TaskDetail",
    "TaskEvent",
    "TaskExpiredError",
    "TaskGoneError",
    "TensorSpec",
    "Timings",
    "TransientError",
    "UnknownModelError",
    "UnknownTaskError",
    "WebhookDelivery",
    "WebhookEndpoint",
    "WebhookVerificationError",
    "WorkerCrashError",
]
